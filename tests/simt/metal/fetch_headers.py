"""Fetch PyTorch's own headers for macOS, to check launch.mm against.

    python tests/simt/metal/fetch_headers.py     # into .build/macos-torch/<version>/, 230 MB of wheels

Of the oldest version that the builder makes a Metal variant for, and of the newest there is.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[3] / ".build" / "macos-torch"
WANTED = ["torch==2.12.0", "torch"]


def main():
    for requirement in WANTED:
        if (FOLDER / requirement.removeprefix("torch==")).exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            flags = (
                "--no-deps --only-binary=:all: --platform macosx_14_0_arm64 --python-version 3.12"
            )
            command = [sys.executable, "-m", "pip", "download", *flags.split(), "--dest", folder]
            subprocess.run([*command, requirement], check=True)
            (wheel,) = Path(folder).glob("torch-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.startswith("torch/include/")]
                archive.extractall(FOLDER / wheel.name.split("-")[1], names)


if __name__ == "__main__":
    main()
