"""Benchmarks: `python -m benchmarks NAME` measures, writes benchmarks/results/NAME.json and prints a table."""
