"""Fused Triton kernels of the recurrent block, for NVIDIA and AMD GPUs. Imports torch and triton only."""
