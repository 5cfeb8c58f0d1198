"""Every test gets the kernel as users do: through `kernels.get_kernel`, on each device there is."""

import copy
import ctypes
import functools
import os
import re
import subprocess
import sys
from collections import Counter
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

from helpers import reference
from helpers.loopback_hub import LoopbackHub

SIMT_BUILDS = ROOT / ".build" / "simt"

# Why a test is skipped: "needs WHAT", and after a colon the command that brings it.
NEEDS_GPU = "needs a GPU"
NEEDS_CLANG = "needs clang 19 and GCC's Objective-C runtime: apt-get install clang-19 gobjc++"
# Where .ci/run sets NOTHING_MAY_BE_MISSING nothing else may be, or it would be tested nowhere. (Not CI's own
# variable: the builder's tests run under that too, where one variant is all there is.)
MAY_BE_MISSING = re.compile("needs (a GPU|two GPUs|a Mac|a CPU with [a-z0-9]+)")


class Variant(NamedTuple):
    """A build of the kernel, and what there is to know about it in a test."""

    name: str
    device: torch.device  # of the tensors it takes
    sources: str  # the folder of csrc/ that it is made of
    floats: tuple  # the dtypes it takes

    @property
    def is_emulated(self):
        """Run by tests/simt, which takes long."""
        return self.name.endswith("-simt")

    def load(self):
        """The kernel's module."""
        if self.is_emulated:
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


@functools.cache
def why_not(name):
    """What is missing to test a variant here, or None."""
    if name.endswith("-simt"):
        sources = VARIANTS[name].sources
        if (SIMT_BUILDS / sources).exists():
            return None
        return NEEDS_CLANG if sources == "metal" else f"needs the {name} variant: make test"
    if name == "cuda" and not torch.cuda.is_available():
        return NEEDS_GPU
    local = Path(os.environ["LOCAL_KERNELS"].partition("=")[2])
    platform = "cpu" if name == "cpu" else f"cu{torch.version.cuda.partition('.')[0]}*"
    variants = [*local.glob(f"torch*-{platform}-*"), *local.glob(f"build/torch*-{platform}-*")]
    return None if variants else f"needs the {name} variant: make build"


def pytest_ignore_collect(collection_path, config):
    """kernel-builder's `nix run .#ci-test` lacks what the other files import."""
    if config.option.markexpr == "kernels_ci" and collection_path.suffix == ".py":
        return "kernels_ci" not in collection_path.read_text() or None
    return None


# LayerRepository takes the variant for torch's own backend.
needs_torch_for_cpu = pytest.mark.skipif(
    torch.version.cuda is not None and why_not("cuda") is not None,
    reason="needs a GPU, or the build of torch for CPUs: make clean && "
    "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make build",
)


def pytest_report_header():
    return [
        f"variant {name}: {why_not(name) or VARIANTS[name].load().__name__}" for name in VARIANTS
    ]


def pytest_generate_tests(metafunc):
    """Runs a test of the kernel on each variant, or on those that @pytest.mark.variant names."""
    if "variant" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("variant")
    variants = [
        pytest.param(
            name, marks=pytest.mark.skipif(bool(why_not(name)), reason=why_not(name) or "")
        )
        for name in (marker.args if marker else VARIANTS)
    ]
    metafunc.parametrize("variant", variants, indirect=True, scope="session")


def pytest_collection_modifyitems(items):
    """Leaves out the dtypes that a variant doesn't take: float64, on GPUs."""

    def takes(item):
        parameters = getattr(item, "callspec", None) and item.callspec.params
        if not parameters or "variant" not in parameters:
            return True
        dtypes = {parameters.get(name) for name in ("dtype", "residual_dtype")}
        return torch.float64 not in dtypes - {*VARIANTS[parameters["variant"]].floats}

    items[:] = filter(takes, items)


# ----- what was not tested --------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return nothing_missing((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return nothing_missing((yield))


def skip_reason(report):
    """Why a test was skipped, or a whole file."""
    return report.longrepr[2].removeprefix("Skipped: ")


def nothing_missing(report):
    """The report, a failure if something was skipped where nothing may be missing."""
    strict = os.environ.get("NOTHING_MAY_BE_MISSING") == "1"
    if strict and report.skipped and not hasattr(report, "wasxfail"):
        reason = skip_reason(report)
        if not MAY_BE_MISSING.fullmatch(reason):
            report.outcome = "failed"
            report.longrepr = f"{report.nodeid}\nmay not be skipped here: {reason}"
    return report


def pytest_deselected(items):
    """Counts what `make test` leaves to `make check`."""
    config = items[0].config
    marks = [item.get_closest_marker("check") for item in items]
    # By -m all of them have the mark. What -k leaves out comes here too, and nobody asked for it.
    if config.option.markexpr == "not check" and all(marks):
        counts = dict(Counter(mark.args[0] for mark in marks))
        # A worker of pytest-xdist sends them home.
        getattr(config, "workeroutput", vars(config)).setdefault("left_to_check", counts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    vars(node.config).update(left_to_check=getattr(node, "workeroutput", {}).get("left_to_check"))


def pytest_terminal_summary(terminalreporter, config):
    """In words: what was not tested on this machine, and the command that would change it."""
    skipped = [r for r in terminalreporter.stats.get("skipped", ()) if not hasattr(r, "wasxfail")]
    left_to_check = vars(config).get("left_to_check") or {}
    if not skipped and not left_to_check:
        return
    packages, commands = [], []
    terminalreporter.section("not tested on this machine")
    for reason, count in Counter(map(skip_reason, skipped)).most_common():
        what, _, command = reason.partition(": ")
        terminalreporter.line(f"{count:5} skipped, because the test {what}")
        if command.startswith("apt-get install "):
            packages += command.split()[2:]
        elif command:
            commands.append(command)
    for what, count in left_to_check.items():
        terminalreporter.line(f"{count:5} left to maintainers: {what}")
    if packages:
        commands.insert(0, f"sudo apt-get install {' '.join(packages)}")
    if commands or left_to_check:
        commands.append("make check")
        terminalreporter.line(
            f"What can be tested here is, by `{' && '.join(dict.fromkeys(commands))}`."
        )


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in a test, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def variant(request):
    """The build under test. Tensors are made on its device."""
    with VARIANTS[request.param].device:
        yield VARIANTS[request.param]


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
def synchronize(variant_dir):
    """Returns what PyTorch would raise when it next synchronises with the MPS stream, or None."""
    (extension,) = variant_dir.glob("*.abi3.so")
    function = ctypes.CDLL(extension).metal_synchronize
    function.restype = ctypes.c_char_p
    return lambda: (function() or b"").decode() or None


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
    from helpers import swapping  # transformers' models, which take seconds and few tests need

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
