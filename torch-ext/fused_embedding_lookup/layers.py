"""Layers that `kernels.kernelize` swaps into transformers' Gemma 4 models.

Each layer is pure, as `kernels` requires: a `forward` and nothing else, run on the module that it is
swapped into. Its `...Layout` twin is a whole module with the original's constructor, parameters and
forward, for `transformers.KernelConfig`, which needs one for classes that transformers doesn't
decorate itself.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .op import fused_embedding_lookup


class Gemma4VisionPatchEmbedder(nn.Module):
    """`transformers`' class of this name, also in DiffusionGemma's vision tower."""

    has_backward = True
    can_torch_compile = True

    input_proj: nn.Module
    position_embedding_table: torch.Tensor

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_position_ids: torch.Tensor,
        padding_positions: torch.Tensor,
    ) -> torch.Tensor:
        """Project image patches and add their position embeddings.

        Args:
            pixel_values: ``[batch, patches, 3 * patch_size**2]``, in [0, 1].
            pixel_position_ids: ``[batch, patches, 2]``, (x, y) of each patch, (-1, -1) for padding.
            padding_positions: ``[batch, patches]``, bool, True for padding.

        Returns:
            ``[batch, patches, hidden_size]``
        """
        pixel_values = 2 * (pixel_values - 0.5)
        target_dtype = self.input_proj.weight.dtype
        if target_dtype.is_floating_point:
            pixel_values = pixel_values.to(target_dtype)
        hidden_states = self.input_proj(pixel_values)
        return fused_embedding_lookup(
            pixel_position_ids,
            self.position_embedding_table,
            padding=padding_positions,
            residual=hidden_states,
        )


class Gemma4VisionPatchEmbedderLayout(nn.Module):
    """What `KernelConfig` builds in place of `Gemma4VisionPatchEmbedder`; its forward is plain PyTorch."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.patch_size = config.patch_size
        self.position_embedding_size = config.position_embedding_size
        self.input_proj = nn.Linear(3 * self.patch_size**2, self.hidden_size, bias=False)
        self.position_embedding_table = nn.Parameter(
            torch.ones(2, self.position_embedding_size, self.hidden_size)
        )

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_position_ids: torch.Tensor,
        padding_positions: torch.Tensor,
    ) -> torch.Tensor:
        pixel_values = 2 * (pixel_values - 0.5)
        target_dtype = self.input_proj.weight.dtype
        if target_dtype.is_floating_point:
            pixel_values = pixel_values.to(target_dtype)
        hidden_states = self.input_proj(pixel_values)
        x, y = pixel_position_ids.clamp(min=0).unbind(-1)
        position_embeddings = F.embedding(x, self.position_embedding_table[0]) + F.embedding(
            y, self.position_embedding_table[1]
        )
        return hidden_states + torch.where(
            padding_positions.unsqueeze(-1), 0.0, position_embeddings
        )
