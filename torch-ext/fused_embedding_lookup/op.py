"""The op: its Python signature, its shape function and its derivative. The kernels are in the extension."""

from __future__ import annotations

import torch

from ._ops import add_op_namespace_prefix, ops


def fused_embedding_lookup(
    position_ids: torch.Tensor,
    table: torch.Tensor,
    *,
    padding: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    padding_id: int | None = None,
) -> torch.Tensor:
    """Look up one embedding per axis, sum them, mask padding and add a residual, in one kernel.

    Computes, bit for bit, what Gemma 4's ``Gemma4VisionPatchEmbedder`` computes with seven::

        embedding = table[0][position_ids[..., 0].clamp(min=0)] + table[1][position_ids[..., 1].clamp(min=0)] + ...
        return residual + torch.where(padding.unsqueeze(-1), 0.0, embedding)

    The sum is taken in float32 (float64 for a float64 table) and rounded once to the table's dtype.
    The gradient of ``table`` is summed in a fixed order and rounded once: the same bits on every run.

    Args:
        position_ids: ``[..., K]``, int64 or int32, one id per axis, 1 <= K <= 4. An id below zero
            reads row 0. Any strides.
        table: ``[K, P, H]``, float32, float16, bfloat16, or float64 on the CPU. Any strides with a
            unit last one.
        padding: ``[...]``, bool. Where True, the embedding is zero.
        residual: ``[..., H]``, any of the table's dtypes. Added to the embedding. Any strides.
        padding_id: An axis whose id equals this adds zero.

    Returns:
        ``[..., H]``, of dtype ``torch.promote_types(table.dtype, residual.dtype)``.

    Raises:
        IndexError: An id is not less than P (CPU; a device-side assertion on CUDA; on MPS the
            token's row is NaN, unless it is padding).
        ValueError: An argument has a shape, dtype, device or stride that the op does not take.
    """
    return ops.forward(position_ids, table, padding, residual, padding_id)


@torch.library.register_fake(add_op_namespace_prefix("forward"))
def _forward_fake(position_ids, table, padding, residual, padding_id):
    # The extension checks the rest; this it can't see, because a meta tensor never reaches it.
    for name, tensor in (("table", table), ("padding", padding), ("residual", residual)):
        if tensor is not None and tensor.device != position_ids.device:
            raise ValueError(
                f"fused_embedding_lookup: {name} must be on the device of position_ids, "
                f"got {tensor.device} and {position_ids.device}"
            )
    dtype = table.dtype if residual is None else torch.promote_types(table.dtype, residual.dtype)
    return table.new_empty((*position_ids.shape[:-1], table.shape[-1]), dtype=dtype)


@torch.library.register_fake(add_op_namespace_prefix("backward"))
def _backward_fake(grad, position_ids, padding, padding_id, num_rows, dtype):
    return grad.new_empty((position_ids.shape[-1], num_rows, grad.shape[-1]), dtype=dtype)


def _forward_setup_context(ctx, inputs, output):
    position_ids, table, padding, residual, padding_id = inputs
    ctx.save_for_backward(position_ids, padding)
    ctx.padding_id = padding_id
    ctx.num_rows = table.shape[1]
    ctx.table_dtype = table.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype


def _forward_backward(ctx, grad):
    position_ids, padding = ctx.saved_tensors
    grad_table = grad_residual = None
    if ctx.needs_input_grad[1]:
        grad_table = ops.backward(
            grad, position_ids, padding, ctx.padding_id, ctx.num_rows, ctx.table_dtype
        )
    if ctx.needs_input_grad[3]:
        grad_residual = grad.to(ctx.residual_dtype)
    return None, grad_table, None, grad_residual, None


torch.library.register_autograd(
    add_op_namespace_prefix("forward"), _forward_backward, setup_context=_forward_setup_context
)


def _backward_setup_context(ctx, inputs, output):
    grad, position_ids, padding, padding_id, _, _ = inputs
    ctx.save_for_backward(position_ids, padding)
    ctx.padding_id = padding_id
    ctx.grad_dtype = grad.dtype


def _backward_backward(ctx, grad_grad_table):
    # The backward is linear in `grad`, and the forward is its adjoint. Autograd may hand over a
    # table of any strides, one number expanded to all of it for example.
    position_ids, padding = ctx.saved_tensors
    table = grad_grad_table.contiguous()
    grad_grad = ops.forward(position_ids, table, padding, None, ctx.padding_id)
    return grad_grad.to(ctx.grad_dtype), None, None, None, None, None


torch.library.register_autograd(
    add_op_namespace_prefix("backward"), _backward_backward, setup_context=_backward_setup_context
)
