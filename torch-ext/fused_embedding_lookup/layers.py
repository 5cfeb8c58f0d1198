"""Layers that `kernels.kernelize` swaps into transformers' Gemma 4 models.

Each layer is pure, as `kernels` requires: a `forward` and nothing else, run on the module that it is
swapped into. Its `...Layout` twin is a whole module with the original's constructor, parameters and
forward, for `transformers.KernelConfig`, which needs one for classes that transformers doesn't
decorate itself.
"""

import sys

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


def _from_transformers(module: str, name: str):
    """A class of transformers, which has it loaded: these layers run only in its models."""
    return getattr(sys.modules[f"transformers.{module}"], name)


class Gemma4UnifiedVisionEmbedder(nn.Module):
    """`transformers`' class of this name: all there is of a vision tower in the encoder-free 12B."""

    has_backward = True
    can_torch_compile = True

    patch_ln1: nn.Module
    patch_dense: nn.Module
    patch_ln2: nn.Module
    pos_embedding: torch.Tensor
    pos_norm: nn.Module
    multimodal_embedder: nn.Module

    def forward(
        self,
        pixel_values: torch.Tensor,
        image_position_ids: torch.Tensor,
        return_dict: bool = True,
    ):
        """Project merged image patches, add their position embeddings and normalise.

        Args:
            pixel_values: ``[batch, patches, 3 * model_patch_size**2]``
            image_position_ids: ``[batch, patches, 2]``, (x, y) of each patch. An axis with -1 adds
                nothing.
            return_dict: False for a tuple.

        Returns:
            `BaseModelOutputWithPooling`: the embeddings, ``[batch, patches, mm_embed_dim]``, and
            their projection into the language model's space.
        """
        target_dtype = self.patch_dense.weight.dtype
        if target_dtype.is_floating_point:
            pixel_values = pixel_values.to(target_dtype)
        hidden_states = self.patch_ln2(self.patch_dense(self.patch_ln1(pixel_values)))
        # The table is [P, 2, H]; the view of it as [2, P, H] is read where it is.
        hidden_states = fused_embedding_lookup(
            image_position_ids,
            self.pos_embedding.transpose(0, 1),
            residual=hidden_states,
            padding_id=-1,
        )
        hidden_states = self.pos_norm(hidden_states)
        output = _from_transformers("modeling_outputs", "BaseModelOutputWithPooling")(
            last_hidden_state=hidden_states,
            pooler_output=self.multimodal_embedder(hidden_states),
        )
        return output.to_tuple() if return_dict is False else output


class Gemma4UnifiedVisionEmbedderLayout(nn.Module):
    """What `KernelConfig` builds in place of `Gemma4UnifiedVisionEmbedder`; plain PyTorch."""

    def __init__(self, vision_config, text_config):
        super().__init__()
        patch_dim = vision_config.model_patch_size**2 * 3
        mm_embed_dim = vision_config.mm_embed_dim
        self.patch_ln1 = nn.LayerNorm(patch_dim)
        self.patch_dense = nn.Linear(patch_dim, mm_embed_dim)
        self.patch_ln2 = nn.LayerNorm(mm_embed_dim)
        self.pos_embedding = nn.Parameter(
            torch.zeros(vision_config.mm_posemb_size, 2, mm_embed_dim)
        )
        self.pos_norm = nn.LayerNorm(mm_embed_dim)
        embedder = _from_transformers(
            "models.gemma4_unified.modeling_gemma4_unified", "Gemma4UnifiedMultimodalEmbedder"
        )
        self.multimodal_embedder = embedder(vision_config, text_config)

    def forward(
        self,
        pixel_values: torch.Tensor,
        image_position_ids: torch.Tensor,
        return_dict: bool = True,
    ):
        target_dtype = self.patch_dense.weight.dtype
        if target_dtype.is_floating_point:
            pixel_values = pixel_values.to(target_dtype)
        hidden_states = self.patch_ln2(self.patch_dense(self.patch_ln1(pixel_values)))
        x, y = image_position_ids.clamp(min=0).unbind(-1)
        rows = torch.stack([self.pos_embedding[x, 0], self.pos_embedding[y, 1]], dim=-2)
        is_padding = (image_position_ids == -1).unsqueeze(-1)
        hidden_states = hidden_states + torch.where(is_padding, 0.0, rows).sum(-2)
        hidden_states = self.pos_norm(hidden_states)
        output = _from_transformers("modeling_outputs", "BaseModelOutputWithPooling")(
            last_hidden_state=hidden_states,
            pooler_output=self.multimodal_embedder(hidden_states),
        )
        return output.to_tuple() if return_dict is False else output
