"""torch.func, forward-mode AD and vmap: alone, nested and compiled, what the eager code gives."""

import itertools
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves

from helpers import process, reference
from helpers.memory import allocations
from helpers.problems import problem

# In float64, and with the shared table that a batch of tables becomes.
pytestmark = pytest.mark.variant("cpu")

ROWS, HIDDEN = 5, 3


def arguments(case, batch=None, dtype=torch.float64):
    """ids, table, residual and keyword arguments of a model's lookup, each with a batch in front."""
    qwen = case == "qwen"
    options = {"shared": qwen, "weighted": qwen, "padding": None if case == "unified" else 0.3}

    def sample(seed):
        shape = (2, 3, 4 if qwen else 2)
        return problem(shape, ROWS, HIDDEN, dtype, residual=dtype, seed=seed, **options)

    values = sample(0)
    if batch is not None:
        values = {name: torch.stack([sample(i)[name] for i in range(batch)]) for name in values}
    ids, table, residual = map(values.pop, ("position_ids", "table", "residual"))
    return ids, table, residual, values | ({"padding_id": -1} if case == "unified" else {})


CASES = ("gemma", "unified", "qwen")


def per_sample(f, p):
    """The gradient for each sample of the first leading dimension."""
    return vmap(grad(lambda p, i: loss(lambda p: f(p, i))(p)), (None, 0))(p, torch.arange(2))


def loss(f):
    return lambda p: f(p).pow(3).sum()


# Of f, a nonlinear function around the op; p, its parameters; v, tangents of the same structure.
TRANSFORMS = {
    "grad": lambda f, p, v: grad(loss(f))(p),
    "grad_and_value": lambda f, p, v: grad_and_value(loss(f))(p),
    "vjp": lambda f, p, v: vjp(f, p)[1](f(p)),
    "jvp": lambda f, p, v: jvp(f, (p,), (v,)),
    "linearize": lambda f, p, v: linearize(f, p)[1](v),
    "jacrev": lambda f, p, v: jacrev(f)(p),
    "jacfwd": lambda f, p, v: jacfwd(f)(p),
    "hessian": lambda f, p, v: hessian(loss(f))(p),
    "jacrev of jacrev": lambda f, p, v: jacrev(jacrev(loss(f)))(p),
    "jacfwd of jacfwd": lambda f, p, v: jacfwd(jacfwd(loss(f)))(p),
    "jacrev of jacfwd": lambda f, p, v: jacrev(jacfwd(loss(f)))(p),
    "jvp of grad": lambda f, p, v: jvp(grad(loss(f)), (p,), (v,)),
    "grad of jvp": lambda f, p, v: grad(lambda p: loss(lambda p: jvp(f, (p,), (v,))[1])(p))(p),
    "jvp of jvp": lambda f, p, v: jvp(lambda p: jvp(f, (p,), (v,))[1], (p,), (v,)),
    "grad of grad": lambda f, p, v: grad(
        lambda p: sum(g.pow(2).sum() for g in grad(loss(f))(p).values())
    )(p),
    "grad of jvp of grad": lambda f, p, v: grad(
        lambda p: sum(g.pow(2).sum() for g in jvp(grad(loss(f)), (p,), (v,))[1].values())
    )(p),
    "vmap": lambda f, p, v: vmap(f)(stack(p, v)),
    "vmap of grad": lambda f, p, v: vmap(grad(loss(f)))(stack(p, v)),
    "vmap of jvp": lambda f, p, v: vmap(lambda p: jvp(f, (p,), (v,)))(stack(p, v)),
    "vmap of jvp of grad": lambda f, p, v: vmap(lambda p: jvp(grad(loss(f)), (p,), (v,)))(
        stack(p, v)
    ),
    "vmap over tangents": lambda f, p, v: vmap(lambda v: jvp(f, (p,), (v,))[1])(stack(p, v)),
    "grad of vmap": lambda f, p, v: grad(lambda p: vmap(f)(stack(p, v)).pow(3).sum())(p),
    "jvp of vmap of grad": lambda f, p, v: jvp(
        lambda p: vmap(grad(loss(f)))(stack(p, v)), (p,), (v,)
    ),
    "vmap of vmap": lambda f, p, v: vmap(vmap(f))(stack(stack(p, v), stack(v, v))),
    "vmap of hessian": lambda f, p, v: vmap(hessian(loss(f)))(stack(p, v)),
}


def stack(p, v):
    return {name: torch.stack([p[name], v[name]]) for name in p}


def lookup_function(lookup, case, tracked):
    """f(p) around `lookup`, nonlinear in what is tracked; p and tangents."""
    ids, table, residual, options = arguments(case)
    everything = {"table": table, "residual": residual}
    p = {name: everything[name] for name in tracked}
    v = {name: torch.randn_like(tensor) for name, tensor in p.items()}

    def f(p):
        given = {**everything, **{name: tensor.sin() for name, tensor in p.items()}}
        return lookup(ids, given["table"], residual=given["residual"], **options).cos()

    return f, p, v


TRACKED = (("table",), ("residual",), ("table", "residual"))


def both(kernel, case, tracked):
    """The same function around ours and around the eager code, and arguments."""
    torch.manual_seed(0)
    ours, p, v = lookup_function(kernel.fused_embedding_lookup, case, tracked)
    return ours, lookup_function(reference.eager, case, tracked)[0], p, v


@pytest.mark.parametrize("tracked", TRACKED, ids="+".join)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform(kernel, transform, case, tracked):
    ours, eager, p, v = both(kernel, case, tracked)
    expected = TRANSFORMS[transform](eager, p, v)
    torch.testing.assert_close(TRANSFORMS[transform](ours, p, v), expected)
    torch.testing.assert_close(vmap(lambda x: x)(torch.ones(1)), torch.ones(1))  # no level is left


REFUSED_BY_DYNAMO = ("linearize", "vmap of hessian")  # of the eager code, too


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    "transform", [name for name in TRANSFORMS if name not in REFUSED_BY_DYNAMO]
)
def test_transform_compiled(kernel, transform, trainable):
    """`trainable`: AOTAutograd differentiates the transform as well."""
    ours, eager, p, v = both(kernel, "qwen", ("table", "residual"))
    if trainable:
        p = {name: tensor.requires_grad_() for name, tensor in p.items()}
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda p, v: TRANSFORMS[transform](ours, p, v), fullgraph=True, backend="aot_eager"
    )
    # Without the mode of the default device: under any mode Dynamo fails at Tensor.unflatten.
    with torch.overrides._pop_mode_temporarily():
        results = [TRANSFORMS[transform](eager, p, v), compiled(p, v)]
    torch.testing.assert_close(results[1], results[0])
    if trainable:
        grads = [
            torch.autograd.grad(sum(leaf.sum() for leaf in tree_leaves(result)), [*p.values()])
            for result in results
        ]
        torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("mode", ["no_grad", "enable_grad"])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("tracked", TRACKED, ids="+".join)
@pytest.mark.parametrize("case", CASES)
def test_dual_tensors(kernel, case, tracked, trainable, mode):
    """A tangent is never dropped: not where parameters are frozen, nor where none is recorded."""
    ours, eager, p, v = both(kernel, case, tracked)
    with getattr(torch, mode)(), forward_ad.dual_level():
        results = []
        for f in (ours, eager):
            leaves = {name: tensor.clone().requires_grad_(trainable) for name, tensor in p.items()}
            duals = {name: forward_ad.make_dual(leaf, v[name]) for name, leaf in leaves.items()}
            out = forward_ad.unpack_dual(f(duals))
            results.append([*out])
            if trainable and mode == "enable_grad":  # reverse over forward
                total = out.primal.pow(2).sum() + out.tangent.pow(3).sum()
                results[-1] += torch.autograd.grad(total, [*leaves.values()])
    torch.testing.assert_close(*results)


def test_tangents_are_not_shared(kernel):
    """Changing the result's tangent in place leaves the residual's alone."""
    ids, table, residual, options = arguments("gemma")
    with forward_ad.dual_level():
        tangent = torch.ones_like(residual)
        dual = forward_ad.make_dual(residual, tangent)
        out = kernel.fused_embedding_lookup(ids, table, residual=dual, **options)
        out.mul_(2)
        assert torch.equal(forward_ad.unpack_dual(out).tangent, torch.full_like(residual, 2))
        assert torch.equal(tangent, torch.ones_like(residual))


@pytest.mark.parametrize("outer", ["grad", "jvp"])
@pytest.mark.parametrize("inner", ["grad", "jvp"])
def test_no_grad_inside_transforms(kernel, outer, inner):
    """What no_grad hides from every level stays hidden, what it doesn't is seen."""
    ours, eager, p, v = both(kernel, "gemma", ("table", "residual"))
    first = {
        "grad": lambda f: lambda p: sum(g.sum() for g in grad(loss(f))(p).values()),
        "jvp": lambda f: lambda p: jvp(loss(f), (p,), (v,))[1],
    }

    def hidden(f):
        def g(p):
            with torch.no_grad():
                constant = f(p)
            return constant * f(p)

        return g

    results = []
    for f in (ours, eager):
        g = first[inner](hidden(f))
        results.append(grad(g)(p) if outer == "grad" else jvp(g, (p,), (v,)))
    torch.testing.assert_close(*results)


# ---------------------------------------------------------------------------------------------
# vmap


def samples(tensors, in_dims, size):
    """The arguments of each sample."""
    for sample in range(size):
        yield [
            tensor if dim is None else tensor.select(dim, sample)
            for tensor, dim in zip(tensors, in_dims)
        ]


SUBSETS = list(itertools.product([False, True], repeat=3))[1:]


@pytest.mark.parametrize("dtype", reference.FLOATS, ids=str)
@pytest.mark.parametrize("batched", SUBSETS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_vmap(kernel, case, batched, dtype):
    """Each sample's own bits and, as a gradient, its own sum; whichever arguments have the batch."""
    batches = arguments(case, batch=4, dtype=dtype)
    one = arguments(case, dtype=dtype)
    names = [name for name, value in one[3].items() if isinstance(value, torch.Tensor)]
    scalars = {name: value for name, value in one[3].items() if name not in names}
    has_batch = [*batched, *[batched[0]] * len(names)]  # per-token options go with the ids
    choices = [
        (a if has else b) for has, a, b in zip(has_batch, flat(batches, names), flat(one, names))
    ]
    for last in (False, True):  # the batch in front, and last in memory
        in_dims = [
            (x.dim() - 1 if last else 0) if has else None for has, x in zip(has_batch, choices)
        ]
        tensors = [
            x if dim in (0, None) else x.movedim(0, -1).contiguous()
            for x, dim in zip(choices, in_dims)
        ]

        def f(ids, table, residual, *options):
            return kernel.fused_embedding_lookup(
                ids, table, residual=residual, **dict(zip(names, options)), **scalars
            )

        def table_gradient(ids, table, residual, *options):
            return grad(lambda table: f(ids, table, residual, *options).float().pow(2).sum())(table)

        with torch.no_grad():
            actual = vmap(f, in_dims=tuple(in_dims))(*tensors)
        expected = torch.stack(
            [f(*map(torch.Tensor.contiguous, x)) for x in samples(tensors, in_dims, 4)]
        )
        assert torch.equal(actual, expected)
        actual = vmap(table_gradient, in_dims=tuple(in_dims))(*tensors)
        expected = torch.stack(
            [table_gradient(*map(torch.Tensor.contiguous, x)) for x in samples(tensors, in_dims, 4)]
        )
        assert torch.equal(actual, expected)


def flat(problem, names):
    return [*problem[:3], *(problem[3][name] for name in names)]


@pytest.mark.parametrize("padding_id", [None, -1, 0, 2, ROWS, 99])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("case", ["gemma", "shared"])
def test_vmap_over_tables_and_ids(kernel, case, id_dtype, padding_id):
    """padding_id is meant of the ids as they are given, also where it is no row."""
    ids = torch.randint(-2, ROWS, (2, 3, 7, 2)).to(id_dtype)
    if padding_id is not None:
        ids[..., 2:4, :] = padding_id
    table = torch.randn(2, 3, *(() if case == "shared" else (2,)), ROWS, HIDDEN)

    def f(ids, table):
        return kernel.fused_embedding_lookup(ids, table, padding_id=padding_id)

    expected = torch.stack([torch.stack([f(i, t) for i, t in zip(*x)]) for x in zip(ids, table)])
    assert torch.equal(vmap(vmap(f))(ids, table), expected)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(2, ROWS), (ROWS,)], ids=str)
@pytest.mark.parametrize("nested", ["table", "ids of tables", "tables of ids"])
def test_vmap_names_an_id_that_is_too_large(kernel, nested, shape, compiled):
    """Never the next table's row. The id, its axis and P are the caller's, in either direction."""
    ids = torch.zeros(3, 4, 2, dtype=torch.int64)
    ids[1, 2, 1] = ROWS
    tables = torch.randn(3, *shape, HIDDEN)

    def f(ids, table):
        return kernel.fused_embedding_lookup(ids, table)

    calls = {
        "table": vmap(f),
        "ids of tables": vmap(vmap(f, in_dims=(0, None)), in_dims=(None, 0)),
        "tables of ids": vmap(vmap(f, in_dims=(None, 0)), in_dims=(0, None)),
    }
    call = calls[nested]
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    message = (
        f"position_ids must be less than the {ROWS} rows of the table, got {ROWS} on axis 1 of"
    )
    if compiled:  # where an exception is not handled: out of range of all tables' rows
        message = "position_ids must be less than the "
    with torch.no_grad(), pytest.raises(IndexError, match=re.escape(message)):
        call(ids, tables)


@pytest.mark.parametrize("shared", [False, True])
def test_vmap_of_the_backward_names_an_id_that_is_too_large(kernel, shared):
    ids = torch.zeros(3, 4, 2, dtype=torch.int64)
    ids[1, 2, 1] = ROWS
    with pytest.raises(
        IndexError, match=f"less than the {ROWS} rows of the table, got {ROWS} on axis 1"
    ):
        vmap(
            lambda grad: kernel.op.ops.backward(
                grad, ids[1], None, None, None, ROWS, shared, torch.float32
            )
        )(torch.randn(3, 4, HIDDEN))


@pytest.mark.parametrize(
    "ids, table, message",
    [
        ((), (2, ROWS, HIDDEN), "position_ids must have shape [..., K]"),
        ((7, 2), (HIDDEN,), "table must have shape [K, P, H] or [P, H], got [3]"),
        ((7, 2), (1, ROWS, HIDDEN), "position_ids must have shape [..., 1]"),
        ((7, 1), (2, ROWS, HIDDEN), "position_ids must have shape [..., 2]"),
        (
            (7, 2),
            (2, 2, ROWS, HIDDEN),
            "table must have shape [K, P, H] or [P, H], got [2, 2, 5, 3]",
        ),
        ((7, 2), (2, 0, HIDDEN), "table must have at least one row"),
    ],
)
@pytest.mark.parametrize("batched", [(True, True), (True, False), (False, True)], ids=str)
def test_vmap_of_bad_shapes(kernel, ids, table, message, batched):
    """A batch does not make a bad shape a good one."""
    ids = torch.zeros((2, *ids) if batched[0] else ids, dtype=torch.int64)
    table = torch.zeros((2, *table) if batched[1] else table)
    in_dims = tuple(0 if has else None for has in batched)
    with pytest.raises(ValueError, match="^fused_embedding_lookup: " + re.escape(message)):
        vmap(kernel.fused_embedding_lookup, in_dims=in_dims)(ids, table)


def test_vmap_of_bad_shapes_of_fake_tensors(kernel):
    """Where the op itself computes nothing and so refuses nothing, the rule does."""
    with FakeTensorMode():
        ids, table = torch.zeros(2, 7, 1, dtype=torch.int64), torch.zeros(2, 2, ROWS, HIDDEN)
        message = re.escape("no batching rule for samples of shapes [[7, 1], [2, 5, 3]]")
        with pytest.raises(ValueError, match=message):
            vmap(kernel.fused_embedding_lookup)(ids, table)


@pytest.mark.filterwarnings("error")  # PyTorch's loop over the samples comes with a warning
def test_vmap_copies_no_table(kernel):
    ids, table = torch.zeros(4, 6, 2, dtype=torch.int64), torch.randn(4, 2, 1000, 64)
    _, sizes, _ = allocations(lambda: vmap(kernel.fused_embedding_lookup)(ids, table))
    assert 0 < sum(sizes) < table.nbytes / 10


# ---------------------------------------------------------------------------------------------
# Weights, which have no derivative


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "transform",
    {
        "requires_grad": lambda f, w: f(w.requires_grad_()),
        "grad": lambda f, w: grad(lambda w: f(w).sum())(w),
        "jvp": lambda f, w: jvp(f, (w,), (w,)),
        "jacfwd": lambda f, w: jacfwd(f)(w),
        "vmap of grad": lambda f, w: vmap(grad(lambda w: f(w).sum()))(torch.stack([w, w])),
        "grad of jvp": lambda f, w: grad(
            lambda w: jvp(lambda x: f(w * x.sum()), (w,), (w,))[1].sum()
        )(w),
    }.items(),
    ids=lambda item: item[0],
)
def test_weights_are_refused_where_they_are_tracked(kernel, transform, compiled):
    ids, table, _, options = arguments("qwen")
    error = ValueError

    def call(weights):
        return transform[1](
            lambda weights: kernel.fused_embedding_lookup(ids, table, weights=weights), weights
        )

    if compiled:
        torch._dynamo.reset()
        call, error = torch.compile(call, backend="aot_eager"), Exception
    with pytest.raises(error, match="weights must not require a gradient or carry a tangent"):
        call(options["weights"])


def test_weights_with_a_tangent(kernel):
    ids, table, _, options = arguments("qwen")
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(options["weights"], options["weights"])
        with pytest.raises(ValueError, match="weights must not require a gradient or carry"):
            kernel.fused_embedding_lookup(ids, table, weights=dual)


# ---------------------------------------------------------------------------------------------
# Where PyTorch lacks a name that this needs


MISSING = """
from helpers.variants import VARIANTS
import torch
del torch._functorch.utils.enable_single_level_autograd_function
kernel = VARIANTS["cpu"].load()
ids, table = torch.tensor([[0, 1], [1, 1]]), torch.randn(2, 4, 3, requires_grad=True)
f = lambda table: kernel.fused_embedding_lookup(ids, table)
expected = torch.zeros(2, 4, 3)
expected[0, 0] = expected[0, 1] = 1
expected[1, 1] = 2
assert torch.equal(torch.autograd.grad(f(table).sum(), table)[0], expected)
compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
assert torch.equal(torch.autograd.grad(compiled(table).sum(), table)[0], expected)
table = table.detach()
for transform in (
    lambda table: torch.func.jvp(f, (table,), (table,)),
    torch.func.jacfwd(f),
    torch.func.grad(lambda table: f(table).sum()),
    torch.func.jacrev(f),
    torch.func.hessian(lambda table: f(table).sum()),
    torch.compile(lambda table: torch.func.jvp(f, (table,), (table,))[1], backend="aot_eager"),
):
    try:
        print("silently", transform(table))
    except (NotImplementedError, RuntimeError) as error:
        print("refused:", repr(error)[:300])
"""
# Forward-mode AD by ourselves; what stays of autograd's own registration, by PyTorch.
REFUSED = ["no forward-mode derivative on torch", "must override the setup_context staticmethod"]


def test_torch_without_a_private_name():
    """First-order autograd, and an error for every transform."""
    lines = process.script(MISSING).stdout.splitlines()
    expected = [REFUSED[i] for i in (0, 0, 1, 1, 1, 0)]
    assert len(lines) == len(expected), lines
    for line, text in zip(lines, expected):
        assert line.startswith("refused:") and text in line, lines


# ---------------------------------------------------------------------------------------------
# The original layers


@pytest.fixture
def layers(swap_in, variant_dir, monkeypatch):
    """Returns an original, of transformers, the same with our layer, and what both are called with."""
    from helpers import tiny_models, vision_towers  # they take seconds

    def get(name):
        if name == "unified":
            original = tiny_models.build("unified-12b").model.embed_vision.double()
            batch = tiny_models.prompt("unified-12b")
            ids = batch["image_position_ids"]
            ids[0, 3, 0] = -1  # on one axis alone
            ours = swap_in(torch.nn.Sequential(original))[0]
            return (
                original,
                ours,
                {"pixel_values": batch["pixel_values"], "image_position_ids": ids},
            )
        vision_towers.undo(monkeypatch.setattr)
        original = vision_towers.build(name, torch.float64)
        inputs = vision_towers.inputs(name, [[1, 4, 6]], torch.float64)
        return original, vision_towers.swap(original, variant_dir), inputs

    return get


@pytest.mark.parametrize("name", ["unified", "qwen3_vl"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "jacfwd", "jacrev", "hessian"])
def test_transform_of_a_layer(layers, name, transform):
    """Of a module's output with its parameters moved along three directions at once."""
    original, ours, inputs = layers(name)
    parameters = {name: p.detach() for name, p in original.named_parameters()}
    directions = {name: torch.randn(3, *p.shape, dtype=p.dtype) for name, p in parameters.items()}
    p, v = ({"steps": torch.randn(3, dtype=torch.float64) / 9} for _ in range(2))

    def output(module):
        def f(p):
            moved = {
                name: tensor + torch.tensordot(p["steps"], directions[name], 1)
                for name, tensor in parameters.items()
            }
            return functional_call(module, moved, kwargs=inputs).last_hidden_state

        return f

    expected = TRANSFORMS[transform](output(original), p, v)
    torch.testing.assert_close(TRANSFORMS[transform](output(ours), p, v), expected)
    assert all(leaf.count_nonzero() for leaf in tree_leaves(expected))
