"""Multi-axis embedding lookup, sum, mask and residual add in one kernel: Gemma 4's position embeddings."""

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
