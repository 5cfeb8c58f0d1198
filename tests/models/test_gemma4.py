"""The layer in transformers' own Gemma 4 classes, swapped in by `kernels.kernelize`."""

import inspect
import types

import pytest
import torch
from kernels import Mode
from transformers import Gemma4VisionConfig, Gemma4VisionModel
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionPatchEmbedder

from helpers import bounds, reference
from helpers.problems import grid

pytestmark = pytest.mark.asan
CONFIG = Gemma4VisionConfig(**reference.SMALL_VISION_CONFIG)


def embedder(dtype):
    module = Gemma4VisionPatchEmbedder(CONFIG)
    with torch.no_grad():
        module.position_embedding_table.normal_()
    return module.to(dtype)


def images(dtype, padded=True):
    """Two images of 9 x 6 and 6 x 6 patches, padded to 63 patches unless not."""
    sizes = [(9, 6), (6, 6)] if padded else [(9, 6), (9, 6)]
    patches = 63 if padded else 54
    ids = torch.cat([grid(1, patches, *size) for size in sizes])
    pixels = torch.rand(2, patches, 3 * 16**2).to(dtype)
    return pixels, ids, (ids == -1).all(-1)


@pytest.mark.parametrize("dtype", reference.FLOATS, ids=str)
@pytest.mark.parametrize("padded", [True, False])
def test_patch_embedder(variant, swap_in, dtype, padded):
    """Equal output; gradients as eager's, the table's the float64 sum but for rounding."""
    original = embedder(dtype)
    ours = swap_in(original)
    pixels, ids, padding = images(dtype, padded)
    expected, actual = original(pixels, ids, padding), ours(pixels, ids, padding)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)

    grad = torch.randn_like(expected)
    expected.backward(grad)
    actual.backward(grad)
    assert torch.equal(ours.input_proj.weight.grad, original.input_proj.weight.grad)
    exact, magnitude = reference.grad_table(grad, ids, 128, padding)
    grad = ours.position_embedding_table.grad
    bounds.assert_sum(grad, exact, magnitude, 18, variant.sum_eps(dtype))


@pytest.mark.parametrize("pixels_dtype", [*reference.FLOATS, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", reference.FLOATS[:3], ids=str)
def test_pixels_of_another_dtype(swap_in, dtype, pixels_dtype):
    """Equal output, and the gradient of the pixels, of which processors make float32."""
    original = embedder(dtype)
    ours = swap_in(original)
    pixels, *places = images(torch.float32)
    pixels = (
        (255 * pixels).to(pixels_dtype) if pixels_dtype == torch.uint8 else pixels.to(pixels_dtype)
    )
    pixels.requires_grad_(pixels.is_floating_point())
    expected, actual = original(pixels, *places), ours(pixels, *places)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)
    if pixels.requires_grad:
        grad = torch.randn_like(expected)
        ours_grad, expected_grad = (
            torch.autograd.grad(out, pixels, grad)[0] for out in (actual, expected)
        )
        assert torch.equal(ours_grad, expected_grad)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_patch_embedder_under_autocast(variant, swap_in, autocast_dtype):
    """The projection is 16-bit, the table float32: mixed dtypes, a float32 result."""
    original = embedder(torch.float32)
    ours = swap_in(original)
    pixels, ids, padding = images(torch.float32)
    with torch.autocast(variant.device.type, autocast_dtype):
        expected, actual = original(pixels, ids, padding), ours(pixels, ids, padding)
    assert expected.dtype == actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    actual.backward(grad)
    exact, magnitude = reference.grad_table(grad, ids, 128, padding)
    grad = ours.position_embedding_table.grad
    bounds.assert_sum(grad, exact, magnitude, 18, variant.sum_eps(torch.float32))
    assert torch.equal(ours.input_proj.weight.grad, original.input_proj.weight.grad)


def test_16_bit_table_under_a_float32_projection(swap_in):
    original = embedder(torch.float32)
    original.position_embedding_table.data = original.position_embedding_table.data.bfloat16()
    ours = swap_in(original)
    batch = images(torch.float32)
    assert torch.equal(ours(*batch), original(*batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_vision_model(swap_in, dtype):
    """The whole tower, forward and backward."""
    original = Gemma4VisionModel(CONFIG).to(dtype)
    with torch.no_grad():
        original.patch_embedder.position_embedding_table.normal_()
    ours = swap_in(original)
    pixels, ids, _ = images(dtype)
    expected = original(pixels, ids).last_hidden_state
    actual = ours(pixels, ids).last_hidden_state
    assert torch.equal(actual, expected)
    expected.sum().backward()
    actual.sum().backward()
    for (name, expected), actual in zip(original.named_parameters(), ours.parameters()):
        if name != "patch_embedder.position_embedding_table":
            assert torch.equal(actual.grad, expected.grad), name


def test_patch_embedder_compiled(swap_in):
    """No graph break comes from the layer."""
    original = embedder(torch.float32)
    compiled = torch.compile(swap_in(original), fullgraph=True)
    batch = images(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*batch), original(*batch))


@pytest.mark.parametrize(
    "mode", [Mode.INFERENCE, Mode.TRAINING, Mode.INFERENCE | Mode.TORCH_COMPILE]
)
def test_every_mode_is_served(swap_in, mode):
    swap_in(embedder(torch.float32), mode)


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize("one", ["ids", "padding", "ids and padding", "pixels"])
def test_a_batch_of_one_broadcasts(kernel, swap_in, one, twin):
    """As the original's additions do; expanded, so that the gradient is the sum over the batch."""
    original = embedder(torch.float32)
    ours = swap_in(original)
    if twin:
        ours = kernel.layers.Gemma4VisionPatchEmbedderLayout(CONFIG)
        ours.load_state_dict(original.state_dict())
    pixels, ids, padding = images(torch.float32)
    ids = ids[:1] if "ids" in one else ids
    padding = padding[:1] if "padding" in one else padding
    pixels = pixels[:1] if one == "pixels" else pixels
    results = []
    for module in (original, ours):
        out = module(pixels, ids, padding)
        results.append((out, *torch.autograd.grad(out.pow(2).sum(), module.parameters())))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0], results[1])


class Doubled(Gemma4VisionPatchEmbedder):
    """A subclass with position embeddings of its own."""

    def _position_embeddings(self, pixel_position_ids, padding_positions):
        return 2 * super()._position_embeddings(pixel_position_ids, padding_positions)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("how", ["subclass", "instance"])
def test_overridden_position_embeddings_are_called(swap_in, how, compiled):
    original = Doubled(CONFIG) if how == "subclass" else embedder(torch.float32)
    torch.nn.init.normal_(original.position_embedding_table)
    ours = swap_in(original)
    if how == "instance":
        for module in (original, ours):
            module._position_embeddings = lambda ids, padding: ids.float().sum(-1, keepdim=True)
    batch = images(torch.float32)
    module = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    assert torch.equal(module(*batch), original(*batch))


@pytest.mark.parametrize("compiled", [False, True])
def test_transforms(swap_in, compiled):
    """Per-sample gradients, a Hessian's product with a vector and a tangent, through the layer."""
    original = embedder(torch.float32)
    ours = swap_in(original)
    batch = images(torch.float32)
    parameters = {name: p.detach() for name, p in original.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}

    def transforms(module):
        def loss(parameters, *sample):
            return torch.func.functional_call(module, parameters, sample).pow(3).mean()

        def transformed(parameters):
            grad = torch.func.grad(loss)
            return (
                torch.func.vmap(grad, (None, 0, 0, 0))(parameters, *batch),
                torch.func.jvp(lambda p: grad(p, *batch), (parameters,), (tangents,)),
                torch.func.jvp(lambda p: loss(p, *batch), (parameters,), (tangents,)),
            )

        return transformed

    expected = transforms(original)(parameters)
    actual = transforms(ours)
    if compiled:
        torch._dynamo.reset()
        actual = torch.compile(actual, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(actual(parameters), expected)


def test_layer_is_pure(kernel):
    layer = kernel.layers.Gemma4VisionPatchEmbedder
    own = {name for name in vars(layer) if not name.startswith("__")}
    assert own == {"forward", "has_backward", "can_torch_compile"}
    assert layer.has_backward and layer.can_torch_compile
    ours = inspect.signature(layer.forward).parameters
    assert list(ours) == list(inspect.signature(Gemma4VisionPatchEmbedder.forward).parameters)


def test_input_proj_is_called_as_a_module(swap_in):
    """So that LoRA wrappers, quantised weights and hooks on it keep working."""
    ours = swap_in(embedder(torch.float32))
    calls = []
    ours.input_proj.register_forward_hook(lambda *_: calls.append(1))
    ours(*images(torch.float32))
    assert calls == [1]


def test_quantised_input_proj_keeps_pixel_values_float(swap_in):
    """With integer weights the original leaves the pixels' dtype alone; so do we."""
    original = embedder(torch.float32)
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.int8), requires_grad=False)
    seen = []

    class Quantised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            seen.append(x.dtype)
            return x.new_zeros(*x.shape[:-1], 64)

    original.input_proj = Quantised()
    batch = images(torch.float32)
    assert torch.equal(swap_in(original)(*batch), original(*batch))
    assert seen == [torch.float32] * 2


@pytest.mark.parametrize("dtype", reference.FLOATS, ids=str)
def test_layout_is_the_original(kernel, dtype):
    """Same constructor, same parameters, same forward: checkpoints load, and it is a true fallback."""
    original = embedder(dtype)
    layout = kernel.layers.Gemma4VisionPatchEmbedderLayout(CONFIG).to(dtype)
    layout.load_state_dict(original.state_dict(), strict=True)
    shapes = {name: p.shape for name, p in original.named_parameters()}
    assert {name: p.shape for name, p in layout.named_parameters()} == shapes
    assert (layout.hidden_size, layout.patch_size) == (original.hidden_size, original.patch_size)
    assert layout.position_embedding_size == original.position_embedding_size
    batch = images(dtype)
    assert torch.equal(layout(*batch), original(*batch))
    # And the layer's forward runs on it, as `kernelize` makes it.
    layout.forward = types.MethodType(kernel.layers.Gemma4VisionPatchEmbedder.forward, layout)
    assert torch.equal(layout(*batch), original(*batch))


def test_padding_negative_and_too_large_ids(request, variant, swap_in):
    """What transformers tests of this module: padding is zeroed, negative ids read row 0, others raise."""
    ours = swap_in(embedder(torch.float32))
    table = ours.position_embedding_table
    pixels = torch.rand(1, 3, 3 * 16**2)
    projected = ours.input_proj(2 * (pixels - 0.5))
    ids = torch.tensor([[[1, 2], [-1, -1], [-1, 3]]])
    padding = torch.tensor([[False, True, False]])
    out = ours(pixels, ids, padding)
    assert torch.equal(out[0, 0], projected[0, 0] + (table[0, 1] + table[1, 2]))
    assert torch.equal(out[0, 1], projected[0, 1])
    assert torch.equal(out[0, 2], projected[0, 2] + (table[0, 0] + table[1, 3]))
    ids[0, 0, 0] = 128
    if variant.sources == "metal":
        # An error at the next synchronisation; other tokens are as before.
        assert torch.equal(ours(pixels, ids, padding)[0, 1:], out[0, 1:])
        assert "got 128 on axis 0 of token 0" in request.getfixturevalue("synchronize")()
    elif variant.name != "cuda":  # a GPU would be lost to the tests after it, see test_errors.py
        with pytest.raises(IndexError if variant.sources == "cpu" else RuntimeError):
            ours(pixels, ids, padding)
