"""Memory: what the op takes grows linearly, and what it can't get is an error that a trainer knows."""

import pytest
import torch
from accelerate.utils.memory import find_executable_batch_size, should_reduce_batch_size

from helpers.memory import total_allocated

pytestmark = pytest.mark.variant("cpu")  # tests/devices/test_cuda.py has a GPU's

HUGE = 2**46  # more tokens, columns or bytes than there are addresses, of which none is touched


def backward(kernel, grad, ids, num_rows, weights=None, shared=False):
    ops = kernel.op.ops
    return ops.backward(grad, ids, weights, None, None, num_rows, shared, grad.dtype)


OUT_OF_MEMORY = {
    "the result": lambda kernel: kernel.fused_embedding_lookup(
        torch.zeros(1, 2, dtype=torch.int64).expand(HUGE, 2), torch.randn(2, 3, 64)
    ),
    "the table's gradient": lambda kernel: backward(
        kernel, torch.ones(1, 1).expand(1, HUGE), torch.zeros(1, 2, dtype=torch.int64), 3
    ),
    "the backward's workspace": lambda kernel: backward(
        kernel,
        torch.ones(1, 1).expand(HUGE, 1),
        torch.zeros(1, 2, dtype=torch.int64).expand(HUGE, 2),
        3,
    ),
}


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_out_of_memory_says_so(kernel, name):
    """And for what, and how much; not where the binary was built."""
    with pytest.raises(
        RuntimeError, match=f"cannot allocate {name}, [0-9]+ bytes: out of memory."
    ) as e:
        OUT_OF_MEMORY[name](kernel)
    assert should_reduce_batch_size(e.value)
    assert "API call failed" not in str(e.value)
    assert ".h" not in str(e.value)


def test_a_smaller_batch_is_tried(kernel):
    """accelerate's own loop, which Trainer's auto_find_batch_size runs in."""
    tried = []

    @find_executable_batch_size(starting_batch_size=HUGE)
    def train(batch_size):
        tried.append(batch_size)
        tokens = HUGE if batch_size == HUGE else 4
        ids = torch.zeros(1, 2, dtype=torch.int64).expand(tokens, 2)
        return kernel.fused_embedding_lookup(ids, torch.randn(2, 3, 64))

    assert train().shape == (4, 64)
    assert len(tried) == 2


def test_a_size_past_64_bits(kernel):
    with pytest.raises(
        ValueError, match="the result of shape .* more bytes than 64 bits can count"
    ):
        kernel.fused_embedding_lookup(
            torch.zeros(1, 2, dtype=torch.int64).expand(2**60, 2), torch.randn(2, 3, 64)
        )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "tokens, tables, rows, shared",
    [
        (1_000_000, 1, 262_144, True),  # the ids of a language model
        (1_000_000, 2, 262_144, False),
        (20_000, 64, 2050, False),  # audio codebooks
        (20_000, 64, 2050, True),
        (1_000_000, 2, 100, False),  # few rows in use: the sums are kept, not the order
    ],
)
def test_workspace_is_linear_in_tokens_and_rows(kernel, tokens, tables, rows, shared, weighted):
    """With one column, so that what is counted is the order of the entries and the rows' beginnings."""
    ids = torch.randint(0, rows, (tokens, tables))
    weights = torch.ones(tokens, tables) if weighted else None
    grad = torch.ones(tokens, 1)
    all_rows = rows * (1 if shared else tables)
    result, total = total_allocated(lambda: backward(kernel, grad, ids, rows, weights, shared))
    assert torch.equal(result.sum(), torch.tensor(float(tokens * tables)))
    assert total - result.nbytes <= 16 * ids.numel() + 20 * all_rows + 2**16
    out, forward = total_allocated(
        lambda: kernel.fused_embedding_lookup(ids, result, weights=weights)
    )
    assert forward == out.nbytes  # it has no workspace
