"""Ways of training Gemma 4 with our layers swapped in, each against the same with transformers' own.

Loss and gradients are equal to the bit but for the table's, whose sum is taken in another order.
"""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from helpers import swapping, tiny_models
from helpers.bounds import assert_same_gradients

pytestmark = pytest.mark.variant("cpu", "cuda")
NAMES = ["e2b", "unified-12b"]
EVERY_DTYPE = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
TABLES = ("position_embedding_table", "pos_embedding")


def batch(name):
    """A prompt with its labels."""
    arguments = tiny_models.prompt(name)
    labels = arguments["input_ids"].masked_fill(arguments["mm_token_type_ids"] != 0, -100)
    return {**arguments, "labels": labels}


def assert_same_step(swap_in, original, name, step=lambda model, batch: model(**batch).loss):
    """Swap our layers into the model as it is, and compare a forward and backward."""
    ours = swap_in(original)
    losses = [step(model, batch(name)) for model in (original, ours)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert_same_gradients(ours, original)
    return ours


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("table", ["frozen", "trained"])
@EVERY_DTYPE
def test_lora(swap_in, name, table, dtype):
    """LoRA on every linear layer, the patch projection too; the table frozen or in modules_to_save."""
    model = tiny_models.build(name, dtype)
    embedder = "embed_vision" if name == "unified-12b" else "patch_embedder"
    projection = "patch_dense" if name == "unified-12b" else "input_proj"
    layers = r"language_model\..*\.(q_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    layers += r"|vision_tower\..*\.(q_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)\.linear"
    if table == "frozen":  # else the projection is trained whole, with the table
        layers += rf"|{embedder}\.{projection}|vision_tower\.{embedder}\.{projection}"
    config = LoraConfig(
        r=4,
        target_modules=rf"model\.({layers})",
        modules_to_save=[embedder] if table == "trained" else None,
        init_lora_weights=False,
    )
    model = get_peft_model(model, config).train()
    ours = assert_same_step(swap_in, model, name)
    tables = [p for n, p in ours.named_parameters() if n.endswith(TABLES) and p.requires_grad]
    assert len(tables) == (1 if table == "trained" else 0)
    if table == "frozen":
        assert any(
            "lora" in n and projection in n and p.grad is not None
            for n, p in ours.named_parameters()
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("use_reentrant", [True, False])
@EVERY_DTYPE
def test_gradient_checkpointing(swap_in, name, use_reentrant, dtype):
    model = tiny_models.build(name, dtype).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    assert_same_step(swap_in, model, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(variant, swap_in, name, dtype):
    """16-bit arithmetic, float32 weights and gradients."""

    def step(model, batch):
        with torch.autocast(variant.device.type, dtype):
            return model(**batch).loss

    ours = assert_same_step(swap_in, tiny_models.build(name).train(), name, step)
    assert {p.grad.dtype for p in ours.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("name", NAMES)
@EVERY_DTYPE
def test_gradient_accumulation(swap_in, name, dtype):
    """Three steps into the same gradients."""
    original = tiny_models.build(name, dtype).train()
    ours = swap_in(original)
    for model in (original, ours):
        for _ in range(3):
            (model(**batch(name)).loss / 3).backward()
    assert_same_gradients(ours, original)


def test_compiled_training_step(swap_in):
    """The layer in a compiled vision tower: one graph, no break, the gradients of the plain one."""
    original = tiny_models.build("e2b").model.vision_tower.patch_embedder
    ours = swap_in(torch.nn.Sequential(original))[0]
    compiled = torch.compile(ours, fullgraph=True)
    prompt = tiny_models.prompt("e2b")
    pixels, ids = prompt["pixel_values"], prompt["image_position_ids"]
    for model in (compiled, original):
        model(pixels, ids, (ids == -1).all(-1)).square().mean().backward()
    for parameter, expected in zip(ours.parameters(), original.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("table", ["frozen", "trained"])
def test_quantised_projection(swap_in, name, table):
    """An 8-bit projection of the patches, by torchao; the table frozen or trained."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = tiny_models.build(name).train()
    embedder = next(m for m in model.modules() if isinstance(m, swapping.LAYERS))
    for path, parameter in model.named_parameters():
        parameter.requires_grad_("layernorm" in path)
    for path, parameter in embedder.named_parameters():
        parameter.requires_grad_(table == "trained" and path.endswith(TABLES))
    quantize_(
        embedder, Int8WeightOnlyConfig(), lambda m, path: path in ("input_proj", "patch_dense")
    )
    assert_same_step(swap_in, model, name)


def two_steps(folder, variant):
    """What both trainers are told."""
    return {
        "output_dir": folder,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": variant.device.type == "cpu",
    }


class Prompts(torch.utils.data.Dataset):
    def __init__(self, name):
        self.item = {key: value[0] for key, value in batch(name).items()}

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.item


@pytest.mark.parametrize("name", NAMES)
def test_trainer(variant, swap_in, name, tmp_path):
    """Two optimizer steps of transformers' Trainer."""
    losses = []
    original = tiny_models.build(name).train()
    for model in (copy.deepcopy(original), swap_in(original)):
        arguments = TrainingArguments(
            per_device_train_batch_size=2,
            gradient_checkpointing=True,
            **two_steps(tmp_path, variant),
        )
        # The data loader's sampler draws on the CPU, whatever the default device is.
        with torch.device("cpu"):
            trainer = Trainer(model, arguments, train_dataset=Prompts(name))
            trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.parametrize("name", ["e2b", "31b"])
def test_trl_sft(variant, swap_in, name, tmp_path):
    """Two steps of TRL's SFTTrainer on conversations with photos, LoRA on the language model."""
    losses = []
    original = tiny_models.build(name).train()
    rows = [
        {"images": [photo], "messages": tiny_models.conversation({})}
        for photo in tiny_models.photos(3)
    ]
    for model in (copy.deepcopy(original), swap_in(original)):
        arguments = SFTConfig(
            per_device_train_batch_size=1,
            max_length=None,
            bf16=False,
            **two_steps(tmp_path, variant),
        )
        with torch.device("cpu"):
            trainer = SFTTrainer(
                model,
                args=arguments,
                train_dataset=Dataset.from_list(rows),
                processing_class=tiny_models.processor(),
                peft_config=LoraConfig(target_modules=r".*language_model.*(q_proj|v_proj)"),
            )
            trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(swap_in, name, tmp_path):
    """A swapped model saves what the original loads, and the other way round."""
    original = tiny_models.build(name)
    ours = swap_in(original)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.5)
    ours.save_pretrained(tmp_path)
    loaded = type(original).from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch(name)).loss, ours(**batch(name)).loss)
    ours.load_state_dict(original.state_dict(), strict=True)
    assert torch.equal(ours(**batch(name)).loss, original(**batch(name)).loss)
