"""Fetch PyTorch's own headers for macOS, to check launch.mm against.

    python tests/simt/metal/fetch_headers.py     # into .build/macos-torch/<version>/, 230 MB of wheels at first

Of the oldest version that the builder makes a Metal variant for, and of the newest there is.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[3] / ".build" / "macos-torch"
OLDEST = "2.12.0"
FLAGS = ["--only-binary=:all:", "--platform", "macosx_14_0_arm64", "--python-version", "3.12"]


def main():
    for version in (OLDEST, newest()):
        if (FOLDER / version).exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            pip("download", "--no-deps", *FLAGS, "--dest", folder, f"torch=={version}")
            (wheel,) = Path(folder).glob("torch-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.startswith("torch/include/")]
                archive.extractall(Path(folder) / version, names)
            FOLDER.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(folder) / version, FOLDER / version)  # whole, or not there


def newest():
    """What pip would take, without taking it."""
    arguments = ["install", "--dry-run", "--quiet", "--report", "-", "--no-deps"]
    arguments += ["--ignore-installed", "--target", "nowhere", *FLAGS, "torch"]
    report = json.loads(pip(*arguments, stdout=subprocess.PIPE).stdout)
    return report["install"][0]["metadata"]["version"]


def pip(*arguments, **options):
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, check=True, text=True, **options)


if __name__ == "__main__":
    main()
