"""Swaps the layers of a build into transformers models, by `kernels.kernelize`."""

import kernels
import torch
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionPatchEmbedder
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedVisionEmbedder

LAYERS = (Gemma4VisionPatchEmbedder, Gemma4UnifiedVisionEmbedder)


def load(variant_dir):
    """The kernel's module from the folder of a variant."""
    backend = "cpu" if "-cpu-" in variant_dir.name else "cuda"
    return kernels.get_local_kernel(variant_dir.parent, backend=backend)


def swap(model, variant_dir, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE):
    """Swap our layers into a model, and check that they are in it."""
    mapping = {}
    for layer in LAYERS:
        if getattr(layer, "kernel_layer_name", None) is None:
            # What @use_kernel_forward_from_hub would have done to the class.
            kernels.replace_kernel_forward_from_hub(layer, layer.__name__)
        repository = kernels.LocalLayerRepository(variant_dir, layer_name=layer.__name__)
        mapping[layer.__name__] = {device: repository for device in ("cpu", "cuda")}
    device = next(model.parameters()).device
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(model, mode=mode, device=device.type)
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    assert layers
    assert all(is_ours(layer) for layer in layers)
    return model


def is_ours(layer: torch.nn.Module) -> bool:
    return layer.forward.__func__.__module__.startswith("_fused_embedding_lookup_")
