"""Build the kernel with kernel-builder's own CMake templates, where there is no Nix to run it.

    git clone https://github.com/huggingface/kernels .build/kernels
    python tools/kernel_builder.py .build/kernels cpu cuda     # into .build/kernel-builder/<variant>/
    cp -r .build/kernel-builder/torch* build/                  # in place of what `make build` made there
    python -m pytest -m "not check"

The templates are those of the commit that flake.lock pins. It needs cmake 3.26 or newer (PyPI has it) and what
tools/build.py needs. CUDA is compiled against the torch that is installed, whichever build of it that is. What
Nix adds isn't done: manylinux_2_28's libraries, the ABI check.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2
import ninja
from build import CUDA_ARCHS, ROOT, Cpu, Cuda, Variant, digest, read_config

OUTPUT = ROOT / ".build" / "kernel-builder"
TEMPLATES = "kernel-builder/src/pyproject/templates"


def main():
    if len(sys.argv) < 3 or not set(sys.argv[2:]) <= {"cpu", "cuda"}:
        sys.exit(__doc__)
    lock = json.loads((ROOT / "flake.lock").read_text())["nodes"]["kernel-builder"]["locked"]
    (OUTPUT / "kernels").mkdir(parents=True, exist_ok=True)
    command = ["git", "-C", sys.argv[1], f"--work-tree={OUTPUT / 'kernels'}", "restore"]
    subprocess.run([*command, f"--source={lock['rev']}", "-W", f":/{TEMPLATES}"], check=True)
    config = read_config()
    for backend in sys.argv[2:]:
        variant = Cpu(config) if backend == "cpu" else Cuda(config, CUDA_ARCHS)
        source = OUTPUT / "source" / backend
        render(variant, source)
        build(variant, source)


def render(variant: Variant, source: Path):
    """What `kernel-builder create-pyproject` would write, as far as CMake needs it."""
    templates = OUTPUT / "kernels" / TEMPLATES
    for folder in (source, OUTPUT / variant.name):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in ("csrc", "torch-ext"):
        shutil.copytree(ROOT / folder, source / folder)
    shutil.copytree(templates, source / "cmake")
    shutil.copytree(templates / "torch", source / "cmake", dirs_exist_ok=True)
    shutil.copy(templates / "torch" / "registration.h", source / "torch-ext")
    (source / f"metadata-{variant.backend}.json").write_text(json.dumps(variant.metadata()))

    def values(name, section):
        flags = {f"{x}_flags": ";".join(section.get(f"{x}-flags", [])) for x in ("cxx", "cuda")}
        sources = "\n".join(f'"{path}"' for path in section["src"])
        return flags | section | {"name": name, "kernel_name": name, "sources": sources}

    torch, python_name = variant.config["torch"], variant.python_name
    identity = {"kernel_name": python_name, "python_name": python_name, "data_extensions": []}
    identity["kernel_unique_id"] = variant.kernel_id.rpartition(f"_{variant.backend}_")[2]
    identity["stable_abi"] = [{"backend": b, "version": v} for b, v in torch["stable-abi"].items()]
    environment = jinja2.Environment(trim_blocks=True, loader=jinja2.FileSystemLoader(templates))
    parts = [("torch/preamble", identity), ("torch/torch-binding", values(python_name, torch))]
    for name, kernel in variant.config["kernel"].items():
        parts.append((f"kernel-component/{kernel['backend']}", values(name, kernel)))
    parts.append(("torch/torch-extension", identity))
    rendered = (environment.get_template(f"{name}.cmake").render(part) for name, part in parts)
    (source / "CMakeLists.txt").write_text("\n".join(rendered))


def build(variant: Variant, source: Path):
    """Configure, compile, install and hash, with nix-builder's options."""
    options = {"CMAKE_BUILD_TYPE": "Release", "CMAKE_SKIP_RPATH": "ON"}
    options |= {"GPU_LANG": variant.backend.upper(), "BUILD_ALL_SUPPORTED_ARCHS": "ON"}
    options |= {"Python3_EXECUTABLE": sys.executable, "CMAKE_INSTALL_PREFIX": OUTPUT}
    options |= {"CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja"}
    variables = dict(os.environ)
    if variant.backend == "cuda":
        home = Path(variant.nvcc).parent.parent
        runtime = min(home.glob("lib*/libcudart.so.[0-9]*"))
        options |= {"CMAKE_CUDA_COMPILER": variant.nvcc, "CUDAToolkit_ROOT": home}
        options |= {"CUDA_CUDART": runtime, "CUDA_cudart_LIBRARY": runtime}
        options |= {"CMAKE_PROJECT_INCLUDE": Path(__file__).with_suffix(".cmake")}
        variables["LIBRARY_PATH"] = str(runtime.parent)
    arguments = ["-G", "Ninja", *(f"-D{name}={value}" for name, value in options.items())]
    run = functools.partial(subprocess.run, cwd=source, check=True, env=variables)
    run(["cmake", "-B", "build", *arguments])
    run(["cmake", "--build", "build", "--target", "install"])
    shutil.rmtree(OUTPUT / variant.kernel_id)
    path = OUTPUT / variant.name / "metadata.json"
    metadata = json.loads(path.read_text()) | {"digest": digest(path.parent)}
    path.write_text(json.dumps(metadata))


if __name__ == "__main__":
    main()
