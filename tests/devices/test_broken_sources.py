"""The GPUs' sources, broken on purpose, on the engine that runs them on a CPU: it or a result says so."""

import re
import shutil
import sys
from pathlib import Path

import ninja
import pytest

from helpers import ROOT, process
from helpers.broken import Broken
from helpers.variants import SIMT_BUILDS, extension, why_not

pytestmark = pytest.mark.check("the GPUs' sources, broken on purpose, are noticed by tests/simt")

BACKWARD, FORWARD, COMMON = (
    f"csrc/cuda/{name}" for name in ("backward.cu", "forward.cu", "common.cuh")
)
METAL_BACKWARD, METAL_FORWARD, METAL_COMMON, LAUNCH = (
    f"csrc/metal/{name}" for name in ("backward.metal", "forward.metal", "common.h", "launch.mm")
)
METAL_INTERPOLATION, METAL_SCALING = (
    f"csrc/metal/{name}.metal" for name in ("interpolation", "scaling")
)
RACE = "a race: .* shared memory"
OUTSIDE = "outside of (writable|its) memory"
BROKEN = {
    "a barrier of the sort is missing": Broken(
        BACKWARD, "«__syncthreads();» if (threadIdx.x < kDigits) {", "", RACE,
    ),
    "a warp of the sort doesn't wait for its lanes": Broken(
        BACKWARD, "kDigits; «__syncwarp();» const uint32_t met", "", RACE,
    ),
    "a lane of the sort writes what others have yet to read": Broken(
        BACKWARD, "«__syncwarp(); // a match orders no memory»", "", RACE,
    ),
    "the barrier before the sums is missing": Broken(
        BACKWARD, "if (!load_tile(plan, tile, shared)) return; «__syncthreads();»", "", f"{RACE}|outside of its memory|not a multiple",
    ),
    "the barrier before the pieces are joined is missing": Broken(
        BACKWARD, "column); «__syncthreads();» if (!has_column) return;", "", RACE,
    ),
    "only some threads come to a barrier": Broken(
        BACKWARD, "«»if (has_column) sum_stretch", "if (!has_column) return;", "is stuck",
    ),
    "a kernel doesn't wait for the one before": Broken(
        BACKWARD, "sum_kernel(const Plan plan) { «wait_for_previous_kernel();»", "", "before it has waited for the previous launch",
    ),
    "some blocks don't wait for the kernel before": Broken(
        BACKWARD, "fill_share(plan, plan.digit + 1); return «wait_for_previous_kernel()»;", "", "ends without waiting for the previous launch",
    ),
    "a share is filled that the kernel before may be filling": Broken(
        BACKWARD, "fill_share(plan, plan.digit «+ 1»)", "", "before it has waited for the previous launch",
    ),
    "the forward writes a vector past the row": Broken(
        FORWARD, "if (c >= num_columns«») break;", "+ N", "a race: .* wrote|outside of writable memory",
    ),
    "the forward reads past the table": Broken(
        FORWARD, "has_row[b] && c < num_columns«»", "+ 4096", "reads .* outside of its memory",
    ),
    "the last entry is left out": Broken(
        BACKWARD, "if (position «»>= num_entries) entry", "+ 1", "gradient differs",
    ),
    "a run that crosses tiles is left out": Broken(
        BACKWARD, "if (!goes_on || «!»begins) return;", "", "gradient differs",
    ),
    "a run that crosses stretches is left out": Broken(
        BACKWARD, "const bool leaves = «shared.row(next * kStretch - 1) == row»;", "side == kHead", "gradient differs|a race",
    ),
    "a warp's mask lacks a lane": Broken(
        COMMON, "kAllLanes = «0xffffffff»", "0x7fffffff", "is not in its own mask 7fffffff",
    ),
    "a warp's mask has lanes that are not there": Broken(
        FORWARD, "«»entries.resolve(lookup, padding, lane);", "if (lane == 31) return;", "is stuck",
    ),
    "too little shared memory is asked for": Broken(
        BACKWARD, "sizeof(SortShared)«», stream,", "/ 2", "outside of writable memory",
    ),
    "more shared memory than there may be": Broken(
        BACKWARD, "constexpr int kStretchBits = «4»;", "6", "static assertion failed: two blocks",
    ),
    "shared memory for less than three blocks of the sums": Broken(
        BACKWARD, "«»alignas(kVectorBytes) float partials", "uint4 unused[512];", "static assertion failed: three blocks",
    ),
    "shared memory for less than four blocks of the sums": Broken(
        BACKWARD, "«»alignas(kVectorBytes) float partials", "uint4 unused[1024];", "static assertion failed: four blocks",
    ),
    "the workspace is a product": Broken(
        BACKWARD, "int64_t{plan.num_tiles} * «»kSides * lookup.num_columns);", "plan.num_tiles *", "the workspace is not linear",
    ),
    "a block reads parts of sectors": Broken(
        BACKWARD, "«lookup.num_columns % N == 0 && can_vectorise_activation(lookup, sizeof(Grad), N)»;", "false", "reads sectors for less than their bytes",
    ),
    "the last row is read again for entries that aren't there": Broken(
        FORWARD, "«exists[b] &&» entries.has_row(k)", "", "reads rows too often",
    ),
    "a kernel can't be loaded while a graph is captured": Broken(
        COMMON, "«const RelaxedCapture relaxed;» check_cuda(cudaLaunchKernelEx", "", "not permitted when stream is capturing",
    ),
    "a launch's error is left for others to find": Broken(
        COMMON, "«cudaGetLastError();»", "", "an error is left",
    ),
    "a vector is read where no vector may be": Broken(
        COMMON, "«stride * element_size % bytes == 0»", "true", "not a multiple",
    ),
    "blocks add to the same sums": Broken(
        BACKWARD, "«(int64_t{tile} * kSides + side)»", "side", "a race: .* of another block",
    ),
    "sums are combined in the order of arrival": Broken(
        BACKWARD, "rank[u] = «met + __popc(same & ((1u << lane) - 1)); if (valid && lane == __ffs(same) - 1) warp_counts[digit] = met + __popc(same);»", "valid ? atomicAdd(&warp_counts[digit], 1u) : met + same;", "depends on the seed|a race",
    ),
    "the sort isn't stable": Broken(
        BACKWARD, "met + «__popc(same & ((1u << lane) - 1))»;", "__popc(same >> lane) - 1", "gradient differs|a race",
    ),
    "an offset overflows": Broken(
        FORWARD, "lookup.activation.data<const Residual>() + «token.activation»;", "static_cast<int32_t>(token.activation)", "outside of its memory",
    ),
    "the residual is read twice": Broken(
        FORWARD, "entries.resolve(lookup, padding, lane);«»", "load_residuals<kResidual, K == 0>(lookup, offsets, lane * N, residuals);", "reads the residual too often",
    ),
    "padding's gradients are read": Broken(
        BACKWARD, "«if (items[0].row == plan.no_row) return;»", "", "reads the gradient too often",
    ),
    "a product is fused into the sum": Broken(
        FORWARD, "sum[n] = «__fadd_rn(sum[n], kWeighted ? __fmul_rn(weight, elements[n]) : elements[n])»;", "kWeighted ? fmaf(weight, elements[n], sum[n]) : sum[n] + elements[n]", "output differs",
    ),
    "a weighted sum starts from -0": Broken(
        FORWARD, "? «0.0f» : -0.0f;", "-0.0f", "output differs",
    ),

    "Metal: a pointer lacks its address space": Broken(
        METAL_FORWARD, "«device» const Table* row = table", "", "from incompatible type|changes address space|cannot initialize",
    ),
    "Metal: a parameter lacks its address space": Broken(
        METAL_BACKWARD, "«device» const ushort* order [[", "", r"lookup_backward_pieces: buffer can't be a `const ushort\*`",
    ),
    "Metal: a function's parameter lacks its address space": Broken(
        METAL_FORWARD, "«thread» float (&sums)[kUnroll][N]", "", "add_rows: `float .&sums..* has no address space",
    ),
    "Metal: an attribute has another type": Broken(
        METAL_BACKWARD, "«uint» tile_part [[threadgroup_position_in_grid]]", "float", "threadgroup_position_in_grid can't be a `float`",
    ),
    "Metal: a host name is another's": Broken(
        METAL_BACKWARD, '"lookup_backward_pieces_" «#a "_" #n»', '#n "_" #a', "has the host name lookup_backward_pieces_1_float",
    ),
    "Metal: arguments are written": Broken(
        METAL_FORWARD, "«»const bool has_rows =", "lookup.num_columns = 8;", "no viable|not assignable|const-qualified",
    ),
    "Metal: a constant lacks its address space": Broken(
        METAL_COMMON, "«constant» constexpr int64_t kNoRow", "", "must be in the constant address space",
    ),
    "Metal: two parameters with one index": Broken(
        METAL_BACKWARD, "device const Piece* pieces [[buffer(«kPieces»)]]", "kOrder", "two parameters with one buffer index",
    ),
    "Metal: a barrier of the sort is missing": Broken(
        METAL_BACKWARD, "«threadgroup_barrier(mem_flags::mem_threadgroup);» for (uint pair", "", RACE,
    ),
    "Metal: the barrier after the sort is missing": Broken(
        METAL_BACKWARD, "«threadgroup_barrier(mem_flags::mem_threadgroup);» } // What position", "", RACE,
    ),
    "Metal: the barrier before counts are read is missing": Broken(
        METAL_BACKWARD, "«threadgroup_barrier(mem_flags::mem_threadgroup);» Counts result", "", RACE,
    ),
    "Metal: some lanes stay away from a vote": Broken(
        METAL_BACKWARD, "const uint start = starts[row]; «»", "if (lane * N >= lookup.num_columns) return;", "is stuck",
    ),
    "Metal: entries past the last": Broken(
        METAL_BACKWARD, "«if (i >= num_entries) continue;»", "", f"{OUTSIDE}|a race",
    ),
    "Metal: columns past the last": Broken(
        METAL_FORWARD, "* N < lookup.num_columns«»;", "+ N", "a race: .* wrote|outside of writable memory",
    ),
    "Metal: pieces are added twice": Broken(
        METAL_BACKWARD, "sums[n] += «first + i < count ? term : 0.0f»;", "term", "gradient differs",
    ),
    "Metal: equal addends change places": Broken(
        METAL_BACKWARD, "row «+ (list & 1)»);", "", f"{OUTSIDE}|a race|gradient differs",
    ),
    "Metal: too large an id is an address": Broken(
        METAL_COMMON, "report_id(errors, lookup.num_rows, id, k, token); «return kNoRow;»", "", "outside of its memory",
    ),
    "Metal: too large an id is silent": Broken(
        METAL_COMMON, "«report_id(errors, lookup.num_rows, id, k, token);»", "", "no error",
    ),
    "Metal: addends of two kinds are taken for one": Broken(
        METAL_BACKWARD, "of_row «& (are_partials ? partials : ~partials)»;", "", f"{OUTSIDE}|gradient differs",
    ),
    "Metal: the pieces are added up twice": Broken(
        LAUNCH, "backward.sum_pieces(width); «»", "backward.sum_pieces(width);", "reads the gradient too often",
    ),
    "Metal: the patch after the image's last": Broken(
        METAL_INTERPOLATION, "if (patch «<» first + patches) {", "<=", "patches differ|outside of writable memory",
    ),
    "Metal: the wrong number of patches is silent": Broken(
        METAL_INTERPOLATION, "if («!has_patch && first != params.num_patches»)", "first > params.num_patches", "no error",
    ),
    "Metal: nothing to bind": Broken(
        LAUNCH, "if («!stand_in.present()») return;", "false", "what is bound as buffer .* is no buffer",
    ),
    "Metal: pixels are rounded for the result only": Broken(
        METAL_SCALING, "«const Pixel centred = static_cast<Pixel>(values[v].get(n) - 0.5f); results.set(n, static_cast<float>(static_cast<Pixel>(2 * static_cast<float>(centred))));»", "results.set(n, 2 * (values[v].get(n) - 0.5f));", "pixels differ",
    ),
    "Metal: pixels past the last are read": Broken(
        METAL_SCALING, "vector «< params.num_vectors ? vector : params.num_vectors - 1»", "", "outside of its memory",
    ),
    "Metal: pixels past the last are written": Broken(
        METAL_SCALING, "«if (vector < params.num_vectors)» store", "", "outside of writable memory",
    ),
    "Metal: an offset overflows": Broken(
        METAL_COMMON, "activation += «index * lookup.activation_strides[dim]»;", "static_cast<int32_t>(index * lookup.activation_strides[dim])", "outside of its memory",
    ),
    "Metal: threadgroups take one turn": Broken(
        METAL_BACKWARD, "row += «threadgroups») {", "params.total_rows", "gradient differs",
    ),
    "Metal: a vector is read where no vector may be": Broken(
        LAUNCH, "return stride «% kWidth == 0»;", ">= 0", "not a multiple",
    ),
    "Metal: the shader has another name": Broken(
        LAUNCH, 'encoder_.use(«"lookup_backward_sort"»', '"sort"', "the Metal library has no function sort: ",
    ),
    "Metal: an encoder of its own": Broken(
        LAUNCH, "encoder_(«stream->commandEncoder()»)", "[stream->commandBuffer() computeCommandEncoder]", "already encoding to this command buffer",
    ),
    "Metal: PyTorch's encoder is ended": Broken(
        LAUNCH, "encode(encoder); «»", "[stream->commandEncoder() endEncoding];", "on an encoder that has ended",
    ),
    "Metal: a commit": Broken(
        LAUNCH, "encode(encoder); «»", "[stream->commandBuffer() commit];", "a commit while an encoder is open",
    ),
    "Metal: outside of the queue": Broken(
        LAUNCH, "«»dispatch_sync(stream->queue(), ^{", "Encoder outside(stream);", "outside of the stream's queue",
    ),
    "Metal: another stream's queue": Broken(
        LAUNCH, "«dispatch_sync(stream->queue(),» ^{", "static at::mps::MPSStream* first = stream; dispatch_sync(first->queue(),", "outside of the stream's queue",
    ),
    "Metal: the queue waits for itself": Broken(
        LAUNCH, "encode(encoder); «»", "dispatch_sync(stream->queue(), ^{ stream->device(); });", "a queue waits for itself",
    ),
    "Metal: pipelines are made without a lock": Broken(
        LAUNCH, "«const std::lock_guard<std::mutex> lock(mutex);» id<MTLComputePipelineState>& pipeline", "", "is made twice",
    ),
    "Metal: a pipeline is released too early": Broken(
        LAUNCH, '«»if (made == nil) fail("no pipeline', "[made release];", "an object is used after its last release",
    ),
    "Metal: a buffer is let go before the dispatch": Broken(
        LAUNCH, "encoder_.bind(metal::kStarts, input(«workspace_.starts»)); encoder_.dispatch(params_.total_rows);", 'allocate("", {params_.total_rows}, ScalarType::Int, workspace_.starts.device())', "is no buffer any more",
    ),
    "Metal: a buffer is bound after it was let go": Broken(
        LAUNCH, "«encoder_.bind(metal::kStarts, input(workspace_.starts));» encoder_.dispatch(params_.total_rows);", 'const Operand old = input(allocate("", {params_.total_rows}, ScalarType::Int, workspace_.starts.device())); encoder_.bind(metal::kStarts, old);', "what is bound as buffer .* is no buffer",
    ),
    "Metal: the host reads what is not there yet": Broken(
        LAUNCH, "input(workspace_.starts)); «» encoder_.dispatch(params_.total_rows);", "if (*static_cast<const int32_t*>(workspace_.starts.const_data_ptr()) != 0)", "depends on the seed|gradient differs",
    ),
    "Metal: a buffer is written while it is read": Broken(
        LAUNCH, "«list_ ^= 1;»", "", "a race: ",
    ),
    "Metal: two buffers are swapped": Broken(
        LAUNCH, "metal::«kPieces, output(workspace_.pieces)); encoder_.bind(metal::kNumPieces», output(workspace_.num_pieces)", "kNumPieces, output(workspace_.pieces)); encoder_.bind(metal::kPieces", f"{OUTSIDE}|gradient differs|a race",
    ),
    "Metal: a buffer is not bound": Broken(
        LAUNCH, "«encoder.bind(metal::kResidual, lookup.activation, lookup.ids);»", "", "lookup_forward_float_float_float_. is missing buffer",
    ),
    "Metal: arguments of another size": Broken(
        LAUNCH, "encoder.set(metal::kForward, «forward»);", "shader_params", "lookup_forward_float_float_float_. takes 24 bytes as buffer",
    ),
    "Metal: a buffer's offset is forgotten": Broken(
        LAUNCH, "offset:«static_cast<NSUInteger>(byte_offset)» atIndex:index];", "(byte_offset ? 0 : 0)", "output differs|outside of its memory",
    ),
    "Metal: not a buffer": Broken(
        LAUNCH, "(id<MTLBuffer>)«operand.storage»", "(static_cast<char*>(operand.storage) + 8)", "is no buffer",
    ),
    "Metal: more threads than there may be": Broken(
        LAUNCH, "std::«min»<int64_t>(most, metal::kMaxThreads)", "max", "threads a threadgroup, 224 may be",
    ),
    "Metal: more threads than 32 bits number": Broken(
        LAUNCH, "«std::min(threadgroups, kMaxGrid / threads_)»", "threadgroups", "which 32 bits can't number",
    ),
    "Metal: too little threadgroup memory": Broken(
        LAUNCH, "set_threadgroup_memory(metal::kSortMemory«»)", "/ 2", OUTSIDE,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def look_at():
    """Returns a function that looks at a build: of a variant's folder, the status and what was printed."""
    server = process.start(sys.executable, ROOT / "tests" / "helpers" / "build_check.py")

    def look_at(variant_dir, backend):
        log = variant_dir.parent / "log"
        print(variant_dir, backend, log, file=server.stdin, flush=True)
        status = server.stdout.readline()
        assert status, server.stderr.read()  # there is no server
        return int(status), log.read_text(errors="replace")

    with server:
        yield look_at
        server.stdin.close()


def rebuild(backend, changed, text, folder):
    """Build, in `folder`, with `text` in place of what `make simt` has built from a source or header: what that
    is part of is compiled anew and linked with the rest. Returns the variant's folder, or None; and the
    compilers' output."""
    (variant_dir,) = (SIMT_BUILDS / backend).glob("torch*")
    build = ROOT / ".build" / f"{variant_dir.name}-simt-{backend}"
    objects, csrc = folder / "objects", folder / "csrc"
    shutil.copytree(build, objects)
    shutil.copytree(ROOT / "csrc", csrc)
    (folder / changed).write_text(text)

    def ask_ninja(*arguments):
        return process.run(Path(ninja.BIN_DIR) / "ninja", "-C", build, *arguments).stdout

    assert "no work to do" in ask_ninja("-n"), "the sources have changed since `make simt`"
    commands = []
    for of_object in ask_ninja("-t", "deps").split("\n\n"):
        if str(ROOT / changed) in of_object.split():
            commands += ask_ninja("-t", "commands", of_object.partition(":")[0]).splitlines()
    commands.append(ask_ninja("-t", "commands", "extension.so").splitlines()[-1])
    output = ""
    for command in commands:
        # Less optimised takes less time. What is broken may also be unused.
        command = command.replace(" -O3 ", " -O2 ").replace("-Werror", "")
        command = command.replace(str(ROOT / "csrc"), str(csrc))
        result = process.run("sh", "-c", command, cwd=objects, fails=None)
        output += result.stdout + result.stderr
        if result.returncode != 0:
            return None, output
    shutil.copytree(variant_dir, folder / variant_dir.name)
    shutil.copy2(objects / "extension.so", extension(folder / variant_dir.name))
    return folder / variant_dir.name, output


def needs(backend):
    if reason := why_not(f"{backend}-simt"):
        pytest.skip(reason)


@pytest.mark.parametrize("file", [BACKWARD, LAUNCH])
def test_the_sources_as_they_are_pass(look_at, file, tmp_path):
    backend = file.split("/")[1]
    needs(backend)
    variant_dir, output = rebuild(backend, file, (ROOT / file).read_text(), tmp_path)
    assert variant_dir, output
    status, output = look_at(variant_dir, backend)
    assert status == 0, output


@pytest.mark.parametrize("name", BROKEN)
def test_broken_sources_are_noticed(look_at, name, tmp_path):
    broken = BROKEN[name]
    backend = broken.file.split("/")[1]
    needs(backend)
    variant_dir, output = rebuild(backend, broken.file, broken.apply(name), tmp_path)
    if variant_dir:
        status, output = look_at(variant_dir, backend)
        assert status != 0
    assert re.search(broken.red, output), output
