"""The second op: which rows of a square position table each image patch reads, and their weights."""

from __future__ import annotations

import torch

from . import sharding
from ._ops import add_op_namespace_prefix, ops
from .autograd import call, check_tensor

_TAPS = {"bilinear": 2, "bicubic": 4}  # on each of the two axes
_PADDINGS = ("border", "zeros")


def vision_interpolation_indices_and_weights(
    grid_thw: torch.Tensor,
    num_grid_per_side: int,
    *,
    num_patches: int,
    mode: str = "bilinear",
    align_corners: bool = False,
    spatial_merge_size: int = 1,
    padding: str = "border",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Resample a square table of position embeddings to the grids of images and videos, in one kernel.

    What :func:`transformers.vision_utils.get_vision_interpolation_indices_and_weights` returns, bit for
    bit on the CPU, without waiting for the device: the caller says how many patches there are. Made for
    ``fused_embedding_lookup(indices, table, weights=weights)`` with ``table`` ``[num_grid_per_side**2, H]``.
    Neither result has a derivative.

    Args:
        grid_thw: ``[images, 3]``, int64 or int32: frames, height and width of each image or video, in
            patches. Any strides.
        num_grid_per_side: Rows and columns of the table's grid.
        num_patches: Patches of all grids together, ``hidden_states.shape[0]`` of the model.
        mode: ``"bilinear"``, T = 4, or ``"bicubic"``, T = 16, as in :func:`torch.nn.functional.interpolate`.
        align_corners: As in :func:`torch.nn.functional.interpolate`.
        spatial_merge_size: Patches are in blocks of this size squared; 1: in raster order. It need not
            divide heights and widths.
        padding: Outside the grid, ``"border"`` reads its edge, ``"zeros"`` weighs nothing.

    Returns:
        indices: ``[num_patches, T]``, int64, rows of the flattened grid.
        weights: ``[num_patches, T]``, float32.

    Raises:
        ValueError: An argument is not what it says above; on the CPU also if the grids don't have
            ``num_patches`` patches, or one is negative or narrower than ``spatial_merge_size``. Those
            three are a device-side assertion on CUDA, on MPS an error at the next synchronisation.
        TypeError: ``grid_thw`` is not a tensor.
    """
    if mode not in _TAPS:
        raise ValueError(f"fused_embedding_lookup: mode must be one of {list(_TAPS)}, got {mode!r}")
    if padding not in _PADDINGS:
        raise ValueError(
            f"fused_embedding_lookup: padding must be one of {list(_PADDINGS)}, got {padding!r}"
        )
    check_tensor("grid_thw", grid_thw)
    sharding.ensure_registered([grid_thw])
    return call(
        ops.interpolation.default,
        grid_thw,
        num_grid_per_side,
        num_patches,
        mode == "bicubic",
        align_corners,
        spatial_merge_size,
        padding == "zeros",
    )


@torch.library.register_fake(add_op_namespace_prefix("interpolation"))
def _interpolation_fake(
    grid_thw, num_grid_per_side, num_patches, bicubic, align_corners, spatial_merge_size, zeros
):
    size = (num_patches, 16 if bicubic else 4)
    return (
        grid_thw.new_empty(size, dtype=torch.int64),
        grid_thw.new_empty(size, dtype=torch.float32),
    )
