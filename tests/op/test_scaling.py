"""The third op: Gemma 4's pixels, scaled and cast in one pass, against the code that it replaces."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from helpers import reference

pytestmark = [
    pytest.mark.asan,
    pytest.mark.gpu,
    pytest.mark.variant("cpu", "cuda-simt", "metal-simt", "cuda"),
]

FLOATS = reference.FLOATS
# Ties, infinities, what overflows when it is doubled, and what is lost when a half is taken off.
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.5, 0.0, -0.0, 1.0, 65504.0, -65504.0, 3e38,
           1e-40, 0.50390625, 2.0**-24, 0.4999999]  # fmt: skip


def eager(pixel_values, dtype):
    return (2 * (pixel_values - 0.5)).to(dtype)


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.sanitizer
@pytest.mark.parametrize("residual_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equal_to_eager(kernel, poison, dtype, residual_dtype):
    """Every dtype of the pixels and of the result; lengths around those of vectors and blocks."""
    for count in (0, 1, 3, 31, 32, 33, 64, 1000, 1024, 4097):
        pixels = torch.randn(count)
        pixels[: len(SPECIAL)] = torch.tensor(SPECIAL)[:count]
        pixels = pixels.to(dtype)
        actual = kernel.scale_pixels(pixels, residual_dtype)
        assert_same(actual, eager(pixels, residual_dtype))


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_any_strides(kernel, data):
    dtypes = st.sampled_from(FLOATS[:3])
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=0, max_size=4))
    pixels = torch.rand([size + 1 for size in sizes]).to(data.draw(dtypes))
    for dim in range(len(sizes)):
        pixels = pixels.narrow(dim, 1, sizes[dim])[(slice(None),) * dim + (slice(None, None, 2),)]
    pixels = pixels.permute(data.draw(st.permutations(range(len(sizes)))))
    if data.draw(st.booleans()):
        pixels = pixels.unsqueeze(0).expand(3, *pixels.shape)
    dtype = data.draw(dtypes)
    actual = kernel.scale_pixels(pixels, dtype)
    assert actual.is_contiguous()
    assert_same(actual, eager(pixels, dtype))


@pytest.mark.variant("cpu", "cuda")
@pytest.mark.parametrize("offset", [0, 1])
def test_results_that_go_past_the_caches(kernel, poison, offset):
    for dtype in FLOATS[:3]:
        pixels = torch.rand(2**24 + 37)[offset:]
        assert_same(kernel.scale_pixels(pixels, dtype), eager(pixels, dtype))


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_gradient(kernel, dtype):
    pixels = torch.rand(5, 7).to(dtype).requires_grad_()
    for target in FLOATS[:3]:
        grad = torch.randn(5, 7).to(target)
        ours, theirs = (
            torch.autograd.grad(function(pixels, target), pixels, grad)[0]
            for function in (kernel.scale_pixels, eager)
        )
        assert_same(ours, theirs)


TRANSFORMS = {
    "grad": func.grad,
    "jacrev": func.jacrev,
    "jacfwd": func.jacfwd,
    "hessian": func.hessian,
    "per-sample grad": lambda f: func.vmap(func.grad(f)),
    "vmap over the last": lambda f: func.vmap(func.jacrev(f), in_dims=1),
    "jvp": lambda f: lambda x: func.jvp(f, (x,), (torch.ones_like(x),)),
    "forward over reverse": lambda f: func.jacfwd(func.grad(f)),
}


# Dynamo doesn't trace jacfwd itself where a default device is set.
COMPILED = ["grad", "jacrev", "per-sample grad", "jvp"]


@pytest.mark.parametrize(
    ("transform", "compiled"), [*((t, False) for t in TRANSFORMS), *((t, True) for t in COMPILED)]
)
def test_transforms(kernel, transform, compiled):
    """As of the code above, nested or not."""
    pixels = torch.rand(3, 4)

    def loss(function, x):
        return function(x, torch.bfloat16).float().square().sum()

    def of(function):
        transformed = TRANSFORMS[transform](functools.partial(loss, function))
        if compiled and function is not eager:
            torch._dynamo.reset()
            transformed = torch.compile(transformed, fullgraph=True, backend="aot_eager")
        return tree_leaves(transformed(pixels))

    for ours, theirs in zip(of(kernel.scale_pixels), of(eager), strict=True):
        assert_same(ours, theirs)


@pytest.mark.variant("cpu", "cuda")
def test_torch_library(kernel):
    op = kernel.op.ops.scaling.default
    for pixels in (
        torch.rand(3, 4),
        torch.rand(3, 4, requires_grad=True),
        torch.rand(4, 6)[:, ::2],
    ):
        torch.library.opcheck(op, (pixels, torch.bfloat16))


@pytest.mark.variant("cpu")
def test_gradcheck(kernel):
    torch.autograd.gradcheck(
        lambda x: kernel.scale_pixels(x, torch.float64),
        torch.rand(3, 4, dtype=torch.float64, requires_grad=True),
        check_forward_ad=True,
        check_batched_grad=True,
    )


@pytest.mark.variant("cpu", "cuda")
def test_compiled_with_dynamic_shapes(kernel):
    torch._dynamo.reset()
    function = torch.compile(
        lambda x: kernel.scale_pixels(x, torch.bfloat16), fullgraph=True, dynamic=True
    )
    for size in (4, 5, 33):
        pixels = torch.rand(2, size)
        assert_same(function(pixels), eager(pixels, torch.bfloat16))


def test_fake(kernel, device):
    with FakeTensorMode():
        out = kernel.scale_pixels(torch.empty(3, 4).t(), torch.float16)
    assert out.shape == (4, 3) and out.dtype == torch.float16 and out.is_contiguous()
    assert out.device.type == device.type


@pytest.mark.parametrize(
    ("pixels", "dtype", "message"),
    [
        (
            torch.zeros(3, dtype=torch.uint8),
            torch.float32,
            "pixel_values must be float32, .*got Byte",
        ),
        (torch.zeros(3), torch.int64, "dtype must be float32, .*got Long"),
    ],
    ids=["whole pixels", "a whole result"],
)
def test_faults(kernel, device, pixels, dtype, message):
    with pytest.raises(ValueError, match=f"fused_embedding_lookup: {message}"):
        kernel.scale_pixels(pixels.to(device), dtype)


def test_not_a_tensor(kernel):
    with pytest.raises(TypeError, match="pixel_values must be a tensor, got list"):
        kernel.scale_pixels([0.5], torch.float32)
