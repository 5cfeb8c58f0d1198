"""Every test gets the kernel as users do: through `kernels.get_kernel`, on each device there is."""

import os
import subprocess
import sys
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

from loopback_hub import LoopbackHub

torch.manual_seed(0)

# The Hub's layers come without a choice of backend.
needs_torch_for_cpu = pytest.mark.skipif(
    torch.version.cuda is not None,
    reason="LayerRepository loads the variant for torch's own backend; there is none for CUDA yet",
)


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


def publish(hub, home, root=ROOT, fails=False):
    """Run tools/publish.py against the hub. Returns its output."""
    environment = {key: value for key, value in os.environ.items() if key != "LOCAL_KERNELS"}
    result = subprocess.run(
        [sys.executable, root / "tools" / "publish.py"],
        env=environment | hub.environment(home),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="session")
def published(tmp_path_factory, kernel):
    """A hub to which this checkout's build has been published. For tests that change nothing there."""
    with LoopbackHub() as hub:
        hub.publish_output = publish(hub, tmp_path_factory.mktemp("home"))
        yield hub
