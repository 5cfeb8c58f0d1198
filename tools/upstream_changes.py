"""Compare what our layers replace, between the transformers that is installed and the newest release.

    python tools/upstream_changes.py           # the newest that pip finds
    python tools/upstream_changes.py 5.24.0    # or this version

Syntax trees are compared: comments, docstrings and formatting don't count. Prints the differences, and exits with 1 if
there are any.
"""

import ast
import difflib
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import transformers

REPLACED = {
    "transformers/models/gemma4/modeling_gemma4.py": ["Gemma4VisionPatchEmbedder"],
    "transformers/models/gemma4_unified/modeling_gemma4_unified.py": [
        "Gemma4UnifiedVisionEmbedder"
    ],
    "transformers/vision_utils.py": ["get_vision_interpolation_indices_and_weights"],
}


def main():
    requirement = "==".join(["transformers", *sys.argv[1:]])
    site = Path(transformers.__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, "--only-binary=:all:", requirement], check=True)
        (wheel,) = Path(folder).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            there = REPLACED.keys() & set(archive.namelist())
            newer = {path: archive.read(path).decode() for path in there}
    print(f"{importlib.metadata.version('transformers')} and {wheel.name}")
    changed = False
    for path, names in REPLACED.items():
        for name in names:
            old, new = code((site / path).read_text(), name), code(newer.get(path, ""), name)
            assert old, f"{name} is not in {path}"
            diff = list(difflib.unified_diff(old, new, "installed", "newest", lineterm="", n=1))
            print(f"{path}: {name}: {'changed' if diff else 'unchanged'}", *diff, sep="\n")
            changed |= bool(diff)
    sys.exit(changed)


def code(source: str, name: str) -> list:
    """The lines of a definition, without what doesn't run; none if it isn't there."""
    for node in ast.parse(source).body:
        if getattr(node, "name", None) == name:
            for inner in ast.walk(node):
                if ast.get_docstring(inner) if hasattr(inner, "name") else None:
                    inner.body.pop(0)
            return ast.unparse(node).splitlines()
    return []


if __name__ == "__main__":
    main()
