"""PyTorch's own checks: autograd, opcheck, compile, export, and what the profiler sees."""

import io

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import reference


def arguments(dtype=torch.float32, residual_dtype=None, requires_grad=True, shape=(2, 6), hidden=5):
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    ids = torch.randint(-1, 4, (*shape, 2), generator=generator)
    table = torch.randn(2, 4, hidden, generator=generator).to(dtype).requires_grad_(requires_grad)
    padding = torch.rand(shape, generator=generator) < 0.3
    residual = torch.randn(*shape, hidden, generator=generator).to(residual_dtype or dtype)
    return ids, table, padding, residual.requires_grad_(requires_grad)


@pytest.mark.kernels_ci
@pytest.mark.variant("cpu")  # it takes float64
@pytest.mark.parametrize("padding_id", [None, -1])
@pytest.mark.parametrize("fast_mode", [True, False])
def test_gradcheck(kernel, padding_id, fast_mode):
    ids, table, padding, residual = arguments(torch.float64)

    def op(table, residual):
        return kernel.fused_embedding_lookup(
            ids, table, padding=padding, residual=residual, padding_id=padding_id
        )

    assert torch.autograd.gradcheck(op, (table, residual), fast_mode=fast_mode)
    assert torch.autograd.gradgradcheck(op, (table, residual), fast_mode=fast_mode)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", reference.FLOATS, ids=str)
def test_double_backward(kernel, dtype):
    """The gradient of the gradient is the forward again, without the residual."""
    ids, table, padding, _ = arguments(dtype)
    out = kernel.fused_embedding_lookup(ids, table, padding=padding)
    grad = torch.randn_like(out, requires_grad=True)
    (grad_table,) = torch.autograd.grad(out, table, grad, create_graph=True)
    weight = torch.randn_like(table)
    (grad_grad,) = torch.autograd.grad(grad_table, grad, weight)
    assert torch.equal(grad_grad, reference.eager(ids, weight, padding))


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", reference.FLOATS, ids=str)
def test_opcheck(kernel, dtype):
    ops = kernel.op.ops
    ids, table, padding, residual = arguments(dtype)
    for args in [
        (ids, table, padding, residual, None),
        (ids.int(), table, None, None, -1),
        (ids, table.detach(), padding, None, None),
        (ids[:, :0], table, padding[:, :0], residual[:, :0], None),
        (ids, table.transpose(0, 1).contiguous().transpose(0, 1), padding, residual.bfloat16(), 0),
    ]:
        torch.library.opcheck(ops.forward.default, args)
    grad = torch.randn(2, 6, 5, dtype=dtype, requires_grad=True)
    for args in [
        (grad, ids, padding, None, 4, dtype),
        (grad.detach().sum().expand(2, 6, 5), ids, None, -1, 4, torch.float32),
    ]:
        torch.library.opcheck(ops.backward.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(kernel, dynamic):
    """One graph, no recompilation over shapes, the same bits and gradients."""

    def step(ids, table, padding, residual):
        return kernel.fused_embedding_lookup(ids, table, padding=padding, residual=residual * 2)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    # No size twice: a compiler that sees equal sizes may take them to be the same.
    shapes = [(7, 11), (3, 9), (8, 13)] if dynamic else [(7, 11), (7, 11)]
    for run, shape in enumerate(shapes):
        # From the second shape on, a recompilation is an error.
        with torch.compiler.set_stance("default" if run == 0 else "fail_on_recompile"):
            ids, table, padding, residual = arguments(torch.float32, torch.bfloat16, shape=shape)
            out = compiled(ids, table, padding, residual)
            grads = torch.autograd.grad(out.sum(), (table, residual))
        expected = step(ids, table, padding, residual)
        assert torch.equal(out, expected)
        expected_grads = torch.autograd.grad(expected.sum(), (table, residual))
        assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads))


def test_export(kernel):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(2, 4, 5))

        def forward(self, ids, padding, residual):
            return kernel.fused_embedding_lookup(
                ids, self.table, padding=padding, residual=residual
            )

    module = Module()
    ids, _, padding, residual = arguments(requires_grad=False)
    batch, patches = torch.export.Dim("batch"), torch.export.Dim("patches")
    dims = {0: batch, 1: patches}
    exported = torch.export.export(
        module, (ids, padding, residual), dynamic_shapes=(dims, dims, dims)
    )
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for shape in [(2, 6), (7, 3)]:
        ids, _, padding, residual = arguments(requires_grad=False, shape=shape)
        assert torch.equal(loaded(ids, padding, residual), module(ids, padding, residual))


@pytest.mark.kernels_ci
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(kernel):
    """No batching rule: the leading dimensions are the batch. PyTorch's loop gives the same bits."""
    ids, table, _, _ = arguments(requires_grad=False)
    mapped = torch.vmap(lambda ids: kernel.fused_embedding_lookup(ids, table))(ids)
    assert torch.equal(mapped, kernel.fused_embedding_lookup(ids, table))


def allocations(function):
    """The sizes of all tensors that `function` allocates, and the names of the ops it runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    on = "device" if torch.get_default_device().type == "cuda" else "cpu"
    sizes = [getattr(event, f"self_{on}_memory_usage") for event in profiler.events()]
    return result, [size for size in sizes if size > 0], [e.name for e in profiler.events()]


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", reference.FLOATS, ids=str)
def test_forward_allocates_exactly_its_output(kernel, dtype):
    """No copy either of ids, padding or residual that are expanded, sliced or transposed."""
    ids = reference.grid(1, 70, 9, 7).expand(4, 70, 2)
    padding = (ids == -1).all(-1)
    table = torch.randn(64, 2, 96).to(dtype).transpose(0, 1)
    residual = torch.randn(70, 4, 192).to(dtype)[..., ::2].transpose(0, 1)
    out, sizes, _ = allocations(
        lambda: kernel.fused_embedding_lookup(ids, table, padding=padding, residual=residual)
    )
    assert sizes == [out.nbytes]


@pytest.mark.kernels_ci
def test_backward_allocates_its_result_and_a_small_workspace(variant, kernel):
    ids = reference.grid(4, 630, 24, 24)
    table = torch.randn(2, 4096, 768, requires_grad=True)
    workspace = torch.get_num_threads() * 2**20
    if (
        variant.sources == "cuda"
    ):  # as csrc/cuda/backward.cu has it: partial sums, segments, the rest
        tokens, tiles = 4 * 630, 3
        workspace = tiles * 1024 * 768 + 2 * 4096 * 2 * tiles + (tokens + 4096) * 2 * 10
    elif variant.sources == "metal":  # segments and the order
        workspace = 2 * 4096 * 2 * 3 + 3 * 1024 * 2 * 4
    out = kernel.fused_embedding_lookup(ids, table)
    # An expanded gradient, as from out.sum().backward(), is not copied.
    incoming = torch.ones(()).expand(out.shape)
    (grad,), sizes, _ = allocations(lambda: torch.autograd.grad(out, table, incoming))
    assert max(sizes) == grad.nbytes
    assert sum(sizes) - grad.nbytes <= workspace


@pytest.mark.kernels_ci
def test_frozen_table_costs_nothing(kernel):
    """The residual's gradient is the incoming one, itself; nothing is launched or allocated."""
    ids, table, padding, residual = arguments()
    out = kernel.fused_embedding_lookup(ids, table.detach(), padding=padding, residual=residual)
    incoming = torch.randn_like(out)
    (grad,), sizes, names = allocations(lambda: torch.autograd.grad(out, residual, incoming))
    assert grad.data_ptr() == incoming.data_ptr()
    assert sizes == []
    # aten::to returns its argument when the dtypes are equal.
    assert {name for name in names if "::" in name and "autograd::" not in name} <= {"aten::to"}


@pytest.mark.kernels_ci
def test_frozen_residual(kernel):
    ids, table, padding, residual = arguments()
    out = kernel.fused_embedding_lookup(ids, table, padding=padding, residual=residual.detach())
    out.sum().backward()
    assert residual.grad is None
    assert table.grad is not None


@pytest.mark.kernels_ci
def test_no_grad_records_nothing(kernel):
    ids, table, padding, residual = arguments()
    with torch.no_grad():
        out = kernel.fused_embedding_lookup(ids, table, padding=padding, residual=residual)
    assert not out.requires_grad
    with torch.inference_mode():
        kernel.fused_embedding_lookup(ids, table, padding=padding, residual=residual)
