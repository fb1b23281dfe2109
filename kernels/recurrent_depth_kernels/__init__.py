"""Triton kernels for the recurrent block (torch and triton only)."""
