"""The layers for `kernels benchmark`, and the vision tower, checked against transformers' own classes.

    kernels benchmark .

At their real sizes, with random weights: nothing is downloaded. The reference is the module as
transformers has it; ours is a copy with the layer's forward swapped in, which is what `kernelize` does.
"""

import copy
from types import MethodType

import torch
from kernels.benchmark import Benchmark
from transformers import (
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedVisionConfig,
    Gemma4VisionConfig,
    Gemma4VisionModel,
)
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionPatchEmbedder
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedVisionEmbedder


def image(width, height, patches):
    """The ids of an image of width x height patches, padded to `patches` with -1."""
    x, y = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    position_ids = torch.full((1, patches, 2), -1)
    position_ids[:, : x.numel()] = torch.stack([x, y], dim=-1).reshape(-1, 2)
    return position_ids


class Layers(Benchmark):
    """bfloat16; an image of 280 soft tokens for one, of 1120 for the other."""

    seed = 0

    def swapped(self, original):
        ours = copy.deepcopy(original)
        layer = getattr(self.kernel.layers, type(original).__name__)
        ours.forward = MethodType(layer.forward, ours)
        return ours

    def setup_patch_embedder(self):
        self.original = Gemma4VisionPatchEmbedder(Gemma4VisionConfig())
        torch.nn.init.normal_(self.original.position_embedding_table)
        self.original.to(self.device, torch.bfloat16)
        self.ours = self.swapped(self.original)
        position_ids = image(60, 40, 2520).to(self.device)
        pixels = torch.rand(1, 2520, 768, device=self.device)
        self.batch = (pixels, position_ids, (position_ids == -1).all(-1))

    def setup_unified_embedder(self):
        configs = Gemma4UnifiedVisionConfig(), Gemma4UnifiedTextConfig()
        self.original = Gemma4UnifiedVisionEmbedder(*configs)
        torch.nn.init.normal_(self.original.pos_embedding)
        self.original.to(self.device, torch.bfloat16)
        self.ours = self.swapped(self.original)
        patch = 3 * configs[0].model_patch_size ** 2
        # The harness runs it a hundred times, and on a CPU the projections take long.
        size = (39, 26, 1120) if self.device == "cuda" else (6, 4, 28)
        pixels = torch.rand(1, size[2], patch, device=self.device)
        self.batch = (pixels, image(*size).to(self.device))

    def setup_vision_tower(self):
        """E2B's, on a CPU with a small image for the same reason."""
        tower = Gemma4VisionModel(Gemma4VisionConfig())
        torch.nn.init.normal_(tower.patch_embedder.position_embedding_table)
        self.original = tower.to(self.device, torch.bfloat16).eval()
        self.ours = copy.deepcopy(self.original)
        self.ours.patch_embedder = self.swapped(self.original.patch_embedder)
        size = (60, 40, 2520) if self.device == "cuda" else (9, 6, 63)
        pixels = torch.rand(1, size[2], 768, device=self.device)
        self.batch = (pixels, image(*size).to(self.device))

    @torch.inference_mode()
    def benchmark_patch_embedder(self):
        self.out = self.ours(*self.batch)

    @torch.inference_mode()
    def verify_patch_embedder(self):
        return self.original(*self.batch)

    @torch.inference_mode()
    def benchmark_unified_embedder(self):
        self.out = self.ours(*self.batch).last_hidden_state

    @torch.inference_mode()
    def verify_unified_embedder(self):
        return self.original(*self.batch).last_hidden_state

    benchmark_vision_tower = benchmark_unified_embedder
    verify_vision_tower = verify_unified_embedder
