"""Whole models of the Qwen3-VL family: what they generate, their losses and gradients, with our layer."""

import pytest
import torch

from helpers.vision_towers import MODELS, build_model, prompt, swap, undo

pytestmark = pytest.mark.variant("cpu", "cuda")
DTYPES = [torch.float32, torch.bfloat16]
TABLE = "pos_embed"


@pytest.fixture
def swap_in(variant_dir, monkeypatch):
    """Returns a copy of a model that is patched and has our layer."""
    undo(monkeypatch.setattr)
    return lambda model, *args: swap(model, variant_dir, *args)


def assert_same_step(original, ours, media="image", dtype=torch.float32):
    """The same loss and logits, and the same gradients but for the rounding of the table's."""
    batch = prompt(media, dtype)
    labels = batch["input_ids"].masked_fill(batch["mm_token_type_ids"] != 0, -100)
    expected, actual = (model(**batch, labels=labels) for model in (original, ours))
    assert torch.equal(actual.logits, expected.logits) and torch.equal(actual.loss, expected.loss)
    expected.loss.backward()
    actual.loss.backward()
    theirs = dict(original.named_parameters())
    seen = 0
    for path, parameter in ours.named_parameters():
        grad = theirs[path].grad
        if grad is None:
            assert parameter.grad is None, path
        elif TABLE in path:
            scale = grad.abs().max().item()
            eps = torch.finfo(grad.dtype).eps
            torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=8 * eps * scale)
            assert parameter.grad.count_nonzero() > 0
            seen += 1
        else:
            assert torch.equal(parameter.grad, grad), path
    return seen


@pytest.mark.parametrize("media", ["image", "images", "video"])
@pytest.mark.parametrize("name", MODELS)
def test_generate(swap_in, name, media):
    """The same tokens and, at each, the same scores; and they depend on the position embeddings."""
    original = build_model(name)
    ours = swap_in(original)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    expected, actual = (m.generate(**prompt(media), **options) for m in (original, ours))
    assert torch.equal(actual.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(actual.logits, expected.logits, strict=True))
    ours.model.visual.pos_embed.weight.data.neg_()
    other = ours.generate(**prompt(media), **options)
    assert not torch.equal(other.logits[0], expected.logits[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_training_step(swap_in, name, dtype):
    original = build_model(name, dtype).train()
    assert assert_same_step(original, swap_in(original), "images", dtype) == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5"])
def test_gradient_checkpointing(swap_in, name, use_reentrant):
    models = []
    original = build_model(name).train()
    for model in (original, swap_in(original)):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        models.append(model)
    assert assert_same_step(*models, "video") == 1


@pytest.mark.parametrize("table", ["adapted", "saved", "frozen"])
def test_lora(swap_in, table):
    """Adapters everywhere, the table's among them; or the table trained beside them."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        target_modules=r".*(qkv|q_proj|v_proj" + ("|pos_embed)" if table == "adapted" else ")"),
        modules_to_save=["pos_embed"] if table == "saved" else None,
        init_lora_weights=False,
    )
    original = get_peft_model(build_model("qwen3_vl").train(), config)
    seen = assert_same_step(original, swap_in(original), "images")
    assert seen == {"adapted": 2, "saved": 1, "frozen": 0}[table]


def test_compile(swap_in):
    """The language model and what of the tower Dynamo takes; transformers' own tower breaks the graph."""
    original = build_model("qwen3_vl")
    ours = swap_in(original)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    with torch.no_grad():
        expected, actual = original(**prompt("image")), compiled(**prompt("image"))
    assert torch.equal(actual.logits, expected.logits)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5"])
def test_export_of_the_tower(swap_in, name):
    """As transformers' exporters do: ids, weights and lengths are computed before."""
    from transformers.exporters.utils import _prepare_grid_thw_vision_inputs

    original = build_model(name).model.visual
    ours = swap_in(original)
    arguments = prompt("images")
    given = {"grid_thw": arguments["image_grid_thw"]}
    _prepare_grid_thw_vision_inputs(ours, given)
    assert "interp_indices" in given
    given["hidden_states"] = arguments["pixel_values"]
    with torch.no_grad():
        program = torch.export.export(ours, (), given, strict=False)
        expected = original(**given).pooler_output
        assert torch.equal(program.module()(**given).pooler_output, expected)
    assert any("embedding_lookup" in str(node.target) for node in program.graph.nodes)
