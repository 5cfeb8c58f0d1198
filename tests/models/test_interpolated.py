"""The weighted lookup against the models that have it: transformers' own code, run and not retyped."""

import copy
import importlib
import inspect

import pytest
import torch
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from helpers import bounds, reference
from helpers.reference import FLOATS

MODELS = [
    "cohere_compass",
    "muse_glimmer",
    "muse_spark",
    "paddleocr_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_omni_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen4_exp",
]
LOOKUP = "interp_weights[:, :, None]).sum(1)"  # the line that the op replaces
GRID = torch.tensor([[1, 10, 14], [2, 6, 4]])  # two images, the second of two frames
AUTOCAST = {"autocast": torch.bfloat16, "autocast to float16": torch.float16}
SIDE = 12  # of the table's grid
COLUMNS = 66  # heads of an even size, and a last block that is not whole


class Captured(Exception):
    """Raised by a hook that has seen enough: what comes after the lookup is not under test."""


def module_with_the_lookup(model):
    """An instance of the class whose forward has the lookup, small, and of random parameters."""
    modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    (cls,) = [
        cls
        for _, cls in inspect.getmembers(modeling, inspect.isclass)
        if cls.__module__ == modeling.__name__
        and "forward" in vars(cls)
        and LOOKUP in inspect.getsource(cls.forward)
    ]
    config_class = getattr(cls, "config_class", None)
    if config_class is None:  # not a model of its own, but a part of one
        config_class = inspect.signature(cls.__init__).parameters["config"].annotation
    config = config_class()
    sizes = {"hidden_size": COLUMNS, "num_position_embeddings": SIDE**2, "image_size": 8 * SIDE}
    sizes |= {"depth": 1, "num_hidden_layers": 1, "num_heads": 3, "num_attention_heads": 3}
    sizes |= {"patch_size": 8, "intermediate_size": 8, "out_hidden_size": 8}
    for name, value in sizes.items():
        if hasattr(config, name):
            setattr(config, name, value)
    config._attn_implementation = "eager"
    module = cls(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def pixels(patches, tokens):
    """As many patches as the module that embeds them takes."""
    if isinstance(patches, torch.nn.Linear):
        return torch.randn(tokens, patches.in_features)
    if isinstance(patches, torch.nn.Conv2d):
        return torch.randn(1, tokens, patches.in_channels, *patches.kernel_size)
    return torch.randn(tokens, patches.proj.weight[0].numel())


def run_lookup(module, dtype, ids, weights):
    """What the lookup is given in the module's forward: the table and the residual; and what comes of it."""
    seen = {}
    patches = getattr(module, "patch_embed", None) or module.patch_embedding
    (embedding,) = [m for m in module.modules() if isinstance(m, torch.nn.Embedding)]

    def see_residual(_, args, output):
        seen["residual"] = output.reshape(len(ids), -1)

    def see_result(_, args):
        seen["result"] = args[0]
        raise Captured

    patches.register_forward_hook(see_residual)
    if hasattr(module, "rotary_pos_emb"):  # a whole tower: up to here
        module.rotary_pos_emb.register_forward_pre_hook(see_result)
    try:
        values = pixels(patches, len(ids)).to(dtype)
        precomputed = {"interp_indices": ids, "interp_weights": weights}
        seen["result"] = module(values, grid_thw=GRID, **precomputed)
    except Captured:
        pass
    return embedding.weight, seen["residual"], seen["result"]


@pytest.fixture(scope="module")
def modules():
    """One of each model."""
    return {model: module_with_the_lookup(model) for model in MODELS}


@pytest.mark.variant("cpu")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [*FLOATS[:3], *AUTOCAST], ids=str)
@pytest.mark.parametrize("align_corners", [False, True])
def test_forward_and_gradient(variant, kernel, modules, model, dtype, align_corners):
    """The same bits; and the gradient of what follows within the float64 sum's rounding."""
    ids, weights = get_vision_interpolation_indices_and_weights(
        GRID, SIDE, align_corners=align_corners, spatial_merge_size=2
    )
    autocast = AUTOCAST.get(dtype)
    dtype = torch.float32 if autocast else dtype
    module = copy.deepcopy(modules[model]).to(dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        table, residual, expected = run_lookup(module, dtype, ids, weights)
        actual = kernel.fused_embedding_lookup(
            ids,
            table,
            weights=weights,
            residual=residual,
            embedding_dtype=residual.dtype,
        )
    assert residual.dtype == (autocast or dtype)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected.reshape(actual.shape))

    grad = torch.randn_like(actual)
    (grad_table,) = torch.autograd.grad(actual, table, grad)
    exact, magnitude = reference.grad_table(grad, ids, len(table), weights=weights, shared=True)
    bounds.assert_sum(grad_table, exact, magnitude, len(ids), variant.sum_eps(dtype))


@pytest.mark.variant("cpu")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 70, 1152, 1280])
@pytest.mark.parametrize("patches", [14, 90])
def test_any_width(kernel, poison, dtype, columns, patches):
    """The models' one formula at the widths that they have, and odd ones."""
    ids, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, patches, patches]]), 48, align_corners=True, spatial_merge_size=2
    )
    table = torch.randn(48**2, columns).to(dtype)
    residual = torch.randn(len(ids), columns).to(dtype)
    lookup = kernel.fused_embedding_lookup(ids, table, weights=weights, residual=residual)
    assert torch.equal(lookup, residual + reference.interpolated(ids, table, weights))


@pytest.mark.variant("cpu")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reference_is_the_op_s_and_the_models_formula(dtype):
    """With four entries PyTorch's sum is sequential, so the two ways of writing it agree."""
    ids, weights = torch.randint(0, 9, (500, 4)), torch.randn(500, 4)
    table = torch.randn(9, 75).to(dtype)
    for embedding_dtype in FLOATS:
        assert torch.equal(
            reference.eager(ids, table, weights=weights, embedding_dtype=embedding_dtype),
            reference.interpolated(ids, table, weights, embedding_dtype),
        )
