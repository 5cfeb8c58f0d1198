"""Every bad input is refused, with a message that names the argument, what it got and what it takes."""

import re

import pytest
import torch

from helpers import process
from helpers.problems import problem

pytestmark = [pytest.mark.asan, pytest.mark.gpu, pytest.mark.kernels_ci]


def good():
    """Arguments that the op takes, for a test to spoil one of."""
    ids = torch.zeros(2, 5, 3, dtype=torch.int64)
    return problem(ids, 4, 8, padding=True, residual=torch.float32)


BAD = {
    "ids float": ("position_ids", torch.zeros(2, 5, 3), "position_ids must be int64 or int32, got Float"),
    "ids int16": ("position_ids", torch.zeros(2, 5, 3, dtype=torch.int16), "int64 or int32, got Short"),
    "ids scalar": ("position_ids", torch.tensor(1), "position_ids must have shape [..., K], got a tensor without"),
    "ids axes": ("position_ids", torch.zeros(2, 5, 2, dtype=torch.int64), "[..., 3] to go with a table of 3 axes, got [2, 5, 2]"),
    "table rank": ("table", torch.randn(8), "table must have shape [K, P, H] or [P, H], got [8]"),
    "table rank 4": ("table", torch.randn(1, 3, 4, 8), "table must have shape [K, P, H] or [P, H], got [1, 3, 4, 8]"),
    "table dtype": ("table", torch.ones(3, 4, 8, dtype=torch.int32), "table must be float32, float16, bfloat16 or float64, got Int"),
    "table complex": ("table", torch.randn(3, 4, 8, dtype=torch.complex64), "table must be float32, float16, bfloat16 or float64, got ComplexFloat"),
    "table float8": ("table", torch.randn(3, 4, 8).to(torch.float8_e4m3fn), "table must be float32, float16, bfloat16 or float64, got Float8_e4m3fn"),
    "table stride": ("table", torch.randn(3, 4, 16)[..., ::2], "table must have a last stride of 1, got 2"),
    "table expanded": ("table", torch.randn(3, 4, 1).expand(3, 4, 8), "table must have a last stride of 1, got 0"),
    "table axes": ("table", torch.randn(5, 4, 8), "position_ids must have shape [..., 5] to go with a table of 5 axes, got [2, 5, 3]"),
    "table no axes": ("table", torch.randn(0, 4, 8), "position_ids must have shape [..., 0] to go with a table of 0 axes, got [2, 5, 3]"),
    "table no rows": ("table", torch.randn(3, 0, 8), "table must have at least one row to read, got P = 0"),
    "shared table no rows": ("table", torch.randn(0, 8), "table must have at least one row to read, got P = 0"),
    "ids no axes": ("position_ids", torch.zeros(2, 5, 0, dtype=torch.int64), "position_ids must have shape [..., K] with K from 1 to 64, got K = 0"),
    "ids many axes": ("position_ids", torch.zeros(2, 5, 65, dtype=torch.int64), "position_ids must have shape [..., K] with K from 1 to 64, got K = 65"),
    "weights dtype": ("weights", torch.ones(2, 5, 3, dtype=torch.bfloat16), "weights must be float32, got BFloat16"),
    "weights double": ("weights", torch.ones(2, 5, 3, dtype=torch.float64), "weights must be float32, got Double"),
    "weights shape": ("weights", torch.ones(2, 5, 2), "weights must have shape [2, 5, 3] to go with position_ids of shape [2, 5, 3], got [2, 5, 2]"),
    "weights rank": ("weights", torch.ones(2, 5), "weights must have shape [2, 5, 3]"),
    "weights leading": ("weights", torch.ones(1, 5, 3), "weights must have shape [2, 5, 3]"),
    "weights device": ("weights", torch.ones(2, 5, 3, device="meta"), "weights must be on the device of position_ids, got meta and cpu"),
    "embedding_dtype": ("embedding_dtype", torch.int32, "embedding_dtype must be float32, float16, bfloat16 or float64, got Int"),
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
    if isinstance(value, torch.Tensor) and not value.is_meta:
        value = value.to(variant.device)
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
        kernel.op.ops.backward(torch.ones(1, 8), ids, None, None, None, 4, False, torch.float32)


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
                torch.ones(2, 5, 8), ids, None, arguments["padding"], None, 4, False, torch.float32
            )
    kernel.fused_embedding_lookup(ids.clamp(max=3), **arguments)


@pytest.mark.variant("cuda")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_id_too_large_is_an_assertion_on_a_gpu(kernel, direction):
    """In a process of its own: nothing runs on the GPU after an assertion."""
    call = {
        "forward": "kernel.fused_embedding_lookup(ids, torch.ones(1, 4, 8, device='cuda'))",
        "backward": "kernel.op.ops.backward(torch.ones(2, 8, device='cuda'), ids, None, None, None, 4, False, torch.float32)",
    }
    script = (
        "from helpers.variants import VARIANTS\n"
        "import torch\n"
        "kernel = VARIANTS['cuda'].load()\n"
        "ids = torch.tensor([[3], [4]], device='cuda')\n"
        f"{call[direction]}\n"
        "torch.cuda.synchronize()\n"
    )
    result = process.script(script, fails=True)
    assert "device-side assert triggered" in result.stderr


@pytest.mark.variant("metal-simt")
@pytest.mark.parametrize("bad", TOO_LARGE)
def test_id_too_large_in_the_error_buffer(kernel, synchronize, bad):
    """From either direction, whether the token is padding or not. Other tokens are as they would be."""
    for dtype in (torch.float32, torch.bfloat16):
        for hidden in (8, 7):  # vectors, and none
            arguments = good()
            ids = arguments.pop("position_ids").to(torch.int32 if bad < 2**31 else torch.int64)
            arguments["table"] = arguments["table"][..., :hidden].to(dtype).requires_grad_()
            arguments["residual"] = arguments["residual"][..., :hidden]
            fine = kernel.fused_embedding_lookup(ids, **arguments)
            assert synchronize() is None
            ids[1, 2, 1] = bad
            arguments["padding"][1, 2] = True
            message = (
                "fused_embedding_lookup: position_ids must be less than the 4 rows of the table, "
                f"got {bad} on axis 1 of token 7"
            )
            out = kernel.fused_embedding_lookup(ids, **arguments)
            assert synchronize() == message
            assert torch.equal(out[0], fine[0])
            (grad,) = torch.autograd.grad(out, arguments["table"], torch.ones_like(out))
            assert synchronize() == message
            assert grad[:, 0].tolist() == [[9.0] * hidden] * 3
            assert synchronize() is None


@pytest.mark.variant("metal-simt")
def test_id_too_large_for_a_copy(kernel, synchronize):
    """One entry without weights and residual is copied by a shader of its own."""
    table = torch.randn(1, 4, 8)
    ids = torch.tensor([[0], [12345678901234567890 // 7], [3]])
    out = kernel.fused_embedding_lookup(ids, table)
    assert "rows of the table, got 1763668414462081127 on axis 0 of token 1" in synchronize()
    assert torch.equal(out[[0, 2]], table[0, [0, 3]])


@pytest.mark.variant("metal-simt")
def test_more_ids_too_large_than_messages(kernel, synchronize):
    """PyTorch's buffer has thirty; the rest are counted."""
    ids = torch.full((500, 2), 7)
    kernel.fused_embedding_lookup(ids, torch.randn(2, 4, 8))
    assert "got 7 on axis" in synchronize()
    assert synchronize() is None


@pytest.mark.variant("cuda-simt", "metal-simt", "cuda")
def test_too_many_tokens(variant, kernel):
    """More than 32 bits count. Expanded tensors, and a result of which no page is touched."""
    ids = torch.zeros(1, 1, dtype=torch.int32).expand(2**31, 1)
    table = torch.zeros(1, 1, 1, dtype=torch.float16)
    message = f"must have at most 2147483647 tokens on {API[variant.sources]}, got 2147483648"
    with pytest.raises(ValueError, match=message):
        kernel.fused_embedding_lookup(ids, table)
    with pytest.raises(ValueError, match=message):
        kernel.op.ops.backward(
            table[0].expand(2**31, 1), ids, None, None, None, 1, False, torch.float16
        )


@pytest.mark.variant("cuda-simt", "metal-simt", "cuda")
def test_too_large_a_table_for_the_backward(variant, kernel):
    grad, ids = torch.zeros(1, 1, dtype=torch.float16), torch.zeros(1, 1, dtype=torch.int64)
    message = (
        f"table of shape [1, 2147483648, 1] is too large for the backward on {API[variant.sources]}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel.op.ops.backward(grad, ids, None, None, None, 2**31, False, torch.float16)


@pytest.mark.variant("metal-simt")
def test_too_many_columns(kernel):
    """In memory of which no page is touched."""
    ids, table = torch.zeros(1, 1, dtype=torch.int64), torch.empty(1, 1, 2**31, dtype=torch.float16)
    message = "table must have at most 2147483647 columns on MPS, got 2147483648"
    with pytest.raises(ValueError, match=message):
        kernel.fused_embedding_lookup(ids, table)
    with pytest.raises(ValueError, match=message):
        kernel.op.ops.backward(table[0], ids, None, None, None, 1, False, torch.float16)


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
        ((torch.ones(3, 8), torch.zeros(4, 1, dtype=torch.int64), None, None, None, 4, False, torch.float32), "grad must have shape [4, 8]"),
        ((torch.ones(4, 8), torch.zeros(4, 1, dtype=torch.int64), None, None, None, -1, False, torch.float32), "num_rows must not be negative, got -1"),
        ((torch.ones(4, 8), torch.zeros(4, 1, dtype=torch.int64), None, None, None, 4, False, torch.int32), "dtype must be float32, float16, bfloat16 or float64, got Int"),
        ((torch.ones(4, 8).int(), torch.zeros(4, 1, dtype=torch.int64), None, None, None, 4, False, torch.float32), "grad must be float32, float16, bfloat16 or float64, got Int"),
        ((torch.tensor(1.0), torch.zeros(4, 1, dtype=torch.int64), None, None, None, 4, False, torch.float32), "grad must have shape [..., H]"),
        ((torch.ones(8), torch.tensor(1), None, None, None, 4, False, torch.float32), "position_ids must have shape [..., K]"),
    ],
)  # fmt: skip
def test_bad_argument_of_the_backward(variant, kernel, arguments, message):
    """Which is called by ours alone; since torch 2.15 an extension's own error is a RuntimeError."""
    grad, ids, *rest = arguments
    with pytest.raises((ValueError, RuntimeError), match=expected(message, variant)):
        kernel.op.ops.backward(grad.to(variant.device), ids.to(variant.device), *rest)
