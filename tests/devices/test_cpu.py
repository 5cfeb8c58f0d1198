"""The CPU variant's instruction sets: each is picked, each gives the same bits."""

import os
import sys
from pathlib import Path

import pytest
import torch

from helpers import ROOT, process

pytestmark = [pytest.mark.asan, pytest.mark.variant("cpu")]

CPU_FLAGS = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
NEEDS = {"default": "", "avx2": " avx2 ", "avx512": " avx512bw "}
HERE = [name for name, flag in NEEDS.items() if flag in CPU_FLAGS]


def python_with(capability, *arguments):
    """Run Python with PyTorch's variable for capping the instruction set."""
    if capability not in HERE:
        pytest.skip(f"needs a CPU with {capability}")
    return process.python(*arguments, ATEN_CPU_CAPABILITY=capability).stdout


@pytest.mark.parametrize("capability", NEEDS)
def test_capability_is_the_one_asked_for(kernel, capability):
    script = (
        "from helpers.variants import VARIANTS\n"
        "print(VARIANTS['cpu'].load().op.ops.cpu_capability())"
    )
    assert python_with(capability, "-c", script).strip() == capability


@pytest.mark.kernels_ci
def test_capability_is_the_best_there_is(kernel):
    if "ATEN_CPU_CAPABILITY" in os.environ:
        pytest.skip("needs ATEN_CPU_CAPABILITY not to be set: unset ATEN_CPU_CAPABILITY")
    assert kernel.op.ops.cpu_capability() == HERE[-1]


HASHES = """
import hashlib, torch
from helpers import reference
from helpers.variants import VARIANTS
kernel = VARIANTS["cpu"].load()
generator = torch.Generator().manual_seed(0)

def floats(*shape):  # torch.randn's depend on the instruction set
    return torch.randint(-(2**20), 2**20, shape, generator=generator) / 99991

for rows, weighted in ((30, True), (30, False), (3000, True), (3000, False)):  # by columns, and by rows
    for dtype in reference.FLOATS:
        ids = torch.randint(-1, rows, (2000, 4), generator=generator)
        weights = floats(*ids.shape) if weighted else None
        table = floats(rows, 203).to(dtype).requires_grad_()
        residual = floats(2000, 203).to(dtype)
        out = kernel.fused_embedding_lookup(ids, table, weights=weights, residual=residual)
        (grad,) = torch.autograd.grad(out, table, residual)
        for result in (out.detach(), grad):
            digest = hashlib.sha256(result.view(torch.uint8).numpy()).hexdigest()
            print(rows, weighted, dtype, digest)
"""


@pytest.mark.parametrize("capability", ["avx2", "avx512"])
def test_results_do_not_depend_on_the_instruction_set(kernel, capability):
    """The bits of forwards and gradients, both ways of the latter, are the baseline's."""
    hashes = python_with(capability, "-c", HASHES)
    assert len({line.split()[-1] for line in hashes.splitlines()}) == 32
    assert hashes == python_with("default", "-c", HASHES)


@pytest.mark.parametrize("capability", ["default", *HERE[1:-1]])
def test_op_with_a_lesser_instruction_set(kernel, capability):
    """test_op.py, whole, with what a CPU without this one's best instructions would run."""
    tests = ["-k", "cpu", ROOT / "tests/op/test_op.py"]
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    assert " passed" in python_with(capability, *pytest, *tests)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_results_do_not_depend_on_the_number_of_threads(kernel, threads):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 50, (999, 2), generator=generator)
    table = torch.randn(2, 50, 333, generator=generator, requires_grad=True)
    grad = torch.randn(999, 333, generator=generator)
    default_threads = torch.get_num_threads()
    results = []
    try:
        for count in (default_threads, threads):
            torch.set_num_threads(count)
            out = kernel.fused_embedding_lookup(ids, table)
            results.append((out, torch.autograd.grad(out, table, grad)[0]))
    finally:
        torch.set_num_threads(default_threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))
