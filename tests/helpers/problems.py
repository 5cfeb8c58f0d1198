"""The op's arguments: of given sizes, and any that it takes."""

import math

import torch
from hypothesis import strategies as st


def grid(batch, patches, width, height):
    """The position ids of `batch` images of width x height patches, padded to `patches` with -1."""
    x, y = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    position_ids = torch.full((batch, patches, 2), -1)
    position_ids[:, : width * height] = torch.stack([x, y], dim=-1).reshape(-1, 2)
    return position_ids


def problem(
    ids,
    rows,
    hidden,
    dtype=torch.float32,
    *,
    shared=False,
    weighted=False,
    padding=None,
    residual=None,
    requires_grad=False,
    seed=0,
):
    """The op's arguments by name, of random values, in the order of its signature.

    ids            position ids; or their shape, of ids that are -1 or a row, at random
    padding        True: tokens whose ids are all -1; a number: that part of the tokens, at random
    residual       its dtype, if there is one
    requires_grad  do the table and the residual
    """
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def floats(shape, dtype):
        drawn = torch.promote_types(dtype, torch.float32)
        values = torch.randn(shape, generator=generator, dtype=drawn)
        return values.to(dtype).requires_grad_(requires_grad)

    if not isinstance(ids, torch.Tensor):
        ids = torch.randint(-1, rows, ids, generator=generator)
    *leading, entries = ids.shape
    tables = () if shared else (entries,)
    arguments = {"position_ids": ids, "table": floats((*tables, rows, hidden), dtype)}
    if weighted:
        arguments["weights"] = torch.randn(ids.shape, generator=generator)
    if padding is True:
        arguments["padding"] = (ids == -1).all(-1)
    elif padding is not None:
        arguments["padding"] = torch.rand(leading, generator=generator) < padding
    if residual is not None:
        arguments["residual"] = floats((*leading, hidden), residual)
    return arguments


# ----- any that it takes ----------------------------------------------------------------------------


def restride(tensor, how):
    """The same values, laid out differently; whatever lies between them is NaN or out of range."""
    if how == "contiguous" or tensor.dim() == 0:
        return tensor.contiguous()
    poison = (
        math.nan if tensor.is_floating_point() else (1 if tensor.dtype == torch.bool else 2**30)
    )
    if how == "offset":
        buffer = torch.full((tensor.numel() + 3,), poison, dtype=tensor.dtype)
        view = buffer[3:].view(tensor.shape)
    elif how == "rows apart":  # a slice of a tensor with longer rows
        buffer = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), poison, dtype=tensor.dtype)
        view = buffer[..., 2 : tensor.shape[-1] + 2]
    elif how == "elements apart":
        buffer = torch.full((*tensor.shape[:-1], tensor.shape[-1] * 2), poison, dtype=tensor.dtype)
        view = buffer[..., ::2]
    elif how == "reversed":  # dimensions in memory from the last to the first
        view = torch.empty(tensor.shape[::-1], dtype=tensor.dtype).permute(
            *range(tensor.dim())[::-1]
        )
    elif how == "leading reversed":  # the same, with the last left where it is
        leading = range(tensor.dim() - 1)
        shape = [tensor.shape[i] for i in leading][::-1] + [tensor.shape[-1]]
        view = torch.empty(shape, dtype=tensor.dtype).permute(*leading[::-1], tensor.dim() - 1)
    elif how == "expanded":  # stride 0 in the first dimension: the first entry, repeated
        return tensor[:1].expand(tensor.shape)
    view.copy_(tensor)
    return view


ANY_LAYOUT = [
    "contiguous",
    "offset",
    "rows apart",
    "elements apart",
    "reversed",
    "leading reversed",
    "expanded",
]
TABLE_LAYOUT = ["contiguous", "offset", "rows apart", "leading reversed", "expanded"]

# K: mostly small, now and then anything up to the most there may be.
ENTRIES = st.one_of(st.integers(1, 5), st.sampled_from([8, 15, 16, 17, 63, 64]), st.integers(1, 64))


@st.composite
def any_problem(draw, variant):
    """Everything the op takes: shapes, dtypes, layouts, ids below zero, weights, padding, padding_id."""
    leading = draw(st.lists(st.integers(0, 5), min_size=0, max_size=3))
    entries = draw(ENTRIES)
    shared = draw(st.booleans())
    rows = draw(st.integers(1, 9))
    hidden = draw(st.sampled_from([1, 2, 3, 7, 16, 31, 32, 64, 65, 100, 257, 300]))
    generator = torch.Generator(variant.device).manual_seed(draw(st.integers(0, 2**32)))
    any_layout = ANY_LAYOUT if leading else ANY_LAYOUT[:-1]

    def floats(shape, dtype, layouts):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        # A wide range of exponents: rounding, subnormal float16 and overflow to infinity.
        values = values * 2.0 ** torch.randint(-18, 14, shape, generator=generator)
        return restride(values.to(dtype), draw(st.sampled_from(layouts)))

    table_dtype = draw(st.sampled_from(variant.floats))
    tables = () if shared else (entries,)
    arguments = {"table": floats((*tables, rows, hidden), table_dtype, TABLE_LAYOUT)}
    residual_dtype = draw(st.sampled_from((None, *variant.floats)))
    if residual_dtype is not None:
        arguments["residual"] = floats((*leading, hidden), residual_dtype, any_layout)
    id_dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    ids = torch.randint(-3, rows, (*leading, entries), generator=generator, dtype=id_dtype)
    arguments["position_ids"] = restride(ids, draw(st.sampled_from(any_layout)))
    if draw(st.booleans()):
        weights = torch.randn((*leading, entries), generator=generator)
        weights[torch.rand(weights.shape, generator=generator) < 0.2] = 0
        arguments["weights"] = restride(weights, draw(st.sampled_from(any_layout)))
    if draw(st.booleans()):
        padding = torch.rand(leading, generator=generator) < 0.3
        arguments["padding"] = restride(padding, draw(st.sampled_from(ANY_LAYOUT)))
    arguments["padding_id"] = draw(st.sampled_from([None, -1, 0, 2]))
    arguments["embedding_dtype"] = draw(st.sampled_from((None, None, *variant.floats)))
    return arguments
