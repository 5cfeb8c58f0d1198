"""The eager code of the op, in plain PyTorch: what the kernels must equal, and what they replace."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def fused_embedding_lookup(
    position_ids: torch.Tensor,
    table: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    padding_id: int | None = None,
    residual: torch.Tensor | None = None,
    embedding_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The op of the same name, in the words of the models that it is for.

    Without weights, the sum of two rows is Gemma 4's code to the letter; with weights and K = 4 the
    result has the bits of ``interpolated``, the Qwen3-VL family's code. With more rows than that
    PyTorch sums in an order of its own, so the op's order is spelt out here: one row after the
    other, in float32 (float64 for a float64 table), rounded once.
    """
    embedding_dtype = embedding_dtype or table.dtype
    acc = torch.float64 if table.dtype == torch.float64 else torch.float32
    if weights is None and position_ids.shape[-1] <= 2 and embedding_dtype == table.dtype:
        acc = table.dtype  # rounds once, too
    embedding = None
    for k, ids in enumerate(position_ids.unbind(-1)):
        rows = table if table.dim() == 2 else table[k]
        read = None if padding_id is None else ids != padding_id
        ids = ids.clamp(min=0) if read is None else torch.where(read, ids, 0).clamp(min=0)
        term = F.embedding(ids, rows).to(acc)
        if weights is not None:
            term = term * weights[..., k, None]
        if read is not None:
            term = torch.where(read.unsqueeze(-1), term, 0.0)
        if embedding is None:
            embedding = term if weights is None else 0.0 + term
        else:
            embedding = embedding + term
    embedding = embedding.to(embedding_dtype)
    if padding is not None:
        embedding = torch.where(padding.unsqueeze(-1), 0.0, embedding)
    return embedding if residual is None else residual + embedding


def interpolated(
    position_ids: torch.Tensor,
    table: torch.Tensor,
    weights: torch.Tensor,
    embedding_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The position embedding of the Qwen3-VL family: ``[..., K]`` ids and weights of ``[P, H]``."""
    rows = F.embedding(position_ids, table)
    return (rows * weights.unsqueeze(-1)).sum(-2).to(embedding_dtype or table.dtype)
