"""PyTorch's own checks: autograd, opcheck, compile, export, and what the profiler sees."""

import io
import itertools
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import reference
from helpers.memory import allocations
from helpers.problems import grid, problem

pytestmark = [pytest.mark.asan, pytest.mark.gpu]


def arguments(dtype=torch.float32, residual_dtype=None, requires_grad=True, shape=(2, 6), hidden=5):
    """ids, table, padding and residual."""
    residual_dtype = residual_dtype or dtype
    options = {"padding": 0.3, "residual": residual_dtype, "requires_grad": requires_grad}
    return problem((*shape, 2), 4, hidden, dtype, **options).values()


@pytest.mark.kernels_ci
@pytest.mark.variant("cpu")  # it takes float64
@pytest.mark.parametrize("case", ["padding", "padding_id", "weights"])
@pytest.mark.parametrize("fast_mode", [True, False])
def test_gradcheck(kernel, case, fast_mode):
    ids, table, padding, residual = arguments(torch.float64)
    options = {"padding": padding}
    if case == "padding_id":
        options = {"padding_id": -1}
    elif case == "weights":
        table = table.detach()[0].requires_grad_()
        options["weights"] = torch.rand(ids.shape)

    def op(table, residual):
        return kernel.fused_embedding_lookup(ids, table, residual=residual, **options)

    assert torch.autograd.gradcheck(
        op,
        (table, residual),
        fast_mode=fast_mode,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert torch.autograd.gradgradcheck(
        op, (table, residual), fast_mode=fast_mode, check_fwd_over_rev=True, check_batched_grad=True
    )


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
    assert torch.equal(grad_grad, reference.eager(ids, weight, padding=padding))


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", reference.FLOATS, ids=str)
def test_opcheck(variant, kernel, dtype):
    ops = kernel.op.ops
    ids, table, padding, residual = arguments(dtype)
    weights = torch.rand(ids.shape)
    transposed = table.transpose(0, 1).contiguous().transpose(0, 1)
    forward = [
        (ids, table, None, padding, residual, None, None),
        (ids.int(), table, None, None, None, -1, None),
        (ids, table.detach(), None, padding, None, None, None),
        (ids[:, :0], table, None, padding[:, :0], residual[:, :0], None, None),
        (ids, transposed, None, padding, residual.bfloat16(), 0, None),
    ]
    grad = torch.randn(2, 6, 5, dtype=dtype, requires_grad=True)
    backward = [
        (grad, ids, None, padding, None, 4, False, dtype),
        (grad.detach().sum().expand(2, 6, 5), ids, None, None, -1, 4, False, torch.float32),
    ]
    forward += [
        (ids, table[0], weights, padding, residual, None, torch.float32),
        (ids, table, weights, None, None, None, torch.bfloat16),
    ]
    backward.append((grad, ids, weights, padding, -1, 4, True, dtype))
    for op, problems in ((ops.forward.default, forward), (ops.backward.default, backward)):
        for args in problems:
            torch.library.opcheck(op, args)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(kernel, dynamic, weighted):
    """One graph, no recompilation over shapes, the same bits and gradients."""

    def step(ids, table, padding, residual):
        given = {"padding": padding, "residual": residual * 2}
        if weighted:
            table = table[0]
            given |= {"weights": ids * 0.5, "embedding_dtype": torch.bfloat16}
        return kernel.fused_embedding_lookup(ids, table, **given)

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


@pytest.mark.parametrize("weighted", [False, True])
def test_export(kernel, weighted):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(*(() if weighted else (2,)), 4, 5))

        def forward(self, ids, padding, residual):
            given = {"padding": padding, "residual": residual}
            if weighted:
                given |= {"weights": ids * 0.5, "embedding_dtype": torch.bfloat16}
            return kernel.fused_embedding_lookup(ids, self.table, **given)

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
@pytest.mark.parametrize("dtype", reference.FLOATS, ids=str)
def test_forward_allocates_exactly_its_output(kernel, dtype):
    """No copy either of ids, padding or residual that are expanded, sliced or transposed."""
    ids = grid(1, 70, 9, 7).expand(4, 70, 2)
    padding = (ids == -1).all(-1)
    table = torch.randn(64, 2, 96).to(dtype).transpose(0, 1)
    residual = torch.randn(70, 4, 192).to(dtype)[..., ::2].transpose(0, 1)
    out, sizes, _ = allocations(
        lambda: kernel.fused_embedding_lookup(ids, table, padding=padding, residual=residual)
    )
    assert sizes == [out.nbytes]


@pytest.mark.kernels_ci
def test_backward_allocates_its_result_and_a_small_workspace(variant, kernel):
    ids = grid(4, 630, 24, 24)
    table = torch.randn(2, 4096, 768, requires_grad=True)
    workspace = torch.get_num_threads() * 2**20
    if variant.sources == "cuda":  # the README's: the ids twice, partials, counts for two digits
        workspace = 16 * ids.numel() + 2 * 768 * 4 * -(-ids.numel() // 512) + 2 * 2**17
    elif variant.sources == "metal":  # two tiles' order, addends, pieces and partials; rows' starts
        tile = 4096 * 2 + 2 * 4096 * 8 + 512 * 4 + 512 * 768 * 4 + 3 * 4
        workspace = 2 * tile + 2 * 4096 * 4
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


@pytest.mark.kernels_ci
@pytest.mark.variant("cpu")
def test_a_call_that_records_nothing_runs_nothing_but_the_op(kernel):
    """Neither an autograd function nor a context of one: they take longer than the op."""
    ids, table, padding, residual = arguments()
    calls = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            sys.setprofile(lambda frame, *_: calls.append(frame.f_code.co_name))
            kernel.fused_embedding_lookup(ids, table, padding=padding, residual=residual)
            sys.setprofile(None)
    assert "fused_embedding_lookup" in calls
    assert not {"kernel", "setup_context", "_forward_setup"} & {*calls}, calls


class Counting(TorchDispatchMode):
    """Counts the ops that reach it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op._opname)
        return op(*args, **(kwargs or {}))


@pytest.mark.variant("cpu")
def test_dispatch_modes_and_fake_tensors_see_a_call_that_records_nothing(kernel):
    ids, table, padding, residual = arguments(requires_grad=False)
    with Counting() as mode:
        kernel.fused_embedding_lookup(ids, table, padding=padding, residual=residual)
    assert mode.names == ["forward"]
    with FakeTensorMode() as mode, torch.no_grad():
        out = kernel.fused_embedding_lookup(mode.from_tensor(ids), mode.from_tensor(table))
    assert isinstance(out, FakeTensor)


@pytest.mark.variant("cpu")
@pytest.mark.parametrize("mode", ["no_grad", "enable_grad", "compiled"])
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *itertools.product(["position_ids", "table"], [None, [1], 2.0]),
        *itertools.product(["weights", "padding", "residual"], [[1], 2.0]),  # which may be None
    ],
    ids=str,
)
def test_what_is_not_a_tensor_is_named(kernel, argument, value, mode):
    ids, table, padding, residual = arguments()
    given = {"position_ids": ids, "table": table, "padding": padding, "residual": residual}
    given[argument] = value
    call, error = kernel.fused_embedding_lookup, TypeError
    if mode == "compiled":
        torch._dynamo.reset()
        call, error = torch.compile(call, backend="eager"), Exception
    with getattr(torch, mode, torch.enable_grad)(), pytest.raises(error) as info:
        call(**given)
    name = type(value).__name__
    assert f"fused_embedding_lookup: {argument} must be a tensor, got {name}" in str(info.value)


@pytest.mark.variant("cpu")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_out_of_memory(kernel, direction):
    """The allocator's own failure, as accelerate knows it; PyTorch's class where it is CUDA's."""
    memory = pytest.importorskip(
        "accelerate.utils.memory", reason="needs accelerate: pip install -r requirements-test.txt"
    )
    ids, rows = torch.zeros(1, 1, dtype=torch.int64), 2**40
    if direction == "forward":
        table = torch.zeros(1, 1, 2**10)
        arguments = (ids.expand(rows, 1), table, None, None, None, None, None)
    else:
        arguments = (torch.zeros(1, 2**10), ids, None, None, None, rows, False, torch.float32)
    with pytest.raises(RuntimeError, match=" out of memory. .*can't allocate memory") as info:
        kernel.autograd.call(getattr(kernel.op.ops, direction).default, *arguments)
    assert type(info.value) is RuntimeError
    assert memory.should_reduce_batch_size(info.value)

    with FakeTensorMode():
        on_cuda = torch.empty(1, device="cuda")
    with pytest.raises(torch.OutOfMemoryError) as translated:
        kernel.autograd.raise_by_class(info.value, on_cuda)
    assert memory.should_reduce_batch_size(translated.value)
    kernel.autograd.raise_by_class(RuntimeError("CUDA error: unspecified"), on_cuda)  # nothing


@pytest.mark.kernels_ci
def test_a_bad_argument_is_a_value_error_on_every_torch(kernel):
    """What torch 2.15 and later make of std::invalid_argument; tools/other_torch.py runs it there."""
    error = RuntimeError("fused_embedding_lookup: padding must be bool, got Float")
    with pytest.raises(ValueError, match="padding must be bool, got Float"):
        kernel.autograd.raise_by_class(error, torch.empty(0))


@pytest.mark.kernels_ci
@pytest.mark.variant("cpu")
def test_an_id_that_is_too_large_is_an_index_error_on_every_torch(kernel, monkeypatch):
    """Also one that loses both classes; and a batching rule sees which of the two it was."""

    def lost(op):
        def call(*arguments):
            try:
                return op(*arguments)
            except (IndexError, ValueError) as error:
                raise RuntimeError(str(error)) from None

        return call

    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(kernel.autograd, name, lost(getattr(kernel.autograd, name)))
    monkeypatch.setattr(kernel.op, "_forward", lost(kernel.op._forward))
    ids = torch.tensor([[0, 1], [5, 0]])
    table = torch.randn(2, 4, 8, requires_grad=True)
    grad_of_table = torch.func.grad(lambda t: kernel.fused_embedding_lookup(ids, t).sum())
    message = "less than the 4 rows of the table, got 5 on axis 0 of token 1$"
    for call in (
        lambda: kernel.fused_embedding_lookup(ids, table.detach()),
        lambda: kernel.fused_embedding_lookup(ids, table),
        lambda: torch.func.vmap(kernel.fused_embedding_lookup)(
            ids[:, None], torch.stack([table] * 2)
        ),
        lambda: grad_of_table(table),
    ):
        with pytest.raises(IndexError, match=message):
            call()
    with pytest.raises(ValueError, match="position_ids must have shape"):
        torch.func.vmap(kernel.fused_embedding_lookup)(ids[:, 0], table)
