"""Test kernels without a GPU in Triton's interpreter, which must be chosen before triton is imported.

    TRITON_INTERPRET=1 pytest tests/kernels -m "not gpu"        (make kernels-test)
    pytest tests/kernels -m gpu                                 on a machine with a GPU

Runs in a separate process, because nothing can be compiled in the interpreter.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import interpreter_bf16

    interpreter_bf16.apply()
elif not torch.cuda.is_available():
    raise pytest.UsageError("there is no GPU; run these tests with TRITON_INTERPRET=1 pytest tests/kernels")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The device of a test's tensors: the CPU for interpreted kernels, a GPU for compiled ones."""
    if (request.param == "cpu") != INTERPRETED:
        pytest.skip("interpreted kernels take CPU tensors, compiled kernels GPU tensors (TRITON_INTERPRET)")
    return request.param
