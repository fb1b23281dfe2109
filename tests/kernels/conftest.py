"""Kernels without a GPU: Triton's interpreter, which must be chosen before the kernels are imported.

These tests run in a pytest process of their own (`make kernels-test`), because nothing can be compiled under the
interpreter. On a machine with a GPU: `TRITON_INTERPRET=0 pytest tests/kernels -m gpu`.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"

if INTERPRETED:
    import interpreter_bf16

    interpreter_bf16.apply()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a test's tensors live: interpreted kernels on the CPU, compiled ones on a GPU."""
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("the interpreter is off (TRITON_INTERPRET=0)")
    if request.param == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("needs a GPU, and TRITON_INTERPRET=0")
    return request.param
