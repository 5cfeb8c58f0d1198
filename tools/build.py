"""Build the kernel on a machine without Nix, into the layout that kernel-builder produces.

    python tools/build.py                      # build/<variant>/ for each backend this machine can run
    python tools/build.py --backend cuda       # the CUDA variant, for all architectures, on any machine
    python tools/build.py --sanitize           # the CPU variant with AddressSanitizer and UBSan
    python tools/build.py --output elsewhere   # instead of build/

What is built, from which sources and with which flags is read from build.toml. The compilation
itself is ninja's: incremental, parallel, with progress. The compiler is $CXX, or c++, with
$CXXFLAGS appended to the flags; for CUDA nvcc, of $CUDA_HOME, of `make cuda` or on the PATH. The Metal
variant itself is built on a Mac, by kernel-builder.

What is made is what kernel-builder makes, but for this:

| | kernel-builder | here | because |
| --- | --- | --- | --- |
| C and C++ libraries | manylinux_2_28's | the machine's | the compiler is; tests/ warn of what that would reject |
| warnings | none | -Wall -Wextra, ptxas -v | this is where the code is worked on |
| torch's nvcc flags | --expt-relaxed-constexpr, ENABLE_FP8 | none | the sources use neither |
| CUDA architectures | all | this machine's GPU's; all with --backend cuda, and after it | to be quick |
| provenance | its version and commit | "tools/build.py" | it wasn't kernel-builder |
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
    args = parser.parse_args()

    config = read_config()
    archs = args.archs or CUDA_ARCHS
    if args.sanitize:
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
            if not args.archs and is_for_all_archs(args.output / variants[-1].name):
                variants[-1].archs = CUDA_ARCHS
    for variant in variants:
        variant.build(args.output)


def read_config() -> dict:
    """build.toml, if kernel-builder would take it."""
    try:
        Build.open(ROOT)
    except ValueError as error:
        sys.exit(f"error: build.toml: {error}")
    return tomllib.loads((ROOT / "build.toml").read_text())


class Variant:
    """Which compiler with which flags makes which sources into one extension."""

    backend: str  # whose sources
    runs_on: str  # whose tensors it takes
    build_folder_suffix = ""
    registration = REGISTRATION_H
    cxx_flags = ()
    link_flags = ()

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
        destination = output / self.name
        objects.mkdir(parents=True, exist_ok=True)
        write_if_changed(objects / "registration.h", self.registration)
        write_if_changed(objects / "build.ninja", self.ninja_file(objects))
        print(f"{objects.name}: compiling", flush=True)
        status = subprocess.call([Path(ninja.BIN_DIR) / "ninja", "-C", objects])
        if status != 0:
            sys.exit(status)
        write_compile_commands()
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
            "-O3",
            "-DNDEBUG",
            f"-D{self.backend.upper()}_KERNEL",
            *self.target_version(),
            "-DPy_LIMITED_API=3",
            f"-I{ROOT / 'csrc'}",
            f"-I{objects}",
            f"-isystem {torch_dir / 'include'}",
            f"-isystem {python_include}",
        ]
        cxx_flags = [
            "-std=gnu++20",
            *common,
            "-fPIC",
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
        metadata = self.metadata() | {"digest": digest(destination)}
        (destination / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        # Raises if `kernels` would not take it.
        Metadata.read_from_file(destination / "metadata.json")

    def metadata(self) -> dict:
        """What metadata.json says, but for the digest."""
        general = self.config["general"]
        return {
            "name": general["name"],
            "id": self.kernel_id,
            "version": general["version"],
            "license": general["license"],
            "source": general["source"],
            "python-depends": [],
            "kernel-depends": [],
            "backend": self.metadata_backend(),
            "provenance": {"kernel-builder": {"version": "tools/build.py"}} | git_status(),
        }

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
        # PyPI's packages have the runtime under its version's name only, and in lib/.
        home = Path(self.nvcc).parent.parent
        folders = " ".join(f"-L{home / name}" for name in ("lib", "lib64"))
        runtime = f"-cudart=none {folders} -Xlinker -l:libcudart.so.{self.version[0]}"
        return f"{self.nvcc} -ccbin {self.compiler} {runtime}"

    def rule(self, source: str):
        return "nvcc" if source.endswith(".cu") else super().rule(source)

    def device_rule(self, common: list):
        codes = []
        for arch in self.archs:
            number = arch.removesuffix("+PTX").replace(".", "")
            codes.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if arch.endswith("+PTX"):
                codes.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        flags = ["-std=c++20", *common, *codes, f"-ccbin {self.compiler} -Xcompiler=-fPIC"]
        # ptxas reports registers, stack and spills: tests/devices/test_cuda_binary.py reads that.
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


NO_NVCC = "there is no nvcc in $CUDA_HOME or on the PATH (`make cuda` brings one from PyPI)"


def find_nvcc():
    """The CUDA compiler's path, or None."""
    homes = [os.environ.get("CUDA_HOME"), ROOT / ".build" / "cuda-toolkit" / "nvidia" / "cu13"]
    candidates = [Path(home, "bin", "nvcc").absolute() for home in homes if home]
    return next(filter(None, map(shutil.which, [*candidates, "nvcc"])), None)


def is_for_all_archs(variant: Path) -> bool:
    """Whether `make cuda` has built what is there, which then stays for all of them."""
    metadata = variant / "metadata.json"
    if not metadata.exists():
        return False
    return json.loads(metadata.read_text())["backend"]["archs"] == sorted(CUDA_ARCHS)


def accepts(compiler: str, flag: str) -> bool:
    """Whether the compiler knows a flag."""
    command = [compiler, flag, "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def digest(variant: Path) -> dict:
    """The hashes of a variant's files, as metadata.json has them."""
    hashed = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
    return {"algorithm": str(hashed.algorithm).lower(), "files": hashed.files}


def git_status() -> dict:
    """The sources' commit, and whether the tree differs from it; nothing without a checkout or git."""
    try:
        commit = git("rev-parse", "HEAD").strip()
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"kernel": {"commit": commit, "dirty": dirty}}


def source_revision() -> str:
    """What makes the op namespace unique: the commit, marked if the tree differs from it."""
    status = git_status()
    if status:
        return status["kernel"]["commit"][:7] + ("_dirty" if status["kernel"]["dirty"] else "")
    # The sources' own hash is as unique.
    hashed = hashlib.sha256()
    for path in sorted(
        p for folder in ("csrc", "torch-ext") for p in (ROOT / folder).rglob("*") if p.is_file()
    ):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()[:7]


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True
    ).stdout


def write_compile_commands():
    """For editors: how each source was compiled, in every variant that has been built here."""
    commands = []
    for variant in sorted((ROOT / ".build").glob("*/build.ninja")):
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", variant.parent, "-t", "compdb"]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        commands += [entry for entry in json.loads(listing) if not entry["file"].endswith(".o")]
    (ROOT / "compile_commands.json").write_text(json.dumps(commands, indent=1) + "\n")


def write_if_changed(path: Path, text: str):
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


if __name__ == "__main__":
    main()
