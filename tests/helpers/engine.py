"""What the GPUs' sources are looked at with on the engine of tests/simt: as they are, and broken on purpose."""

import ctypes

import pytest
import torch

from helpers import reference
from helpers.problems import grid, problem
from helpers.variants import load_library


def five_tiles(hidden, dtype=torch.float32):
    """Five tiles of tokens on a grid. With 72 columns, some blocks have only a few. The table doesn't begin
    where its storage does."""
    arguments = problem(grid(12, 400, 20, 20), 64, hidden, dtype, padding=0.1, residual=dtype)
    storage = torch.empty(3, 64, hidden, dtype=dtype)
    arguments["table"] = storage[1:].copy_(arguments["table"]).detach().requires_grad_()
    return arguments


def under_seed(kernel, variant_dir, seed, arguments):
    """The output and the table's gradient, with the engine's threads in the order of a seed."""
    load_library(variant_dir).simt_seed(seed)
    out = kernel.fused_embedding_lookup(**arguments)
    (grad,) = torch.autograd.grad(out, arguments["table"], arguments["residual"])
    return out.detach(), grad


def step(kernel, seed=0, hidden=40):
    """A forward and a backward, of values that depend on the seed. Returns the output and the table's
    gradient, and what they should be."""
    arguments = problem((3, 50, 2), 6, hidden, residual=torch.float32, seed=seed)
    ids, table, residual = arguments.values()
    table.requires_grad_()
    out = kernel.fused_embedding_lookup(**arguments)
    (grad,) = torch.autograd.grad(out, table, residual)
    expected = reference.eager(**arguments), reference.grad_table(residual, ids, 6)[0].float()
    return (out, grad), expected


def check(results, expected):
    assert torch.equal(results[0], expected[0]), "output differs"
    torch.testing.assert_close(results[1], expected[1])


def check_strides_past_32_bits(kernel):
    """Two tokens 2**31 + 8 elements apart, in memory of which only their pages are touched."""
    stride = 2**31 + 8
    buffer = torch.empty(stride + 40, dtype=torch.bfloat16)
    rows = buffer.as_strided((2, 40), (stride, 1))
    rows.copy_(torch.randn(2, 40))
    table = torch.randn(1, 3, 40, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.tensor([[0], [2]])
    out = kernel.fused_embedding_lookup(ids, table, residual=rows)
    assert torch.equal(out, reference.eager(ids, table, residual=rows))
    out.backward(rows)
    assert torch.equal(table.grad[0, [0, 2]], rows)


LARGEST = 2**31 - 1


def check_grids_of_32_bits(kernel):
    """Metal's, at the largest sizes that the op takes, in memory of which no page is touched."""
    ids = torch.zeros(1, 1, dtype=torch.int32).expand(LARGEST, 1)
    table = torch.zeros(1, 1, 1, dtype=torch.float16)
    residual = torch.zeros(1, 1, dtype=torch.float16).expand(LARGEST, 1)
    kernel.fused_embedding_lookup(ids, table)
    kernel.fused_embedding_lookup(ids, table, residual=residual)
    rows = 2**32 // 256 + 1  # a threadgroup of 256 threads each
    grad = torch.zeros(1, 257, dtype=torch.float16)
    kernel.op.ops.backward(grad, ids[:1], None, None, None, rows, False, torch.float16)


def check_a_failed_launch(kernel, variant_dir):
    """It is told once: by us, and not by whoever asks CUDA for its last error next."""
    library = load_library(variant_dir)
    ids, table, _, residual = five_tiles(72).values()
    options = None, None, None, 64, False, torch.float32
    library.cuda_refuse_launches(ctypes.c_bool(True))
    try:
        for function in (
            lambda: kernel.fused_embedding_lookup(ids, table),
            lambda: kernel.op.ops.backward(residual, ids, *options),
        ):
            with pytest.raises(RuntimeError, match="failed: the .*: invalid argument"):
                function()
            assert library.cuda_last_error() == 0, "an error is left"
    finally:
        library.cuda_refuse_launches(ctypes.c_bool(False))
