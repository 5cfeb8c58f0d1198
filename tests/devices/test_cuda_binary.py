"""The CUDA variant's machine code, for every architecture: what can be seen of it without a GPU."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import runpy
import shutil
from collections import defaultdict
from typing import NamedTuple

import pytest
import torch

from helpers import ROOT, process, variants
from helpers.symbols import SYSTEM, undefined_symbols
from helpers.variants import NEEDS_ALL_OF_CUDA

TOOLKIT = ROOT / ".build/cuda-toolkit"
TOOLKIT_CUOBJDUMP = TOOLKIT / "triton/backends/nvidia/bin/cuobjdump"

pytestmark = [
    pytest.mark.check("the CUDA variant's machine code for all architectures"),
    pytest.mark.xdist_group("cuda_binary"),  # which is disassembled once
]


@pytest.fixture(scope="module")
def folder():
    folders = variants.builds("cu[0-9]*")
    if not folders:
        pytest.skip(NEEDS_ALL_OF_CUDA)
    return folders[0]


@pytest.fixture(scope="module")
def extension(folder):
    return variants.extension(folder)


@pytest.fixture(scope="module")
def resources(folder):
    """What ptxas said of each kernel for each architecture: stack, spills and registers."""
    report = defaultdict(dict)
    for log in (ROOT / ".build" / folder.name / "csrc" / "cuda").glob("*.log"):
        entries = re.findall(
            r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes stack frame, "
            r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
            log.read_text(),
            re.DOTALL,
        )
        for name, arch, *numbers in entries:
            report[arch][demangle(name)] = tuple(map(int, numbers))
    if not report:
        pytest.skip(NEEDS_ALL_OF_CUDA)
    return report


@pytest.fixture(scope="module")
def machine_code(extension):
    """The instructions of each kernel, by architecture."""
    cuobjdump = TOOLKIT_CUOBJDUMP if TOOLKIT_CUOBJDUMP.exists() else shutil.which("cuobjdump")
    if cuobjdump is None:
        pytest.skip(NEEDS_ALL_OF_CUDA)
    listing = process.run(cuobjdump, "--dump-sass", extension).stdout
    code = defaultdict(dict)
    for arch, rest in re.findall(
        r"\tcode for (sm_\d+)\n(.*?)(?=\tcode for |\Z)", listing, re.DOTALL
    ):
        for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", rest, re.DOTALL):
            code[arch][demangle(name)] = parse(body)
    return code


class Instruction(NamedTuple):
    name: str  # LDG.E.EF.128
    operands: str  # R24, desc[UR36][R4.64]

    def named(self):
        """The numbers of the registers in its operands."""
        return {int(number) for number in re.findall(r"\bR(\d+)", self.operands)}

    def loaded(self):
        """Of a load, the registers that it writes."""
        first = int(re.match(r"R(\d+)", self.operands)[1])
        bits = re.search(r"\.(64|128)\b", self.name)
        return set(range(first, first + (int(bits[1]) // 32 if bits else 1)))


def parse(listing):
    """The instructions in a kernel's listing, without their predicates."""
    pattern = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)\s*(.*?)\s*;"
    return [Instruction(*found) for found in re.findall(pattern, listing)]


def first_wait(instructions, loads):
    """The first instruction that needs what one of `loads` (positions) brings before the last of them is
    requested, or None."""
    pending = set()
    for position in range(loads[0], loads[-1] + 1):
        instruction = instructions[position]
        if instruction.named() & pending:
            return instruction
        if position in loads:
            pending |= instruction.loaded()
    return None


@functools.cache  # they are the same for all architectures
def demangle(name):
    """forward_kernel<BFloat16, BFloat16, 8, 2>"""
    full = process.run("c++filt", name).stdout
    short = re.search(r"(\w+_kernel(?:<.*>)?)\(", full.replace("(anonymous namespace)::", ""))
    return re.sub(r"[\w]+::", "", short[1]) if short else full.strip()


def test_no_kernel_uses_local_memory(resources):
    """No stack, no spill: an array that lost its registers would show here."""
    assert len({len(report) for report in resources.values()}) == 1
    for arch, report in resources.items():
        for name, (stack, stores, loads, _) in report.items():
            assert (stack, stores, loads) == (0, 0, 0), f"{name} for {arch}"


def test_every_architecture_is_there(resources, machine_code):
    """kernel-builder's. A build for one GPU has that one's only."""
    assert set(resources) == set(machine_code)
    if "NOTHING_MAY_BE_MISSING" in os.environ:
        archs = runpy.run_path(ROOT / "tools" / "build.py")["CUDA_ARCHS"]
        names = {"sm_" + arch.removesuffix("+PTX").replace(".", "") for arch in archs}
        assert set(machine_code) == names


THREADS = {
    "forward": 256,
    "rows": 512,
    "sort": 512,
    "sum": 256,
    "finish": 256,
    "interpolation": 128,
    "scaling": 256,
}
REGISTERS = 65536  # of a multiprocessor
MOST_THREADS = {"sm_75": 1024, "sm_86": 1536, "sm_87": 1536, "sm_89": 1536}
MOST_THREADS |= {"sm_110": 1536, "sm_120": 1536, "sm_121": 1536}


def blocks_with(registers, threads):
    """The blocks that a multiprocessor's registers have room for: they are handed out by eights a
    thread, 256 to a warp."""
    return REGISTERS // (-(-registers // 8) * 8 * threads)


def test_registers_leave_room_for_the_blocks_that_the_design_counts_on(resources):
    """32 warps of the main forwards, 24 of the others, 32 of the sums and of their last step, and at least
    two blocks of any kernel, on every architecture whose multiprocessors take as many threads. The sums'
    shared memory has room for as many: a static assertion beside their launch."""
    wanted = {
        r"forward_kernel<(\w+), \1, \1, [48], [24], .*": 4,
        r"forward_kernel<.*": 3,
        r"(sum|finish)_kernel<.*": 4,
        r"(rows|sort|interpolation|scaling)_kernel.*": 2,
    }
    for arch, report in resources.items():
        for name, (*_, registers) in report.items():
            blocks = next(n for pattern, n in wanted.items() if re.fullmatch(pattern, name))
            threads = THREADS[name.partition("_")[0]]
            blocks = min(blocks, MOST_THREADS.get(arch, 2048) // threads)
            assert blocks_with(registers, threads) >= blocks, f"{name} for {arch}: {registers}"


# The main paths, by what a forward's lane requests of the residual, with the ids, padding and weights, and then
# of the rows.
FORWARDS = [
    ("forward_kernel<BFloat16, BFloat16, BFloat16, 8, 2, false, true>", 3, 2 * 3),
    ("forward_kernel<Half, Half, Half, 8, 2, false, true>", 3, 2 * 3),
    ("forward_kernel<float, float, float, 4, 2, false, true>", 3, 2 * 3),
    ("forward_kernel<BFloat16, BFloat16, BFloat16, 8, 2, false, false>", 0, 2 * 3),
    ("forward_kernel<BFloat16, BFloat16, BFloat16, 8, 4, true, true>", 1, 4),
    ("forward_kernel<float, float, float, 4, 4, true, true>", 1, 4),
    ("forward_kernel<BFloat16, BFloat16, BFloat16, 8, 4, true, false>", 0, 4),
    ("forward_kernel<BFloat16, BFloat16, BFloat16, 8, 0, true, true>", 1, 4),
]
SUMS = ["sum_kernel<BFloat16, BFloat16, 8>", "sum_kernel<float, float, 4>"]


class Batch(NamedTuple):
    """Loads that are requested before any is waited for: `count` of those whose name matches, after the first
    `skip`; with `all_before`, and all that a kernel loads before the last of them."""

    kernel: str
    load: str
    count: int
    skip: int = 0
    all_before: bool = False

    def positions(self, instructions):
        loads = [i for i, found in enumerate(instructions) if found.name.startswith("LDG")]
        matching = [i for i in loads if re.fullmatch(self.load, instructions[i].name)]
        batch = matching[self.skip : self.skip + self.count]
        assert len(batch) == self.count, (
            f"{len(batch)} loads, where the design has {self.count}. If the kernel's design has changed, "
            "so must the counts in FORWARDS and BATCHES."
        )
        return [i for i in loads if i <= batch[-1]] if self.all_before else batch


STREAMED, KEPT, PLAIN = r"LDG\.E\.EF\..*128", r"LDG\.E\.128\.CONSTANT", r"LDG\.E"
BATCHES = [
    *(Batch(kernel, STREAMED, count, all_before=True) for kernel, count, _ in FORWARDS if count),
    *(Batch(kernel, KEPT, count) for kernel, _, count in FORWARDS),
    # The low and the high half of four ids, and four flags; four entries and the counts of 16 tiles.
    Batch("rows_kernel", r"LDG.*", 4 * 3),
    Batch("sort_kernel", PLAIN + r"(\.64)?", 4 + 16),
    # Two entries, the tile's first row and a neighbour's; two weights; four tokens' gradients.
    *(Batch(kernel, PLAIN + r"(\.64)?", 4) for kernel in SUMS),
    *(Batch(kernel, PLAIN, 2, skip=2) for kernel in SUMS),
    *(Batch(kernel, KEPT, 4) for kernel in SUMS),
    # The rows at a tile's ends and of its neighbours; four partials.
    Batch("finish_kernel<BFloat16, 4>", PLAIN, 4),
    Batch("finish_kernel<BFloat16, 4>", PLAIN + r"\.128", 4),
    Batch("scaling_kernel<float, BFloat16, 4>", STREAMED, 4),
    Batch("scaling_kernel<BFloat16, BFloat16, 8>", STREAMED, 4),
]
each_batch = pytest.mark.parametrize(
    "batch", BATCHES, ids=lambda b: f"{b.kernel}-{b.load}-{b.count}"
)

# What ptxas makes of the sources elsewhere was not looked at as closely.
ARCHS = {"sm_80", "sm_90", "sm_100"}


@each_batch
def test_a_batch_of_loads_is_requested_before_any_is_waited_for(machine_code, batch):
    for arch in sorted(ARCHS & set(machine_code)):
        instructions = machine_code[arch][batch.kernel]
        wait = first_wait(instructions, batch.positions(instructions))
        assert wait is None, f"{batch.kernel} for {arch}: {wait}"


@each_batch
def test_a_wait_within_a_batch_is_noticed(machine_code, batch):
    """A use of what its first load brings moved up, and a load whose address needs that."""
    code = machine_code["sm_90"] if "sm_90" in machine_code else next(iter(machine_code.values()))
    instructions = code[batch.kernel]
    loads = batch.positions(instructions)
    register = min(instructions[loads[0]].loaded())
    for consumer in (
        Instruction("ISETP.NE.AND", f"P0, PT, R{register}, RZ, PT"),
        Instruction("LDG.E.128", f"R200, desc[UR4][R{register}.64]"),
    ):
        broken = [*instructions[: loads[-1]], consumer, *instructions[loads[-1] :]]
        assert first_wait(broken, [*loads[:-1], loads[-1] + 1]) == consumer


@pytest.mark.parametrize("kernel", [kernel for kernel, *_ in FORWARDS] + SUMS)
def test_main_path_moves_16_bytes_at_a_time(machine_code, kernel):
    """Activations, rows and sums; ids, weights, flags and the sorted list come by the entry."""
    for arch, code in machine_code.items():
        stores = [i.name for i in code[kernel] if i.name.startswith("STG")]
        assert stores and all("128" in store for store in stores), f"{kernel} for {arch}"
        assert not [i for i in code[kernel] if re.match(r"(LDL|STL)\b", i.name)], kernel


@pytest.mark.parametrize("kernel", ["BFloat16", "Half"])
def test_two_rows_are_added_in_packed_arithmetic(machine_code, kernel):
    """16-bit additions on pairs, and no conversion of an element, where the architecture has them."""
    name = f"forward_kernel<{kernel}, {kernel}, {kernel}, 8, 2, false, true>"
    for arch, code in machine_code.items():
        if (kernel, arch) == ("BFloat16", "sm_75"):
            continue
        packed = [i for i in code[name] if re.match(r"(HADD2|HFMA2)\b", i.name)]
        assert len(packed) >= 3 * 2 * 4, f"{arch}: fewer than of 3 vectors, 2 additions of 4 pairs"
        assert not [i for i in code[name] if re.match(r"F2F|FADD|F2FP", i.name)], arch


def test_kernels_overlap_where_they_can(machine_code):
    """From 9.0 on each kernel of the backward waits for the one before, and lets the next one start; after the
    last come others'. The sort's share of zeros needs nothing of that one."""
    for arch, code in machine_code.items():
        for name, instructions in code.items():
            names = [i.name.partition(".")[0] for i in instructions]
            overlaps = int(arch[3:]) >= 90 and name.startswith(("rows", "sort", "sum", "finish"))
            is_last = name.startswith("finish")
            assert ("ACQBULK" in names) == overlaps, f"{name} for {arch}"
            assert ("PREEXIT" in names) == (overlaps and not is_last), f"{name} for {arch}"
            if overlaps:
                waits = {"LDG"} if name.startswith("sort") else {"LDG", "STG", "EXIT"}
                assert names.index("ACQBULK") < min(names.index(name) for name in waits)


def test_size(extension):
    assert extension.stat().st_size < 5 * 2**20


def test_links_to_nothing_of_cuda_but_the_runtime(extension):
    """Which comes with torch; of torch only the stable ABI's C functions are used."""
    undefined, _ = undefined_symbols(extension)
    needed = process.run("readelf", "--dynamic", extension).stdout
    assert re.findall(r"NEEDED.*\[lib(cu\w+|nv\w+)", needed) == ["cudart"]
    assert "aoti_torch_get_current_cuda_stream" in undefined
    stable = re.compile(r"(__)?cuda\w+@libcudart|aoti_torch_|torch_|PyModule_Create2$")
    assert not [name for name in undefined if not (stable.match(name) or SYSTEM.match(name))]


def test_loads_where_there_is_no_gpu(extension, tmp_path):
    """Registered for CUDA tensors and no others, so that a mistaken call says so."""
    if torch.version.cuda is None:  # then torch lacks what is CUDA's: the runtime and one function
        runtimes = list(TOOLKIT.glob("nvidia/cu*/lib/libcudart.so.*"))
        if not runtimes:
            pytest.skip(NEEDS_ALL_OF_CUDA)
        ctypes.CDLL(runtimes[0], mode=ctypes.RTLD_GLOBAL)
        source, stub = tmp_path / "stub.cpp", tmp_path / "stub.so"
        source.write_text(
            'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
        )
        process.run(os.environ.get("CXX", "c++"), "-shared", "-fPIC", source, "-o", stub)
        ctypes.CDLL(stub, mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(extension)
    ops = getattr(torch.ops, extension.name.removesuffix(".abi3.so"))
    with pytest.raises(NotImplementedError, match=r"'CPU' backend"):
        ops.forward(
            torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 2, 3), None, None, None, None, None
        )
