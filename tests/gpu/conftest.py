"""Every test of this folder runs on the CPU, and on a GPU where there is one; what only a GPU can show is skipped without."""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a test's models and prompts lie. The CPU proves that the test's body runs."""
    return torch.device(request.param)


@pytest.fixture
def cuda():
    """For what has no meaning on the CPU: goes with @pytest.mark.gpu."""
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _exact_products():
    """float32 means float32: no TF32, in which parity would be a matter of luck."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
