"""The Metal variant's host side, on tests/simt: its pipelines, objects and errors, and threads that share it."""

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import reference
from conftest import ROOT

pytestmark = pytest.mark.variant("metal-simt")


@pytest.fixture(scope="module")
def emulator(variant_dir):
    (extension,) = variant_dir.glob("*.abi3.so")
    return ctypes.CDLL(extension)


def step(kernel, seed, hidden=40):
    """A forward and a backward. Returns the output and the table's gradient, and what they should be."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, 6, (3, 50, 2), generator=generator)
    table = torch.randn(2, 6, hidden, generator=generator, requires_grad=True)
    residual = torch.randn(3, 50, hidden, generator=generator)
    out = kernel.fused_embedding_lookup(ids, table, residual=residual)
    out.backward(residual)
    return (out, table.grad), (
        reference.eager(ids, table, residual=residual),
        reference.grad_table(residual, ids, 6)[0].float(),
    )


def check(results, expected):
    assert torch.equal(results[0], expected[0])
    torch.testing.assert_close(results[1], expected[1])


def test_eight_threads_at_once(kernel):
    """They meet in the stream's queue, some of them to make the same pipelines."""
    with ThreadPoolExecutor(8) as pool:
        for results, expected in pool.map(
            lambda seed: step(kernel, seed, 33 + seed % 8), range(64)
        ):
            check(results, expected)


def run(script, **environment):
    """In a process that has made no pipelines yet."""
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT / "tests",
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_object_is_left_behind():
    """But the pipelines, which are made once."""
    result = run("""
import ctypes
import torch
import conftest
kernel = conftest.VARIANTS["metal-simt"].load()
(extension,) = (conftest.SIMT_BUILDS / "metal").glob("*/*.abi3.so")
emulator = ctypes.CDLL(extension)
def step(dtype):
    table = torch.ones(1, 4, 8, dtype=dtype, requires_grad=True)
    kernel.fused_embedding_lookup(torch.zeros(3, 1, dtype=torch.int64), table).sum().backward()
    return emulator.metal_live_objects()
live = step(torch.float32)
assert step(torch.float32) == live
assert step(torch.float16) == live + 2  # the pipelines of its forward and its sums
""")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("threads", [32, 224, 1000])
def test_threadgroups_are_no_larger_than_a_pipeline_allows(kernel, emulator, threads):
    """Where the shaders can do with less. A sum of rows can't, and says so."""
    emulator.metal_set_max_threads(threads)
    try:
        if threads >= 256:
            check(*step(kernel, 0))
        else:
            with pytest.raises(
                ValueError,
                match=f"the Metal function lookup_backward_sum_float_float_4 takes 256 threads, this GPU allows {threads}",
            ):
                step(kernel, 0)
            ids, table = torch.arange(50)[:, None], torch.randn(1, 50, 40)
            assert torch.equal(kernel.fused_embedding_lookup(ids, table), table[0])
    finally:
        emulator.metal_set_max_threads(1024)


def test_a_pipeline_that_cannot_be_made_is_named():
    """With Metal's own reason. The exception doesn't cross the queue, which could not let it through."""
    script = (
        "import conftest, torch\n"
        "kernel = conftest.VARIANTS['metal-simt'].load()\n"
        "ids, table = torch.zeros(3, 1, dtype=torch.int64), torch.randn(1, 4, 8, dtype=torch.bfloat16)\n"
        "kernel.fused_embedding_lookup(ids, table)\n"
    )
    result = run(script, METAL_EMULATOR_NO_PIPELINES="1")
    assert (
        "RuntimeError: fused_embedding_lookup: no pipeline for the Metal function "
        "lookup_forward_bfloat_bfloat_4: the emulator was told to fail"
    ) in result.stderr
