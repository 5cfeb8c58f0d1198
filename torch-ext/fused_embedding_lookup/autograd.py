"""The op's derivatives and batching rule: what autograd, forward-mode AD and torch.func see of it.

Forward is linear in the table and the residual, and backward is its adjoint: each is the other's
derivative. They and the scaling of pixels stand on the `Autograd` dispatch key, where `torch.func`
meets them once for every level of a nested transform. PyTorch has no public way to register a
forward-mode derivative there; on a version that lacks one of the private names below, transforms are
refused.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from . import sharding
from ._ops import add_op_namespace_prefix, ops

try:
    from torch._C import (
        _after_autograd_keyset,
        _any_requires_grad,
        _are_functorch_transforms_active,
        _is_fwd_grad_enabled,
    )
    from torch._C import _AutoDispatchBelowAutograd as BelowAutograd
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd import forward_ad
    from torch.autograd.forward_ad import _current_level, _set_fwd_grad_enabled  # noqa: F401
    from torch.autograd.function import _SingleLevelFunction
except ImportError as error:
    MISSING = str(error)
else:
    MISSING = None

FORWARD, BACKWARD, SCALING = ops.forward.default, ops.backward.default, ops.scaling.default
_library = torch.library.Library(add_op_namespace_prefix("").rstrip(":"), "IMPL")


_ID_TOO_LARGE = "fused_embedding_lookup: position_ids must be less than the "


def raise_by_class(error: RuntimeError, tensor: Tensor) -> None:
    """Give an error of the extension the class that callers catch it by.

    It leaves the extension as a string, and the class is lost on the way: that of running out of CUDA's
    memory, and since torch 2.15 that of a bad argument. Nothing promises to keep an id's IndexError.
    """
    text = str(error)
    if type(error) is RuntimeError and text.startswith(_ID_TOO_LARGE):
        raise IndexError(text) from error
    if type(error) is RuntimeError and text.startswith("fused_embedding_lookup: "):
        raise ValueError(text) from error
    if type(error) is RuntimeError and tensor.is_cuda and " out of memory." in text:
        raise torch.OutOfMemoryError(text) from error


def call(op, *arguments):
    try:
        return op(*arguments)
    except RuntimeError as error:
        raise_by_class(error, arguments[0])
        raise


_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_PLAIN_OR_NONE = _PLAIN | {type(None)}


def records_nothing(position_ids, table, weights, padding, residual) -> bool:
    """Whether a call of plain tensors has no derivative, and no transform that sees it.

    It may then go past the kernels below, in Python, which take longer than the op itself.
    """
    return (
        MISSING is None
        and type(position_ids) in _PLAIN
        and type(table) in _PLAIN
        and type(weights) in _PLAIN_OR_NONE
        and type(padding) in _PLAIN_OR_NONE
        and type(residual) in _PLAIN_OR_NONE
        and forward_ad._current_level < 0
        and not _are_functorch_transforms_active()
        and not (torch.is_grad_enabled() and _any_requires_grad(table, weights, residual))
    )


def check_tensor(name: str, tensor) -> None:
    """What is not a tensor is named. (The extension checks the rest.)

    So is forward-mode AD where it could not be registered: PyTorch would take the tangent for zero.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"fused_embedding_lookup: {name} must be a tensor, got {type(tensor).__name__}"
        )
    if MISSING is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(
            f"fused_embedding_lookup: no forward-mode derivative on torch {torch.__version__}, "
            f"which lacks a name that it takes: {MISSING}"
        )


# ---------------------------------------------------------------------------------------------
# Derivatives. `setup` and `backward` are as `torch.library.register_autograd` takes them.


def _refuse(weights_are_tracked: bool) -> None:
    if weights_are_tracked:
        raise ValueError(
            "fused_embedding_lookup: weights must not require a gradient or carry a tangent, got "
            "weights that do; no derivative is computed for them, detach them"
        )


def _readable(table: Tensor) -> Tensor:
    """`table` with the unit last stride that the op takes; derivatives come with any."""
    return table if table.stride(-1) == 1 else table.contiguous()


def _save(ctx, position_ids, weights, padding, padding_id) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(position_ids, weights, padding)
    ctx.save_for_forward(position_ids, weights, padding)
    ctx.padding_id = padding_id


def _forward_setup(ctx, inputs, output):
    position_ids, table, weights, padding, residual, padding_id, embedding_dtype = inputs[:7]
    _refuse(ctx.needs_input_grad[2])
    _save(ctx, position_ids, weights, padding, padding_id)
    ctx.num_rows = table.shape[-2]
    ctx.shared = table.dim() == 2
    ctx.table_dtype = table.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.embedding_dtype = embedding_dtype
    ctx.out_dtype = output.dtype


def _forward_backward(ctx, grad):
    grad_table = grad_residual = None
    if grad is not None and ctx.needs_input_grad[1]:
        position_ids, weights, padding = ctx.saved_tensors
        rows = ctx.num_rows, ctx.shared, ctx.table_dtype
        grad_table = call(BACKWARD, grad, position_ids, weights, padding, ctx.padding_id, *rows)
    if grad is not None and ctx.needs_input_grad[4]:
        grad_residual = grad.to(ctx.residual_dtype)
    return None, grad_table, None, None, grad_residual, None, None


def _forward_jvp(ctx, _ids, table, weights, _padding, residual, *_):
    _refuse(weights is not None)
    if table is None:  # a copy: two tensors may not share one tangent, which is changed in place
        return residual.to(ctx.out_dtype, copy=True)
    position_ids, weights, padding = ctx.saved_tensors
    options = ctx.padding_id, ctx.embedding_dtype
    out = call(FORWARD, position_ids, _readable(table), weights, padding, residual, *options)
    return out.to(ctx.out_dtype)


def _backward_setup(ctx, inputs, output):
    grad, position_ids, weights, padding, padding_id, num_rows, shared, dtype = inputs[:8]
    _refuse(ctx.needs_input_grad[2])
    _save(ctx, position_ids, weights, padding, padding_id)
    ctx.rows = num_rows, shared, dtype
    ctx.grad_dtype = grad.dtype


def _backward_backward(ctx, table):
    grad = None
    if table is not None:
        position_ids, weights, padding = ctx.saved_tensors
        options = None, ctx.padding_id, ctx.grad_dtype
        grad = call(FORWARD, position_ids, _readable(table), weights, padding, *options)
    return grad, None, None, None, None, None, None, None


def _backward_jvp(ctx, grad, _ids, weights, *_):
    _refuse(weights is not None)
    position_ids, weights, padding = ctx.saved_tensors
    return call(BACKWARD, grad, position_ids, weights, padding, ctx.padding_id, *ctx.rows)


def _scaling_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.pixels_dtype, ctx.out_dtype = inputs[0].dtype, output.dtype


def _scaling_backward(ctx, grad):
    return None if grad is None else 2 * grad.to(ctx.pixels_dtype), None


def _scaling_jvp(ctx, pixel_values, *_):
    return (2 * pixel_values).to(ctx.out_dtype)


def _register(op, setup, backward, jvp) -> None:
    """The derivatives of `op`, as a kernel on its `Autograd` key."""

    # `apply` calls `forward` with both modes off and `jvp` with the second off. What runs in them may
    # be the next level of torch.func, whose derivative would silently be lost.

    def forward(*inputs):
        *arguments, (keyset, grad_mode, forward_mode) = inputs
        below = BelowAutograd()
        with torch.set_grad_enabled(grad_mode), _set_fwd_grad_enabled(forward_mode), below:
            return op.redispatch(keyset & _after_autograd_keyset, *arguments)

    def tangent(ctx, *tangents):
        with _set_fwd_grad_enabled(True):
            return jvp(ctx, *tangents)

    methods = {
        "forward": forward,
        "setup_context": setup,
        "backward": lambda ctx, grad: (*backward(ctx, grad), None),
        "jvp": tangent,
    }
    methods = {name: staticmethod(method) for name, method in methods.items()}
    function = type(f"FusedEmbeddingLookup_{op._opname}", (_SingleLevelFunction,), methods)

    def kernel(keyset, *arguments):
        sharding.ensure_registered(arguments)
        modes = keyset, torch.is_grad_enabled(), _is_fwd_grad_enabled()
        with enable_single_level_autograd_function():
            return function.apply(*arguments, modes)

    _library.impl(op._opname, kernel, "Autograd", with_keyset=True)


for _op, *_derivatives in (
    (FORWARD, _forward_setup, _forward_backward, _forward_jvp),
    (BACKWARD, _backward_setup, _backward_backward, _backward_jvp),
    (SCALING, _scaling_setup, _scaling_backward, _scaling_jvp),
):
    if MISSING is None:
        _register(_op, *_derivatives)
    else:
        torch.library.register_autograd(
            add_op_namespace_prefix(_op._opname), _derivatives[1], setup_context=_derivatives[0]
        )


# ---------------------------------------------------------------------------------------------
# Batching, for `torch.func.vmap`. Ids, weights, padding and activations get the batch as one more
# leading dimension. B tables become one shared table of all their rows, [B * P, H] or
# [B * K * P, H], of which the ids are rewritten.


def _batch_first(size: int, dims, tensors) -> list:
    """`tensors` with the batch in front; those that aren't batched are expanded, not copied."""
    result = []
    for tensor, dim in zip(tensors, dims):
        if tensor is not None:
            tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        result.append(tensor)
    return result


def _refuse_shapes(op, arguments, dims):
    """Raises what `op` says of one sample; or, where it sees fake tensors and so says nothing, this."""
    sample = [x if dim is None else x.select(dim, 0) for x, dim in zip(arguments, dims)]
    call(op, *sample)
    shapes = [[*x.shape] for x in sample if isinstance(x, Tensor)]
    raise ValueError(f"fused_embedding_lookup: no batching rule for samples of shapes {shapes}")


def _fold(position_ids: Tensor, shape, padding_id) -> Tensor:
    """Ids `[B, ..., K]` into B tables of `shape`, (P,) or (K, P), as ids into the rows of all.

    padding_id becomes -1. An id that is out of range stays so: P is not row 0 of the next table.
    """
    *axes, num_rows = shape
    tables = math.prod(axes, start=position_ids.shape[0])
    first = torch.arange(tables, device=position_ids.device) * num_rows
    first = first.view(position_ids.shape[0], *[1] * (position_ids.dim() - 2), math.prod(axes))
    folded = first + position_ids.clamp(min=0)
    folded = torch.where(position_ids < num_rows, folded, tables * num_rows)
    if padding_id is not None:
        folded = torch.where(position_ids == padding_id, -1, folded)
    return folded


@contextlib.contextmanager
def _naming_ids(position_ids, shape, padding_id):
    """An IndexError names an id as the caller gave it, not as it was folded."""
    try:
        yield
    except IndexError:
        table = position_ids.new_zeros((*shape, 1), dtype=torch.float32)
        call(FORWARD, position_ids, table, None, None, None, padding_id, None)  # raises
        raise


def _forward_vmap(info, dims, *arguments):
    _, table, *_, padding_id, embedding_dtype = arguments
    per_token = [*arguments[:1], *arguments[2:5]]
    position_ids, *per_token = _batch_first(info.batch_size, (dims[0], *dims[2:5]), per_token)
    if position_ids.dim() < 2:
        _refuse_shapes(FORWARD, arguments, dims)
    if dims[1] is None:
        return FORWARD(position_ids, table, *per_token, padding_id, embedding_dtype), 0
    table = table.movedim(dims[1], 0)
    shape = tuple(table.shape[1:-1])
    if len(shape) == 0 or shape[:-1] not in ((), (position_ids.shape[-1],)):
        _refuse_shapes(FORWARD, arguments, dims)
    folded, all_rows = _fold(position_ids, shape, padding_id), _readable(table.flatten(0, -2))
    options = None if padding_id is None else -1, embedding_dtype
    with _naming_ids(position_ids, shape, padding_id):
        return call(FORWARD, folded, all_rows, *per_token, *options), 0


def _backward_vmap(info, dims, *arguments):
    padding_id, num_rows, shared, dtype = arguments[4:]
    grad, position_ids, *per_token = _batch_first(info.batch_size, dims, arguments[:4])
    if position_ids.dim() < 2 or grad.dim() < 2 or num_rows < 0:
        _refuse_shapes(BACKWARD, arguments, dims)
    shape = (num_rows,) if shared else (position_ids.shape[-1], num_rows)
    folded = _fold(position_ids, shape, padding_id)
    options = None if padding_id is None else -1, info.batch_size * math.prod(shape), True, dtype
    with _naming_ids(position_ids, shape, padding_id):
        table = call(BACKWARD, grad, folded, *per_token, *options)
    return table.unflatten(0, (info.batch_size, *shape)), 0


torch.library.register_vmap(add_op_namespace_prefix("forward"), _forward_vmap)
torch.library.register_vmap(add_op_namespace_prefix("backward"), _backward_vmap)
torch.library.register_vmap(
    add_op_namespace_prefix("scaling"),
    lambda info, dims, pixel_values, dtype: (SCALING(pixel_values, dtype), dims[0]),
)
