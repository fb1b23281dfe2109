"""The GPU suite: proves on one GPU that everything works, and measures it, in pieces of a few minutes.

    python -m benchmarks gpu --minutes 9 --out gpu-results       # again with the same --out: continues

Needs torch, triton, transformers and a checkout, no installation and no network. Each stage is a process with a time
limit; it writes its JSON file after every measurement, and a failure is recorded with its traceback. Without a GPU all
stages run at toy size, which tests the suite; nothing is kept then.
"""

from benchmarks.gpu.suite import main

__all__ = ["main"]
