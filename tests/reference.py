"""What the op must equal: transformers' formulas, and the sums in float64."""

import torch
import torch.nn.functional as F

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Gemma4VisionConfig's arguments for a tower of the real architecture, small enough for a test.
SMALL_VISION_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "position_embedding_size": 128,
}


def eager(position_ids, table, padding=None, residual=None, padding_id=None):
    """The code of transformers since 5.10, for any number of axes.

    With up to two axes this is the original's arithmetic to the letter. With more, its sum would be
    rounded after every addition; the op's contract rounds once, so the sum is taken in float32.
    """
    acc = torch.float64 if table.dtype == torch.float64 else torch.float32
    if position_ids.shape[-1] <= 2 and padding_id is None:
        acc = table.dtype
    clamped = position_ids.clamp(min=0)
    embedding = None
    for axis in range(position_ids.shape[-1]):
        term = F.embedding(clamped[..., axis], table[axis]).to(acc)
        if padding_id is not None:
            term = torch.where((position_ids[..., axis] == padding_id).unsqueeze(-1), 0.0, term)
        embedding = term if embedding is None else embedding + term
    embedding = embedding.to(table.dtype)
    if padding is not None:
        embedding = torch.where(padding.unsqueeze(-1), 0.0, embedding)
    return embedding if residual is None else residual + embedding


def one_hot(position_ids, table, padding, residual):
    """The code of transformers up to 5.9: a one-hot of the ids times the table."""
    encoded = F.one_hot(position_ids.clamp(min=0), num_classes=table.shape[1])
    encoded = encoded.permute(0, 2, 1, 3).to(table)
    embedding = (encoded @ table).sum(dim=1)
    embedding = torch.where(padding.unsqueeze(-1), 0.0, embedding)
    return residual + embedding


def grad_table(grad, position_ids, num_rows, padding=None, padding_id=None):
    """The table's gradient, and the sum of the magnitudes of its terms, in float64."""
    hidden, axes = grad.shape[-1], position_ids.shape[-1]
    flat = grad.reshape(-1, hidden).double()
    keep = ~padding if padding is not None else torch.ones_like(position_ids[..., 0]) == 1
    sums = torch.zeros(2, axes, num_rows, hidden, dtype=torch.float64, device=grad.device)
    for axis in range(axes):
        ids = position_ids[..., axis]
        used = keep if padding_id is None else keep & (ids != padding_id)
        used = used.reshape(-1)
        rows = ids.clamp(min=0).reshape(-1)[used].long()
        sums[0, axis].index_add_(0, rows, flat[used])
        sums[1, axis].index_add_(0, rows, flat[used].abs())
    return sums[0], sums[1]


def ulp(value, dtype):
    """The distance between neighbouring numbers of `dtype` at `value` (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(value.abs().clamp(min=info.tiny))[1] - 1
    return torch.ldexp(torch.full_like(value, info.eps), exponent)


def grid(batch, patches, width, height):
    """The position ids of `batch` images of width x height patches, padded to `patches` with -1."""
    x, y = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    position_ids = torch.full((batch, patches, 2), -1)
    position_ids[:, : width * height] = torch.stack([x, y], dim=-1).reshape(-1, 2)
    return position_ids
