"""Every test gets the kernel as users do: through `kernels.get_kernel`, on each device there is."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
REPO_ID = "kernels-community/fused-embedding-lookup"

# Before anything imports `kernels` or `transformers`. kernel-builder's test shell sets LOCAL_KERNELS
# itself. Nothing here may reach for the network.
os.environ.setdefault("LOCAL_KERNELS", f"{REPO_ID}={ROOT}")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import kernels
import pytest
import torch

import reference
from loopback_hub import LoopbackHub

torch.manual_seed(0)


SIMT_BUILDS = ROOT / ".build" / "simt"


class Variant(NamedTuple):
    """A build of the kernel, and what there is to know about it in a test."""

    name: str
    device: torch.device  # of the tensors it takes
    sources: str  # the folder of csrc/ that it is made of
    floats: tuple  # the dtypes it takes

    def load(self):
        """The kernel's module."""
        if self.name.endswith("-simt"):
            return kernels.get_local_kernel(SIMT_BUILDS / self.sources, backend="cpu")
        return kernels.get_kernel(REPO_ID, version=1, backend=self.name)

    def sum_eps(self, table_dtype):
        """The precision in which a gradient of a table of `table_dtype` is summed."""
        if self.sources == "cpu" and table_dtype.itemsize > 2:
            return 2.0**-52
        return 2.0**-23


VARIANTS = {
    "cpu": Variant("cpu", torch.device("cpu"), "cpu", reference.FLOATS),
    # The GPUs' sources, run by tests/simt.
    "cuda-simt": Variant("cuda-simt", torch.device("cpu"), "cuda", reference.FLOATS[:3]),
    "metal-simt": Variant("metal-simt", torch.device("cpu"), "metal", reference.FLOATS[:3]),
    "cuda": Variant("cuda", torch.device("cuda"), "cuda", reference.FLOATS[:3]),
}


def why_not(name):
    """Why a variant can't be tested here, or None if it can."""
    if name.endswith("-simt"):
        sources = VARIANTS[name].sources
        if (SIMT_BUILDS / sources).exists():
            return None
        return f"not built (tools/build.py --simt {sources} --output .build/simt)"
    if name == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    local = Path(os.environ["LOCAL_KERNELS"].partition("=")[2])
    platform = "cpu" if name == "cpu" else f"cu{torch.version.cuda.partition('.')[0]}*"
    variants = [*local.glob(f"torch*-{platform}-*"), *local.glob(f"build/torch*-{platform}-*")]
    return None if variants else "not built (tools/build.py)"


AVAILABLE = [name for name in VARIANTS if why_not(name) is None]


# The Hub's layers come without a choice of backend.
needs_torch_for_cpu = pytest.mark.skipif(
    torch.version.cuda is not None and why_not("cuda") is not None,
    reason="LayerRepository loads the variant for torch's own backend, CUDA's, and there is no GPU",
)


def pytest_report_header():
    return [
        f"variant {name}: {why_not(name) or VARIANTS[name].load().__name__}" for name in VARIANTS
    ]


def pytest_generate_tests(metafunc):
    """Runs a test of the kernel on each variant, or on the one that @pytest.mark.variant names."""
    if "variant" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("variant")
    names = [name for name in marker.args if name in AVAILABLE] if marker else AVAILABLE
    if not names:
        missing = marker.args if marker else VARIANTS
        reason = ", ".join(f"{name}: {why_not(name)}" for name in missing)
        names = [pytest.param(missing[0], marks=pytest.mark.skip(reason=reason))]
    metafunc.parametrize("variant", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def variant(request):
    """The build under test. Tensors are made on its device."""
    with VARIANTS[request.param].device:
        yield VARIANTS[request.param]


@pytest.fixture(autouse=True)
def skip_what_a_variant_does_not_take(request):
    parameters = getattr(request.node, "callspec", None)
    if parameters is None or "variant" not in parameters.params:
        return
    for name in ("dtype", "residual_dtype"):
        dtype = parameters.params.get(name)
        if dtype == torch.float64 and dtype not in request.getfixturevalue("variant").floats:
            pytest.skip("only the CPU's kernels take float64")


@pytest.fixture(scope="session")
def device(variant):
    """The device of the tensors under test."""
    return variant.device


@pytest.fixture(scope="session")
def kernel(variant):
    """The kernel's module."""
    return variant.load()


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


@pytest.fixture
def swap_in(variant_dir, monkeypatch):
    """Returns a copy of a model into which `kernelize` has swapped our layers, having checked it did."""
    import swapping  # transformers' models, which take seconds and few tests need

    for layer in swapping.LAYERS:  # swapping.swap decorates the classes, and this takes it back
        monkeypatch.setattr(layer, "kernel_layer_name", None, raising=False)
        monkeypatch.setattr(layer, "kernel_condition", None, raising=False)
    return lambda model, *args: swapping.swap(copy.deepcopy(model), variant_dir, *args)


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
def published(tmp_path_factory):
    """A hub to which this checkout's build has been published. For tests that change nothing there."""
    with LoopbackHub() as hub:
        hub.publish_output = publish(hub, tmp_path_factory.mktemp("home"))
        yield hub
