"""The layer of Gemma 4 Unified, the encoder-free 12B, swapped in by `kernels.kernelize`."""

import inspect
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma4UnifiedTextConfig, Gemma4UnifiedVisionConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedVisionEmbedder

from helpers import bounds, reference
from helpers.problems import grid

CONFIGS = (
    Gemma4UnifiedVisionConfig(
        patch_size=2, mm_embed_dim=48, mm_posemb_size=40, output_proj_dims=48
    ),
    Gemma4UnifiedTextConfig(hidden_size=32),
)
PATCH = 3 * (2 * 3) ** 2


def embedder(dtype):
    module = Gemma4UnifiedVisionEmbedder(*CONFIGS)
    torch.nn.init.normal_(module.pos_embedding)
    return module.to(dtype)


def images(dtype):
    """Two images of 9 x 6 and 6 x 6 patches, padded to 60; and patches placed on one axis only."""
    ids = torch.cat([grid(1, 60, *size) for size in ((9, 6), (6, 6))])
    ids[0, 3, 0] = -1
    ids[0, 4, 1] = -1
    ids[0, 5] = -2  # not padding: reads row 0
    return torch.rand(2, 60, PATCH).to(dtype), ids


@pytest.mark.parametrize("dtype", reference.FLOATS, ids=str)
def test_vision_embedder(variant, swap_in, dtype):
    """Equal output; gradients as eager's, the table's the float64 sum but for rounding."""
    original = embedder(dtype)
    ours = swap_in(original)
    pixels, ids = images(dtype)
    # What reaches the table is the gradient of the sum, before the norms.
    sums = {}
    for name, model in (("original", original), ("ours", ours)):
        model.pos_norm.register_full_backward_hook(
            lambda module, grad_in, grad_out, name=name: sums.update({name: grad_in[0]})
        )
    expected, actual = original(pixels, ids), ours(pixels, ids)
    assert type(actual) is BaseModelOutputWithPooling
    for key in ("last_hidden_state", "pooler_output"):
        assert torch.equal(actual[key], expected[key])

    grad = torch.randn_like(expected.pooler_output)
    expected.pooler_output.backward(grad)
    actual.pooler_output.backward(grad)
    for (name, parameter), theirs in zip(ours.named_parameters(), original.parameters()):
        if name != "pos_embedding":
            assert torch.equal(parameter.grad, theirs.grad), name
    assert torch.equal(sums["ours"], sums["original"])
    exact, magnitude = reference.grad_table(sums["ours"], ids, 40, padding_id=-1)
    grad = ours.pos_embedding.grad.transpose(0, 1)
    bounds.assert_sum(grad, exact, magnitude, 30, variant.sum_eps(dtype))


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(variant, swap_in, autocast_dtype):
    original = embedder(torch.float32)
    ours = swap_in(original)
    batch = images(torch.float32)
    with torch.autocast(variant.device.type, autocast_dtype):
        expected, actual = original(*batch), ours(*batch)
    assert torch.equal(actual.pooler_output, expected.pooler_output)


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every op by its name."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls.append((op._opname, args))
        return op(*args, **(kwargs or {}))


@pytest.mark.variant("cpu")
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("device", ["cuda", "mps", "cpu"])
def test_embedding_dtype_under_autocast(kernel, device, enabled):
    """What `sum` returns on that device is what the layer asks for. Fake tensors: of no GPU."""
    forward = kernel.layers.Gemma4UnifiedVisionEmbedder.forward
    module = embedder(torch.bfloat16)
    torch.set_autocast_enabled(device, enabled)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            for owner in module.modules():
                for name, parameter in owner.named_parameters(recurse=False):
                    like = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    owner._parameters[name] = torch.nn.Parameter(like)
            ids = torch.empty(2, 60, 2, dtype=torch.int64, device=device)
            pixels = torch.empty(2, 60, PATCH, dtype=torch.bfloat16, device=device)
            summed = torch.empty(2, 3, dtype=torch.bfloat16, device=device).sum(-2).dtype
            with Recorder() as recorder, torch.no_grad():
                forward(module, pixels, ids)
        assert isinstance(pixels, FakeTensor) and pixels.fake_mode is fake
    finally:
        torch.set_autocast_enabled(device, False)
    (arguments,) = [args for name, args in recorder.calls if name == "forward"]
    asked = arguments[6] or arguments[1].dtype
    assert asked == summed
    assert summed == (torch.float32 if enabled and device != "cpu" else torch.bfloat16)


@pytest.mark.parametrize("one", ["ids", "pixels"])
def test_a_batch_of_one_broadcasts(swap_in, one):
    original = embedder(torch.float32)
    ours = swap_in(original)
    pixels, ids = images(torch.float32)
    batch = (pixels[:1], ids) if one == "pixels" else (pixels, ids[:1])
    expected, actual = original(*batch), ours(*batch)
    assert torch.equal(actual.pooler_output, expected.pooler_output)


def test_tuple(swap_in):
    original = embedder(torch.float32)
    ours = swap_in(original)
    batch = images(torch.float32)
    expected, actual = original(*batch, return_dict=False), ours(*batch, return_dict=False)
    assert type(actual) is tuple
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_compiled(swap_in):
    """No graph break comes from the layer, forward or backward."""
    original = embedder(torch.float32)
    ours = swap_in(original)
    compiled = torch.compile(ours, fullgraph=True)
    batch = images(torch.float32)
    for module in (compiled, original):
        module(*batch).pooler_output.square().mean().backward()
    for parameter, expected in zip(ours.parameters(), original.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_layer_is_pure(kernel):
    layer = kernel.layers.Gemma4UnifiedVisionEmbedder
    own = {name for name in vars(layer) if not name.startswith("__")}
    assert own == {"forward", "has_backward", "can_torch_compile"}
    ours = inspect.signature(layer.forward).parameters
    assert list(ours) == list(inspect.signature(Gemma4UnifiedVisionEmbedder.forward).parameters)


@pytest.mark.parametrize("dtype", reference.FLOATS, ids=str)
def test_layout_is_the_original(kernel, dtype):
    """Same constructor, same parameters, same forward: checkpoints load, and it is a true fallback."""
    original = embedder(dtype)
    layout = kernel.layers.Gemma4UnifiedVisionEmbedderLayout(*CONFIGS).to(dtype)
    layout.load_state_dict(original.state_dict(), strict=True)
    batch = images(dtype)
    for _ in range(2):
        for actual, expected in zip(layout(*batch).to_tuple(), original(*batch).to_tuple()):
            assert torch.equal(actual, expected)
        # And the layer's forward runs on it, as `kernelize` makes it.
        forward = kernel.layers.Gemma4UnifiedVisionEmbedder.forward
        layout.forward = types.MethodType(forward, layout)
