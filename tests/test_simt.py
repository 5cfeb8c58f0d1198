"""The engine that runs the GPUs' sources on a CPU: what doesn't depend on its seed, what it notices."""

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
from conftest import ROOT, why_not


def problem(hidden, dtype):
    """Five tiles of tokens on a grid. With 72 columns, some blocks have only a few. The table doesn't
    begin where its storage does."""
    generator = torch.Generator().manual_seed(0)
    ids = reference.grid(12, 400, 20, 20)
    padding = torch.rand(12, 400, generator=generator) < 0.1
    table = torch.randn(3, 64, hidden, generator=generator).to(dtype)[1:]
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


BACKWARD, FORWARD, COMMON, SHADERS, LAUNCH = (
    f"csrc/{name}"
    for name in (
        "cuda/backward.cu",
        "cuda/forward.cu",
        "cuda/common.cuh",
        "metal/embedding_lookup.metal",
        "metal/launch.mm",
    )
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

    "Metal: a pointer lacks its address space": (
        SHADERS, "  device const Table* rows[kMaxAxes];", "  const Table* rows[kMaxAxes];", "from incompatible type|changes address space",
    ),
    "Metal: a parameter lacks its address space": (
        SHADERS, "device const Grad* grad [[", "const Grad* grad [[", "`const Grad\\* grad .* has no address space",
    ),
    "Metal: a function's parameter lacks its address space": (
        SHADERS, "thread float (&values)[N]", "float (&values)[N]", "load_vector: `float .&values..N.` has no address space",
    ),
    "Metal: arguments are written": (
        SHADERS, "  const uint axis = static_cast<uint>(table_row", "  lookup.hidden = 8;\n  const uint axis = static_cast<uint>(table_row", "no viable|not assignable|const-qualified",
    ),
    "Metal: a constant lacks its address space": (
        SHADERS, "constant constexpr int64_t kNoRow", "constexpr int64_t kNoRow", "must be in the constant address space",
    ),
    "Metal: two parameters with one index": (
        SHADERS, "device const uint* order [[buffer(kOrder)]]", "device const uint* order [[buffer(kSegments)]]", "two parameters with one buffer index",
    ),
    "Metal: a barrier of the sort is missing": (
        SHADERS, "      threadgroup_barrier(mem_flags::mem_threadgroup);\n      for (uint pair", "      for (uint pair", "a race: .* shared memory",
    ),
    "Metal: the barrier after the sort is missing": (
        SHADERS, "  threadgroup_barrier(mem_flags::mem_threadgroup);\n\n  for (uint i", "\n  for (uint i", "a race: .* shared memory",
    ),
    "Metal: the barrier before the next columns is missing": (
        SHADERS, "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    for (int n = 0; n < N; ++n) lane_sums", "    for (int n = 0; n < N; ++n) lane_sums", "a race: .* shared memory",
    ),
    "Metal: the barrier before the last sum is missing": (
        SHADERS, "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    if (simdgroup == 0 && has_column) {", "    if (simdgroup == 0 && has_column) {", "a race: .* shared memory",
    ),
    "Metal: some lanes stay away from a vote": (
        SHADERS, "  threadgroup float* lane_sums", "  if (lane * N >= lookup.hidden) return;\n  threadgroup float* lane_sums", "is stuck",
    ),
    "Metal: tokens past the last": (
        SHADERS, "  if (token >= lookup.num_tokens) return;\n", "", "outside of (writable|its) memory",
    ),
    "Metal: columns past the last": (
        SHADERS, "      if (column >= lookup.hidden) break;\n", "      if (column >= lookup.hidden + N) break;\n", "a race: .* wrote|outside of writable memory",
    ),
    "Metal: too large an id is an address": (
        SHADERS, "  if (id >= lookup.num_rows) return kBadRow;\n", "", "outside of its memory",
    ),
    "Metal: an offset overflows": (
        SHADERS, "offsets.rows += index * lookup.rows_strides[dim];", "offsets.rows += static_cast<int32_t>(index * lookup.rows_strides[dim]);", "outside of its memory",
    ),
    "Metal: a vector is read where no vector may be": (
        LAUNCH, "return elements % metal::kVectorWidth == 0;", "return elements >= 0;", "not a multiple",
    ),
    "Metal: the shader has another name": (
        LAUNCH, 'encoder.use("lookup_backward_sort"', 'encoder.use("sort"', "the Metal library has no function sort: ",
    ),
    "Metal: an encoder of its own": (
        LAUNCH, "encoder_(stream->commandEncoder())", "encoder_([stream->commandBuffer() computeCommandEncoder])", "already encoding to this command buffer",
    ),
    "Metal: PyTorch's encoder is ended": (
        LAUNCH, "        encode(encoder);\n", "        encode(encoder);\n        [stream->commandEncoder() endEncoding];\n", "on an encoder that has ended",
    ),
    "Metal: a commit": (
        LAUNCH, "        encode(encoder);\n", "        encode(encoder);\n        [stream->commandBuffer() commit];\n", "a commit while an encoder is open",
    ),
    "Metal: outside of the queue": (
        LAUNCH, "  dispatch_sync(stream->queue(), ^{\n", "  Encoder outside(stream);\n  dispatch_sync(stream->queue(), ^{\n", "outside of the stream's queue",
    ),
    "Metal: the queue waits for itself": (
        LAUNCH, "        encode(encoder);\n", "        encode(encoder);\n        dispatch_sync(stream->queue(), ^{ stream->device(); });\n", "a queue waits for itself",
    ),
    "Metal: two buffers are swapped": (
        LAUNCH, "encoder.set_output(metal::kSegments, segments);\n    encoder.set_output(metal::kOrder, order);", "encoder.set_output(metal::kOrder, segments);\n    encoder.set_output(metal::kSegments, order);", "outside of (writable|its) memory|gradient differs",
    ),
    "Metal: a buffer is not bound": (
        LAUNCH, "    encoder.set_input(metal::kResidual, tensors.residual, tensors.ids);\n", "", "lookup_forward_float_float_. is missing buffer",
    ),
    "Metal: arguments of another size": (
        LAUNCH, "encoder.set(metal::kForward, forward);", "encoder.set(metal::kForward, shader_params);", "lookup_forward_float_float_. takes 32 bytes as buffer",
    ),
    "Metal: a buffer's offset is forgotten": (
        LAUNCH, "[encoder_ setBuffer:buffer offset:offset atIndex:index];", "[encoder_ setBuffer:buffer offset:0 atIndex:index];", "output differs|outside of its memory",
    ),
    "Metal: not a buffer": (
        LAUNCH, "(id<MTLBuffer>)(reinterpret_cast<uintptr_t>(data) - offset)", "(id<MTLBuffer>)(reinterpret_cast<uintptr_t>(data))", "is no buffer",
    ),
    "Metal: more threads than there may be": (
        LAUNCH, "return std::min(wanted, most / metal::kSimdWidth * metal::kSimdWidth);", "return most == 0 ? most : wanted;", "threads a threadgroup, 224 may be",
    ),
    "Metal: too little threadgroup memory": (
        LAUNCH, "encoder.set_threadgroup_memory(metal::kTile * sizeof(uint64_t));", "encoder.set_threadgroup_memory(metal::kTile * sizeof(uint32_t));", "outside of (writable|its) memory",
    ),
    "Metal: one threadgroup too few": (
        LAUNCH, "encoder.dispatch(divide_up(lookup.num_tokens, threads / metal::kSimdWidth), threads);", "encoder.dispatch(lookup.num_tokens / (threads / metal::kSimdWidth), threads);", "output differs",
    ),
}  # fmt: skip

# Run on the broken build, in a process of its own.
CHECK = """
import ctypes
import sys
from pathlib import Path

import kernels
import torch

import reference
from test_op import test_strides_past_32_bits
from test_simt import problem, run

torch.use_deterministic_algorithms(True)  # and so, what nobody writes is NaN
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
residual = torch.randn(9, 77)[:, :72]
table = torch.randn(1, 9, 72)
out = kernel.fused_embedding_lookup(ids[:9], table, residual=residual)
assert torch.equal(out, residual + table[0]), "output differs"
torch.use_deterministic_algorithms(False)
test_strides_past_32_bits(kernel)
if sys.argv[2] == "metal":
    assert kernel.fused_embedding_lookup(ids[:10], table)[9].isnan().all()
    (extension,) = folder.glob("*/*.abi3.so")
    ctypes.CDLL(extension).metal_set_max_threads(224)
    out = kernel.fused_embedding_lookup(ids[:9], table)
    assert torch.equal(out, table[0]), "output differs"
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, to break and to build again and again."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("csrc", "torch-ext", "tools", "tests"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy2(ROOT / "build.toml", copy)
    # The binding is compiled anew with every commit's name, and here the name stays.
    for command in (
        "init -q",
        "add .",
        "-c user.name=test -c user.email=test@localhost commit -qm test",
    ):
        subprocess.run(["git", *command.split()], cwd=copy, check=True)
    return copy


def check_build(checkout, backend):
    """Build the copy and run CHECK on it. Returns the status and what was printed."""
    build = [sys.executable, "tools/build.py", "--simt", backend, "--output", "build"]
    # Without $CXXFLAGS: what is broken may also be unused, which -Werror would notice first.
    environment = {key: value for key, value in os.environ.items() if key != "CXXFLAGS"}
    check = [sys.executable, "-c", CHECK, checkout / "build" / backend, backend]
    for command in (build, check):
        result = subprocess.run(
            command,
            cwd=checkout,
            env=environment | {"PYTHONPATH": str(checkout / "tests")},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            break
    return result.returncode, result.stdout + result.stderr


def needs(backend):
    if backend == "metal" and why_not("metal-simt") and "CI" not in os.environ:
        pytest.skip(f"metal-simt: {why_not('metal-simt')}")


@pytest.mark.parametrize("backend", ["cuda", "metal"])
def test_the_sources_as_they_are_pass(checkout, backend):
    needs(backend)
    status, output = check_build(checkout, backend)
    assert status == 0, output


@pytest.mark.parametrize("path, old, new, message", BROKEN.values(), ids=BROKEN)
def test_broken_sources_are_noticed(checkout, path, old, new, message):
    backend = path.split("/")[1]
    needs(backend)
    text = (checkout / path).read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path}"
    (checkout / path).write_text(text.replace(old, new))
    try:
        status, output = check_build(checkout, backend)
    finally:
        (checkout / path).write_text(text)
    assert status != 0
    assert re.search(message, output), output
