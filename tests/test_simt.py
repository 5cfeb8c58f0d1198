"""The engine that runs the CUDA sources on a CPU: what doesn't depend on its seed, what it notices."""

import ctypes
import os
import re
import shutil
import subprocess
import sys

import kernels
import pytest
import torch

import reference
from conftest import ROOT


def problem(hidden, dtype):
    """Five tiles of tokens on a grid. With 72 columns, some blocks have only a few."""
    generator = torch.Generator().manual_seed(0)
    ids = reference.grid(12, 400, 20, 20)
    padding = torch.rand(12, 400, generator=generator) < 0.1
    table = torch.randn(2, 64, hidden, generator=generator).to(dtype)
    residual = torch.randn(12, 400, hidden, generator=generator).to(dtype)
    return ids, table, padding, residual


def run(folder, seed, dtype=torch.float32, hidden=72):
    """The output and the table's gradient from the build in `folder`, under a seed of the engine."""
    kernel = kernels.get_local_kernel(folder, backend="cpu")
    (extension,) = folder.glob("*/*.abi3.so")
    ctypes.CDLL(extension).simt_seed(seed)
    ids, table, padding, residual = problem(hidden, dtype)
    table.requires_grad_()
    out = kernel.fused_embedding_lookup(ids, table, padding=padding, residual=residual)
    out.backward(residual)
    return out.detach(), table.grad


@pytest.mark.variant("cuda-simt", "metal-simt")
@pytest.mark.parametrize("dtype", reference.FLOATS[:3], ids=str)
@pytest.mark.parametrize("hidden", [72, 75])
def test_results_do_not_depend_on_the_order_of_threads_and_blocks(variant_dir, dtype, hidden):
    expected = run(variant_dir.parent, 0, dtype, hidden)
    for seed in range(1, 8):
        actual = run(variant_dir.parent, seed, dtype, hidden)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected)), seed


BACKWARD, FORWARD, COMMON = (
    f"csrc/cuda/{name}" for name in ("backward.cu", "forward.cu", "common.cuh")
)
BROKEN = {
    "a barrier of the sort is missing": (
        BACKWARD, "      __syncthreads();\n      const int offset", "      const int offset", "a race: .* shared memory",
    ),
    "the barrier before the partial sums is missing": (
        BACKWARD, "  __syncthreads();\n\n  const int lane = threadIdx.x % kTokenLanes", "  const int lane = threadIdx.x % kTokenLanes", "a race: .* shared memory",
    ),
    "the barrier before the next row is missing": (
        BACKWARD, "    }\n    __syncthreads();\n  }\n\n", "    }\n  }\n\n", "a race: .* shared memory",
    ),
    "only some threads come to a barrier": (
        BACKWARD, "    if (warp == 0 && has_column) {", "    if (warp == 3) return;\n    if (warp == 0 && has_column) {", "is stuck",
    ),
    "the forward writes a vector past the row": (
        FORWARD, "if (column >= lookup.hidden) break;", "if (column >= lookup.hidden + N) break;", "a race: .* wrote|outside of writable memory",
    ),
    "the forward reads past the table": (
        FORWARD, "(has_row >> k & 1) != 0 && column < lookup.hidden", "(has_row >> k & 1) != 0 && column < lookup.hidden + 4096", "reads .* outside of its memory",
    ),
    "the last token of a tile is left out": (
        BACKWARD, "if (token < lookup.num_tokens) {\n      const", "if (token + 1 < lookup.num_tokens) {\n      const", "gradient differs",
    ),
    "a warp's mask lacks a lane": (
        COMMON, "kAllLanes = 0xffffffff", "kAllLanes = 0x7fffffff", "is not in its own mask 7fffffff",
    ),
    "a warp's mask has lanes that are not there": (
        FORWARD, "  const unsigned has_row", "  if (lane == 31) return;\n  const unsigned has_row", "is stuck",
    ),
    "too little shared memory is asked for": (
        BACKWARD, "constexpr int kStageBytes = kTile * kTokenBytes;", "constexpr int kStageBytes = kTile * kTokenBytes / 2;", "outside of writable memory",
    ),
    "more shared memory than the default, without a word": (
        BACKWARD, "kTokenBytes = 64;", "kTokenBytes = 128;", "invalid argument",
    ),
    "a vector is read where no vector may be": (
        COMMON, "stride * element_size % bytes == 0", "true", "not a multiple",
    ),
    "blocks add to the same sums": (
        BACKWARD, "(tile_axis * kTileRuns + begin / kMinRun) * plan.pitch;\n      store", "(axis * kTileRuns + begin / kMinRun) * plan.pitch;\n      store", "a race: .* of another block",
    ),
    "sums are combined in the order of arrival": (
        BACKWARD, "sums[n] += warp_sums[other * kColumns + n];", "sums[n] += warp_sums[(1 + (other + item) % 3) * kColumns + n];", "depends on the seed",
    ),
    "an offset overflows": (
        COMMON, "offsets.rows += token * lookup.rows_strides[0];", "offsets.rows += static_cast<int32_t>(token * lookup.rows_strides[0]);", "outside of its memory",
    ),
}  # fmt: skip

# Run on the broken build, in a process of its own.
CHECK = """
import sys
from pathlib import Path

import kernels
import torch

import reference
from test_op import test_strides_past_32_bits
from test_simt import problem, run

folder = Path(sys.argv[1])
kernel = kernels.get_local_kernel(folder, backend="cpu")
for hidden in (72, 75):
    results = [run(folder, seed, hidden=hidden) for seed in range(4)]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0])), "depends on the seed"
    ids, table, padding, residual = problem(hidden, torch.float32)
    out, grad = results[0]
    assert torch.equal(out, reference.eager(ids, table, padding, residual)), "output differs"
    exact, magnitude = reference.grad_table(residual, ids, 64, padding)
    assert ((grad - exact).abs() <= 240 * 2**-23 * magnitude).all(), "gradient differs"
# More rows than blocks.
grad = torch.randn(2600, 8)
ids = torch.arange(2600)[:, None]
assert torch.equal(kernel.op.ops.backward(grad, ids, None, None, 2600, torch.float32)[0], grad)
# Rows that a vector would fit into, but apart by what it doesn't.
kernel.fused_embedding_lookup(ids[:9], torch.randn(1, 9, 72), residual=torch.randn(9, 77)[:, :72])
test_strides_past_32_bits(kernel)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, to break and to build again and again."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("csrc", "torch-ext", "tools", "tests"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy2(ROOT / "build.toml", copy)
    return copy


def check_build(checkout):
    """Build the copy and run CHECK on it. Returns the status and what was printed."""
    build = [sys.executable, "tools/build.py", "--simt", "--output", "build"]
    # Without $CXXFLAGS: what is broken may also be unused, which -Werror would notice first.
    environment = {key: value for key, value in os.environ.items() if key != "CXXFLAGS"}
    subprocess.run(build, cwd=checkout, env=environment, check=True, capture_output=True)
    result = subprocess.run(
        [sys.executable, "-c", CHECK, checkout / "build"],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout / "tests")},
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


def test_the_sources_as_they_are_pass(checkout):
    status, output = check_build(checkout)
    assert status == 0, output


@pytest.mark.parametrize("path, old, new, message", BROKEN.values(), ids=BROKEN)
def test_broken_sources_are_noticed(checkout, path, old, new, message):
    text = (checkout / path).read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path}"
    (checkout / path).write_text(text.replace(old, new))
    try:
        status, output = check_build(checkout)
    finally:
        (checkout / path).write_text(text)
    assert status != 0
    assert re.search(message, output), output
