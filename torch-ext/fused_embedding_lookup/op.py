"""The op: its Python signature and its shape functions. The kernels are in the extension."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd, sharding
from ._ops import add_op_namespace_prefix, ops

_forward = ops.forward.default


def fused_embedding_lookup(
    position_ids: Tensor,
    table: Tensor,
    *,
    weights: Tensor | None = None,
    padding: Tensor | None = None,
    padding_id: int | None = None,
    residual: Tensor | None = None,
    embedding_dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum K looked-up rows for each token, mask padding and add a residual, in one kernel.

    Computes, bit for bit, what ``transformers``' Gemma 4 (``Gemma4VisionPatchEmbedder``) and
    Qwen3-VL families (the interpolated position embedding, K = 4) compute in several::

        row_k = table[k][position_ids[..., k].clamp(min=0)]    # table[...] itself if it is shared
        sum = row_0 * weights[..., 0, None] + row_1 * weights[..., 1, None] + ...
        return residual + torch.where(padding.unsqueeze(-1), 0.0, sum.to(embedding_dtype))

    A product is rounded to float32 and then added in float32, in order (for a float64 table, float64
    in both); the sum is rounded once, to ``embedding_dtype``. PyTorch's own sum of more than four
    terms takes another order: there the results differ by the rounding of float32 sums. The gradient
    of ``table`` is summed in a fixed order, in float32 or better, and rounded once: the same bits on
    every run. All derivatives and transforms of ``torch.func`` are those of the code above.

    Args:
        position_ids: ``[..., K]``, int64 or int32, 1 <= K <= 64, the rows of each token. An id below
            zero reads row 0. Any strides.
        table: ``[K, P, H]``, one table for each axis, or ``[P, H]``, one that all axes share. float32,
            float16, bfloat16, or float64 on the CPU. Any strides with a unit last one.
        weights: ``[..., K]``, float32: each row is multiplied by its weight. No derivative is computed
            for them: where one would be recorded they are refused, under ``torch.no_grad`` weights
            that require a gradient are taken. Any strides.
        padding: ``[...]``, bool. Where True, the embedding is zero. Any strides.
        padding_id: An axis whose id equals this adds zero.
        residual: ``[..., H]``, any of the table's dtypes. Added to the embedding. Any strides.
        embedding_dtype: What the sum is rounded to before the residual is added, any of the table's
            dtypes. Default: the table's.

    Returns:
        ``[..., H]``, of dtype ``torch.promote_types(embedding_dtype, residual.dtype)``.

    Raises:
        IndexError: An id is not less than P (CPU; a device-side assertion on CUDA; on MPS an error at
            the next synchronisation).
        ValueError: An argument has a shape, dtype, device or stride that the op does not take, or
            ``weights`` require a gradient, where it would be recorded, or carry a tangent.
        TypeError: An argument is not a tensor.
        torch.OutOfMemoryError: CUDA has no memory for the result (on the CPU, a RuntimeError).
    """
    arguments = position_ids, table, weights, padding, residual, padding_id, embedding_dtype
    if torch.compiler.is_compiling():
        _check_tensors(position_ids, table, weights, padding, residual)
        return _forward(*arguments)
    if not autograd.records_nothing(position_ids, table, weights, padding, residual):
        _check_tensors(position_ids, table, weights, padding, residual)
        sharding.ensure_registered(arguments)
        return autograd.call(_forward, *arguments)
    try:
        if torch.is_inference_mode_enabled():
            return _forward(*arguments)
        with autograd.BelowAutograd():
            return _forward(*arguments)
    except RuntimeError as error:
        autograd.raise_by_class(error, table)
        raise


def _check_tensors(position_ids, table, weights, padding, residual) -> None:
    """What is not a tensor is named. (The extension checks the rest.)"""
    optional = {"weights": weights, "padding": padding, "residual": residual}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    for name, tensor in {"position_ids": position_ids, "table": table, **given}.items():
        autograd.check_tensor(name, tensor)


@torch.library.register_fake(add_op_namespace_prefix("forward"))
def _forward_fake(position_ids, table, weights, padding, residual, padding_id, embedding_dtype):
    # The extension checks the rest; this it can't see, because a meta tensor never reaches it.
    given = {"table": table, "weights": weights, "padding": padding, "residual": residual}
    for name, tensor in given.items():
        if tensor is not None and tensor.device != position_ids.device:
            raise ValueError(
                f"fused_embedding_lookup: {name} must be on the device of position_ids, "
                f"got {tensor.device} and {position_ids.device}"
            )
    dtype = embedding_dtype or table.dtype
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    return table.new_empty((*position_ids.shape[:-1], table.shape[-1]), dtype=dtype)


@torch.library.register_fake(add_op_namespace_prefix("backward"))
def _backward_fake(grad, position_ids, weights, padding, padding_id, num_rows, shared, dtype):
    axes = () if shared else position_ids.shape[-1:]
    return grad.new_empty((*axes, num_rows, grad.shape[-1]), dtype=dtype)
