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

from conftest import ROOT, why_not
from helpers import reference


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


@pytest.mark.variant("cuda-simt")
def test_a_failed_launch_is_told_once(kernel, variant_dir):
    """By us, and not by whoever asks CUDA for its last error next."""
    (path,) = variant_dir.glob("*.abi3.so")
    extension = ctypes.CDLL(path)
    ids, table, _, residual = problem(72, torch.float32)
    extension.cuda_refuse_launches(ctypes.c_bool(True))
    try:
        for function in (
            lambda: kernel.fused_embedding_lookup(ids, table),
            lambda: kernel.op.ops.backward(
                residual, ids, None, None, None, 64, False, torch.float32
            ),
        ):
            with pytest.raises(RuntimeError, match="failed: the .*: invalid argument"):
                function()
            assert extension.cuda_last_error() == 0
    finally:
        extension.cuda_refuse_launches(ctypes.c_bool(False))


BACKWARD, FORWARD, COMMON = (
    f"csrc/cuda/{name}" for name in ("backward.cu", "forward.cu", "common.cuh")
)
METAL_BACKWARD, METAL_FORWARD, METAL_COMMON, LAUNCH = (
    f"csrc/metal/{name}" for name in ("backward.metal", "forward.metal", "common.h", "launch.mm")
)
METAL_INTERPOLATION, METAL_SCALING = (
    f"csrc/metal/{name}.metal" for name in ("interpolation", "scaling")
)
BROKEN = {
    "a barrier of the sort is missing": (
        BACKWARD, "    __syncthreads();\n    if (threadIdx.x < kDigits) {", "    if (threadIdx.x < kDigits) {", "a race: .* shared memory",
    ),
    "a warp of the sort doesn't wait for its lanes": (
        BACKWARD, "      __syncwarp();\n", "", "a race: .* shared memory",
    ),
    "a lane of the sort writes what others have yet to read": (
        BACKWARD, "      __syncwarp();  // a match orders no memory\n", "", "a race: .* shared memory",
    ),
    "the barrier before the sums is missing": (
        BACKWARD, "  if (!load_tile(plan, tile, shared)) return;\n  __syncthreads();\n", "  if (!load_tile(plan, tile, shared)) return;\n", "a race: .* shared memory|outside of its memory|not a multiple",
    ),
    "the barrier before the pieces are joined is missing": (
        BACKWARD, "column);\n  __syncthreads();\n  if (!has_column) return;", "column);\n  if (!has_column) return;", "a race: .* shared memory",
    ),
    "only some threads come to a barrier": (
        BACKWARD, "  if (has_column) sum_stretch", "  if (!has_column) return;\n  if (has_column) sum_stretch", "is stuck",
    ),
    "a kernel doesn't wait for the one before": (
        BACKWARD, "sum_kernel(const Plan plan) {\n  wait_for_previous_kernel();\n", "sum_kernel(const Plan plan) {\n", "before it has waited for the previous launch",
    ),
    "some blocks don't wait for the kernel before": (
        BACKWARD, "  wait_for_previous_kernel();\n  let_next_kernel_start();\n  if (blockIdx.x >= plan.num_sort_tiles) return fill_share(plan, plan.digit + 1);\n", "  if (blockIdx.x >= plan.num_sort_tiles) return;\n  wait_for_previous_kernel();\n", "ends without waiting for the previous launch",
    ),
    "the forward writes a vector past the row": (
        FORWARD, "if (c >= num_columns) break;", "if (c >= num_columns + N) break;", "a race: .* wrote|outside of writable memory",
    ),
    "the forward reads past the table": (
        FORWARD, "has_row[b] && c < num_columns", "has_row[b] && c < num_columns + 4096", "reads .* outside of its memory",
    ),
    "the last entry is left out": (
        BACKWARD, "if (position >= num_entries) entry", "if (position + 1 >= num_entries) entry", "gradient differs",
    ),
    "a run that crosses tiles is left out": (
        BACKWARD, "  if (!goes_on || !begins) return;", "  if (!goes_on || begins) return;", "gradient differs",
    ),
    "a run that crosses stretches is left out": (
        BACKWARD, "  const bool leaves = shared.row(next * kStretch - 1) == row;", "  const bool leaves = side == kHead;", "gradient differs|a race",
    ),
    "a warp's mask lacks a lane": (
        COMMON, "kAllLanes = 0xffffffff", "kAllLanes = 0x7fffffff", "is not in its own mask 7fffffff",
    ),
    "a warp's mask has lanes that are not there": (
        FORWARD, "  entries.resolve(lookup, padding, lane);", "  if (lane == 31) return;\n  entries.resolve(lookup, padding, lane);", "is stuck",
    ),
    "too little shared memory is asked for": (
        BACKWARD, "sizeof(SortShared), stream,", "sizeof(SortShared) / 2, stream,", "outside of writable memory",
    ),
    "more shared memory than there may be": (
        BACKWARD, "constexpr int kStretchBits = 4;", "constexpr int kStretchBits = 6;", "static assertion failed: two blocks",
    ),
    "shared memory for less than three blocks of the sums": (
        BACKWARD, "  alignas(kVectorBytes) float partials", "  uint4 unused[512];\n  alignas(kVectorBytes) float partials", "static assertion failed: three blocks",
    ),
    "shared memory for less than four blocks of the sums": (
        BACKWARD, "  alignas(kVectorBytes) float partials", "  uint4 unused[1024];\n  alignas(kVectorBytes) float partials", "static assertion failed: four blocks",
    ),
    "the workspace is a product": (
        BACKWARD, "int64_t{plan.num_tiles} * kSides * lookup.num_columns);", "int64_t{plan.num_tiles} * plan.num_tiles * kSides * lookup.num_columns);", "assert wide \\* 5 <= 25e6",
    ),
    "a block reads parts of sectors": (
        BACKWARD, "lookup.num_columns % N == 0 && can_vectorise_activation(lookup, sizeof(Grad), N);", "false;", "reads sectors for less than their bytes",
    ),
    "the last row is read again for entries that aren't there": (
        FORWARD, "exists[b] && entries.has_row(k)", "entries.has_row(k)", "reads rows too often",
    ),
    "a kernel can't be loaded while a graph is captured": (
        COMMON, "  const RelaxedCapture relaxed;\n  check_cuda(cudaLaunchKernelEx", "  check_cuda(cudaLaunchKernelEx", "not permitted when stream is capturing",
    ),
    "a launch's error is left for others to find": (
        COMMON, "  cudaGetLastError();\n", "", "assert extension.cuda_last_error\\(\\) == 0",
    ),
    "a vector is read where no vector may be": (
        COMMON, "stride * element_size % bytes == 0", "true", "not a multiple",
    ),
    "blocks add to the same sums": (
        BACKWARD, "(int64_t{tile} * kSides + side)", "side", "a race: .* of another block",
    ),
    "sums are combined in the order of arrival": (
        BACKWARD,
        "      rank[u] = met + __popc(same & ((1u << lane) - 1));\n      if (valid && lane == __ffs(same) - 1) warp_counts[digit] = met + __popc(same);\n",
        "      rank[u] = valid ? atomicAdd(&warp_counts[digit], 1u) : met + same;\n", "depends on the seed|a race",
    ),
    "the sort isn't stable": (
        BACKWARD, "met + __popc(same & ((1u << lane) - 1));", "met + __popc(same >> lane) - 1;", "gradient differs|a race",
    ),
    "an offset overflows": (
        FORWARD, "lookup.activation.data<const Residual>() + token.activation;", "lookup.activation.data<const Residual>() + static_cast<int32_t>(token.activation);", "outside of its memory",
    ),
    "the residual is read twice": (
        FORWARD, "  entries.resolve(lookup, padding, lane);", "  entries.resolve(lookup, padding, lane);\n  load_residuals<kResidual, K == 0>(lookup, offsets, lane * N, residuals);", "reads the residual too often",
    ),
    "padding's gradients are read": (
        BACKWARD, "    if (items[0].row == plan.no_row) return;\n", "", "reads the gradient too often",
    ),
    "a product is fused into the sum": (
        FORWARD, "sum[n] = __fadd_rn(sum[n], kWeighted ? __fmul_rn(weight, elements[n]) : elements[n]);", "sum[n] = kWeighted ? fmaf(weight, elements[n], sum[n]) : sum[n] + elements[n];", "output differs",
    ),
    "a weighted sum starts from -0": (
        FORWARD, "? 0.0f : -0.0f;", "? -0.0f : -0.0f;", "output differs",
    ),

    "Metal: a pointer lacks its address space": (
        METAL_FORWARD, "    device const Table* row = table", "    const Table* row = table", "from incompatible type|changes address space|cannot initialize",
    ),
    "Metal: a parameter lacks its address space": (
        METAL_BACKWARD, "device const ushort* order [[", "const ushort* order [[", "lookup_backward_pieces: buffer can't be a `const ushort\\*`",
    ),
    "Metal: a function's parameter lacks its address space": (
        METAL_FORWARD, "thread float (&sums)[kUnroll][N]", "float (&sums)[kUnroll][N]", "add_rows: `float .&sums..* has no address space",
    ),
    "Metal: an attribute has another type": (
        METAL_BACKWARD, "uint tile_part [[threadgroup_position_in_grid]]", "float tile_part [[threadgroup_position_in_grid]]", "threadgroup_position_in_grid can't be a `float`",
    ),
    "Metal: a host name is another's": (
        METAL_BACKWARD, '"lookup_backward_pieces_" #a "_" #n', '"lookup_backward_pieces_" #n "_" #a', "has the host name lookup_backward_pieces_1_float",
    ),
    "Metal: arguments are written": (
        METAL_FORWARD, "    const bool has_rows =", "    lookup.num_columns = 8;\n    const bool has_rows =", "no viable|not assignable|const-qualified",
    ),
    "Metal: a constant lacks its address space": (
        METAL_COMMON, "constant constexpr int64_t kNoRow", "constexpr int64_t kNoRow", "must be in the constant address space",
    ),
    "Metal: two parameters with one index": (
        METAL_BACKWARD, "device const Piece* pieces [[buffer(kPieces)]]", "device const Piece* pieces [[buffer(kOrder)]]", "two parameters with one buffer index",
    ),
    "Metal: a barrier of the sort is missing": (
        METAL_BACKWARD, "      threadgroup_barrier(mem_flags::mem_threadgroup);\n      for (uint pair", "      for (uint pair", "a race: .* shared memory",
    ),
    "Metal: the barrier after the sort is missing": (
        METAL_BACKWARD, "  threadgroup_barrier(mem_flags::mem_threadgroup);\n}\n\n// What position", "}\n\n// What position", "a race: .* shared memory",
    ),
    "Metal: the barrier before counts are read is missing": (
        METAL_BACKWARD, "  threadgroup_barrier(mem_flags::mem_threadgroup);\n  Counts result", "  Counts result", "a race: .* shared memory",
    ),
    "Metal: some lanes stay away from a vote": (
        METAL_BACKWARD, "    const uint start = starts[row];\n", "    const uint start = starts[row];\n    if (lane * N >= lookup.num_columns) return;\n", "is stuck",
    ),
    "Metal: entries past the last": (
        METAL_BACKWARD, "    if (i >= num_entries) continue;\n", "", "outside of (writable|its) memory",
    ),
    "Metal: columns past the last": (
        METAL_FORWARD, "* N < lookup.num_columns;", "* N < lookup.num_columns + N;", "a race: .* wrote|outside of writable memory",
    ),
    "Metal: pieces are added twice": (
        METAL_BACKWARD, "sums[n] += first + i < count ? term : 0.0f;", "sums[n] += term;", "gradient differs",
    ),
    "Metal: equal addends change places": (
        METAL_BACKWARD, "row + (list & 1));", "row);", "outside of (writable|its) memory|a race|gradient differs",
    ),
    "Metal: too large an id is an address": (
        METAL_COMMON, "    report_id(errors, lookup.num_rows, id, k, token);\n    return kNoRow;\n", "    report_id(errors, lookup.num_rows, id, k, token);\n", "outside of its memory",
    ),
    "Metal: too large an id is silent": (
        METAL_COMMON, "    report_id(errors, lookup.num_rows, id, k, token);\n", "", "no error",
    ),
    "Metal: addends of two kinds are taken for one": (
        METAL_BACKWARD, "of_row & (are_partials ? partials : ~partials);", "of_row;", "outside of (writable|its) memory|gradient differs",
    ),
    "Metal: the pieces are added up twice": (
        LAUNCH, "      backward.sum_pieces(width);\n", "      backward.sum_pieces(width);\n      backward.sum_pieces(width);\n", "reads the gradient too often",
    ),
    "Metal: the patch after the image's last": (
        METAL_INTERPOLATION, "if (patch < first + patches) {", "if (patch <= first + patches) {", "patches differ|outside of writable memory",
    ),
    "Metal: the wrong number of patches is silent": (
        METAL_INTERPOLATION, "if (!has_patch && first != params.num_patches)", "if (first > params.num_patches)", "no error",
    ),
    "Metal: nothing to bind": (
        LAUNCH, "  if (!stand_in.present()) return;", "  if (false) return;", "what is bound as buffer .* is no buffer",
    ),
    "Metal: pixels are rounded for the result only": (
        METAL_SCALING, "const Pixel centred = static_cast<Pixel>(values[v].get(n) - 0.5f);\n        results.set(n, static_cast<float>(static_cast<Pixel>(2 * static_cast<float>(centred))));", "results.set(n, 2 * (values[v].get(n) - 0.5f));", "pixels differ",
    ),
    "Metal: pixels past the last are read": (
        METAL_SCALING, "vector < params.num_vectors ? vector : params.num_vectors - 1", "vector", "outside of its memory",
    ),
    "Metal: pixels past the last are written": (
        METAL_SCALING, "if (vector < params.num_vectors) store", "store", "outside of writable memory",
    ),
    "Metal: an offset overflows": (
        METAL_COMMON, "activation += index * lookup.activation_strides[dim];", "activation += static_cast<int32_t>(index * lookup.activation_strides[dim]);", "outside of its memory",
    ),
    "Metal: threadgroups take one turn": (
        METAL_BACKWARD, "row += threadgroups) {", "row += params.total_rows) {", "gradient differs",
    ),
    "Metal: a vector is read where no vector may be": (
        LAUNCH, "return stride % kWidth == 0;", "return stride >= 0;", "not a multiple",
    ),
    "Metal: the shader has another name": (
        LAUNCH, 'encoder_.use("lookup_backward_sort"', 'encoder_.use("sort"', "the Metal library has no function sort: ",
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
    "Metal: another stream's queue": (
        LAUNCH, "  dispatch_sync(stream->queue(), ^{\n", "  static at::mps::MPSStream* first = stream;\n  dispatch_sync(first->queue(), ^{\n", "outside of the stream's queue",
    ),
    "Metal: the queue waits for itself": (
        LAUNCH, "        encode(encoder);\n", "        encode(encoder);\n        dispatch_sync(stream->queue(), ^{ stream->device(); });\n", "a queue waits for itself",
    ),
    "Metal: pipelines are made without a lock": (
        LAUNCH, "  const std::lock_guard<std::mutex> lock(mutex);\n  id<MTLComputePipelineState>& pipeline", "  id<MTLComputePipelineState>& pipeline", "is made twice",
    ),
    "Metal: a pipeline is released too early": (
        LAUNCH, "  if (made == nil) fail(\"no pipeline", "  [made release];\n  if (made == nil) fail(\"no pipeline", "an object is used after its last release",
    ),
    "Metal: a buffer is let go before the dispatch": (
        LAUNCH, "encoder_.bind(metal::kStarts, input(workspace_.starts));\n    encoder_.dispatch(params_.total_rows);", "encoder_.bind(metal::kStarts, input(allocate(\"\", {params_.total_rows}, ScalarType::Int, workspace_.starts.device())));\n    encoder_.dispatch(params_.total_rows);", "is no buffer any more",
    ),
    "Metal: a buffer is bound after it was let go": (
        LAUNCH, "encoder_.bind(metal::kStarts, input(workspace_.starts));\n    encoder_.dispatch(params_.total_rows);", "const Operand old = input(allocate(\"\", {params_.total_rows}, ScalarType::Int, workspace_.starts.device()));\n    encoder_.bind(metal::kStarts, old);\n    encoder_.dispatch(params_.total_rows);", "what is bound as buffer .* is no buffer",
    ),
    "Metal: the host reads what is not there yet": (
        LAUNCH, "encoder_.dispatch(params_.total_rows);", "encoder_.dispatch(*static_cast<const int32_t*>(workspace_.starts.const_data_ptr()) == 0 ? params_.total_rows : 1);", "gradient differs",
    ),
    "Metal: a buffer is written while it is read": (
        LAUNCH, "      list_ ^= 1;\n", "", "a race: ",
    ),
    "Metal: two buffers are swapped": (
        LAUNCH, "metal::kPieces, output(workspace_.pieces));\n    encoder_.bind(metal::kNumPieces, output(workspace_.num_pieces)", "metal::kNumPieces, output(workspace_.pieces));\n    encoder_.bind(metal::kPieces, output(workspace_.num_pieces)", "outside of (writable|its) memory|gradient differs|a race",
    ),
    "Metal: a buffer is not bound": (
        LAUNCH, "    encoder.bind(metal::kResidual, lookup.activation, lookup.ids);\n", "", "lookup_forward_float_float_float_. is missing buffer",
    ),
    "Metal: arguments of another size": (
        LAUNCH, "encoder.set(metal::kForward, forward);", "encoder.set(metal::kForward, shader_params);", "lookup_forward_float_float_float_. takes 24 bytes as buffer",
    ),
    "Metal: a buffer's offset is forgotten": (
        LAUNCH, "offset:static_cast<NSUInteger>(byte_offset) atIndex:index];", "offset:(byte_offset ? 0 : 0) atIndex:index];", "output differs|outside of its memory",
    ),
    "Metal: not a buffer": (
        LAUNCH, "(id<MTLBuffer>)operand.storage", "(id<MTLBuffer>)(static_cast<char*>(operand.storage) + 8)", "is no buffer",
    ),
    "Metal: more threads than there may be": (
        LAUNCH, "std::min<int64_t>(most, metal::kMaxThreads)", "std::max<int64_t>(most, metal::kMaxThreads)", "threads a threadgroup, 224 may be",
    ),
    "Metal: more threads than 32 bits number": (
        LAUNCH, "std::min(threadgroups, kMaxGrid / threads_)", "threadgroups", "which 32 bits can't number",
    ),
    "Metal: too little threadgroup memory": (
        LAUNCH, "set_threadgroup_memory(metal::kSortMemory)", "set_threadgroup_memory(metal::kSortMemory / 2)", "outside of (writable|its) memory",
    ),
}  # fmt: skip

# Run on the broken build, in a process of its own.
CHECK = """
import ctypes
import sys
from pathlib import Path

import kernels
import torch

from helpers import reference
from test_op import test_strides_past_32_bits
from test_simt import problem, run
from test_simt import test_a_failed_launch_is_told_once
sys.path.insert(0, "tests/simt")
from traffic import count_traffic

torch.use_deterministic_algorithms(True)  # and so, what nobody writes is NaN
folder = Path(sys.argv[1])
kernel = kernels.get_local_kernel(folder, backend="cpu")
for hidden in (72, 75):
    results = [run(folder, seed, hidden=hidden) for seed in range(4)]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0])), "depends on the seed"
    ids, table, padding, residual = problem(hidden, torch.float32)
    out, grad = results[0]
    assert torch.equal(out, reference.eager(ids, table, padding=padding, residual=residual)), "output differs"
    exact, magnitude = reference.grad_table(residual, ids, 64, padding)
    assert ((grad - exact).abs() <= 240 * 2**-23 * magnitude).all(), "gradient differs"
# More rows than blocks.
grad = torch.randn(2600, 8)
ids = torch.arange(2600)[:, None]
assert torch.equal(kernel.op.ops.backward(grad, ids, None, None, None, 2600, False, torch.float32)[0], grad), "gradient differs"
# Rows that many blocks read, in sums that are exact.
ids = torch.randint(0, 2600, (8000, 1))
grad = torch.randint(-8, 9, (8000, 8)).float()
actual = kernel.op.ops.backward(grad, ids, None, None, None, 2600, False, torch.float32)[0]
assert torch.equal(actual, torch.zeros(2600, 8).index_add_(0, ids[:, 0], grad)), "gradient differs"
# Weights, one shared table, more entries than lanes.
for entries in (4, 40):
    ids, weights = torch.randint(0, 30, (50, entries)), torch.randn(50, entries)
    table = torch.randn(30, 72, requires_grad=True)
    weights[0], table.data[:, 0] = -1, 0  # -0 + -0 from +0 on is +0
    out = kernel.fused_embedding_lookup(ids, table, weights=weights)
    expected = reference.eager(ids, table, weights=weights)
    same = torch.equal(out, expected) and torch.equal(out.signbit(), expected.signbit())
    assert same, "output differs"
    out.backward(torch.ones_like(out))
    exact, magnitude = reference.grad_table(
        torch.ones_like(out), ids, 30, weights=weights, shared=True
    )
    assert ((table.grad - exact).abs() <= 70 * 2**-23 * magnitude).all(), "gradient differs"
ids = torch.arange(10)[:, None]
# Rows that a vector would fit into, but apart by what it doesn't.
residual = torch.randn(9, 77)[:, :72]
table = torch.randn(1, 9, 72)
out = kernel.fused_embedding_lookup(ids[:9], table, residual=residual)
assert torch.equal(out, residual + table[0]), "output differs"
torch.use_deterministic_algorithms(False)
test_strides_past_32_bits(kernel)
if sys.argv[2] == "cuda":
    (variant_dir,) = folder.glob("torch*")
    ids, table, padding, residual = problem(72, torch.float32)
    log = []
    with count_traffic(variant_dir, log):
        kernel.fused_embedding_lookup(ids, table, padding=padding, residual=residual)
    assert log[0][residual.data_ptr()].read == residual.nbytes, "reads the residual too often"
    log = []
    with count_traffic(variant_dir, log):
        kernel.op.ops.backward(residual, ids, None, padding, None, 64, False, torch.float32)
    read = sum(launch[residual.data_ptr()].read for launch in log if residual.data_ptr() in launch)
    assert read <= 2 * ((~padding).sum() + 3) * 72 * 4, "reads the gradient too often"
    from test_cuda_traffic import test_workspace

    log, grad = [], torch.randn(400, 128).bfloat16()
    with count_traffic(variant_dir, log):
        kernel.op.ops.backward(grad, ids[0], None, None, None, 64, False, torch.bfloat16)
    moved = log[-2][grad.data_ptr()]
    assert moved.read_by_blocks <= moved.read, "reads sectors for less than their bytes"
    log, table = [], torch.randn(1, 64, 72)
    with count_traffic(variant_dir, log):
        kernel.fused_embedding_lookup(ids[0, :, :1].abs(), table)
    assert log[0][table.data_ptr()].read == 400 * 72 * 4, "reads rows too often"
    test_workspace(kernel, "grid")
    test_a_failed_launch_is_told_once(kernel, variant_dir)
if sys.argv[2] == "metal":
    import threading
    from concurrent.futures import ThreadPoolExecutor

    from test_metal import check, step, test_grids_have_at_most_32_bits_of_threads

    (extension,) = folder.glob("*/*.abi3.so")
    emulator = ctypes.CDLL(extension)
    kernel.fused_embedding_lookup(ids[:10], table)  # 9 is too large
    assert emulator.metal_synchronize() != 0, "no error"

    ids, _, padding, residual = problem(72, torch.float32)
    log = []
    with count_traffic(extension.parent, log):
        kernel.op.ops.backward(residual, ids, None, padding, None, 64, False, torch.float32)
    read = [one[residual.data_ptr()].read_once for one in log if residual.data_ptr() in one]
    assert sum(read) <= 1.1 * residual.nbytes, "reads the gradient too often"
    ids = torch.arange(10)[:, None]

    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    interpolate = kernel.vision_interpolation_indices_and_weights
    grid = torch.tensor([[1, 4, 6], [2, 12, 10]])
    for mode in ("bilinear", "bicubic"):
        actual = interpolate(grid, 16, num_patches=264, mode=mode)
        expected = get_vision_interpolation_indices_and_weights(grid, 16, mode=mode)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected)), "patches differ"
        assert emulator.metal_synchronize() == 0
    interpolate(grid, 16, num_patches=265)
    assert emulator.metal_synchronize() != 0, "no error"
    for images in (grid[:0], grid * 0):
        assert interpolate(images, 16, num_patches=0)[0].shape == (0, 4)

    for pixels in (torch.rand(6143), torch.rand(6140).bfloat16()):
        actual = kernel.scale_pixels(pixels, torch.float16)
        assert torch.equal(actual, (2 * (pixels - 0.5)).half()), "pixels differ"
    emulator.metal_set_max_threads(224)
    torch.use_deterministic_algorithms(True)
    check(*step(kernel, 0))
    emulator.metal_set_max_threads(1024)
    emulator.metal_set_max_threadgroups(3)
    results, expected = step(kernel, 0)
    assert torch.allclose(results[1], expected[1], atol=1e-4), "gradient differs"
    emulator.metal_set_max_threadgroups(0)
    torch.use_deterministic_algorithms(False)
    emulator.metal_run_shaders(False)
    test_grids_have_at_most_32_bits_of_threads(kernel, None)
    emulator.metal_run_shaders(True)

    together = threading.Barrier(4)

    def on_stream(stream):
        emulator.metal_set_stream(stream)
        table = torch.randn(1, 9, 37).bfloat16()
        together.wait()
        # By a pipeline that isn't made yet.
        out = kernel.fused_embedding_lookup(ids[:9], table, residual=table[0])
        assert torch.equal(out, table[0] * 2), "output differs"

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(on_stream, range(1, 5)))
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
    build = [sys.executable, "tests/simt/build.py", backend]
    # Without $CXXFLAGS: what is broken may also be unused, which -Werror would notice first.
    environment = {key: value for key, value in os.environ.items() if key != "CXXFLAGS"}
    check = [sys.executable, "-c", CHECK, checkout / ".build" / "simt" / backend, backend]
    paths = [str(checkout / "tests" / folder) for folder in ("", "op", "devices")]
    for command in (build, check):
        result = subprocess.run(
            command,
            cwd=checkout,
            env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            break
    return result.returncode, result.stdout + result.stderr


def needs(backend):
    if reason := why_not(f"{backend}-simt"):
        pytest.skip(reason)


BROKEN_ON_PURPOSE = pytest.mark.check(
    "the GPUs' sources, broken on purpose, are noticed by tests/simt"
)


@BROKEN_ON_PURPOSE
@pytest.mark.parametrize("backend", ["cuda", "metal"])
def test_the_sources_as_they_are_pass(checkout, backend):
    needs(backend)
    status, output = check_build(checkout, backend)
    assert status == 0, output


@BROKEN_ON_PURPOSE
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
