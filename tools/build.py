"""Build the kernel on a machine without Nix, into the layout that kernel-builder produces.

    python tools/build.py                      # build/<variant>/ for each backend this machine can run
    python tools/build.py --backend cuda       # the CUDA variant, for all architectures, on any machine
    python tools/build.py --sanitize           # the CPU variant with AddressSanitizer and UBSan
    python tools/build.py --simt               # the GPUs' sources for tests/simt, which runs them on a CPU
    python tools/build.py --output elsewhere   # instead of build/

What is built, from which sources and with which flags is read from build.toml. The compilation
itself is ninja's: incremental, parallel, with progress. The compiler is $CXX, or c++, with
$CXXFLAGS appended to the flags; for CUDA nvcc, of $CUDA_HOME, of `make cuda` or on the PATH. The Metal
variant itself is built on a Mac, by kernel-builder.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import tomllib
import torch
from kernels._rust import Build, Digest, DigestAlgorithm, KernelName, Metadata

ROOT = Path(__file__).resolve().parent.parent
CXX_SUFFIXES = (".cpp", ".cc", ".cxx")
SIMT = "tests/simt"

# What kernel-builder builds for with CUDA 13: machine code for each, and PTX of the last for newer ones.
CUDA_ARCHS = ["7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "11.0", "12.0", "12.1+PTX"]

# What kernel-builder puts next to the sources: the macros that register an extension's ops under a
# name which is itself a macro, and make the extension importable.
REGISTRATION_H = """\
#pragma once

#include <Python.h>

#define STABLE_TORCH_LIBRARY_EXPAND(NAME, MODULE) STABLE_TORCH_LIBRARY(NAME, MODULE)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(NAME, DEVICE, MODULE) STABLE_TORCH_LIBRARY_IMPL(NAME, DEVICE, MODULE)

#define REGISTRATION_STRING(NAME) #NAME
#define REGISTRATION_INIT(NAME)                                                                  \\
  PyMODINIT_FUNC PyInit_##NAME() {                                                               \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, REGISTRATION_STRING(NAME), nullptr, 0,   \\
                                 nullptr, nullptr, nullptr, nullptr, nullptr};                   \\
    return PyModule_Create(&module);                                                             \\
  }
#define REGISTER_EXTENSION(NAME) REGISTRATION_INIT(NAME)
"""

OPS_PY = """\
import torch

from . import {id}

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str):
    \"\"\"
    Prefix op by namespace.
    \"\"\"
    return f"{id}::{{op_name}}"
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build", help="default: %(default)s")
    parser.add_argument("--backend", action="append", choices=["cpu", "cuda"])
    parser.add_argument(
        "--archs",
        nargs="+",
        metavar="ARCH",
        help="for CUDA: 9.0, 12.1+PTX, ... (default: this machine's GPU's; all with --backend cuda)",
    )
    parser.add_argument(
        "--sanitize",
        action="store_true",
        help="build the CPU variant with -fsanitize=address,undefined",
    )
    parser.add_argument(
        "--simt",
        nargs="*",
        choices=["cuda", "metal"],
        help="build these variants' sources for tests/simt (default: those that can be)",
    )
    args = parser.parse_args()

    try:
        Build.open(ROOT)
    except ValueError as error:
        sys.exit(f"error: build.toml: {error}")
    config = tomllib.loads((ROOT / "build.toml").read_text())
    archs = args.archs or CUDA_ARCHS
    if args.simt is not None:
        names = args.simt or ["cuda"]
        if not args.simt:
            if why_no_clang():
                print(f"metal: not built for tests/simt, {why_no_clang()}")
            else:
                names.append("metal")
        variants = [SimtCuda(config) if name == "cuda" else SimtMetal(config) for name in names]
    elif args.sanitize:
        variants = [Sanitized(config)]
    elif args.backend:
        variants = [Cuda(config, archs) if name == "cuda" else Cpu(config) for name in args.backend]
    else:
        variants = [Cpu(config)]
        if not torch.cuda.is_available():
            print("cuda: not built, torch sees no GPU (`make cuda` builds it all the same)")
        elif find_nvcc() is None:
            print(f"cuda: not built, {NO_NVCC}")
        else:
            native = "{}.{}".format(*torch.cuda.get_device_capability())
            variants.append(Cuda(config, args.archs or [native]))
    for variant in variants:
        variant.build(args.output)


class Variant:
    """Which compiler with which flags makes which sources into one extension."""

    backend: str  # whose sources
    runs_on: str  # whose tensors it takes
    build_folder_suffix = ""
    subfolder = ""  # of the output
    registration = REGISTRATION_H
    cxx_flags = ()
    link_flags = ()
    extra_sources = ()

    def __init__(self, config: dict):
        self.config = config
        # Of torch's that the sources are held to, or None if they use this torch's own.
        self.abi = config["torch"]["stable-abi"].get(self.backend)
        self.python_name = KernelName(config["general"]["name"]).python_name
        self.kernel_id = f"_{self.python_name}_{self.backend}_{source_revision()}"
        self.compiler = os.environ.get("CXX", "c++")
        if shutil.which(self.compiler) is None:
            sys.exit(
                f"error: no C++ compiler: `{self.compiler}` is not on the PATH. "
                "Install one (Debian: apt-get install g++) or set CXX."
            )

    @property
    def name(self) -> str:
        """The variant's, as kernel-builder has it: the folder that `kernels` looks for."""
        abi = self.config["torch"]["stable-abi"][self.runs_on].replace(".", "")
        return f"torch-stable-abi{abi}-{self.platform_tag}-{platform.machine()}-{sys.platform}"

    @property
    def platform_tag(self) -> str:
        return self.runs_on

    @property
    def linker(self) -> str:
        return self.compiler

    def build(self, output: Path):
        """Compile, link and lay out."""
        objects = ROOT / ".build" / (self.name + self.build_folder_suffix)
        destination = output / self.subfolder / self.name
        objects.mkdir(parents=True, exist_ok=True)
        write_if_changed(objects / "registration.h", self.registration)
        write_if_changed(objects / "build.ninja", self.ninja_file(objects))
        print(f"{self.name}: compiling", flush=True)
        status = subprocess.call([Path(ninja.BIN_DIR) / "ninja", "-C", objects])
        if status != 0:
            sys.exit(status)
        self.lay_out(objects / "extension.so", destination)
        print(f"{self.name}: {destination}")

    def ninja_file(self, objects: Path) -> str:
        """The build.ninja."""
        python_include = Path(sysconfig.get_path("include"))
        if not (python_include / "Python.h").exists():
            sys.exit(
                f"error: no Python headers: {python_include / 'Python.h'} is missing. "
                "Install them (Debian: apt-get install python3-dev)."
            )
        torch_dir = Path(torch.__file__).parent
        # What a C++ compiler and nvcc both take.
        common = [
            "-std=c++17",
            "-O3",
            "-DNDEBUG",
            f"-D{self.backend.upper()}_KERNEL",
            *self.target_version(),
            "-DPy_LIMITED_API=0x03090000",
            f"-I{ROOT / 'csrc'}",
            f"-I{objects}",
            f"-isystem {torch_dir / 'include'}",
            f"-isystem {python_include}",
        ]
        cxx_flags = [
            *common,
            "-fPIC",
            "-fvisibility=hidden",
            *(["-fno-gnu-unique"] if accepts(self.compiler, "-fno-gnu-unique") else []),
            "-Wall",
            "-Wextra",
            *self.cxx_flags,
            os.environ.get("CXXFLAGS", ""),
        ]
        # Without a NEEDED entry torch's symbols stay undefined: the loader opens extensions locally.
        link_flags = [
            "-shared",
            f"-L{torch_dir / 'lib'}",
            *self.link_flags,
            "-Xlinker --no-as-needed -ltorch -ltorch_cpu -lc10",
        ]
        lines = [
            f"cxx_flags = {' '.join(cxx_flags)}",
            "rule cxx",
            f"  command = {self.compiler} -MD -MF $out.d $cxx_flags $extra_flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            f"  command = {self.linker} $in {' '.join(link_flags)} -o $out",
            "  description = link $out",
            *self.device_rule(common),
        ]
        compiled = []
        for source, flags in self.sources():
            rule = self.rule(source)
            if rule is not None:
                compiled.append(source + ".o")
                lines += [
                    f"build {compiled[-1]}: {rule} {ROOT / source} | {' '.join(self.needs(source))}",
                    f"  extra_flags = {flags}",
                ]
        lines += [f"build extension.so: link {' '.join(compiled)}", ""]
        return "\n".join(lines)

    def target_version(self):
        if self.abi is None:
            return []
        major, minor = (int(part) for part in self.abi.split("."))
        return [f"-DTORCH_TARGET_VERSION=0x{major << 56 | minor << 48:016x}"]

    def sources(self):
        """Each source, headers included, and the flags that only it gets."""
        kernels = self.config["kernel"].values()
        kernels = [kernel for kernel in kernels if kernel["backend"] == self.backend]
        for component in [self.config["torch"], *kernels]:
            flags = [f"-I{ROOT / directory}" for directory in component.get("include", [])]
            # Only the binding knows the op namespace, which changes with every commit.
            if component is self.config["torch"]:
                flags.append(f"-DTORCH_EXTENSION_NAME={self.kernel_id}")
            for source in component["src"]:
                language = "cuda" if self.rule(source) == "nvcc" else "cxx"
                yield source, " ".join(flags + component.get(f"{language}-flags", []))
        for source in self.extra_sources:
            yield source, ""

    def rule(self, source: str):
        """The rule that compiles a source; None for a header."""
        return "cxx" if source.endswith(CXX_SUFFIXES) else None

    def needs(self, source: str):
        """What a source is made anew for, besides what its compiler says."""
        return []

    def device_rule(self, common: list):
        return []

    def lay_out(self, extension: Path, destination: Path):
        """Write the variant's folder afresh: nothing of an earlier build stays."""
        shutil.rmtree(destination, ignore_errors=True)
        shutil.copytree(
            ROOT / "torch-ext" / self.python_name,
            destination,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        shutil.copy2(extension, destination / f"{self.kernel_id}.abi3.so")
        (destination / "_ops.py").write_text(OPS_PY.format(id=self.kernel_id))
        general = self.config["general"]
        metadata = {
            "name": general["name"],
            "id": self.kernel_id,
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "kernel-depends": [],
            "backend": self.metadata_backend(),
        }
        digest = Digest.hash_variant(DigestAlgorithm.SHA256, destination)
        metadata["digest"] = {"algorithm": str(digest.algorithm).lower(), "files": digest.files}
        (destination / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        # Raises if `kernels` would not take it.
        Metadata.read_from_file(destination / "metadata.json")

    def metadata_backend(self) -> dict:
        return {"type": self.runs_on}


class Cpu(Variant):
    backend = runs_on = "cpu"


class Sanitized(Cpu):
    build_folder_suffix = "-sanitize"
    cxx_flags = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    link_flags = ("-fsanitize=address,undefined",)


class Cuda(Variant):
    backend = runs_on = "cuda"

    def __init__(self, config: dict, archs: list):
        super().__init__(config)
        self.archs = archs
        self.nvcc = find_nvcc()
        if self.nvcc is None:
            sys.exit(f"error: {NO_NVCC}")
        version = subprocess.run(
            [self.nvcc, "--version"], check=True, capture_output=True, text=True
        ).stdout
        self.version = re.search(r"release (\d+)\.(\d+)", version).groups()

    @property
    def platform_tag(self) -> str:
        return "cu" + "".join(self.version)

    @property
    def linker(self) -> str:
        # The static runtime, as in the extensions that kernel-builder makes. nvcc looks for it in
        # lib64/, PyPI's packages have it in lib/.
        libraries = Path(self.nvcc).parent.parent / "lib"
        return (
            f"{self.nvcc} -ccbin {self.compiler} -cudart=static -L{libraries} "
            "-Xlinker=--exclude-libs,ALL"
        )

    def rule(self, source: str):
        return "nvcc" if source.endswith(".cu") else super().rule(source)

    def device_rule(self, common: list):
        codes = []
        for arch in self.archs:
            number = arch.removesuffix("+PTX").replace(".", "")
            codes.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if arch.endswith("+PTX"):
                codes.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        flags = [*common, *codes, f"-ccbin {self.compiler} -Xcompiler=-fPIC,-fvisibility=hidden"]
        # ptxas reports registers, stack and spills: tests/test_cuda_binary.py reads that.
        flags.append("-Xptxas=-v")
        compile_source = f"{self.nvcc} -MD -MF $out.d $nvcc_flags $extra_flags -c $in -o $out"
        return [
            f"nvcc_flags = {' '.join(flags)}",
            "rule nvcc",
            f"  command = {compile_source} > $out.log 2>&1 || (cat $out.log; false)",
            "  depfile = $out.d",
            "  deps = gcc",
            f"  description = compile $in for {' '.join(self.archs)}",
        ]

    def metadata_backend(self) -> dict:
        return {"type": "cuda", "archs": sorted(self.archs)}


class Simt(Variant):
    """A GPU's sources, unchanged, for CPU tensors: on tests/simt in place of the GPU."""

    runs_on = "cpu"
    registration = REGISTRATION_H.replace(
        "STABLE_TORCH_LIBRARY_IMPL(NAME, DEVICE, MODULE)",
        "STABLE_TORCH_LIBRARY_IMPL(NAME, CPU, MODULE)",
    )
    extra_sources = (f"{SIMT}/simt.cpp", f"{SIMT}/tensors.cpp")
    # The linker sends these calls to the engine.
    wrapped = (
        "torch_get_const_data_ptr",
        "torch_get_mutable_data_ptr",
        "aoti_torch_delete_tensor_object",
    )

    def __init__(self, config: dict):
        super().__init__(config)
        self.kernel_id += "_simt"

    @property
    def build_folder_suffix(self) -> str:
        return f"-simt-{self.backend}"

    @property
    def subfolder(self) -> str:
        return self.backend

    @property
    def link_flags(self):
        return [f"-Wl,--wrap={function}" for function in self.wrapped]


class SimtCuda(Simt):
    backend = "cuda"
    extra_sources = (*Simt.extra_sources, f"{SIMT}/cuda/runtime.cpp")
    wrapped = (*Simt.wrapped, "__assert_fail")
    cxx_flags = (f"-I{ROOT / SIMT / 'cuda'}", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE")

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
    extra_sources = (*Simt.extra_sources, f"{SIMT}/metal/emulator.mm")

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
        stand_ins = ROOT / SIMT / "metal"
        flags = [
            *common,
            f"-I{stand_ins}",
            "-fPIC -fvisibility=hidden -Wall -Wextra -Wno-unused-function",
            os.environ.get("CXXFLAGS", ""),
        ]
        objcxx = [
            "-x objective-c++ -fblocks -fobjc-runtime=gcc",
            f"-isystem {objc_folder() / 'include'}",
            '-DEMBEDDED_METALLIB_HEADER=\\"metallib.h\\"',
            "-DEMBEDDED_METALLIB_NAMESPACE=simt_metal",
        ]
        # Fast math, as Metal's compiler has it unless the source says otherwise. Wider vectors than
        # the source's would be accesses that the engine isn't told of.
        shader = "-ffast-math -fno-vectorize -fno-slp-vectorize -fsanitize=thread"
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
            return [
                f"{ROOT / SIMT}/{name}" for name in ("metal/reflect.py", "metal/shader.h", "simt.h")
            ]
        return super().needs(source)


CLANG = "clang++-19"


def objc_folder() -> Path:
    """Where GCC keeps the Objective-C runtime and its headers, which clang doesn't bring."""
    folders = sorted(Path("/usr/lib/gcc").glob(f"{platform.machine()}-*/*/include/objc/objc.h"))
    return folders[-1].parents[2] if folders else Path()


def why_no_clang():
    """What the Metal sources need to be compiled here and is missing, or None."""
    if shutil.which(CLANG) is None:
        return f"{CLANG} is not on the PATH (Debian: apt-get install clang-19)"
    if objc_folder() == Path():
        return "there is no Objective-C runtime (Debian: apt-get install gobjc++-12)"
    return None


NO_NVCC = "there is no nvcc in $CUDA_HOME or on the PATH (`make cuda` brings one from PyPI)"


def find_nvcc():
    """The CUDA compiler's path, or None."""
    homes = [os.environ.get("CUDA_HOME"), ROOT / ".build" / "cuda-toolkit" / "nvidia" / "cu13"]
    candidates = [Path(home, "bin", "nvcc").absolute() for home in homes if home]
    return next(filter(None, map(shutil.which, [*candidates, "nvcc"])), None)


def accepts(compiler: str, flag: str) -> bool:
    """Whether the compiler knows a flag."""
    command = [compiler, flag, "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def source_revision() -> str:
    """What makes the op namespace unique: the commit, marked if the tree differs from it."""
    try:
        commit = git("rev-parse", "--short=7", "HEAD").strip()
        return commit + "_dirty" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        # Not a checkout, or no git: the sources' own hash is as unique.
        digest = hashlib.sha256()
        for path in sorted(
            p for folder in ("csrc", "torch-ext") for p in (ROOT / folder).rglob("*") if p.is_file()
        ):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:7]


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True
    ).stdout


def write_if_changed(path: Path, text: str):
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


if __name__ == "__main__":
    main()
