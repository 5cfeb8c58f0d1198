"""Compare what our layers replace, and our patch rewrites, in the transformers that is installed and the newest.

    python tools/upstream_changes.py           # the newest that pip finds
    python tools/upstream_changes.py 5.24.0    # or this version

Syntax trees are compared: comments, docstrings, annotations of arguments and formatting don't count. Prints the
differences, and exits with 1 if there are any.
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

sys.path.append(str(Path(__file__).resolve().parent.parent / "upstream"))
from patched import TOWERS

# The classes of transformers that have a layer of their own name, by model, and what such a layer calls.
LAYERS = {
    "gemma4": ["Gemma4VisionPatchEmbedder"],
    "gemma4_unified": ["Gemma4UnifiedVisionEmbedder"],
    "kimi_k25": ["Kimi_K25VisionPositionEmbeddings", "get_vision_frame_index"],
    "muse_glimmer": ["MuseGlimmerVisionPatchEmbedder"],
    "muse_spark": ["MuseSparkVisionPatchEmbedder"],
    "paddleocr_vl": ["PaddleOCRVisionEmbeddings"],
}
REPLACED = {
    f"transformers/models/{model}/modeling_{model}.py": names
    for model, names in (LAYERS | {model: [tower] for model, tower in TOWERS.items()}).items()
} | {
    "transformers/vision_utils.py": [
        "get_vision_interpolation_indices_and_weights",
        "_interpolation_axis_taps_weights",
    ],
}

DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


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
                if isinstance(inner, DOCUMENTED) and ast.get_docstring(inner) is not None:
                    inner.body.pop(0)
                elif isinstance(inner, ast.arg):
                    inner.annotation = None
            return ast.unparse(node).splitlines()
    return []


if __name__ == "__main__":
    main()
