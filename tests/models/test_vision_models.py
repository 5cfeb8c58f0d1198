"""Whole models of the Qwen3-VL family: what they see and generate, their losses and gradients, with our layer."""

import onnx
import pytest
import torch

from helpers.bounds import assert_same_gradients
from helpers.vision_towers import (
    IMAGE,
    MODELS,
    VIDEO,
    build_model,
    prompt,
    swap,
    tables,
    undo,
)

pytestmark = pytest.mark.variant("cpu", "cuda")
DTYPES = [torch.float32, torch.bfloat16]
MEDIA = ["image", "images", "video"]
EXACT = [name for name in MODELS if name != "kimi_k25"]
FIRST = ["qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"]
REST = pytest.mark.check("more ways through the models of Qwen3-VL's family")


def ways(names, others, of_all):
    """All pairs. `make test` has those of the FIRST models, and of the rest the one in `of_all`."""
    return [
        pytest.param(name, other, marks=[] if name in FIRST or other == of_all else [REST])
        for name in names
        for other in others
    ]


@pytest.fixture
def swap_in(variant_dir, monkeypatch):
    """Returns a copy of a model that is patched and has our layer."""
    undo(monkeypatch.setattr)
    return lambda model, *args: swap(model, variant_dir, *args)


def tensors(output):
    """All tensors of an output, however nested."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    return [tensor for value in values if value is not None for tensor in tensors(value)]


def features(model, batch):
    """What the tower makes of the images or the video."""
    if "pixel_values" in batch:
        output = model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    else:
        output = model.get_video_features(batch["pixel_values_videos"], batch["video_grid_thw"])
    found = tensors(output)
    assert found
    return found


def step(model, batch):
    """The loss and the logits of a training step, of which the backward is taken."""
    ids = batch["input_ids"]
    labels = ids.masked_fill((ids == IMAGE) | (ids == VIDEO), -100)
    output = model(**batch, labels=labels)
    output.loss.backward()
    return output.loss, output.logits


def assert_same_step(original, ours, name, media="image", dtype=torch.float32):
    """The same loss and logits, and the same gradients but for the rounding of the table's."""
    batch = prompt(name, media, dtype)
    for theirs, mine in zip(step(original, batch), step(ours, batch), strict=True):
        assert torch.equal(mine, theirs)
    return assert_same_gradients(ours, original)


@pytest.mark.parametrize(
    ("name", "media"),
    [
        way
        for way in ways(EXACT, MEDIA, "images")
        if way.values != ("paddleocr_vl", "video")  # it takes none
    ],
)
def test_generate(swap_in, name, media):
    """The same features, tokens and, at each, scores; and they depend on the position embeddings."""
    original = build_model(name)
    ours = swap_in(original)
    batch = prompt(name, media)
    with torch.no_grad():
        for theirs, mine in zip(features(original, batch), features(ours, batch), strict=True):
            assert torch.equal(mine, theirs)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    expected, actual = (model.generate(**batch, **options) for model in (original, ours))
    assert torch.equal(actual.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(actual.logits, expected.logits, strict=True))
    (table,) = tables(ours)
    table.data.neg_()
    other = ours.generate(**batch, **options)
    assert not torch.equal(other.logits[0], expected.logits[0])


@pytest.mark.parametrize(("name", "dtype"), ways(EXACT, DTYPES, torch.float32), ids=str)
def test_training_step(swap_in, name, dtype):
    original = build_model(name, dtype).train()
    assert assert_same_step(original, swap_in(original), name, "images", dtype) == 1


@pytest.mark.parametrize("media", ["image", "images"])
def test_kimi(swap_in, media):
    """A rounding of the sum over 16 taps apart, which the layers after it carry on. (No video: transformers
    5.22.2 splits its features by frames that the tower has averaged.)"""
    original = build_model("kimi_k25").train()
    ours = swap_in(original)
    batch = prompt("kimi_k25", media)
    with torch.no_grad():
        for theirs, mine in zip(features(original, batch), features(ours, batch), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for theirs, mine in zip(step(original, batch), step(ours, batch), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for theirs, mine in zip(original.parameters(), ours.parameters(), strict=True):
        assert (theirs.grad is None) == (mine.grad is None)
        if mine.grad is not None:
            scale = theirs.grad.abs().max().item()
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-4 * scale)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(*(model.eval().generate(**batch, **options) for model in (original, ours)))


@pytest.mark.parametrize(
    ("name", "use_reentrant"),
    [("qwen3_vl", True), ("qwen3_vl", False), ("qwen3_5", True), ("qwen3_5", False)]
    + [
        pytest.param(name, False, marks=REST)
        for name in ("qwen3_omni_moe", "cohere_compass", "paddleocr_vl", "muse_glimmer")
    ],
)
def test_gradient_checkpointing(swap_in, name, use_reentrant):
    models = []
    original = build_model(name).train()
    for model in (original, swap_in(original)):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        models.append(model)
    media = "images" if name == "paddleocr_vl" else "video"
    assert assert_same_step(*models, name, media) == 1


@pytest.mark.parametrize(
    ("name", "table"),
    [("qwen3_vl", "adapted"), ("qwen3_vl", "saved"), ("qwen3_vl", "frozen")]
    + [
        pytest.param(name, table, marks=REST)
        for name in ("qwen3_5", "qwen4_exp", "cohere_compass", "paddleocr_vl", "muse_spark")
        for table in ("adapted", "saved")
    ],
)
def test_lora(swap_in, name, table):
    """Adapters everywhere, the table's among them; or the table trained beside them."""
    from peft import LoraConfig, get_peft_model

    own_name = {"paddleocr_vl": "position_embedding", "muse_spark": "position_embedding_table"}
    own_name = own_name.get(name, "pos_embed")
    config = LoraConfig(
        r=4,
        target_modules=r".*\.(qkv|q_proj|v_proj" + (f"|{own_name})" if table == "adapted" else ")"),
        modules_to_save=[own_name] if table == "saved" else None,
        init_lora_weights=False,
    )
    original = get_peft_model(build_model(name).train(), config)
    seen = assert_same_step(original, swap_in(original), name, "images")
    assert seen == {"adapted": 2, "saved": 1, "frozen": 0}[table]


@pytest.mark.parametrize(
    "name", ["qwen3_vl", *(pytest.param(n, marks=REST) for n in ("qwen3_5", "paddleocr_vl"))]
)
def test_compile(swap_in, name):
    """The language model and what of the tower Dynamo takes; transformers' own tower breaks the graph."""
    original = build_model(name)
    ours = swap_in(original)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    batch = prompt(name, "image")
    with torch.no_grad():
        expected, actual = original(**batch), compiled(**batch)
    assert torch.equal(actual.logits, expected.logits)


def exportable(name):
    """A tower as transformers' exporters call it: ids, weights and lengths are computed before."""
    from transformers.exporters.utils import _prepare_grid_thw_vision_inputs

    tower = build_model(name).model.visual
    arguments = prompt(name, "images")
    given = {"grid_thw": arguments["image_grid_thw"]}
    _prepare_grid_thw_vision_inputs(tower, given)
    assert "interp_indices" in given
    return tower, given | {"hidden_states": arguments["pixel_values"]}


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5"])
def test_export_of_the_tower(swap_in, name):
    original, given = exportable(name)
    ours = swap_in(original)
    with torch.no_grad():
        program = torch.export.export(ours, (), given, strict=False)
        expected = original(**given).pooler_output
        assert torch.equal(program.module()(**given).pooler_output, expected)
    assert any("embedding_lookup" in str(node.target) for node in program.graph.nodes)


@REST
def test_onnx_export_of_the_tower(swap_in, tmp_path):
    """The graph of the patch's own code: ONNX has no such op as ours."""
    from helpers.vision_towers import patched

    original, given = exportable("qwen3_5")
    graphs = []
    for tower in (patched.patch_model(original), swap_in(original)):
        file = tmp_path / "tower.onnx"
        torch.onnx.export(tower, (), file, kwargs=given, dynamo=True)
        nodes = onnx.load(file).graph.node
        graphs.append([(node.op_type, node.input, node.output, node.attribute) for node in nodes])
    assert graphs[0] == graphs[1]
    assert "Gather" in {node[0] for node in graphs[0]}
