"""The Metal variant: its host side, what it moves, and what a compiler makes of it, on tests/simt."""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from helpers import ROOT, process, reference
from helpers.broken import Broken
from helpers.engine import check, check_grids_of_32_bits, step
from helpers.memory import total_allocated
from helpers.problems import grid
from helpers.variants import NEEDS_CLANG, load_library
from simt.build import CLANG, why_no_clang
from simt.traffic import count_traffic

pytestmark = [pytest.mark.variant("metal-simt"), pytest.mark.usefixtures("variant")]


@pytest.fixture(scope="module")
def emulator(variant_dir):
    return load_library(variant_dir)


def test_eight_threads_on_one_stream(kernel):
    """They meet in the stream's queue, some of them to make the same pipelines."""
    with ThreadPoolExecutor(8) as pool:
        for results, expected in pool.map(
            lambda seed: step(kernel, seed, 33 + seed % 8), range(64)
        ):
            check(results, expected)


# In a process that has made no pipelines yet.
LOADED = """
from helpers.variants import SIMT_BUILDS, VARIANTS, load_library
import torch
kernel = VARIANTS["metal-simt"].load()
emulator = load_library(next((SIMT_BUILDS / "metal").iterdir()))
"""


def test_no_object_is_left_behind():
    """But the pipelines, which are made once."""
    process.script(
        LOADED
        + """
def step(dtype):
    table = torch.ones(1, 4, 8, dtype=dtype, requires_grad=True)
    kernel.fused_embedding_lookup(torch.zeros(3, 1, dtype=torch.int64), table).sum().backward()
    return emulator.metal_live_objects()
live = step(torch.float32)
assert step(torch.float32) == live
assert step(torch.float16) == live + 3  # the pipelines of its forward and its sums
"""
    )


def test_streams_share_their_pipelines_under_a_lock():
    """Eight threads, each on a stream with a queue of its own, which all want them at first."""
    process.script(
        LOADED
        + """
import threading
from concurrent.futures import ThreadPoolExecutor
from helpers.engine import check, step
barrier = threading.Barrier(8)
def work(stream):
    emulator.metal_set_stream(stream)
    barrier.wait()
    for seed in range(3):
        check(*step(kernel, 10 * stream + seed))
with ThreadPoolExecutor(8) as pool:
    list(pool.map(work, range(8)))
"""
    )


@pytest.mark.parametrize("threads", [32, 224, 1000])
def test_threadgroups_are_no_larger_than_a_pipeline_allows(kernel, emulator, threads):
    emulator.metal_set_max_threads(threads)
    try:
        check(*step(kernel))
        check(*step(kernel, 1, hidden=1500))
    finally:
        emulator.metal_set_max_threads(1024)


@pytest.fixture
def dry_run(emulator):
    """Dispatches are checked, and nothing runs."""
    emulator.metal_run_shaders(False)
    yield
    emulator.metal_run_shaders(True)


def test_grids_have_at_most_32_bits_of_threads(kernel, dry_run):
    check_grids_of_32_bits(kernel)


def test_a_grid_of_fewer_threadgroups_than_tokens_or_rows(kernel, emulator):
    """What is done where there would be too many: each takes several turns."""
    emulator.metal_set_max_threadgroups(3)
    try:
        check(*step(kernel))
        check(*step(kernel, 1, hidden=300))
        ids, table = torch.arange(50)[:, None], torch.randn(1, 50, 40)
        assert torch.equal(kernel.fused_embedding_lookup(ids, table), table[0])
    finally:
        emulator.metal_set_max_threadgroups(0)


@pytest.mark.parametrize("hidden", [8, 7])
@pytest.mark.parametrize("dtype", reference.FLOATS[:3], ids=str)
def test_one_entry_is_copied_bit_by_bit(kernel, dtype, hidden):
    """Subnormal numbers, which a GPU's arithmetic may flush, and NaNs with their payload."""
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    table = torch.randint(0, 2**8, (1, 30, hidden), dtype=bits)  # subnormal in every dtype
    table[0, 3] = -1
    ids = torch.randint(0, 30, (50, 1))
    out = kernel.fused_embedding_lookup(ids, table.view(dtype))
    assert torch.equal(out.view(bits), table[0, ids[:, 0]])


def test_a_row_is_summed_in_the_order_of_tokens(kernel):
    """Entries whose run is too short for a partial, before a tile that has one: 2^24 + 1 is 2^24."""
    tile = 4096
    ids, grad = torch.ones(3 * tile, 1, dtype=torch.int64), torch.zeros(3 * tile, 8)
    ids[[5, tile + 5]] = 0
    grad[5], grad[tile + 5] = 2.0**24, -(2.0**24)
    ids[2 * tile : 2 * tile + 300] = 0
    grad[2 * tile] = 1
    sums = kernel.op.ops.backward(grad, ids, None, None, None, 2, False, torch.float32)
    assert sums[0, :, 0].tolist() == [1, 0]
    # And the partial first: 1 + 2^24 is lost.
    sums = kernel.op.ops.backward(
        grad.roll(tile, 0), ids.roll(tile, 0), None, None, None, 2, False, torch.float32
    )
    assert sums[0, :, 0].tolist() == [0, 0]


@pytest.mark.parametrize("entries", [1, 22, 33, 64])
def test_runs_of_every_length(kernel, entries):
    """Of a shared table, whose runs are longest: less and more than a piece, up to whole tiles."""
    for rows in (1, 7, 300):
        ids = torch.randint(0, rows, (9000 // entries, entries))
        grad = torch.randn(len(ids), 4)
        actual = kernel.op.ops.backward(grad, ids, None, None, None, rows, True, torch.float32)
        exact, magnitude = reference.grad_table(grad, ids, rows, shared=True)
        assert ((actual - exact).abs() <= 1e-5 * magnitude).all()


@pytest.mark.parametrize(
    "tokens, entries, hidden, bytes_per_token",
    [
        (100800, 2, 768, 768 // 2),
        (16384, 22, 2048, 2048 // 2),
        (16384, 32, 2048, 2048),
        (16384, 64, 4096, 4096 * 4),
    ],
)
def test_the_workspace(kernel, dry_run, tokens, entries, hidden, bytes_per_token):
    """Of which no page is touched: an eighth of a float32 row a token, up to 22 entries. With more, what
    it takes that ids which are all the same make a partial a tile."""
    grad = torch.empty(1, hidden, dtype=torch.bfloat16).expand(tokens, hidden)
    ids = torch.zeros(tokens, entries, dtype=torch.int64)
    result, total = total_allocated(
        lambda: kernel.op.ops.backward(grad, ids, None, None, None, 9, False, torch.bfloat16)
    )
    assert total - result.nbytes <= 1.02 * (bytes_per_token * tokens + 19 * ids.numel())


def test_a_pipeline_that_cannot_be_made_is_named():
    """With Metal's own reason. The exception doesn't cross the queue, which could not let it through."""
    lookup = """
ids, table = torch.zeros(3, 1, dtype=torch.int64), torch.randn(1, 4, 8, dtype=torch.bfloat16)
kernel.fused_embedding_lookup(ids, table)
"""
    result = process.script(LOADED + lookup, fails=True, METAL_EMULATOR_NO_PIPELINES=1)
    assert (
        "RuntimeError: fused_embedding_lookup failed: no pipeline for the Metal function "
        "lookup_copy_ushort_4: the emulator was told to fail"
    ) in result.stderr


def test_simdgroups_of_another_width_are_refused():
    """Which no Apple GPU has: the shaders count on 32."""
    lookup = (
        "kernel.fused_embedding_lookup(torch.zeros(3, 1, dtype=torch.int64), torch.randn(1, 4, 8))"
    )
    result = process.script(LOADED + lookup, fails=True, METAL_EMULATOR_SIMD_WIDTH=64)
    assert (
        "RuntimeError: fused_embedding_lookup failed: simdgroups of this GPU have 64 threads, not 32"
    ) in result.stderr


def memory_bytes(launches):
    """Each byte once a launch, reading and writing apart: what caches that hold a tile don't move."""
    return sum(
        moved.read_once + moved.written_once
        for launch in launches
        for address, moved in launch.items()
        if address != 0  # threadgroup memory
    )


TOKENS = {
    "image grids": lambda: grid(40, 2520, 60, 42).reshape(-1, 2),
    "one id": lambda: torch.full((100800, 2), 7),
}


@pytest.mark.parametrize("ids", TOKENS.values(), ids=TOKENS)
def test_the_backward_moves_little_more_than_it_must(kernel, variant_dir, ids):
    """40 images. The columns are fewer than in a model, so that ids and places weigh more."""
    ids, hidden, rows = ids(), 64, 10240
    grad = torch.randn(len(ids), hidden).bfloat16()
    table_bytes = 2 * rows * hidden * 2
    launches = []
    with count_traffic(variant_dir, launches):
        kernel.op.ops.backward(grad, ids, None, None, None, rows, False, torch.bfloat16)
    assert memory_bytes(launches) <= 1.3 * (grad.nbytes + ids.nbytes + table_bytes)
    read = sum(
        launch[grad.data_ptr()].read_once for launch in launches if grad.data_ptr() in launch
    )
    assert read <= 1.01 * grad.nbytes
    # Each element of the table's gradient is written once, by whoever.
    large = [
        moved.written
        for launch in launches
        for address, moved in launch.items()
        if address != 0 and moved.written >= table_bytes
    ]
    assert large == [table_bytes]


def test_time_and_workspace_are_linear(kernel, variant_dir):
    """In tokens and in rows, not in their product: what is moved, at random ids."""

    def moved(tokens, rows):
        ids = torch.randint(0, rows, (tokens, 2))
        grad = torch.randn(tokens, 8)
        launches = []
        with count_traffic(variant_dir, launches):
            kernel.op.ops.backward(grad, ids, None, None, None, rows, False, torch.float32)
        return sum(one.read + one.written for launch in launches for one in launch.values())

    assert moved(20000, 20000) <= 4.5 * moved(5000, 5000)


# ---------------------------------------------------------------------------------------------
# What a compiler makes of the shaders: clang at -O2, in place of Apple's.

# Of each shader with vectors, how many it loads in a row before it computes with the first, at the
# places where it loads the most.
BATCHES = {
    "lookup_forward": [6, 3],
    "lookup_copy": [3],
    "lookup_backward_pieces": [8],
    "lookup_backward_rows": [8, 8],  # of partials and of entries
    "scale_pixels": [4],
    "vision_interpolation": [],  # has no vectors
}


def compile_shaders(sources, folder):
    """clang's IR of the two files in `sources`, by way of `folder`."""
    stand_ins = ROOT / "tests/simt/metal"
    texts = []
    for name in ("forward", "backward", "interpolation", "scaling"):
        source, reflected = sources / f"{name}.metal", folder / f"{name}.cpp"
        compiler = [CLANG, "-D__METAL_VERSION__=400", f"-I{stand_ins}"]
        flags = "-std=c++17 -O2 -ffast-math -fno-exceptions -fno-vectorize -fno-slp-vectorize -w"
        # All functions become part of the kernels, as Apple's compiler has it unless told otherwise.
        flags += " -mllvm -inline-threshold=100000 -DMETAL_ADDRESS_SPACES -S -emit-llvm -o -"
        process.python(stand_ins / "reflect.py", *compiler, "--", source, reflected)
        texts.append(process.run(*compiler, f"-I{sources}", *flags.split(), reflected).stdout)
    return "".join(texts)


def inspect(ir):
    """What is wrong with the shaders, a line each."""
    wrong, seen = [], set()
    for symbol, body in re.findall(
        r"^define.*?@(\w*(?:lookup|vision|scale)_\w+)\(.*?\{\n(.*?)^\}",
        ir,
        re.MULTILINE | re.DOTALL,
    ):
        if "alloca" in body:
            wrong.append(f"{symbol} keeps an array in memory")
        if re.search("[us](div|rem) i64", body):
            wrong.append(f"{symbol} divides 64-bit integers")
        name = re.search(
            r"lookup_(forward|copy|backward_[a-z]+)|vision_interpolation|scale_pixels", symbol
        )[0]
        if "Li4E" not in symbol:
            continue
        seen.add(name)
        blocks = re.split(r"^\S+:.*\n", body, flags=re.MULTILINE)
        before_sums = (re.split(r"= (?:fmul|fadd)", block)[0] for block in blocks)
        batches = sorted((block.count("= load <4 x") for block in before_sums), reverse=True)
        # Where an id is found to be too large, it is in use.
        if name == "lookup_forward" and body.index("atomic_fetch_add") < body.index("load <4 x"):
            wrong.append(f"{symbol} uses the ids before the residual is requested")
        if batches[: len(BATCHES[name])] != BATCHES[name]:
            wrong.append(f"{symbol} loads {batches[:3]} vectors at once, not {BATCHES[name]}")
    return wrong + [f"there is no {name}" for name in BATCHES.keys() - seen]


@pytest.fixture(scope="module")
def needs_clang():
    if why_no_clang():
        pytest.skip(NEEDS_CLANG)


def test_loads_of_a_batch_come_before_the_first_sum(needs_clang, tmp_path):
    assert inspect(compile_shaders(ROOT / "csrc/metal", tmp_path)) == []


SLOW = {
    "a loop stays a loop": Broken(
        "csrc/metal/common.h", '#define UNROLL _Pragma("clang loop unroll(«full»)")', "disable",
        "keeps an array in memory",
    ),
    "a load is conditional": Broken(
        "csrc/metal/backward.metal", "«» values[i] = load<N>(columns + shuffle(",
        "if (first + i < count)", "lookup_backward_rows.* vectors at once, not",
    ),
    "a sum comes between the loads": Broken(
        "csrc/metal/forward.metal", "«add_rows<2, N>(lookup, table, entries, k, first, lane, sums);»",
        "add_rows<1, N>(lookup, table, entries, k, first, lane, sums);"
        " add_rows<1, N>(lookup, table, entries, k + 1, first, lane, sums);",
        "lookup_forward.* vectors at once, not",
    ),
    "the residual waits for the ids": Broken(
        "csrc/metal/forward.metal",
        "«load_residuals<Residual, N>(lookup, params, token_residual, 0, lane, residuals);"
        " entries.resolve(lookup, params, pads, token, lane, errors);»",
        "entries.resolve(lookup, params, pads, token, lane, errors);"
        " load_residuals<Residual, N>(lookup, params, token_residual, 0, lane, residuals);",
        "lookup_forward.* before the residual is requested",
    ),
    "pixels are loaded where they are stored": Broken(
        "csrc/metal/scaling.metal", "«simdgroup_barrier(mem_flags::mem_none);»", "",
        "scale_pixels.* vectors at once, not",
    ),
    "taps stay in a loop": Broken(
        "csrc/metal/interpolation.metal", "«UNROLL» for (int i = 0; i < kTaps; ++i) {",
        '_Pragma("clang loop unroll(disable)")', "vision_interpolation.* keeps an array in memory",
    ),
    "a 64-bit division": Broken(
        "csrc/metal/backward.metal", "const uint token = «entry / lookup.num_entries»;",
        "static_cast<uint>(static_cast<uint64_t>(entry) / static_cast<uint64_t>(lookup.num_rows))",
        "divides 64-bit integers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOW)
def test_slow_sources_are_noticed(needs_clang, tmp_path, name):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / SLOW[name].file).write_text(SLOW[name].apply(name))
    wrong = inspect(compile_shaders(tmp_path / "csrc" / "metal", tmp_path))
    assert re.search(SLOW[name].red, "\n".join(wrong))


# ---------------------------------------------------------------------------------------------
# What Apple's compiler is known to take.

CONSTRUCTS = re.compile(
    r"\[\[(\w+)|(_?[Pp]ragma\b.*)|\b(simd_\w+|\w+_barrier|mem_flags::\w+|atomic_\w+|memory_order_\w+"
    r"|as_type|popcount|precise::\w+)"
)


def unlisted_constructs(sources, page):
    """Attributes, pragmas and functions of Metal's library that the page's table doesn't have."""
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    listed = "\n".join(rows)
    shaders = [path.read_text() for path in sources.iterdir() if path.suffix in (".h", ".metal")]
    code = re.sub("//.*", "", "\n".join(shaders))
    used = {"".join(groups) for groups in CONSTRUCTS.findall(code)}
    return sorted(construct for construct in used if construct not in listed)


def test_every_construct_was_found_in_a_shader_that_compiles(tmp_path):
    page = (ROOT / "docs" / "metal.md").read_text()
    assert unlisted_constructs(ROOT / "csrc/metal", page) == []
    foreign = "#pragma unroll\nuint x [[thread_position_in_grid]]; simd_sum(x); ctz(x);"
    (tmp_path / "foreign.metal").write_text(foreign)
    expected = ["pragma unroll", "simd_sum", "thread_position_in_grid"]
    assert unlisted_constructs(tmp_path, page) == expected


# ---------------------------------------------------------------------------------------------
# PyTorch's own headers for macOS.


def check_syntax(launcher, torch_version):
    """What clang has to say of a launch.mm against the headers of a version. The frameworks are stand-ins."""
    stand_ins = ROOT / "tests/simt/metal"
    include = ROOT / f".build/macos-torch/{torch_version}/torch/include"
    standard = "c++20" if tuple(map(int, torch_version.split(".")[:2])) >= (2, 14) else "c++17"
    (objc,) = {str(path) for path in sorted(Path("/usr/lib/gcc").glob("*/*/include/objc"))[-1:]}
    flags = (
        f"-std={standard} -fsyntax-only -x objective-c++ -fblocks -fobjc-runtime=gcc -Wall -Wextra"
    )
    command = [CLANG, *flags.split(), "-DMETAL_KERNEL", f"-I{launcher.parent}"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{stand_ins}", "-isystem", include]
    command += ["-isystem", str(Path(objc).parent), '-DEMBEDDED_METALLIB_HEADER="metallib.h"']
    command += ["-DEMBEDDED_METALLIB_NAMESPACE=simt_metal", launcher]
    return process.run(*command, fails=None).stderr


def macos_versions():
    return sorted(path.name for path in (ROOT / ".build/macos-torch").glob("2.*"))


OTHER_NAME = Broken(
    "csrc/metal/launch.mm",
    "dispatch_sync(stream->«queue()», ^{",
    "serialQueue()",
    red="no member named 'serialQueue'",
)


def test_the_launcher_compiles_with_the_headers_of_macos(needs_clang, tmp_path):
    if len(macos_versions()) < 2:
        pytest.skip("needs torch's headers for macOS: make macos-headers")
    launcher = ROOT / "csrc/metal/launch.mm"
    broken = tmp_path / "launch.mm"
    shutil.copy2(launcher.parent / "arguments.h", tmp_path)
    broken.write_text(OTHER_NAME.apply("a method has another name"))
    for version in macos_versions():
        assert check_syntax(launcher, version) == ""
        assert re.search(OTHER_NAME.red, check_syntax(broken, version))
