"""Triton kernels run in its interpreter where there is no GPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def poisoned_memory():
    """New memory holds NaN, or the largest integer: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
