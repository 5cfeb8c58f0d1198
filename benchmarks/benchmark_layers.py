"""The layers for `kernels benchmark`, and the vision tower, checked against transformers' own classes.

    kernels benchmark .

At their real sizes, with random weights: nothing is downloaded. The reference is the module as
transformers has it; ours is a copy with the layer's forward swapped in, which is what `kernelize` does. A CPU gets
small images, because the harness runs each a hundred times.
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


class Layers(Benchmark):
    """bfloat16; an image of 280 soft tokens for one, of 1120 for the other."""

    seed = 0

    def prepare(self, model, embedder, table, features, size):
        """A model of which `embedder` is the name of a part, or "", and an image of width x height, padded."""
        torch.nn.init.normal_(model.get_parameter(table))
        self.original = model.to(self.device, torch.bfloat16).eval()
        self.ours = copy.deepcopy(model)
        part = self.ours.get_submodule(embedder)
        part.forward = MethodType(getattr(self.kernel.layers, type(part).__name__).forward, part)
        width, height, patches = size
        x, y = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
        position_ids = torch.full((1, patches, 2), -1, device=self.device)
        position_ids[:, : x.numel()] = torch.stack([x, y], dim=-1).reshape(-1, 2)
        self.batch = (torch.rand(1, patches, features, device=self.device), position_ids)

    def setup_patch_embedder(self):
        model = Gemma4VisionPatchEmbedder(Gemma4VisionConfig())
        self.prepare(model, "", "position_embedding_table", 768, (60, 40, 2520))
        self.batch += ((self.batch[1] == -1).all(-1),)

    def setup_unified_embedder(self):
        config = Gemma4UnifiedVisionConfig()
        model = Gemma4UnifiedVisionEmbedder(config, Gemma4UnifiedTextConfig())
        size = (39, 26, 1120) if self.device == "cuda" else (6, 4, 28)
        self.prepare(model, "", "pos_embedding", 3 * config.model_patch_size**2, size)

    def setup_vision_tower(self):
        size = (60, 40, 2520) if self.device == "cuda" else (9, 6, 63)
        table = "patch_embedder.position_embedding_table"
        self.prepare(Gemma4VisionModel(Gemma4VisionConfig()), "patch_embedder", table, 768, size)

    @torch.inference_mode()
    def benchmark_patch_embedder(self):
        self.out = self.output(self.ours)

    @torch.inference_mode()
    def verify_patch_embedder(self):
        return self.output(self.original)

    def output(self, model):
        out = model(*self.batch)
        return getattr(out, "last_hidden_state", out)

    benchmark_unified_embedder = benchmark_vision_tower = benchmark_patch_embedder
    verify_unified_embedder = verify_vision_tower = verify_patch_embedder
