"""The change proposed to transformers: it applies, and it makes the layer reachable."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from conftest import REPO_ID, ROOT, needs_torch_for_cpu

PATCH = ROOT / "upstream" / "transformers-5.22.patch"
LAYER = "Gemma4VisionPatchEmbedder"


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A folder with the installed transformers in it, patched: links, but for the patched files."""
    patch = shutil.which("patch")
    if patch is None and "CI" not in os.environ:
        pytest.skip("patch is not installed (Debian: apt-get install patch)")
    folder = tmp_path_factory.mktemp("upstream")
    installed = Path(transformers.__file__).parent
    # The folders are real, so nothing that is written here, bytecode included, goes elsewhere.
    shutil.copytree(installed, folder / "transformers", copy_function=os.symlink)
    for name in re.findall(r"^\+\+\+ b/(\S+)", PATCH.read_text(), re.MULTILINE):
        (folder / name).unlink()
        shutil.copy2(installed.parent / name, folder / name)
    # No fuzz: a hunk whose surroundings have changed is to be looked at.
    command = [patch, "--strip=1", "--fuzz=0", "--forward", f"--input={PATCH}"]
    for option in ["--dry-run"], []:
        result = subprocess.run(
            command + option, cwd=folder, check=False, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_modular_and_modeling_agree(patched):
    """transformers generates the one from the other, so the class is the same in both, decorator too."""
    classes = []
    for kind in "modular", "modeling":
        path = patched / "transformers" / "models" / "gemma4" / f"{kind}_gemma4.py"
        tree = ast.parse(path.read_text())
        (found,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == LAYER]
        classes.append(ast.unparse(found))
    assert classes[0] == classes[1]
    assert classes[0].startswith(f"@use_kernel_forward_from_hub('{LAYER}')\n")


SCRIPT = f"""
import copy
import sys
from pathlib import Path

import torch
import transformers
from kernels import LayerRepository, Mode, kernelize, use_kernel_mapping
from transformers import Gemma4VisionConfig, Gemma4VisionModel
from transformers.integrations import hub_kernels
from transformers.models.gemma4 import modeling_gemma4, modular_gemma4

import reference

patched = Path(sys.argv[1])
assert Path(transformers.__file__).parent == patched / "transformers"
for module in modeling_gemma4, modular_gemma4:
    assert module.{LAYER}.kernel_layer_name == "{LAYER}"

entry = hub_kernels.get_kernel_mapping_transformers()["{LAYER}"]
published = LayerRepository("{REPO_ID}", layer_name="{LAYER}", version=1)
assert entry == {{"cuda": published, "mps": published}}

torch.manual_seed(0)
config = Gemma4VisionConfig(**reference.SMALL_VISION_CONFIG)
original = Gemma4VisionModel(config).eval()
torch.nn.init.normal_(original.patch_embedder.position_embedding_table)
pixels, ids = torch.rand(2, 63, 3 * 16**2), reference.grid(2, 63, 9, 6)

def check(model):
    assert model.patch_embedder.forward.__func__.__module__.startswith("_fused_embedding_lookup_")
    with torch.no_grad():
        expected, actual = original(pixels, ids), model(pixels, ids)
    assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)

# transformers' mapping has no "cpu" for this layer.
cpu = {{"{LAYER}": {{"cpu": published}}}}
hub_kernels.register_kernel_mapping_transformers()
with use_kernel_mapping(cpu):
    check(kernelize(copy.deepcopy(original), mode=Mode.INFERENCE, device="cpu"))
    # What use_kernels=True does in from_pretrained.
    model = copy.deepcopy(original)
    model.set_use_kernels(True)
    check(model)
"""


@needs_torch_for_cpu
def test_use_kernels_alone_swaps_the_layer_in(patched, published, tmp_path):
    """From the Hub, without the replace_kernel_forward_from_hub that test_gemma4.py needs."""
    environment = {key: value for key, value in os.environ.items() if key != "LOCAL_KERNELS"}
    environment |= published.environment(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(patched), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, patched],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
