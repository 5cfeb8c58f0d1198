"""Every test gets the kernel as users do: through `kernels.get_kernel`, on each device there is."""

import copy
import os
import re
from collections import Counter
from pathlib import Path

# Before anything that imports `kernels`.
from helpers.variants import ON_THE_ENGINE, VARIANTS, load_library, why_not  # isort: split

import pytest
import torch

from helpers.loopback_hub import LoopbackHub, publish

# Where .ci/run sets NOTHING_MAY_BE_MISSING nothing else may be, or it would be tested nowhere. (Not CI's own
# variable: the builder's tests run under that too, where one variant is all there is.)
MAY_BE_MISSING = re.compile("needs (a GPU|two GPUs|a Mac|a CPU with [a-z0-9]+)")


def pytest_ignore_collect(collection_path, config):
    """With `-m` and one of these, files without such a test: they import what isn't there, or take long."""
    marker = config.option.markexpr
    if marker in ("asan", "gpu", "kernels_ci", "sanitizer") and collection_path.suffix == ".py":
        return f"mark.{marker}" not in collection_path.read_text() or None
    return None


def pytest_report_header():
    return [
        f"variant {name}: {why_not(name) or VARIANTS[name].load().__name__}" for name in VARIANTS
    ]


def pytest_generate_tests(metafunc):
    """Runs a test of the kernel on each variant, or on those that @pytest.mark.variant names."""
    if "variant" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("variant")
    variants = []
    for name in marker.args if marker else VARIANTS:
        marks = [pytest.mark.skipif(bool(why_not(name)), reason=why_not(name) or "")]
        if VARIANTS[name].is_emulated:
            marks.append(ON_THE_ENGINE)
        variants.append(pytest.param(name, marks=marks))
    metafunc.parametrize("variant", variants, indirect=True, scope="session")


def pytest_collection_modifyitems(items, config):
    """Leaves out the dtypes that a variant doesn't take: float64, on GPUs. And of kernels_ci the engine's
    builds, which take minutes: kernel-builder has none."""
    without_engine = config.option.markexpr == "kernels_ci"

    def takes(item):
        parameters = getattr(item, "callspec", None) and item.callspec.params
        if not parameters or "variant" not in parameters:
            return True
        if without_engine and VARIANTS[parameters["variant"]].is_emulated:
            return False
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
    library = load_library(variant_dir)
    return lambda: (library.metal_synchronize() or b"").decode() or None


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


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A hub to which this checkout's build has been published. For tests that change nothing there."""
    with LoopbackHub() as hub:
        hub.publish_output = publish(hub, tmp_path_factory.mktemp("home"))
        yield hub
