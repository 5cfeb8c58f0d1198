"""Build the kernel on a machine without Nix, into the layout that kernel-builder produces.

    python tools/build.py                      # build/<variant>/ for each backend this machine can build
    python tools/build.py --sanitize           # the same with AddressSanitizer and UBSan
    python tools/build.py --output elsewhere   # instead of build/

What is built, from which sources and with which flags is read from build.toml. The compilation
itself is ninja's: incremental, parallel, with progress. The compiler is $CXX, or c++, with
$CXXFLAGS appended to the flags.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import tomllib
import torch
from kernels._rust import Backend, Build, Digest, DigestAlgorithm, KernelName, Metadata

ROOT = Path(__file__).resolve().parent.parent
CXX_SUFFIXES = (".cpp", ".cc", ".cxx")

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
    parser.add_argument(
        "--sanitize", action="store_true", help="build with -fsanitize=address,undefined"
    )
    args = parser.parse_args()

    try:
        supported = Build.open(ROOT).general.backends
    except ValueError as error:
        sys.exit(f"error: build.toml: {error}")
    config = tomllib.loads((ROOT / "build.toml").read_text())
    for backend in supported:
        if backend == Backend.CPU:
            build_variant(config, backend, args.output, args.sanitize)
        else:
            print(f"{backend}: not built, this tool builds the CPU variant only")


def build_variant(config: dict, backend: Backend, output: Path, sanitize: bool):
    """Compile, link and lay out one variant."""
    abi = config["torch"]["stable-abi"][str(backend)]
    variant = (
        f"torch-stable-abi{abi.replace('.', '')}-{backend}-{platform.machine()}-{sys.platform}"
    )
    kernel_id = f"_{python_name(config)}_{backend}_{source_revision()}"
    objects = ROOT / ".build" / (variant + ("-sanitize" if sanitize else ""))
    objects.mkdir(parents=True, exist_ok=True)
    write_if_changed(objects / "registration.h", REGISTRATION_H)
    write_if_changed(
        objects / "build.ninja", ninja_file(config, backend, abi, kernel_id, objects, sanitize)
    )

    print(f"{variant}: compiling", flush=True)
    status = subprocess.call([Path(ninja.BIN_DIR) / "ninja", "-C", objects])
    if status != 0:
        sys.exit(status)
    lay_out(config, backend, kernel_id, objects / "extension.so", output / variant)
    print(f"{variant}: {output / variant}")


def ninja_file(
    config: dict, backend: Backend, abi: str, kernel_id: str, objects: Path, sanitize: bool
) -> str:
    """The build.ninja of one variant."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        sys.exit(
            f"error: no C++ compiler: `{compiler}` is not on the PATH. "
            "Install one (Debian: apt-get install g++) or set CXX."
        )
    python_include = Path(sysconfig.get_path("include"))
    if not (python_include / "Python.h").exists():
        sys.exit(
            f"error: no Python headers: {python_include / 'Python.h'} is missing. "
            "Install them (Debian: apt-get install python3-dev)."
        )
    torch_dir = Path(torch.__file__).parent
    major, minor = (int(part) for part in abi.split("."))
    flags = [
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        *(["-fno-gnu-unique"] if accepts(compiler, "-fno-gnu-unique") else []),
        "-Wall",
        "-Wextra",
        "-O3",
        "-DNDEBUG",
        f"-D{str(backend).upper()}_KERNEL",
        f"-DTORCH_TARGET_VERSION=0x{major << 56 | minor << 48:016x}",
        "-DPy_LIMITED_API=0x03090000",
        f"-I{ROOT / 'csrc'}",
        f"-I{objects}",
        f"-isystem {torch_dir / 'include'}",
        f"-isystem {python_include}",
    ]
    # Without a NEEDED entry torch's symbols stay undefined: the loader opens extensions locally.
    link_flags = [
        "-shared",
        f"-L{torch_dir / 'lib'}",
        "-Wl,--no-as-needed -ltorch -ltorch_cpu -lc10",
    ]
    if sanitize:
        flags += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        link_flags += ["-fsanitize=address,undefined"]

    lines = [
        f"flags = {' '.join(flags)} {os.environ.get('CXXFLAGS', '')}",
        "rule compile",
        f"  command = {compiler} -MD -MF $out.d $flags $extra_flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        f"  command = {compiler} $in {' '.join(link_flags)} -o $out",
        "  description = link $out",
    ]
    # Only the binding knows the op namespace, which changes with every commit.
    components = [(config["torch"], [f"-DTORCH_EXTENSION_NAME={kernel_id}"])]
    components += [
        (kernel, []) for kernel in config["kernel"].values() if kernel["backend"] == str(backend)
    ]
    compiled = []
    for component, extra_flags in components:
        extra_flags = extra_flags + component.get("cxx-flags", [])
        extra_flags += [f"-I{ROOT / directory}" for directory in component.get("include", [])]
        for source in component["src"]:
            if not source.endswith(CXX_SUFFIXES):
                continue
            compiled.append(source + ".o")
            lines += [
                f"build {compiled[-1]}: compile {ROOT / source}",
                f"  extra_flags = {' '.join(extra_flags)}",
            ]
    lines += [f"build extension.so: link {' '.join(compiled)}", ""]
    return "\n".join(lines)


def accepts(compiler: str, flag: str) -> bool:
    """Whether the compiler knows a flag."""
    command = [compiler, flag, "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def lay_out(config: dict, backend: Backend, kernel_id: str, extension: Path, destination: Path):
    """Write the variant's folder afresh: nothing of an earlier build stays."""
    shutil.rmtree(destination, ignore_errors=True)
    shutil.copytree(
        ROOT / "torch-ext" / python_name(config),
        destination,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shutil.copy2(extension, destination / f"{kernel_id}.abi3.so")
    (destination / "_ops.py").write_text(OPS_PY.format(id=kernel_id))
    general = config["general"]
    metadata = {
        "name": general["name"],
        "id": kernel_id,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": str(backend)},
    }
    digest = Digest.hash_variant(DigestAlgorithm.SHA256, destination)
    metadata["digest"] = {"algorithm": str(digest.algorithm).lower(), "files": digest.files}
    (destination / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    Metadata.read_from_file(destination / "metadata.json")  # raises if `kernels` would not take it


def python_name(config: dict) -> str:
    return KernelName(config["general"]["name"]).python_name


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
