"""Tiny random vision towers of transformers' own classes, and our layers in them."""

import importlib
import sys
from pathlib import Path

import kernels
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2] / "upstream"))
import patched

LAYER = "VisionInterpolatedPositionEmbedding"
QWEN = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 24,
    "num_position_embeddings": 8**2,
}
DEEPSTACK = QWEN | {"deepstack_visual_indexes": [0]}
MUSE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 4,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "max_position_embeddings": 64,
    "layer_types": ["window_attention", "full_attention"],
}
PADDLE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 32,
    "patch_size": 4,
}
KIMI = {key: value for key, value in MUSE.items() if "layer" not in key} | {"num_hidden_layers": 2}
KIMI.pop("max_position_embeddings")

# The small modules that transformers has already, and the towers around them.
SMALL = {
    "paddleocr_vl": ("PaddleOCRVisionEmbeddings", "PaddleOCRVisionModel", PADDLE),
    "muse_glimmer": ("MuseGlimmerVisionPatchEmbedder", "MuseGlimmerVisionModel", MUSE),
    "muse_spark": ("MuseSparkVisionPatchEmbedder", "MuseSparkVisionModel", MUSE),
    "kimi_k25": ("Kimi_K25VisionPositionEmbeddings", "Kimi_K25VisionModel", KIMI),
}
GRID = [[1, 6, 8], [3, 4, 6], [1, 2, 10]]  # two images and a video


def build(name, dtype=torch.float32):
    """A tower of transformers' own class, the same weights on every call."""
    torch.manual_seed(0)
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    if name in SMALL:
        _, tower, config = SMALL[name]
    else:
        tower = patched.TOWERS[name]
        config = QWEN if name in ("qwen3_5", "qwen3_5_moe", "qwen4_exp") else DEEPSTACK
    tower = getattr(modeling, tower)
    tower = tower._from_config(tower.config_class(**config), attn_implementation="eager")
    for path, parameter in tower.named_parameters():
        if "pos" in path:  # some of them are zeros at first
            nn.init.normal_(parameter)
    return tower.to(dtype).eval()


def inputs(name, grid, dtype=torch.float32):
    """Arguments of the tower's forward."""
    grid = torch.tensor(grid)
    patches = int(grid.prod(1).sum())
    generator = torch.Generator("cpu").manual_seed(1)  # the same numbers on every device
    shape = {"paddleocr_vl": (1, patches, 3, 4, 4), "kimi_k25": (patches, 3, 4, 4)}
    shape = shape.get(name, (patches, 2 * 3 * 4 * 4))
    pixels = torch.randn(shape, generator=generator, device="cpu").to(grid.device)
    return {
        ("hidden_states" if name in patched.TOWERS else "pixel_values"): pixels.to(dtype),
        "grid_thw": grid,
    }


def _small(name):
    """The class of transformers of SMALL."""
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    return getattr(modeling, SMALL[name][0])


def undo(setattr):
    """Take back, with pytest's `monkeypatch.setattr`, what `swap` does to the classes."""
    for name in SMALL:
        setattr(_small(name), "kernel_layer_name", None, raising=False)
        setattr(_small(name), "kernel_condition", None, raising=False)


def swap(model, variant_dir, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE):
    """A copy of a model, patched, with our layers; having checked that they are there."""
    model = patched.patch_model(model)
    layers = [LAYER, *(layer for layer, _, _ in SMALL.values())]
    for name, (layer, _, _) in SMALL.items():
        if getattr(_small(name), "kernel_layer_name", None) is None:
            kernels.replace_kernel_forward_from_hub(_small(name), layer)
    mapping = {}
    for layer in layers:
        repository = kernels.LocalLayerRepository(variant_dir, layer_name=layer)
        mapping[layer] = {device: repository for device in ("cpu", "cuda")}
    device = next(model.parameters()).device
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(model, mode=mode, device=device.type)
    swapped = [m for m in model.modules() if getattr(type(m), "kernel_layer_name", None) in layers]
    assert swapped
    for module in swapped:
        assert module.forward.__func__.__module__.startswith("_fused_embedding_lookup_")
    return model


TEXT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
    "eos_token_id": None,
    "pad_token_id": 0,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
HYPER_CONNECTIONS = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "hc_count": 2,
    "hc_lowrank": 4,
    "shared_expert_intermediate_size": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
PLAIN = {key: value for key, value in TEXT.items() if key != "rope_parameters"}
COMPASS = PLAIN | {"hidden_size": 32, "rope_parameters": {"full_attention": SECTIONS}}
PADDLE_TEXT = TEXT | {"rope_parameters": SECTIONS}
GLIMMER = PLAIN | {"bos_token_id": None}
SPARK = GLIMMER | {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "moe_hidden_size": 24,
}
DEEPSEEK = {key: value for key, value in PLAIN.items() if key != "head_dim"} | {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
# Whole models: the class, its text model's configuration, its vision tower's.
MODELS = {
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", TEXT, DEEPSTACK),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", TEXT | EXPERTS, DEEPSTACK),
    "qwen3_omni_moe": ("Qwen3OmniMoeThinkerForConditionalGeneration", TEXT | EXPERTS, DEEPSTACK),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", TEXT | LINEAR, QWEN),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", TEXT | LINEAR | EXPERTS, QWEN),
    "qwen4_exp": (
        "Qwen4ExpForConditionalGeneration",
        TEXT | LINEAR | EXPERTS | HYPER_CONNECTIONS,
        QWEN,
    ),
    "cohere_compass": (
        "CohereCompassForConditionalGeneration",
        COMPASS,
        DEEPSTACK | {"out_hidden_size": 32},
    ),
    "paddleocr_vl": ("PaddleOCRVLForConditionalGeneration", PADDLE_TEXT, PADDLE),
    "muse_glimmer": ("MuseGlimmerForConditionalGeneration", GLIMMER, MUSE),
    "muse_spark": ("MuseSparkForConditionalGeneration", SPARK, MUSE),
    "kimi_k25": ("Kimi_K25ForConditionalGeneration", DEEPSEEK, KIMI),
}
# What else is in a model's configuration.
PROJECTOR = {"out_hidden_size": 128, "projector_hidden_size": 32}
AUDIO = {"encoder_layers": 1, "encoder_attention_heads": 1, "encoder_ffn_dim": 8, "d_model": 8}
AUDIO |= {"output_dim": 24, "downsample_hidden_size": 4, "num_mel_bins": 16}
PYRAMID = {"patch_sizes": [2], "hidden_sizes": [8], "depths": [1], "num_hidden_layers": 1}
REST = {
    "qwen3_omni_moe": {"audio_config": AUDIO},
    "muse_glimmer": PROJECTOR,
    "muse_spark": PROJECTOR | {"audio_config": PYRAMID | {"out_hidden_size": 24}},
    "kimi_k25": {"projection_hidden_size": 32},
}
# What a table is called, in all of them.
TABLES = (
    "pos_embed",
    "position_embedding.",
    "position_embedding_table",
    "pos_emb.position_embeddings",
)
IMAGE, VIDEO, START, END = 60, 61, 62, 63


def build_model(name, dtype=torch.float32):
    """A whole model, tiny and random, the same weights on every call."""
    torch.manual_seed(0)
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    cls, text, vision = MODELS[name]
    cls = getattr(modeling, cls)
    config = cls.config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        **REST.get(name, {}),
    )
    model = cls._from_config(config, attn_implementation="eager")
    for table in tables(model):
        nn.init.normal_(table)
    return model.to(dtype).eval()


def tables(model):
    """The parameters that our layer looks ids up in: one."""
    return [p for path, p in model.named_parameters() if any(name in path for name in TABLES)]


def prompt(name, media, dtype=torch.float32):
    """Arguments of a whole model's forward and `generate`: words around an image, several, or a video."""
    grid = {"image": [[1, 6, 8]], "images": [[1, 6, 8], [1, 4, 2]], "video": [[2, 4, 6]]}[media]
    token = VIDEO if media == "video" else IMAGE
    tokens = [5, 6]
    for frames, height, width in grid:
        apart = (
            1 if name == "qwen3_omni_moe" else frames
        )  # a video's frames stand apart, but for Omni
        for _ in range(apart):
            tokens += [START, *[token] * (frames * height * width // 4 // apart), END, 9]
    ids = torch.tensor([tokens + [7, 8]])
    pixels = inputs(name, grid, dtype)
    grid = pixels.pop("grid_thw")
    (pixels,) = pixels.values()
    if name == "paddleocr_vl":  # the model adds the batch
        pixels = pixels[0]
    values, sizes = (
        ("pixel_values_videos", "video_grid_thw")
        if media == "video"
        else ("pixel_values", "image_grid_thw")
    )
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == token).int() * (2 if media == "video" else 1),
        values: pixels,
        sizes: grid,
    }
    if name in ("muse_glimmer", "muse_spark", "kimi_k25", "qwen3_omni_moe"):  # which take none
        del batch["mm_token_type_ids"]
    if name == "qwen3_omni_moe" and media == "video":
        batch["video_second_per_grid"] = torch.ones(len(grid))
    return batch
