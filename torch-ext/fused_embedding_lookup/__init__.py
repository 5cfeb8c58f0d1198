"""Sums of looked-up rows in one kernel: the position embeddings of Gemma 4 and the Qwen3-VL family."""

from . import layers
from .interpolation import vision_interpolation_indices_and_weights
from .op import fused_embedding_lookup
from .pixels import scale_pixels

__all__ = [
    "fused_embedding_lookup",
    "layers",
    "scale_pixels",
    "vision_interpolation_indices_and_weights",
]
