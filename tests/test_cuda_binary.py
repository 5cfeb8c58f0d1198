"""The CUDA variant's machine code, for every architecture: what can be seen of it without a GPU."""

import ctypes
import os
import re
import runpy
import shutil
import subprocess
from collections import defaultdict

import pytest
import torch

from conftest import ROOT
from test_package import undefined_symbols

TOOLKIT_CUOBJDUMP = ROOT / ".build/cuda-toolkit/triton/backends/nvidia/bin/cuobjdump"


def missing(what):
    """Skip, but not in CI, where nothing is missing."""
    if "CI" in os.environ:
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="module")
def folder():
    folders = list((ROOT / "build").glob("torch*-cu[0-9]*-*"))
    if not folders:
        missing("the CUDA variant is not built (make cuda)")
    return folders[0]


@pytest.fixture(scope="module")
def extension(folder):
    (extension,) = folder.glob("*.abi3.so")
    return extension


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
        missing("ptxas's report is not there (.build/)")
    return report


@pytest.fixture(scope="module")
def machine_code(extension):
    """The instructions of each kernel, by architecture."""
    cuobjdump = TOOLKIT_CUOBJDUMP if TOOLKIT_CUOBJDUMP.exists() else shutil.which("cuobjdump")
    if cuobjdump is None:
        missing("cuobjdump is not there (make cuda)")
    listing = subprocess.run(
        [cuobjdump, "--dump-sass", extension], check=True, capture_output=True, text=True
    ).stdout
    code = defaultdict(dict)
    for arch, rest in re.findall(
        r"\tcode for (sm_\d+)\n(.*?)(?=\tcode for |\Z)", listing, re.DOTALL
    ):
        for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", rest, re.DOTALL):
            instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", body)
            code[arch][demangle(name)] = instructions
    return code


def demangle(name):
    """forward_kernel<BFloat16, BFloat16, 8, 2>"""
    full = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout
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
    if "CI" in os.environ:
        archs = runpy.run_path(ROOT / "tools" / "build.py")["CUDA_ARCHS"]
        names = {"sm_" + arch.removesuffix("+PTX").replace(".", "") for arch in archs}
        assert set(machine_code) == names


def test_registers_leave_room_for_the_loads_in_flight(resources):
    """What the README's estimates assume: 1024 threads of the main forward, 15 warps of the finish."""
    for arch, report in resources.items():
        main = [n for n in report if re.fullmatch(r"forward_kernel<(\w+), \1, [48], 2>", n)]
        assert len(main) == 3
        for name, (*_, registers) in report.items():
            if name in main:
                assert registers <= 64, f"{name} for {arch}"
            assert registers <= 102, f"{name} for {arch}"


# Memory instructions of the main path, those of 16 bytes: loads of the residual and the table's rows,
# three vectors a lane and again for the next three; and all others of the kind.
@pytest.mark.parametrize(
    "kernel, expected",
    [
        ("forward_kernel<BFloat16, BFloat16, 8, 2>", {"LDG": 3 + 3 + 6, "STG": 3}),
        ("forward_kernel<Half, Half, 8, 2>", {"LDG": 3 + 3 + 6, "STG": 3}),
        ("forward_kernel<float, float, 4, 2>", {"LDG": 3 + 3 + 6, "STG": 3}),
        ("partial_kernel<BFloat16, true>", {"LDG": 4, "STS": 4, "LDS": 1, "STG": 2}),
        ("finish_kernel<BFloat16, BFloat16, 8>", {"LDG": 4 * 2 + 4, "STG": 2}),
    ],
)
def test_main_path_moves_16_bytes_at_a_time(machine_code, kernel, expected):
    for arch, code in machine_code.items():
        accesses = [i.split(".") for i in code[kernel] if re.match(r"(LD|ST)[GS]\b", i)]
        for kind, least in expected.items():
            wide = [i for i in accesses if i[0] == kind and "128" in i]
            assert len(wide) >= least, f"{kernel} for {arch}: {kind}"
        # What is stored to memory or shared memory element by element is stored so by mistake.
        narrow = [i for i in accesses if i[0] in ("STG", "STS") and "128" not in i]
        assert kernel.startswith("finish") or not narrow, f"{kernel} for {arch}"
        assert not [i for i in code[kernel] if re.match(r"(LDL|STL)\b", i)], f"{kernel} for {arch}"


def test_size(extension):
    assert extension.stat().st_size < 5 * 2**20


def test_links_to_nothing_of_cuda(extension):
    """The runtime is linked statically; of torch only the stable ABI's C functions are used."""
    undefined, _ = undefined_symbols(extension)
    needed = subprocess.run(
        ["readelf", "--dynamic", extension], check=True, capture_output=True, text=True
    ).stdout
    assert not re.search(r"NEEDED.*cuda", needed)
    assert "aoti_torch_get_current_cuda_stream" in undefined
    plain = [name for name in undefined if not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", name)]
    stable = re.compile(r"aoti_torch_|torch_|PyModule_Create2$|_ITM_|__gmon_start__$|_ZNK?St")
    assert not [name for name in plain if not stable.match(name)]


def test_loads_where_there_is_no_gpu(extension, tmp_path):
    """Registered for CUDA tensors and no others, so that a mistaken call says so."""
    if torch.version.cuda is None:  # then torch lacks the one function that is CUDA's
        stub = tmp_path / "stub.so"
        source = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
        compiler = [os.environ.get("CXX", "c++"), "-shared", "-fPIC", "-x", "c++", "-", "-o", stub]
        subprocess.run(compiler, input=source, check=True, text=True)
        ctypes.CDLL(stub, mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(extension)
    ops = getattr(torch.ops, extension.name.removesuffix(".abi3.so"))
    with pytest.raises(NotImplementedError, match=r"'CPU' backend"):
        ops.forward(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 2, 3), None, None, None)
