"""Run the op's tests, on the CPU variant that is built already, in an environment of their own.

    python tools/other_torch.py 2.10.0               # with this version of torch
    python tools/other_torch.py newest               # with the newest that pip finds
    python tools/other_torch.py pinned -m kernels_ci # with requirements.txt's: kernel-builder's CI tests

The environment, .build/torch-VERSION, has what kernel-builder's `nix run .#ci-test` has and nothing else:
torch, kernels, pytest and what flake.nix adds, and of the tests what kernel-builder takes along: the Python
files. Further arguments go to pytest, which without any runs the files that have tests marked kernels_ci, whole.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "numpy", "pytest", "hypothesis")


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    version, *arguments = sys.argv[1:]
    files = [path.read_text() for path in ROOT.glob("requirements*.txt")]
    pins = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==(\S+)", "\n".join(files), re.MULTILINE))
    torch = {"pinned": f"torch=={pins['torch']}", "newest": "torch"}.get(
        version, f"torch=={version}"
    )
    environment = ROOT / ".build" / f"torch-{version}"
    python = environment / "bin" / "python"
    packages = [f"{name}=={pins[name]}" if name in pins else name for name in PACKAGES]
    if not python.exists():
        venv.create(environment, with_pip=True)
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "--upgrade", torch, *packages], check=True)

    tests = environment / "source" / "tests"
    shutil.rmtree(tests, ignore_errors=True)
    for path in (ROOT / "tests").rglob("*.py"):
        copy = tests / path.relative_to(ROOT / "tests")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    marked = (path for path in tests.rglob("test_*.py") if "mark.kernels_ci" in path.read_text())
    what = [tests, *arguments] if arguments else sorted(marked)
    command = [python, "-m", "pytest", "-c", os.devnull, "-p", "no:cacheprovider", "-ra", *what]
    variables = os.environ | {
        "LOCAL_KERNELS": f"kernels-community/fused-embedding-lookup={ROOT / 'build'}"
    }
    sys.exit(subprocess.run(command, cwd=tests, env=variables, check=False).returncode)


if __name__ == "__main__":
    main()
