"""The third op: Gemma 4's pixels, scaled and cast for the patch projection."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd
from ._ops import add_op_namespace_prefix, ops


def scale_pixels(pixel_values: Tensor, dtype: torch.dtype) -> Tensor:
    """``(2 * (pixel_values - 0.5)).to(dtype)`` in one pass, with the roundings of the three.

    From [0, 1] to [-1, 1], as ``transformers``' ``Gemma4VisionPatchEmbedder`` does before it projects
    patches. All derivatives and transforms of ``torch.func`` are those of the code above.

    Args:
        pixel_values: ``[...]``, float32, float16, bfloat16, or float64 on the CPU. Read where it is if
            it is contiguous, else copied first.
        dtype: Of the result, any of those.

    Returns:
        ``[...]``, contiguous.

    Raises:
        ValueError: One of the dtypes is another.
        TypeError: ``pixel_values`` is not a tensor.
    """
    autograd.check_tensor("pixel_values", pixel_values)
    return autograd.call(ops.scaling.default, pixel_values, dtype)


@torch.library.register_fake(add_op_namespace_prefix("scaling"))
def _scaling_fake(pixel_values, dtype):
    return pixel_values.new_empty(pixel_values.shape, dtype=dtype)
