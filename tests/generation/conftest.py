"""Fill uninitialised memory with NaN in these tests, so that reading it is detected."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
