"""transformers' models with the patches of this folder applied, beside the installed ones.

For the tests and the demo, until transformers has the changes.
"""

import copy
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import transformers

<<<<<<<< HEAD:tests/helpers/patched.py
ROOT = Path(__file__).resolve().parent.parent.parent
========
HERE = Path(__file__).resolve().parent
>>>>>>>> wip-fix19:upstream/patched.py
INSTALLED = Path(transformers.__file__).parent
GEMMA_PATCH = HERE / "transformers-5.22.patch"
QWEN_PATCH = HERE / "qwen3_vl-transformers-5.22.patch"

# The classes that have the code inline, and get the module by the patch.
TOWERS = {
    "qwen3_vl": "Qwen3VLVisionModel",
    "qwen3_vl_moe": "Qwen3VLMoeVisionModel",
    "qwen3_omni_moe": "Qwen3OmniMoeVisionEncoder",
    "qwen3_5": "Qwen3_5VisionModel",
    "qwen3_5_moe": "Qwen3_5MoeVisionModel",
    "qwen4_exp": "Qwen4ExpVisionModel",
    "cohere_compass": "CohereCompassVisionModel",
}


def apply(patch, folder):
    """Apply a patch in a folder that has transformers/ or nothing: the files it is for are copied there."""
    for name in re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.MULTILINE):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or not path.exists():
            path.unlink(missing_ok=True)
            shutil.copy2(INSTALLED.parent / name, path)
    # git takes no hunk whose surroundings have changed. It is kept from looking for a repository.
    result = subprocess.run(
        ["git", "apply", patch],
        cwd=folder,
        env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)},
        check=False,
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        raise RuntimeError(
            f"{patch.name} does not apply to transformers {transformers.__version__}:\n"
            + result.stdout
            + result.stderr
        )


@functools.cache
def _files():
    folder = tempfile.TemporaryDirectory()
    apply(QWEN_PATCH, Path(folder.name))
    return folder  # which lasts as long as the cache: the process


def _load(name, path):
    spec = importlib.util.spec_from_file_location(name, Path(_files().name) / path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def modeling(model):
    """The patched modeling file of one of TOWERS, as a module of its own."""
    utils = _load("transformers.patched_vision_utils", "transformers/vision_utils.py")
    module = _load(
        f"transformers.models.{model}.patched_modeling_{model}",
        f"transformers/models/{model}/modeling_{model}.py",
    )
    function = "get_vision_interpolation_indices_and_weights"
    setattr(module, function, getattr(utils, function))
    return module


def patch_tower(tower):
    """Make a tower what it would be if the patch were applied: another forward, and all else as it was."""
    model = type(tower).__module__.rpartition("modeling_")[2]
    classes = modeling(model)
    tower.__class__ = getattr(classes, TOWERS[model])
    prefix = TOWERS[model].rpartition("Vision")[0]
    embedding = getattr(classes, f"{prefix}VisionInterpolatedPositionEmbedding")
    tower.add_pos_embed = embedding(tower.config).train(tower.training)


def patch_model(model):
    """A copy of a model in which every tower is patched."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if type(module).__name__ in TOWERS.values():
            patch_tower(module)
    return model
