"""In these tests, memory that nobody has written is NaN, so that reading it cannot pass unseen."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
