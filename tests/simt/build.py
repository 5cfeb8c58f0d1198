"""Build the GPUs' sources for this engine, which runs them on a CPU.

    python tests/simt/build.py           # into .build/simt/, those that can be built here
    python tests/simt/build.py metal     # one of them, or an error

The sources are those of build.toml and the layout is kernel-builder's, as in tools/build.py: the engine's
files are added, and the kernel takes the CPU's tensors. The Metal sources are compiled by clang 19 with GCC's
Objective-C runtime; $CXX and $CXXFLAGS are as there. tiny-cuda and tiny-metal are the engine with kernels of a
few lines, for its own tests.
"""

import argparse
import os
import platform
import shutil
import sys
from pathlib import Path

ENGINE = Path(__file__).resolve().parent
sys.path.insert(0, str(ENGINE.parent.parent / "tools"))

from build import REGISTRATION_H, ROOT, Variant, read_config

CLANG = "clang++-19"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*", metavar="NAME", help="default: what can be")
    names = parser.parse_args().sources
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"it is one of {', '.join(VARIANTS)}, not {' '.join(unknown)}")
    output = ROOT / ".build" / "simt"
    if not names:
        names = list(VARIANTS)
        if why_no_clang():
            print(f"metal: not built for tests/simt, {why_no_clang()}")
            names = ["tiny-cuda", "cuda"]
            for name in VARIANTS.keys() - names:  # of other sources, perhaps
                shutil.rmtree(output / name, ignore_errors=True)
    config = read_config()
    for name in names:
        VARIANTS[name](config).build(output / name)


class Simt(Variant):
    """A GPU's sources, unchanged, for CPU tensors."""

    runs_on = "cpu"
    registration = REGISTRATION_H.replace(
        "STABLE_TORCH_LIBRARY_IMPL(NAME, DEVICE, MODULE)",
        "STABLE_TORCH_LIBRARY_IMPL(NAME, CPU, MODULE)",
    )
    engine_sources = ("simt.cpp", "tensors.cpp")
    cxx_flags = ("-fvisibility=hidden",)  # build.toml's, for what isn't in it as C++
    # The linker sends these calls to the engine.
    wrapped = (
        "torch_get_const_data_ptr",
        "torch_get_mutable_data_ptr",
        "aoti_torch_new_tensor_handle",
        "aoti_torch_delete_tensor_object",
    )

    def __init__(self, config: dict):
        super().__init__(config)
        self.kernel_id += "_simt"

    @property
    def build_folder_suffix(self) -> str:
        return f"-simt-{self.backend}"

    @property
    def link_flags(self):
        return [f"-Wl,--wrap={function}" for function in self.wrapped]

    def sources(self):
        yield from super().sources()
        for source in self.engine_sources:
            yield str(ENGINE.relative_to(ROOT) / source), ""


class SimtCuda(Simt):
    backend = "cuda"
    engine_sources = (*Simt.engine_sources, "cuda/runtime.cpp")
    wrapped = (*Simt.wrapped, "__assert_fail")
    own = (f"-I{ENGINE / 'cuda'}", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE")
    cxx_flags = (*Simt.cxx_flags, *own)

    def rule(self, source: str):
        return "simt" if source.endswith(".cu") else super().rule(source)

    def device_rule(self, common: list):
        # The engine stands in for the sanitizer's runtime, see simt.h.
        return [
            "simt_flags = -fsanitize=thread -x c++",
            "rule simt",
            f"  command = {self.compiler} -MD -MF $out.d $cxx_flags $simt_flags $extra_flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in for tests/simt",
        ]


class SimtMetal(Simt):
    backend = "metal"
    engine_sources = (*Simt.engine_sources, "metal/emulator.mm")

    def __init__(self, config: dict):
        super().__init__(config)
        problem = why_no_clang()
        if problem:
            sys.exit(f"error: {problem}")

    @property
    def link_flags(self):
        return [*super().link_flags, f"-L{objc_folder()}", "-lobjc"]

    def rule(self, source: str):
        return {".mm": "objcxx", ".metal": "metal"}.get(Path(source).suffix) or super().rule(source)

    def device_rule(self, common: list):
        stand_ins = ENGINE / "metal"
        flags = [
            *common,
            f"-I{stand_ins}",
            "-fPIC -fvisibility=hidden -Wall -Wextra -Wno-unused-function -Wno-duplicate-decl-specifier",
            os.environ.get("CXXFLAGS", ""),
        ]
        objcxx = [
            "-x objective-c++ -fblocks -fobjc-runtime=gcc",
            f"-isystem {objc_folder() / 'include'}",
            '-DEMBEDDED_METALLIB_HEADER=\\"metallib.h\\"',
            "-DEMBEDDED_METALLIB_NAMESPACE=simt_metal",
        ]
        # Fast math, as Metal's compiler has it unless the source says otherwise, and a division that isn't
        # rounded correctly. Wider vectors than the source's would be accesses that the engine isn't told of.
        shader = "-ffast-math -mrecip=all:0 -fno-vectorize -fno-slp-vectorize -fsanitize=thread"
        reflect_flags = f"{CLANG} -MD -MF $out.d -MT $out -D__METAL_VERSION__=400 -I{stand_ins}"
        steps = [
            f"{sys.executable} {stand_ins / 'reflect.py'} {reflect_flags} -- $in $out.cpp",
            f"{CLANG} $clang_flags -DMETAL_ADDRESS_SPACES -fsyntax-only $out.cpp",
            f"{CLANG} $clang_flags {shader} -c $out.cpp -o $out",
        ]
        return [
            f"clang_flags = {' '.join(flags)}",
            "rule objcxx",
            f"  command = {CLANG} -MD -MF $out.d $clang_flags {' '.join(objcxx)} $extra_flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in for tests/simt",
            "rule metal",
            f"  command = {' && '.join(steps)}",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in for tests/simt",
        ]

    def needs(self, source: str):
        if source.endswith(".metal"):
            return [f"{ENGINE / name}" for name in ("metal/reflect.py", "metal/shader.h", "simt.h")]
        return super().needs(source)


class Tiny:
    """Kernels of a few lines in place of the package."""

    tiny_sources: tuple

    @property
    def build_folder_suffix(self) -> str:
        return f"-simt-tiny-{self.backend}"

    def sources(self):
        for source in (*self.tiny_sources, *self.engine_sources):
            yield str(ENGINE.relative_to(ROOT) / source), ""

    def lay_out(self, extension: Path, destination: Path):
        destination.mkdir(parents=True, exist_ok=True)
        shutil.copy2(extension, destination / "tiny.abi3.so")


class TinyCuda(Tiny, SimtCuda):
    tiny_sources = ("tiny/kernels.cu",)
    engine_sources = ("simt.cpp", "cuda/runtime.cpp")
    wrapped = ("__assert_fail",)


class TinyMetal(Tiny, SimtMetal):
    tiny_sources = ("tiny/shaders.metal", "tiny/launches.mm")
    engine_sources = ("simt.cpp", "metal/emulator.mm")
    wrapped = ()


def objc_folder() -> Path:
    """Where GCC keeps the Objective-C runtime and its headers, which clang doesn't bring."""
    folders = sorted(Path("/usr/lib/gcc").glob(f"{platform.machine()}-*/*/include/objc/objc.h"))
    return folders[-1].parents[2] if folders else Path()


def why_no_clang():
    """What the Metal sources need to be compiled here and is missing, or None."""
    if shutil.which(CLANG) is None:
        return f"{CLANG} is not on the PATH (Debian: apt-get install clang-19)"
    if objc_folder() == Path():
        return "there is no Objective-C runtime (Debian: apt-get install gobjc++)"
    return None


# The engine first: it doesn't depend on the kernel's sources.
VARIANTS = {
    "tiny-cuda": TinyCuda,
    "tiny-metal": TinyMetal,
    "cuda": SimtCuda,
    "metal": SimtMetal,
}

if __name__ == "__main__":
    main()
