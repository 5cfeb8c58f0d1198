"""Every bad input is refused, with a message that names the argument, what it got and what it takes."""

import re
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

pytestmark = pytest.mark.kernels_ci


def good():
    """Arguments that the op takes, for a test to spoil one of."""
    return {
        "position_ids": torch.zeros(2, 5, 3, dtype=torch.int64),
        "table": torch.randn(3, 4, 8),
        "padding": torch.zeros(2, 5, dtype=torch.bool),
        "residual": torch.randn(2, 5, 8),
    }


BAD = {
    "ids float": ("position_ids", torch.zeros(2, 5, 3), "position_ids must be int64 or int32, got Float"),
    "ids int16": ("position_ids", torch.zeros(2, 5, 3, dtype=torch.int16), "int64 or int32, got Short"),
    "ids scalar": ("position_ids", torch.tensor(1), "position_ids must have shape [..., K], got a tensor without"),
    "ids axes": ("position_ids", torch.zeros(2, 5, 2, dtype=torch.int64), "[..., 3] to go with a table of 3 axes, got [2, 5, 2]"),
    "table rank": ("table", torch.randn(3, 8), "table must have shape [K, P, H], got [3, 8]"),
    "table dtype": ("table", torch.ones(3, 4, 8, dtype=torch.int32), "table must be float32, float16, bfloat16 or float64, got Int"),
    "table complex": ("table", torch.randn(3, 4, 8, dtype=torch.complex64), "table must be float32, float16, bfloat16 or float64, got ComplexFloat"),
    "table float8": ("table", torch.randn(3, 4, 8).to(torch.float8_e4m3fn), "table must be float32, float16, bfloat16 or float64, got Float8_e4m3fn"),
    "table stride": ("table", torch.randn(3, 4, 16)[..., ::2], "table must have a last stride of 1, got 2"),
    "table expanded": ("table", torch.randn(3, 4, 1).expand(3, 4, 8), "table must have a last stride of 1, got 0"),
    "table axes": ("table", torch.randn(5, 4, 8), "table must have shape [K, P, H] with K from 1 to 4, got K = 5"),
    "table no axes": ("table", torch.randn(0, 4, 8), "K from 1 to 4, got K = 0"),
    "table no rows": ("table", torch.randn(3, 0, 8), "table must have at least one row per axis, got P = 0"),
    "table device": ("table", torch.randn(3, 4, 8, device="meta"), "table must be on the device of position_ids, got meta and cpu"),
    "padding dtype": ("padding", torch.zeros(2, 5, dtype=torch.uint8), "padding must be bool, got Byte"),
    "padding shape": ("padding", torch.zeros(2, 4, dtype=torch.bool), "padding must have shape [2, 5] to go with position_ids of shape [2, 5, 3], got [2, 4]"),
    "padding rank": ("padding", torch.zeros(10, dtype=torch.bool), "padding must have shape [2, 5]"),
    "padding device": ("padding", torch.zeros(2, 5, dtype=torch.bool, device="meta"), "padding must be on the device of position_ids, got meta and cpu"),
    "residual dtype": ("residual", torch.ones(2, 5, 8, dtype=torch.int64), "residual must be float32, float16, bfloat16 or float64, got Long"),
    "residual shape": ("residual", torch.randn(2, 5, 7), "residual must have shape [2, 5, 8] to go with position_ids of shape [2, 5, 3], got [2, 5, 7]"),
    "residual leading": ("residual", torch.randn(1, 5, 8), "residual must have shape [2, 5, 8]"),
    "residual rank": ("residual", torch.randn(10, 8), "residual must have shape [2, 5, 8]"),
    "residual device": ("residual", torch.randn(2, 5, 8, device="meta"), "residual must be on the device of position_ids, got meta and cpu"),
}  # fmt: skip


def expected(message, variant):
    """The message as this variant has it. The table above has the CPU's."""
    if variant.sources != "cpu":
        message = message.replace("float16, bfloat16 or float64", "float16 or bfloat16")
    return re.escape(message.replace("and cpu", f"and {torch.zeros(0).device}"))


@pytest.mark.parametrize("argument, value, message", BAD.values(), ids=BAD)
def test_bad_argument(variant, kernel, argument, value, message):
    value = value if value.is_meta else value.to(variant.device)
    arguments = good() | {argument: value}
    with pytest.raises(
        ValueError, match="^fused_embedding_lookup: .*" + expected(message, variant)
    ):
        kernel.fused_embedding_lookup(arguments.pop("position_ids"), **arguments)


API = {"cuda": "CUDA", "metal": "MPS"}
TOO_LARGE = [4, 5, 2**31 - 1, 2**62]


@pytest.mark.variant("cpu")
@pytest.mark.parametrize("bad", TOO_LARGE)
def test_id_too_large(kernel, bad):
    """The message names the id, its axis and P; padded tokens are no exception, as in eager."""
    dtype = torch.int32 if bad < 2**31 else torch.int64
    arguments = good()
    ids = arguments.pop("position_ids").to(dtype)
    ids[1, 2, 1] = bad
    arguments["padding"][1, 2] = True
    message = (
        f"position_ids must be less than the 4 rows of the table, got {bad} on axis 1 of token 7"
    )
    with pytest.raises(IndexError, match=re.escape(message)):
        kernel.fused_embedding_lookup(ids, **arguments)


@pytest.mark.variant("cpu")
def test_first_of_many_ids_too_large_is_named(kernel):
    """Whichever thread meets one first."""
    ids = torch.zeros(5000, 2, dtype=torch.int64)
    ids[1234, 1] = 77
    ids[2000:] = 99
    for _ in range(10):
        with pytest.raises(IndexError, match="got 77 on axis 1 of token 1234$"):
            kernel.fused_embedding_lookup(ids, torch.randn(2, 10, 256))


@pytest.mark.variant("cpu")
def test_id_too_large_in_the_backward(kernel):
    ids = torch.tensor([[0, 9]])
    with pytest.raises(
        IndexError, match="less than the 4 rows of the table, got 9 on axis 1 of token 0"
    ):
        kernel.op.ops.backward(torch.ones(1, 8), ids, None, None, 4, torch.float32)


@pytest.mark.variant("cuda-simt")
@pytest.mark.parametrize("bad", TOO_LARGE)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_id_too_large_is_an_assertion(kernel, direction, bad):
    """As in F.embedding; padded tokens are no exception. The launches after it are as good as new."""
    arguments = good()
    ids = arguments.pop("position_ids").to(torch.int32 if bad < 2**31 else torch.int64)
    ids[1, 2, 1] = bad
    arguments["padding"][1, 2] = True
    with pytest.raises(RuntimeError, match="device-side assert triggered: id < lookup.num_rows"):
        if direction == "forward":
            kernel.fused_embedding_lookup(ids, **arguments)
        else:
            kernel.op.ops.backward(
                torch.ones(2, 5, 8), ids, arguments["padding"], None, 4, torch.float32
            )
    kernel.fused_embedding_lookup(ids.clamp(max=3), **arguments)


@pytest.mark.variant("cuda")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_id_too_large_is_an_assertion_on_a_gpu(kernel, direction):
    """In a process of its own: nothing runs on the GPU after an assertion."""
    call = {
        "forward": "kernel.fused_embedding_lookup(ids, torch.ones(1, 4, 8, device='cuda'))",
        "backward": "kernel.op.ops.backward(torch.ones(2, 8, device='cuda'), ids, None, None, 4, torch.float32)",
    }
    script = (
        "import conftest, torch\n"
        "kernel = conftest.VARIANTS['cuda'].load()\n"
        "ids = torch.tensor([[3], [4]], device='cuda')\n"
        f"{call[direction]}\n"
        "torch.cuda.synchronize()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "device-side assert triggered" in result.stderr


@pytest.mark.parametrize("bad", TOO_LARGE)
@pytest.mark.variant("metal-simt")
def test_id_too_large_is_nan(kernel, poison, bad):
    """The token's row, and no other's; not if it is padding. No row gets the gradient."""
    arguments = good()
    ids = arguments.pop("position_ids").to(torch.int32 if bad < 2**31 else torch.int64)
    fine = kernel.fused_embedding_lookup(ids, **arguments)
    ids[0, 3, 1] = bad
    ids[1, 2, 1] = bad
    arguments["padding"][1, 2] = True
    for hidden in (8, 7):  # vectors, and none
        for name in ("table", "residual"):
            arguments[name] = arguments[name][..., :hidden].requires_grad_()
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            spoilt = {**arguments, "table": arguments["table"].to(dtype), "residual": None}
            out = kernel.fused_embedding_lookup(ids, **spoilt)
            assert out[0, 3].isnan().all()
            assert out.isnan().sum() == hidden
        out = kernel.fused_embedding_lookup(ids, **arguments)
        assert out[0, 3].isnan().all()
        assert torch.equal(out[1, 2], arguments["residual"][1, 2])
        assert torch.equal(out[0, :3], fine[0, :3, :hidden])
        (grad,) = torch.autograd.grad(out, arguments["table"], torch.ones_like(out))
        assert grad[0, 0].tolist() == grad[2, 0].tolist() == [9.0] * hidden
        assert grad[1, 0].tolist() == [8.0] * hidden


@pytest.mark.variant("cuda-simt", "metal-simt", "cuda")
def test_too_many_tokens(variant, kernel):
    """More than 32 bits count. Expanded tensors, and a result of which no page is touched."""
    ids = torch.zeros(1, 1, dtype=torch.int32).expand(2**31, 1)
    table = torch.zeros(1, 1, 1, dtype=torch.float16)
    message = f"must have at most 2147483647 tokens on {API[variant.sources]}, got 2147483648"
    with pytest.raises(ValueError, match=message):
        kernel.fused_embedding_lookup(ids, table)
    with pytest.raises(ValueError, match=message):
        kernel.op.ops.backward(table[0].expand(2**31, 1), ids, None, None, 1, torch.float16)


@pytest.mark.variant("cuda-simt", "metal-simt", "cuda")
def test_too_large_a_table_for_the_backward(variant, kernel):
    grad, ids = torch.zeros(1, 1, dtype=torch.float16), torch.zeros(1, 1, dtype=torch.int64)
    message = (
        f"table of shape [1, 2147483648, 1] is too large for the backward on {API[variant.sources]}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel.op.ops.backward(grad, ids, None, None, 2**31, torch.float16)


@pytest.mark.variant("metal-simt")
def test_too_many_columns(kernel):
    """In memory of which no page is touched."""
    ids, table = torch.zeros(1, 1, dtype=torch.int64), torch.empty(1, 1, 2**31, dtype=torch.float16)
    message = "table must have at most 2147483647 columns on MPS, got 2147483648"
    with pytest.raises(ValueError, match=message):
        kernel.fused_embedding_lookup(ids, table)
    with pytest.raises(ValueError, match=message):
        kernel.op.ops.backward(table[0], ids, None, None, 1, torch.float16)


def test_padding_id_may_be_out_of_range(kernel):
    """It reads nothing, so it is not an address."""
    table = torch.randn(2, 4, 8)
    out = kernel.fused_embedding_lookup(torch.tensor([[99, 1]]), table, padding_id=99)
    assert torch.equal(out[0], table[1, 1])


def test_ids_below_zero_read_row_zero(kernel):
    table = torch.randn(2, 4, 8)
    ids = torch.tensor([[-1, 1], [-(2**40), -5]])
    out = kernel.fused_embedding_lookup(ids, table)
    assert torch.equal(out, torch.stack([table[0, 0] + table[1, 1], table[0, 0] + table[1, 0]]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.ones(3, 8), torch.zeros(4, 1, dtype=torch.int64), None, None, 4, torch.float32), "grad must have shape [4, 8]"),
        ((torch.ones(4, 8), torch.zeros(4, 1, dtype=torch.int64), None, None, -1, torch.float32), "num_rows must not be negative, got -1"),
        ((torch.ones(4, 8), torch.zeros(4, 1, dtype=torch.int64), None, None, 4, torch.int32), "dtype must be float32, float16, bfloat16 or float64, got Int"),
        ((torch.ones(4, 8).int(), torch.zeros(4, 1, dtype=torch.int64), None, None, 4, torch.float32), "grad must be float32, float16, bfloat16 or float64, got Int"),
        ((torch.tensor(1.0), torch.zeros(4, 1, dtype=torch.int64), None, None, 4, torch.float32), "grad must have shape [..., H]"),
        ((torch.ones(8), torch.tensor(1), None, None, 4, torch.float32), "position_ids must have shape [..., K]"),
    ],
)  # fmt: skip
def test_bad_argument_of_the_backward(variant, kernel, arguments, message):
    grad, ids, *rest = arguments
    with pytest.raises(ValueError, match=expected(message, variant)):
        kernel.op.ops.backward(grad.to(variant.device), ids.to(variant.device), *rest)
