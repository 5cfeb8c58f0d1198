"""The engine itself, on kernels of a few lines (tiny/): right ones pass, and what is wrong is said."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from helpers import ROOT, process
from helpers.variants import NEEDS_CLANG, ON_THE_ENGINE, SIMT_BUILDS, load_library
from simt.traffic import Moved, count_traffic

pytestmark = ON_THE_ENGINE

ENGINE = ROOT / "tests" / "simt"
WORDS = 128  # two blocks of 64 threads


def build(face):
    """The folder of tests/simt/build.py's library of tiny kernels."""
    folders = list((SIMT_BUILDS / f"tiny-{face}").glob("*"))
    if not folders:
        pytest.skip(NEEDS_CLANG if face == "metal" else "needs the engine: make simt")
    return folders[0]


# ----- CUDA's face ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return build("cuda")


def run_kernel(folder, kernel, seed=0, overlaps=False):
    """What the engine says, and what the kernel made of 0, 1, 2, ..."""
    library = load_library(folder)
    library.tiny_run.restype = ctypes.c_char_p
    library.simt_seed(seed)
    given = torch.arange(WORDS, dtype=torch.int32)
    out = torch.zeros(WORDS, dtype=torch.int32)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (given, out)]
    said = library.tiny_run(kernel.encode(), *pointers, ctypes.c_bool(overlaps)).decode()
    return said, out


def reversed_by(size):
    return torch.arange(WORDS).view(-1, size).flip(1).flatten()


RIGHT = {
    "copy": torch.arange(WORDS),
    "all_read_one": torch.zeros(WORDS),
    "reverse_block": reversed_by(64),
    "reverse_warp": reversed_by(32),
    "shuffle_warp": reversed_by(32),
    "vote": torch.full((WORDS,), 0x55555555),
    "count": torch.tensor([WORDS] + [0] * (WORDS - 1)),
    "read_fresh_memory": torch.full((WORDS,), -1),
    "wait_then_copy": torch.arange(WORDS),
    "copy_second_block_then_wait": torch.arange(WORDS),
}
WRONG = {
    "all_write_one": "a race: .* a tensor of 512 bytes, which thread .* of the same block wrote",
    "blocks_write_one": "a race: .* a tensor of 512 bytes, which thread 0 of another block wrote",
    "no_block_barrier": "a race: .* shared memory",
    "no_warp_barrier": "a race: .* shared memory",
    "a_vote_is_no_barrier": "a race: .* shared memory",
    "atomic_and_plain": "a race: .* a tensor of 512 bytes",
    "read_past_the_end": "thread 63 of block 1 reads 4 bytes at .*, outside of its memory",
    "write_past_the_end": "thread 63 of block 1 writes 4 bytes at .*, outside of writable memory",
    "write_what_is_const": "writes 4 bytes at .*, outside of writable memory",
    "past_shared_memory": "thread 63 of block . reads 4 bytes at .*, outside of its memory",
    "some_miss_the_block_barrier": "block . is stuck: of 64 threads, 63 wait at a block's barrier",
    "a_lane_misses_the_vote": "is stuck: of 64 threads, 0 wait at a block's barrier and 62 at a warp's",
    "not_in_its_own_mask": "thread (0|32) is not in its own mask fffffffe",
    "masks_disagree": "comes with the mask (00000003, its warp with f|ffffffff, its warp with 0)",
    "shuffle_from_outside": "shuffles from lane 16, which is not in the mask 0000ffff",
    "misaligned_vector": "accesses 16 bytes at .*, which is not a multiple",
    "misaligned_word": "accesses 4 bytes at .*, which is not a multiple",
    "assertion": 'device-side assert triggered: .*"all are zero"',
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kernel", RIGHT)
def test_right_kernels_pass(tiny, kernel, seed):
    said, out = run_kernel(tiny, kernel, seed, overlaps="wait" in kernel)
    assert said == ""
    assert torch.equal(out, RIGHT[kernel].int())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kernel", WRONG)
def test_what_is_wrong_is_said(tiny, kernel, seed):
    """Whichever thread comes first; and the next launch is as good as new."""
    assert re.search(WRONG[kernel], run_kernel(tiny, kernel, seed)[0])
    assert run_kernel(tiny, "copy")[0] == ""


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("does_not_wait", "ends without waiting for the previous launch"),
        ("writes_before_it_waits", "writes byte .* before it has waited for the previous launch"),
        ("reads_before_it_waits", "reads byte .* before it has waited for the previous launch"),
    ],
)
def test_an_overlapping_launch_waits_for_the_one_before(tiny, kernel, message):
    assert run_kernel(tiny, kernel)[0] == ""
    assert re.search(message, run_kernel(tiny, kernel, overlaps=True)[0])


def test_what_depends_on_the_order_changes_with_the_seed(tiny):
    results = [run_kernel(tiny, "arrive", seed) for seed in (0, 0, 1)]
    assert all(said == "" for said, _ in results)
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][1], results[2][1])


@pytest.mark.parametrize(
    ("kernel", "read"),
    [
        ("copy", Moved(read=512, read_once=512, read_by_blocks=512)),
        ("all_read_one", Moved(read=512, read_once=32, read_by_blocks=64)),
    ],
)
def test_traffic_is_counted(tiny, kernel, read):
    log = []
    with count_traffic(tiny, log):
        assert run_kernel(tiny, kernel)[0] == ""
    (launch,) = log
    written = Moved(written=512, written_once=512, written_by_blocks=512)
    assert sorted(launch.values()) == sorted([read, written])


# ----- Metal's face ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metal():
    return build("metal")


def run_case(folder, case, fails=False):
    """In a process of its own, which may be what ends. Returns what it wrote as it ended."""
    library = next(folder.glob("*.abi3.so"))
    code = """
    import ctypes, sys
    library = ctypes.CDLL(sys.argv[1])
    library.tiny_run.restype = ctypes.c_char_p
    sys.exit(library.tiny_run(sys.argv[2].encode()).decode() or None)
    """
    libraries = Path(torch.__file__).parent / "lib"
    return process.script(code, library, case, fails=fails, LD_LIBRARY_PATH=libraries).stderr


RIGHT_CASES = [
    "a launch runs when it is waited for",
    "launches run in their order",
    "a buffer is bound at an offset",
    "fewer threadgroups take more turns",
]
WRONG_CASES = {
    "a race": "a race: .* shared memory",
    "past the end": "writes 4 bytes at .*, outside of writable memory",
    "a lane misses the vote": "is stuck: of 64 threads, .* 62 at a warp's",
    "too little threadgroup memory": "outside of (its|writable) memory",
    "a buffer is not bound": "add is missing buffer 0",
    "what is bound is no buffer": "what is bound as buffer 0 is no buffer",
    "an offset past the buffer": "buffer 0 of 1024 bytes is bound at 1024",
    "bytes of another size": "add takes 8 bytes as buffer 1, 16 are bound",
    "no threadgroup memory": "reverse is missing threadgroup memory",
    "odd threadgroup memory": "100 bytes of threadgroup memory are no multiple of 16",
    "too much threadgroup memory": "65536 bytes of threadgroup memory, 32768 may be",
    "too large a threadgroup": "add is dispatched with 1056 threads a threadgroup, 1024 may be",
    "too large a grid": "with 4294967296 threads, which 32 bits can't number",
    "a pipeline is made twice": "the pipeline of add is made twice",
    "a pipeline after its last release": "an object is used after its last release",
    "outside of the queue": "the stream's encoder is taken outside of the stream's queue",
    "a second encoder": "a command encoder is already encoding to this command buffer",
    "an encoder after its end": "a pipeline is set on an encoder that has ended",
    "a commit while an encoder is open": "a commit while an encoder is open",
    "the queue waits for itself": "a queue waits for itself",
    "an exception leaves the queue": "an exception leaves the queue",
    "an object is autoreleased without a pool": "an object is autoreleased where there is no pool",
}


@pytest.mark.parametrize("case", RIGHT_CASES)
def test_right_launches_pass(metal, case):
    run_case(metal, case)


@pytest.mark.parametrize("case", WRONG_CASES)
def test_what_is_wrong_in_a_launch_is_said(metal, case):
    assert re.search(WRONG_CASES[case], run_case(metal, case, fails=True))


# What a C++ compiler would let pass, reflect.py does not: the shader's parameters, or its constant.
SHADER = "#include <metal_stdlib>\n{constant}\n[[kernel]] void shader({parameters}) {{}}\n"
DATA = "device uint* data [[buffer(0)]]"
REFUSED = {
    "no attribute": ("device uint* data", "", "shader: the parameter `device uint\\* data` has no attribute"),
    "no address space": ("uint* data [[buffer(0)]]", "", "shader: buffer can't be a `uint\\*`"),
    "an unknown attribute": (DATA + ", uint i [[thread_position]]", "", "doesn't know the attribute thread_position"),
    "an attribute's type": (DATA + ", float i [[thread_position_in_threadgroup]]", "", "thread_position_in_threadgroup can't be a `float`"),
    "an index twice": (DATA + ", device uint* other [[buffer(0)]]", "", "two parameters with one buffer index"),
    "a constant": (DATA, "constexpr uint kOne = 1;", "it must be in the constant address space"),
    "a function's parameter": (DATA, "METAL_FUNC void help(float& sum) {\n}", "help: `float& sum` has no address space"),
}  # fmt: skip


def reflect(tmp_path, constant, parameters, **options):
    source = tmp_path / "shader.metal"
    source.write_text(SHADER.format(constant=constant, parameters=parameters))
    clang = ["clang++-19", "-D__METAL_VERSION__=400", f"-I{ENGINE / 'metal'}"]
    script = ENGINE / "metal" / "reflect.py"
    return process.python(script, *clang, "--", source, tmp_path / "out.cpp", **options).stderr


def test_a_right_shader_is_reflected(metal, tmp_path):
    reflect(tmp_path, "constant constexpr uint kOne = 1;", DATA)
    assert "run0, uint64_t{1} << 0, false, false" in (tmp_path / "out.cpp").read_text()


@pytest.mark.parametrize("name", REFUSED)
def test_shaders_that_metal_would_refuse_are(metal, tmp_path, name):
    parameters, constant, message = REFUSED[name]
    assert re.search(message, reflect(tmp_path, constant, parameters, fails=True))
