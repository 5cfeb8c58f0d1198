"""Layers that `kernels.kernelize` swaps into transformers' models.

Each layer is pure, as `kernels` requires: a `forward` and nothing else, run on the module that it is
swapped into.
"""

from __future__ import annotations

import functools
import sys
from operator import attrgetter

import torch
from torch import nn

from .autograd import check_tensor
from .interpolation import vision_interpolation_indices_and_weights
from .op import fused_embedding_lookup
from .pixels import scale_pixels


def _original_in_onnx_export(forward):
    """ONNX has no such ops: in `torch.onnx.export` the forward of the module's own class runs.

    `kernelize` sets a module's forward, and leaves its class as it was.
    """

    @functools.wraps(forward)
    def original_or_ours(self, *args, **kwargs):
        if torch.onnx.is_in_onnx_export():
            return type(self).forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    return original_or_ours


class Gemma4VisionPatchEmbedder(nn.Module):
    """`transformers`' class of this name, also in DiffusionGemma's vision tower."""

    has_backward = True
    can_torch_compile = True

    input_proj: nn.Module
    position_embedding_table: torch.Tensor

    @_original_in_onnx_export
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
        hidden_states = self.input_proj(_scaled(pixel_values, self.input_proj.weight.dtype))
        if _overrides_position_embeddings(self):
            return hidden_states + self._position_embeddings(pixel_position_ids, padding_positions)
        hidden_states, position_ids, padding = _broadcast(
            hidden_states, pixel_position_ids, padding_positions
        )
        return fused_embedding_lookup(
            position_ids, self.position_embedding_table, padding=padding, residual=hidden_states
        )


def _scaled(pixel_values: torch.Tensor, weight_dtype: torch.dtype) -> torch.Tensor:
    """From [0, 1] to [-1, 1], in the dtype that the projection takes: its weight's, unless it is quantised."""
    if pixel_values.dtype in (torch.float32, torch.float16, torch.bfloat16):
        dtype = weight_dtype if weight_dtype.is_floating_point else pixel_values.dtype
        return scale_pixels(pixel_values, dtype)
    # Whole numbers, and float64, which the GPUs' kernels don't take.
    pixel_values = 2 * (pixel_values - 0.5)
    return pixel_values.to(weight_dtype) if weight_dtype.is_floating_point else pixel_values


def _overrides_position_embeddings(module: nn.Module) -> bool:
    """Whether a subclass computes the position embeddings in its own way."""
    original = _from_transformers("models.gemma4.modeling_gemma4", "Gemma4VisionPatchEmbedder")
    method = module._position_embeddings
    return getattr(method, "__func__", method) is not original._position_embeddings


def _broadcast(hidden_states, position_ids, padding=None):
    """The leading dimensions as the original's addition broadcasts them: expanded, not copied."""
    leading = hidden_states.shape[:-1]
    if position_ids.shape[:-1] != leading or (padding is not None and padding.shape != leading):
        shapes = [leading, position_ids.shape[:-1], *([] if padding is None else [padding.shape])]
        leading = torch.broadcast_shapes(*shapes)
        hidden_states = hidden_states.expand(*leading, -1)
        position_ids = position_ids.expand(*leading, -1)
        padding = None if padding is None else padding.expand(leading)
    return hidden_states, position_ids, padding


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

    @_original_in_onnx_export
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
        hidden_states, position_ids, _ = _broadcast(hidden_states, image_position_ids)
        # The original sums with `sum`, which the autocast of these two devices runs in float32.
        device = self.pos_embedding.device.type
        autocast = device in ("cuda", "mps") and torch.is_autocast_enabled(device)
        hidden_states = fused_embedding_lookup(
            position_ids,
            # The table is [P, 2, H]; the view of it as [2, P, H] is read where it is.
            self.pos_embedding.transpose(0, 1),
            padding_id=-1,
            residual=hidden_states,
            embedding_dtype=torch.float32 if autocast else None,
        )
        hidden_states = self.pos_norm(hidden_states)
        output = _from_transformers("modeling_outputs", "BaseModelOutputWithPooling")(
            last_hidden_state=hidden_states,
            pooler_output=self.multimodal_embedder(hidden_states),
        )
        return output.to_tuple() if return_dict is False else output


def _indices_and_weights(layer, grid_thw, hidden_states, kwargs, spatial_merge_size=1):
    """Those that the caller has computed before, or ours: as transformers' function takes them.

    `layer` says how its grid of position embeddings is resampled. Both are taken out of `kwargs`.
    """
    indices, weights = kwargs.pop("interp_indices", None), kwargs.pop("interp_weights", None)
    if indices is not None and weights is not None:
        return indices, weights
    check_tensor("grid_thw", grid_thw)
    if grid_thw.device != hidden_states.device:
        raise ValueError(
            "fused_embedding_lookup: grid_thw must be on the device of hidden_states, "
            f"{hidden_states.device}, got {grid_thw.device}"
        )
    return vision_interpolation_indices_and_weights(
        grid_thw,
        layer.num_grid_per_side,
        num_patches=hidden_states.shape[0],
        mode=layer.interpolation_mode,
        align_corners=layer.interpolation_align_corners,
        spatial_merge_size=spatial_merge_size,
        padding=getattr(layer, "interpolation_padding", "border"),
    )


def _is_plain(embedding: nn.Module) -> bool:
    """Whether a call of `embedding` reads its weight, and does nothing else.

    Not so: a subclass, as of FSDP2 or a parametrization, a wrapper, as of LoRA, hooks, as of ZeRO-3 and
    offloading, a `padding_idx`, whose row gets no gradient, a quantised weight.
    """
    return (
        type(embedding) is nn.Embedding
        and type(embedding.weight) is nn.Parameter
        and embedding.padding_idx is None
        and not _counts_ids(embedding)
        and "forward" not in vars(embedding)  # where accelerate puts its hooks
        and not embedding._forward_hooks
        and not embedding._forward_pre_hooks
        and not embedding._backward_hooks
        and not embedding._backward_pre_hooks
        and not nn.modules.module._has_any_global_hook()
    )


def _counts_ids(embedding: nn.Module) -> bool:
    """Whether it matters which ids a call looks up, and how often: in it, or in what it wraps.

    A row's gradient is divided by how often it is looked up, rows that are looked up are renormalised, a
    sparse gradient has the rows that were looked up.
    """
    return any(
        module.scale_grad_by_freq or module.max_norm is not None or module.sparse
        for module in embedding.modules()
        if isinstance(module, nn.Embedding)
    )


def _add_embeddings(layer, hidden_states, embedding, indices, weights):
    """hidden_states + (embedding(indices) * weights[:, :, None]).sum(1).to(hidden_states.dtype)"""
    if _is_plain(embedding):
        table = embedding.weight
    elif _counts_ids(embedding):
        embeddings = (embedding(indices) * weights[:, :, None]).sum(1)
        return hidden_states + embeddings.to(hidden_states.dtype)
    else:  # called once, with all ids
        ids = torch.arange(layer.num_grid_per_side**2, device=hidden_states.device)
        table = embedding(ids)
    return fused_embedding_lookup(
        indices,
        table,
        weights=weights,
        residual=hidden_states,
        embedding_dtype=hidden_states.dtype,
    )


class VisionInterpolatedPositionEmbedding(nn.Module):
    """The step after the patch projection in Qwen3-VL's vision tower and in those made from it.

    transformers has no such module yet: the patch in `upstream/` adds it, without parameters, to the
    models. The table stays in the tower, which passes it as a module.
    """

    has_backward = True
    can_torch_compile = True

    num_grid_per_side: int
    interpolation_mode: str
    interpolation_align_corners: bool
    spatial_merge_size: int

    @_original_in_onnx_export
    def forward(
        self,
        hidden_states: torch.Tensor,
        pos_embed: nn.Module,
        grid_thw: torch.Tensor,
        **kwargs,
    ) -> torch.Tensor:
        """Resample the grid of position embeddings to the grids of the images, and add it.

        Args:
            hidden_states: ``[patches, hidden_size]``
            pos_embed: An `nn.Embedding` of ``num_grid_per_side**2`` rows or more, or what wraps one.
            grid_thw: ``[images, 3]``, frames, height and width of each image or video, in patches.
            interp_indices, interp_weights: ``[patches, 4]``, int64 and float32, if computed before.

        Returns:
            ``[patches, hidden_size]``, of the dtype of ``hidden_states``.
        """
        indices, weights = _indices_and_weights(
            self, grid_thw, hidden_states, kwargs, self.spatial_merge_size
        )
        return _add_embeddings(self, hidden_states, pos_embed, indices, weights)


class PaddleOCRVisionEmbeddings(nn.Module):
    """`transformers`' class of this name, in PaddleOCR-VL."""

    has_backward = True
    can_torch_compile = True

    patch_embedding: nn.Module
    position_embedding: nn.Module
    num_grid_per_side: int
    interpolation_mode: str
    interpolation_align_corners: bool

    @_original_in_onnx_export
    def forward(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Project image patches and add their position embeddings.

        Args:
            pixel_values: ``[batch, patches, channels, patch_size, patch_size]``
            grid_thw: ``[images, 3]``, frames, height and width of each image, in patches.

        Returns:
            ``[batch * patches, hidden_size]``
        """
        pixels = pixel_values.flatten(0, 1).to(self.patch_embedding.weight.dtype)
        hidden_states = self.patch_embedding(pixels).flatten(-2).squeeze(-1)
        hidden_states = hidden_states.reshape(pixels.shape[0], -1)
        indices, weights = _indices_and_weights(self, grid_thw, hidden_states, kwargs)
        return _add_embeddings(self, hidden_states, self.position_embedding, indices, weights)


def _transposed(grid_thw: torch.Tensor) -> torch.Tensor:
    """With which the table is read at (column, row)."""
    frames, height, width = grid_thw.unbind(1)
    return torch.stack((frames, width, height), dim=1)


class MuseGlimmerVisionPatchEmbedder(nn.Module):
    """`transformers`' class of this name, which reads the table at (column, row) since 5.24."""

    has_backward = True
    can_torch_compile = True

    patch_embedding: nn.Module
    position_embedding_table: nn.Module
    num_grid_per_side: int
    interpolation_mode: str
    interpolation_align_corners: bool
    interpolation_padding: str

    @_original_in_onnx_export
    def forward(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Project image patches and add their position embeddings.

        Args:
            pixel_values: ``[patches, patch_temporal * 3 * patch_size**2]``
            grid_thw: ``[images, 3]``, frames, height and width of each image, in patches.

        Returns:
            ``[patches, hidden_size]``
        """
        hidden_states = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        major, minor = sys.modules["transformers"].__version__.split(".")[:2]
        if (int(major), int(minor)) >= (5, 24):
            grid_thw = _transposed(grid_thw)
        indices, weights = _indices_and_weights(self, grid_thw, hidden_states, kwargs)
        return _add_embeddings(self, hidden_states, self.position_embedding_table, indices, weights)


class MuseSparkVisionPatchEmbedder(nn.Module):
    """`transformers`' class of this name, which reads the table at (column, row)."""

    has_backward = True
    can_torch_compile = True

    patch_embedding: nn.Module
    position_embedding_table: nn.Module
    num_grid_per_side: int
    interpolation_mode: str
    interpolation_align_corners: bool
    interpolation_padding: str

    @_original_in_onnx_export
    def forward(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Project image patches and add their position embeddings.

        Args:
            pixel_values: ``[patches, patch_temporal * 3 * patch_size**2]``
            grid_thw: ``[images, 3]``, frames, height and width of each image, in patches.

        Returns:
            ``[patches, hidden_size]``
        """
        hidden_states = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        indices, weights = _indices_and_weights(self, _transposed(grid_thw), hidden_states, kwargs)
        return _add_embeddings(self, hidden_states, self.position_embedding_table, indices, weights)


class Kimi_K25VisionPositionEmbeddings(nn.Module):
    """`transformers`' class of this name: 16 taps of a table, and a sinusoid for each frame.

    Equal to the original's up to the order of the sum over the taps.
    """

    has_backward = True
    can_torch_compile = True

    position_embeddings: torch.Tensor
    time_position_embeddings: torch.Tensor
    num_grid_per_side: int
    interpolation_mode: str
    interpolation_align_corners: bool

    @_original_in_onnx_export
    def forward(
        self, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs
    ) -> torch.Tensor:
        """Add position embeddings to projected image patches.

        Args:
            hidden_states: ``[patches, hidden_size]``
            grid_thw: ``[images, 3]``, frames, height and width of each image or video, in patches.

        Returns:
            ``[patches, hidden_size]``
        """
        table = self.position_embeddings.flatten(0, 1)
        indices, weights = _indices_and_weights(self, grid_thw, hidden_states, kwargs)
        # The original rounds the weights to the table's dtype.
        weights = weights.to(table.dtype).float()
        positions = fused_embedding_lookup(indices, table, weights=weights)
        frame_index = _from_transformers(
            "models.kimi_k25.modeling_kimi_k25", "get_vision_frame_index"
        )(grid_thw, kwargs=kwargs)
        positions = positions + self.time_position_embeddings[frame_index]
        return hidden_states + positions.to(hidden_states.dtype)


# transformers.KernelConfig replaces a class that transformers doesn't decorate only if the layer has a
# `...Layout` beside it: a whole module, built where the original would be. These are the originals
# themselves, subclassed for an attribute that KernelConfig sets, so that they start with the same values and are
# found by name (`_no_split_modules`) and by type (`_init_weights`) as the originals are.
_LAYOUTS = {
    "Gemma4VisionPatchEmbedderLayout": "models.gemma4.modeling_gemma4",
    "Gemma4UnifiedVisionEmbedderLayout": "models.gemma4_unified.modeling_gemma4_unified",
}


def __getattr__(name: str):
    if name not in _LAYOUTS or "transformers" not in sys.modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    path = f"{_LAYOUTS[name]}.{name[: -len('Layout')]}"
    # transformers loads its modules when they are asked for.
    original = attrgetter(path)(sys.modules["transformers"])
    members = {
        "__module__": __name__,
        "__qualname__": name,
        "forward": original.forward,  # without one of its own KernelConfig takes it for abstract
    }
    return globals().setdefault(name, type(original.__name__, (original,), members))
