"""The op against transformers' formulas, bit for bit, and its gradient against float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import bounds, reference
from helpers.engine import check_strides_past_32_bits
from helpers.problems import ANY_LAYOUT, any_problem, grid, problem, restride
from helpers.reference import FLOATS

pytestmark = [pytest.mark.asan, pytest.mark.gpu]


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_forward_equals_eager(variant, kernel, data):
    arguments = data.draw(any_problem(variant))
    torch.use_deterministic_algorithms(True)  # poisons fresh memory
    try:
        actual = kernel.fused_embedding_lookup(**arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = reference.eager(**arguments)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@given(data=st.data(), grad_layout=st.sampled_from([*ANY_LAYOUT, "broadcast"]))
@settings(max_examples=400, deadline=None)
def test_backward_rounds_the_exact_sum(variant, kernel, data, grad_layout):
    arguments = data.draw(any_problem(variant))
    ids = arguments["position_ids"]
    table = arguments["table"] = arguments["table"].detach().clone().requires_grad_()
    if "residual" in arguments:
        arguments["residual"] = arguments["residual"].detach().requires_grad_()
    out = kernel.fused_embedding_lookup(**arguments)
    grad = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    if grad_layout == "broadcast":
        grad = grad.new_tensor(0.75).expand(out.shape)
    elif grad_layout != "expanded" or out.dim() > 1:
        grad = restride(grad, grad_layout)
    torch.use_deterministic_algorithms(True)
    try:
        out.backward(grad)
    finally:
        torch.use_deterministic_algorithms(False)

    assert table.grad.dtype == table.dtype
    names = ("padding", "padding_id", "weights")
    given_ones = {name: arguments[name] for name in names if name in arguments}
    exact, magnitude = reference.grad_table(
        grad, ids, table.shape[-2], shared=table.dim() == 2, **given_ones
    )
    terms = max(1, ids.numel() if table.dim() == 2 else ids[..., 0].numel())
    bounds.assert_sum(table.grad, exact, magnitude, terms, variant.sum_eps(table.dtype))
    if "residual" in arguments:
        residual = arguments["residual"]
        assert torch.equal(residual.grad, grad.to(residual.dtype))


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_within_one_ulp_at_real_size(variant, kernel, dtype):
    """The issue's own bar: 2 images of 60 x 40 patches, so 80 or 120 terms a sum."""
    arguments = problem(grid(2, 2520, 60, 40), 256, 768, dtype, padding=True, requires_grad=True)
    ids, table, padding = arguments.values()
    out = kernel.fused_embedding_lookup(**arguments)
    grad = torch.randn(out.shape, dtype=dtype)
    out.backward(grad)
    exact, magnitude = reference.grad_table(grad, ids, 256, padding)
    eps = variant.sum_eps(dtype)
    if eps == torch.finfo(dtype).eps:  # summed in the table's own precision
        bounds.assert_sum(table.grad, exact, magnitude, 120, eps, ulps=0)
    else:  # a term's worth for sums that cancel to next to nothing
        bounds.assert_sum(table.grad, exact, magnitude, 1, eps, ulps=1)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("residual_dtype", [None, *FLOATS], ids=str)
def test_forward_equals_eager_at_real_size(kernel, poison, dtype, residual_dtype):
    ids = grid(2, 2520, 60, 40)
    arguments = problem(ids, 10240, 768, dtype, padding=True, residual=residual_dtype)
    assert torch.equal(kernel.fused_embedding_lookup(**arguments), reference.eager(**arguments))


@pytest.mark.kernels_ci
@pytest.mark.parametrize("hidden", [768, 770])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_result(kernel, poison, dtype, hidden):
    """Results of 16 MiB or more go past the caches, if their rows are aligned."""
    for options in ({"padding": True}, {"residual": dtype}):
        arguments = problem(grid(5, 2520, 60, 40), 64, hidden, dtype, **options)
        actual = kernel.fused_embedding_lookup(**arguments)
        assert actual.nbytes >= 2**24
        assert torch.equal(actual, reference.eager(**arguments))


@pytest.mark.kernels_ci
@pytest.mark.variant("cpu", "cuda")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("way", ["by rows", "by columns"])
def test_large_gradient(variant, kernel, poison, dtype, way):
    """Gradients of 8 MiB or more go past the CPU's caches, if their rows are aligned."""
    if way == "by rows":  # thousands in use, one of them most of the work, some in none
        ids = torch.randint(0, 4600, (3000, 4))
        ids[200:1200] = 7
        given = {"weights": torch.randn(ids.shape)}
        table = torch.randn(4608, 1152, dtype=dtype, requires_grad=True)
    else:
        ids = grid(2, 2520, 60, 40)
        given = {"padding": (ids == -1).all(-1)}
        table = torch.randn(2, 10240, 768, dtype=dtype, requires_grad=True)
    out = kernel.fused_embedding_lookup(ids, table, **given)
    grad = torch.randn_like(out)
    (actual,) = torch.autograd.grad(out, table, grad)
    assert actual.nbytes >= 2**23
    exact, magnitude = reference.grad_table(
        grad, ids, table.shape[-2], shared=table.dim() == 2, **given
    )
    bounds.assert_sum(actual, exact, magnitude, 5000, variant.sum_eps(dtype))
    assert (actual[exact == 0] == 0).all()


@pytest.mark.kernels_ci
@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_forward_equals_the_one_hot_formula(kernel, dtype):
    arguments = problem(grid(2, 130, 12, 10), 64, 96, dtype, padding=True, residual=dtype)
    actual = kernel.fused_embedding_lookup(**arguments)
    assert torch.equal(actual, reference.one_hot(*arguments.values()))


@pytest.mark.kernels_ci
@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_special_values(kernel, dtype):
    """Infinities, NaN, signed zeros, ties and the largest numbers come through as in eager."""
    largest = torch.finfo(dtype).max
    tie = 1 + torch.finfo(dtype).eps  # 1 + eps + half an eps, in float32: to even
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, largest, -largest, tie, -tie, 1e-8, -1e-8]
    values += [torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal / 4, 1.0, 65504.0, 3e38]
    row = torch.tensor(values, dtype=torch.float64).to(dtype)
    n = len(row)
    table = torch.stack([row.repeat_interleave(n), row.repeat(n)])[:, None]
    residual = table[:, 0].flip(0)[:1].roll(7, dims=1)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    actual = kernel.fused_embedding_lookup(ids, table, residual=residual)
    expected = reference.eager(ids, table, residual=residual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


@pytest.mark.kernels_ci
def test_padded_tokens_take_the_residual_whatever_their_ids(kernel):
    table = torch.full((2, 3, 40), math.nan)
    ids = torch.tensor([[-1, -1], [2, 0], [-7, 1]])
    residual = torch.randn(3, 40)
    padding = torch.ones(3, dtype=torch.bool)
    out = kernel.fused_embedding_lookup(ids, table, padding=padding, residual=residual)
    assert torch.equal(out, residual)


@pytest.mark.kernels_ci
@pytest.mark.sanitizer
@pytest.mark.parametrize("hidden", [8, 300])  # columns for one thread, and for several
@pytest.mark.parametrize("shape", [(0, 2), (3, 0, 2), (0, 5, 1)])
def test_no_tokens(kernel, poison, shape, hidden):
    table = torch.randn(shape[-1], 4, hidden, requires_grad=True)
    residual = torch.randn(*shape[:-1], hidden, requires_grad=True)
    padding = torch.zeros(shape[:-1], dtype=torch.bool)
    ids = torch.empty(shape, dtype=torch.int64)
    out = kernel.fused_embedding_lookup(ids, table, padding=padding, residual=residual)
    assert out.shape == (*shape[:-1], hidden)
    out.sum().backward()
    assert torch.equal(table.grad, torch.zeros_like(table))


@pytest.mark.kernels_ci
def test_no_columns(kernel):
    out = kernel.fused_embedding_lookup(torch.zeros(5, 2, dtype=torch.int64), torch.empty(2, 3, 0))
    assert out.shape == (5, 0)


@pytest.mark.kernels_ci
def test_many_distinct_ids(variant, kernel, poison):
    """Thousands of rows in use: the CPU's sums no longer fit the cache, so it goes by rows."""
    ids = torch.randint(0, 3000, (6000, 3))
    for dtype in variant.floats:
        table = torch.randn(3, 3000, 200, dtype=dtype, requires_grad=True)
        out = kernel.fused_embedding_lookup(ids, table)
        grad = torch.randn(out.shape, dtype=dtype)
        out.backward(grad)
        exact, magnitude = reference.grad_table(grad, ids, 3000)
        bounds.assert_sum(table.grad, exact, magnitude, 20, variant.sum_eps(dtype))


@pytest.mark.kernels_ci
@pytest.mark.variant("cpu", "cuda")  # tests/simt takes long, and has no cache
def test_more_distinct_ids_than_the_cache_has_sums(kernel):
    """Not even one column of 80,000 sums fits in the part of the cache that is meant for them."""
    ids = torch.arange(40000)[:, None].expand(-1, 2)
    table = torch.randn(2, 40000, 70, requires_grad=True)
    out = kernel.fused_embedding_lookup(ids, table)
    grad = torch.randn_like(out)
    out.backward(grad)
    assert torch.equal(table.grad, grad.expand(2, -1, -1))


@pytest.mark.kernels_ci
def test_strides_past_32_bits(kernel):
    check_strides_past_32_bits(kernel)


@pytest.mark.variant("cuda")
def test_result_past_32_bits(kernel):
    """More than 2**31 elements, 13 GB: the residual, the result and the gradient of its sum."""
    tokens, hidden = 2**31 // 768 + 1000, 768
    ids = torch.randint(0, 50, (tokens, 2))
    table = torch.randn(2, 50, hidden, dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn(tokens, hidden, dtype=torch.bfloat16)
    out = kernel.fused_embedding_lookup(ids, table, residual=residual)
    for part in (slice(0, 1000), slice(-1000, None)):
        assert torch.equal(out[part], reference.eager(ids[part], table, residual=residual[part]))
    out.sum().backward()
    counts = torch.stack([torch.bincount(ids[:, axis], minlength=50) for axis in range(2)])
    expected = counts[..., None].expand(-1, -1, hidden).bfloat16()
    torch.testing.assert_close(table.grad, expected, rtol=2**-7, atol=0)


@pytest.mark.kernels_ci
@pytest.mark.sanitizer
def test_many_token_dimensions(kernel):
    """Eight leading dimensions that can't be merged are walked; a ninth is refused."""
    table = torch.randn(1, 4, 5)
    ids = torch.randint(0, 4, (3,) * 8 + (1,))[(slice(None, None, 2),) * 8]
    expected = reference.eager(ids, table)
    assert torch.equal(kernel.fused_embedding_lookup(ids, table), expected)
    ids = torch.zeros((3,) * 9 + (1,), dtype=torch.int64)[(slice(None, None, 2),) * 9]
    with pytest.raises(ValueError, match="position_ids.*more than 8 leading dimensions"):
        kernel.fused_embedding_lookup(ids, table)


@pytest.mark.kernels_ci
@pytest.mark.sanitizer
@pytest.mark.parametrize("hidden", [40, 41])  # vectors, and none
def test_every_length_of_a_run(variant, kernel, poison, hidden):
    """Rows read by 1, 2, ... tokens of the same tile, up to all: on CUDA a few are summed one by one,
    more by one group of threads, many by several."""
    lengths = [1, 2, 7, 8, 9, 127, 128, 129, 255, 300, 1023, 1024, 1025]
    rows = torch.cat([torch.full((length,), row) for row, length in enumerate(lengths)])
    ids = torch.stack([rows, rows.flip(0)], dim=1)[torch.randperm(len(rows))]
    table = torch.randn(2, len(lengths) + 2, hidden, requires_grad=True)
    out = kernel.fused_embedding_lookup(ids, table)
    grad = torch.randn_like(out)
    out.backward(grad)
    exact, magnitude = reference.grad_table(grad, ids, len(lengths) + 2)
    bounds.assert_sum(table.grad, exact, magnitude, 1025, variant.sum_eps(torch.float32))


# The forms that came with weights.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("residual_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [20, 2304])  # by columns, and by rows
def test_weighted_gradient_of_a_shared_table(variant, kernel, poison, dtype, residual_dtype, rows):
    """Wide rows, long runs, a row that is most of the work, and rows that nothing reads."""
    tokens, hidden = (800, 140) if variant.is_emulated else (5000, 1100)
    ids = torch.randint(0, rows - 3, (tokens, 4))
    ids[tokens // 5 : tokens * 2 // 5] = 1
    weights = torch.randn(tokens, 4)
    table = torch.randn(rows, hidden, dtype=dtype, requires_grad=True)
    residual = torch.zeros(tokens, hidden, dtype=residual_dtype)
    out = kernel.fused_embedding_lookup(
        ids, table, weights=weights, residual=residual, embedding_dtype=residual_dtype
    )
    grad = torch.randn_like(out)
    (actual,) = torch.autograd.grad(out, table, grad)
    exact, magnitude = reference.grad_table(grad, ids, rows, weights=weights, shared=True)
    terms = torch.bincount(ids.flatten(), minlength=rows)[:, None]
    bounds.assert_sum(actual, exact, magnitude, terms, variant.sum_eps(dtype))
    assert (actual[-3:] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("entries", [5, 16, 64])
def test_many_entries_are_summed_within_the_bound(kernel, dtype, entries):
    """PyTorch's own sum takes another order: both are near the float64 sum."""
    ids = torch.randint(0, 50, (300, entries))
    arguments = problem(ids, 50, 130, dtype, shared=True, weighted=True)
    _, table, weights = arguments.values()
    rows = torch.nn.functional.embedding(ids, table).double() * weights[..., None].double()
    for lookup in (
        kernel.fused_embedding_lookup(**arguments),
        reference.interpolated(*arguments.values()),
    ):
        bounds.assert_sum(lookup, rows.sum(-2), rows.abs().sum(-2), entries, 2.0**-24)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weighted_sum_starts_at_plus_zero(kernel, dtype):
    """As torch.sum does: terms that are all -0 make +0. Without weights the first term is the start."""
    table = torch.full((3, 70), -0.0, dtype=dtype)
    ids = torch.tensor([[0, 1, 2, 1], [0, 0, 0, 0]])
    ones = torch.ones(2, 4)
    weighted = kernel.fused_embedding_lookup(ids, table, weights=ones)
    assert not weighted.signbit().any()
    assert torch.equal(weighted.signbit(), reference.interpolated(ids, table, ones).signbit())
    assert kernel.fused_embedding_lookup(ids, table).signbit().all()


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("residual_dtype", [None, *FLOATS], ids=str)
def test_an_entry_of_padding_adds_plus_zero(kernel, dtype, residual_dtype):
    """So -0 beside it becomes +0, wherever it stands; an entry with a weight, too."""
    table = torch.full((3, 70), -0.0, dtype=dtype)
    ids = torch.tensor([[9, 1, 2], [1, 9, 9], [0, 1, 9], [9, 9, 9], [0, 1, 2]])
    given = {"padding_id": 9}
    if residual_dtype is not None:
        given["residual"] = torch.full((5, 70), -0.0, dtype=residual_dtype)
    for count in (1, 2, 3):
        for weights in (None, torch.ones(5, count)):
            out = kernel.fused_embedding_lookup(ids[:, :count], table, weights=weights, **given)
            expected = reference.eager(ids[:, :count], table, weights=weights, **given)
            assert torch.equal(out.signbit(), expected.signbit())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_weight_of_zero_reads_its_row(kernel, dtype):
    table = torch.tensor([[1.0], [float("inf")], [float("nan")]], dtype=dtype).repeat(1, 70)
    ids = torch.tensor([[0, 1], [0, 2], [0, 0]])
    out = kernel.fused_embedding_lookup(ids, table, weights=torch.tensor([1.0, 0.0]).expand(3, 2))
    assert out[:2].isnan().all()
    assert (out[2] == 1).all()


@pytest.mark.parametrize("payload", [0x7F800001, 0x7FFFFFFF, 0x7FC00000])
def test_a_weight_of_any_nan_makes_nan(variant, kernel, payload):
    """Whatever its bits are: rounding must not carry into its sign, nor cut it to infinity."""
    weights = torch.tensor([payload], dtype=torch.int32).view(torch.float32).expand(2, 4)
    for dtype in variant.floats:
        table = torch.randn(3, 70, dtype=dtype)
        out = kernel.fused_embedding_lookup(torch.zeros(2, 4).long(), table, weights=weights)
        assert out.isnan().all()


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [100, 5000])  # by columns, and by rows
def test_backward_is_deterministic(variant, kernel, dtype, weighted, rows):
    """The same bits from 9 runs, on 1, 2 and 7 threads, however the work is split over them."""
    hidden, runs = (40, 4) if variant.is_emulated else (768, 9)
    ids, weights = grid(2, 2520, 60, 40), None
    if rows > 100:
        ids.random_(0, rows)
        ids[:, 300:1200] = 3  # a row that threads share
    padding = (ids == -1).all(-1)
    if weighted:
        weights = torch.randn(ids.shape)
    default_threads = torch.get_num_threads()
    table = torch.randn(2, rows, hidden, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 2520, hidden, dtype=dtype)
    results = []
    try:
        for run in range(runs):
            torch.set_num_threads([1, 2, 7][run % 3])
            out = kernel.fused_embedding_lookup(ids, table, padding=padding, weights=weights)
            results.append(torch.autograd.grad(out, table, grad)[0])
    finally:
        torch.set_num_threads(default_threads)
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.variant("cpu")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_both_ways_of_the_backward_give_the_same_bits(kernel, dtype):
    """Many rows in use are summed by rows, few by columns; which it is depends on the machine."""
    ids = torch.randint(0, 40, (3000, 4))
    weights, grad = torch.randn(3000, 4), torch.randn(3000, 96, dtype=dtype)

    def backward(ids, weights, grad):
        return kernel.op.ops.backward(grad, ids, weights, None, None, 9000, True, dtype)

    few = backward(ids, weights, grad)
    others = torch.arange(1000, 9000)[:, None].expand(-1, 4)  # each reads a row of its own
    many = backward(
        torch.cat([ids, others]),
        torch.cat([weights, torch.ones(8000, 4)]),
        torch.cat([grad, torch.ones(8000, 96, dtype=dtype)]),
    )
    assert torch.equal(few[:1000], many[:1000])
    assert (many[1000:] == 4).all()
