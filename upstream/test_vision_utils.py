# Copyright 2026 The HuggingFace Team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import unittest

from transformers.testing_utils import is_torch_available, require_torch, torch_device


if is_torch_available():
    import torch

    from transformers import Qwen3VLVisionConfig, Qwen3VLVisionModel, set_seed
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights


# Two images and a video, and a grid of position embeddings of 8 x 8
GRID_THW = [[1, 6, 8], [3, 4, 6], [1, 2, 10]]
NUM_PATCHES = 6 * 8 + 3 * 4 * 6 + 2 * 10
SIDE = 8
# As Qwen3-VL, PaddleOCR-VL, MuseGlimmer and Kimi-K2.5 resample it
OPTIONS = [
    {"mode": "bilinear", "align_corners": True, "spatial_merge_size": 2},
    {"mode": "bilinear", "align_corners": False},
    {"mode": "bilinear", "align_corners": False, "padding": "zeros"},
    {"mode": "bicubic", "align_corners": False},
]


@require_torch
class VisionInterpolationTest(unittest.TestCase):
    def test_num_patches_changes_no_value(self):
        grid_thw = torch.tensor(GRID_THW, device=torch_device)
        for options in OPTIONS:
            with self.subTest(**options):
                expected = get_vision_interpolation_indices_and_weights(grid_thw, SIDE, **options)
                actual = get_vision_interpolation_indices_and_weights(
                    grid_thw, SIDE, **options, num_patches=NUM_PATCHES
                )
                for tensor, expected_tensor in zip(actual, expected):
                    self.assertEqual(tensor.dtype, expected_tensor.dtype)
                    self.assertTrue(torch.equal(tensor, expected_tensor))

    def test_num_patches_saves_reading_the_grid(self):
        # A tensor on the meta device has no values: what would read one, and wait for a device, fails
        grid_thw = torch.tensor(GRID_THW, device="meta")
        for options in OPTIONS:
            with self.subTest(**options):
                indices, weights = get_vision_interpolation_indices_and_weights(
                    grid_thw, SIDE, **options, num_patches=NUM_PATCHES
                )
                self.assertEqual(len(indices), NUM_PATCHES)
                self.assertEqual(indices.shape, weights.shape)

    def test_wrong_num_patches_is_an_error(self):
        # On the CPU: CUDA's is an assertion on the device, after which the process can't use it
        grid_thw = torch.tensor(GRID_THW)
        for num_patches in (NUM_PATCHES - 1, NUM_PATCHES + 1):
            with self.subTest(num_patches=num_patches), self.assertRaises(RuntimeError):
                get_vision_interpolation_indices_and_weights(grid_thw, SIDE, num_patches=num_patches)


@require_torch
class VisionInterpolatedPositionEmbeddingTest(unittest.TestCase):
    """Qwen3-VL's module in its tower. Other models have the same one under their own names."""

    def run_tower(self, dtype, **precomputed):
        """What the module is given and what it returns, and the tower that it is in."""
        set_seed(0)
        config = Qwen3VLVisionConfig(
            depth=1,
            hidden_size=32,
            intermediate_size=32,
            num_heads=2,
            patch_size=4,
            out_hidden_size=32,
            num_position_embeddings=SIDE**2,
            deepstack_visual_indexes=[0],
        )
        model = Qwen3VLVisionModel(config).to(torch_device, dtype).eval()
        torch.nn.init.normal_(model.pos_embed.weight)
        outputs = []
        for module in (model.patch_embed, model.add_pos_embed):
            module.register_forward_hook(lambda module, args, output: outputs.append(output))
        pixel_values = torch.randn(NUM_PATCHES, 3 * 2 * 4 * 4).to(torch_device, dtype)
        with torch.no_grad():
            model(pixel_values, grid_thw=torch.tensor(GRID_THW, device=torch_device), **precomputed)
        return *outputs, model

    def assert_adds(self, hidden_states, actual, model, indices, weights):
        with torch.no_grad():
            pos_embeds = (model.pos_embed(indices) * weights[:, :, None]).sum(1)
        expected = hidden_states + pos_embeds.to(hidden_states.dtype)
        self.assertEqual(actual.dtype, expected.dtype)
        self.assertTrue(torch.equal(actual, expected))

    def test_resamples_the_table_and_adds_it(self):
        grid_thw = torch.tensor(GRID_THW, device=torch_device)
        computed = get_vision_interpolation_indices_and_weights(
            grid_thw, SIDE, mode="bilinear", align_corners=True, spatial_merge_size=2
        )
        for dtype in (torch.float32, torch.bfloat16):
            with self.subTest(dtype=dtype):
                self.assert_adds(*self.run_tower(dtype), *computed)

    def test_takes_precomputed_indices_and_weights(self):
        indices = torch.randint(SIDE**2, (NUM_PATCHES, 4), device=torch_device)
        weights = torch.rand(NUM_PATCHES, 4, device=torch_device)
        outputs = self.run_tower(torch.float32, interp_indices=indices, interp_weights=weights)
        self.assert_adds(*outputs, indices, weights)
