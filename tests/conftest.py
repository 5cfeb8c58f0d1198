"""Every test gets the kernel as users do: through `kernels.get_kernel`, on each device there is."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPO_ID = "kernels-community/fused-embedding-lookup"

# Before anything imports `kernels` or `transformers`. kernel-builder's test shell sets LOCAL_KERNELS
# itself. Nothing here may reach for the network.
os.environ.setdefault("LOCAL_KERNELS", f"{REPO_ID}={ROOT}")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import kernels
import pytest
import torch

torch.manual_seed(0)


@pytest.fixture(scope="session", params=["cpu"])
def device(request):
    """The device under test."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def kernel(device):
    """The kernel's module, of the variant for `device`."""
    return kernels.get_kernel(REPO_ID, version=1, backend=device.type)


@pytest.fixture(scope="session")
def variant_dir(kernel):
    """The folder from which the kernel was loaded."""
    return Path(kernel.__file__).parent


@pytest.fixture
def poison():
    """Fill what torch.empty returns with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
