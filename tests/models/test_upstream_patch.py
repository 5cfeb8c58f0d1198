"""The changes proposed to transformers: they apply, and they make the layers reachable."""

import ast
import os
import re
import runpy
import shutil
import sys

import pytest

from helpers import REPO_ID, ROOT, process
from helpers.variants import needs_torch_for_cpu
from helpers.vision_towers import patched as patching

LAYER = "Gemma4VisionPatchEmbedder"
QWEN_LAYER = "VisionInterpolatedPositionEmbedding"
CHANGES = ROOT / "tools" / "upstream_changes.py"


def test_a_change_upstream_is_noticed():
    """By tools/upstream_changes.py: what runs counts, and what is written about it doesn't."""
    code = runpy.run_path(CHANGES)["code"]
    before = 'class A:\n    """Said."""\n    def f(self, a):\n        return 1\nclass B: pass'
    after = "class A:\n    def f(self, a: int):\n        # Said.\n        return (1)"
    assert code(before, "A") == code(after, "A") != []
    assert code(before, "A") != code(after.replace("1", "2"), "A")
    assert code(after, "B") == []
    other_names = "def f():\n    import a as b\n    try: pass\n    except OSError as e: pass"
    assert code(other_names, "f") != []


@pytest.mark.variant("cpu")
def test_changes_to_what_we_replace_are_looked_for(kernel):
    """In every class that a layer stands for, and every one that the patch gives the layer to."""
    replaced = runpy.run_path(CHANGES)["REPLACED"]
    names = {name for names in replaced.values() for name in names}
    layers = {name for name, value in vars(kernel.layers).items() if hasattr(value, "has_backward")}
    assert QWEN_LAYER in layers
    assert layers - {QWEN_LAYER} | {*patching.TOWERS.values()} <= names
    rewritten = re.findall(
        r"^\+\+\+ b/(\S+/modeling_\S+)", patching.QWEN_PATCH.read_text(), re.MULTILINE
    )
    assert {*rewritten} <= {*replaced}
    for path, names in replaced.items():
        tree = ast.parse((patching.INSTALLED.parent / path).read_text())
        assert {*names} <= {getattr(node, "name", None) for node in tree.body}, path


@pytest.mark.skipif(shutil.which("patch") is None, reason="needs patch: apt-get install patch")
def test_the_command_of_the_page_applies_the_patch():
    """From the repository's root, to the transformers that is installed."""
    page = (ROOT / "docs" / "models.md").read_text()
    (command,) = re.findall(r"^patch -p1 .*$", page, re.MULTILINE)
    command = command.replace("patch -p1", "patch -p1 --dry-run").replace("python", sys.executable)
    output = process.run("bash", "-c", command).stdout
    files = re.findall(r"^\+\+\+ b/(\S+)", patching.QWEN_PATCH.read_text(), re.MULTILINE)
    assert re.findall(r"^checking file (\S+)$", output, re.MULTILINE) == files


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A folder with the installed transformers in it, patched: links, but for the patched files."""
    folder = tmp_path_factory.mktemp("upstream")
    # The folders are real, so nothing that is written here, bytecode included, goes elsewhere.
    shutil.copytree(patching.INSTALLED, folder / "transformers", copy_function=os.symlink)
    for patch in patching.GEMMA_PATCH, patching.QWEN_PATCH:
        patching.apply(patch, folder)
    return folder


def class_of(folder, model, kind, name):
    """The source of a class in a model's modular or modeling file, without comments."""
    path = folder / "transformers" / "models" / model / f"{kind}_{model}.py"
    tree = ast.parse(path.read_text())
    (found,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    return ast.unparse(found)


def test_modular_and_modeling_agree(patched):
    """transformers generates the one from the other, so the class is the same in both, decorator too."""
    modular, modeling = (
        class_of(patched, "gemma4", kind, LAYER) for kind in ("modular", "modeling")
    )
    assert modular == modeling
    assert modular.startswith(f"@use_kernel_forward_from_hub('{LAYER}')\n")


def test_towers_agree(patched):
    """One class in a modular file, and what transformers' converter makes of it in seven."""
    written = class_of(patched, "qwen3_vl", "modular", f"Qwen3VL{QWEN_LAYER}")
    assert written.startswith(f"@use_kernel_forward_from_hub('{QWEN_LAYER}')\n")
    for model, tower in patching.TOWERS.items():
        prefix = tower.rpartition("Vision")[0]
        generated = class_of(patched, model, "modeling", f"{prefix}{QWEN_LAYER}")
        assert generated.replace(prefix, "Qwen3VL") == written
        assert "pos_embed(interp_indices)" not in class_of(patched, model, "modeling", tower)


def forward_of(folder, model, kind, name):
    """The source of the forward of a class in a model's file, without decorators and docstrings; None if it has none."""
    tree = ast.parse(class_of(folder, model, kind, name))
    found = [n for n in tree.body[0].body if getattr(n, "name", None) == "forward"]
    if not found:
        return None
    body = found[0].body[ast.get_docstring(found[0]) is not None :]
    return "\n".join(map(ast.unparse, body))


@pytest.mark.parametrize("model", ["qwen3_vl", "qwen3_5"])
def test_towers_forward_agrees(patched, model):
    """The modular files' forward and what is made of it: in the model itself, and in those that inherit it."""
    name = patching.TOWERS[model]
    written = forward_of(patched, model, "modular", name)
    assert "self.add_pos_embed(" in written
    heirs = {
        "qwen3_vl": ["qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe", "cohere_compass"],
        "qwen3_5": ["qwen3_5", "qwen3_5_moe", "qwen4_exp"],
    }
    for heir in heirs[model]:
        assert forward_of(patched, heir, "modeling", patching.TOWERS[heir]) == written, heir


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("paddleocr_vl", "PaddleOCRVisionEmbeddings"),
        ("muse_glimmer", "MuseGlimmerVisionPatchEmbedder"),
        ("muse_spark", "MuseSparkVisionPatchEmbedder"),
        ("kimi_k25", "Kimi_K25VisionPositionEmbeddings"),
    ],
)
def test_small_modules_agree(patched, model, name):
    written, generated = (
        forward_of(patched, model, kind, name) for kind in ("modular", "modeling")
    )
    assert written == generated and "num_patches=" in written


def test_the_test_that_goes_with_it(patched):
    """What is proposed to be added to transformers' own tests passes where the patch is applied."""
    ran = process.python(
        "-m", "unittest", "test_vision_utils", cwd=ROOT / "upstream", PYTHONPATH=patched
    )
    assert re.search(r"^Ran [1-9]\d* tests.*\n\nOK$", ran.stderr, re.MULTILINE)


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

from helpers import reference
from helpers.problems import grid

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
pixels, ids = torch.rand(2, 63, 3 * 16**2), grid(2, 63, 9, 6)

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


QWEN_SCRIPT = f"""
import copy
import sys
from pathlib import Path

import torch
import transformers
from kernels import LayerRepository, Mode, kernelize, use_kernel_mapping
from transformers.integrations import hub_kernels

from helpers.vision_towers import GRID, build, inputs

assert Path(transformers.__file__).parent == Path(sys.argv[1]) / "transformers"
entry = hub_kernels.get_kernel_mapping_transformers()["{QWEN_LAYER}"]
published = LayerRepository("{REPO_ID}", layer_name="{QWEN_LAYER}", version=1)
assert entry == {{"cuda": published, "mps": published}}

original = build(sys.argv[2])
arguments = inputs(sys.argv[2], GRID)

def check(model):
    assert model.add_pos_embed.forward.__func__.__module__.startswith("_fused_embedding_lookup_")
    with torch.no_grad():
        expected, actual = original(**arguments), model(**arguments)
    assert torch.equal(actual.pooler_output, expected.pooler_output)

# transformers' mapping has no "cpu" for this layer.
hub_kernels.register_kernel_mapping_transformers()
with use_kernel_mapping({{"{QWEN_LAYER}": {{"cpu": published}}}}):
    check(kernelize(copy.deepcopy(original), mode=Mode.INFERENCE, device="cpu"))
    # What use_kernels=True does in from_pretrained.
    model = copy.deepcopy(original)
    model.set_use_kernels(True)
    check(model)
"""


@needs_torch_for_cpu
@pytest.mark.parametrize(
    ("script", "arguments"),
    [(SCRIPT, []), (QWEN_SCRIPT, ["qwen3_vl"]), (QWEN_SCRIPT, ["qwen4_exp"])],
    ids=["gemma4", "qwen3_vl", "qwen4_exp"],
)
def test_use_kernels_alone_swaps_the_layer_in(patched, published, tmp_path, script, arguments):
    """From the Hub, without the replace_kernel_forward_from_hub that test_gemma4.py needs."""
    environment = {"LOCAL_KERNELS": None} | published.environment(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(patched), str(ROOT / "tests")])
    process.script(script, patched, *arguments, **environment)
