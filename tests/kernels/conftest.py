"""Kernels without a GPU: Triton's interpreter, which must be chosen before anything imports triton.

    TRITON_INTERPRET=1 pytest tests/kernels -m "not gpu"        (make kernels-test)
    pytest tests/kernels -m gpu                                 on a machine with a GPU

A process of its own, because nothing can be compiled under the interpreter.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import interpreter_bf16

    interpreter_bf16.apply()
elif not torch.cuda.is_available():
    raise pytest.UsageError("no GPU here: start these tests as TRITON_INTERPRET=1 pytest tests/kernels")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a test's tensors live: interpreted kernels on the CPU, compiled ones on a GPU."""
    if (request.param == "cpu") != INTERPRETED:
        pytest.skip("interpreted kernels take CPU tensors, compiled ones a GPU's (TRITON_INTERPRET)")
    return request.param
