"""What our ops and layers run beneath them: allocations, fills, and nothing that reads a tensor on the host.

A synchronisation is an op too, `aten::item` or a copy, whatever the device: the profiler lists all of them. What a
launcher asks CUDA for itself is in test_cuda.py.
"""

import pytest
import torch
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from helpers import profiled

EMULATED = ("cpu", "cuda-simt", "metal-simt")
QUEUED = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::zero_",
}  # none of them waits
GRID = torch.tensor([[1, 6, 8], [3, 4, 6], [1, 2, 10]])
PATCHES = int(GRID.prod(1).sum())
READS = "aten::_local_scalar_dense"  # what item(), int() and bool() of a tensor end in


def interpolated(requires_grad=False):
    """Arguments of the lookup, bfloat16."""
    indices, weights = get_vision_interpolation_indices_and_weights(GRID, 8, spatial_merge_size=2)
    table = torch.randn(64, 32).bfloat16().requires_grad_(requires_grad)
    residual = torch.randn(PATCHES, 32).bfloat16()
    return (indices, table), {"weights": weights, "residual": residual}


def assert_runs(kernel, function, *ours):
    """`function` calls our ops of these names and no other, and those allocate and fill, no more."""
    calls = profiled.ops(function)
    assert [name for name, _ in calls] == [f"{kernel.__name__}::{name}" for name in ours]
    for _, beneath in calls:
        assert {*beneath} <= QUEUED, beneath


@pytest.mark.variant(*EMULATED)
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_indices_and_weights(kernel, mode):
    assert_runs(
        kernel,
        lambda: kernel.vision_interpolation_indices_and_weights(
            GRID, 8, num_patches=PATCHES, mode=mode, spatial_merge_size=2
        ),
        "interpolation",
    )


@pytest.mark.variant(*EMULATED)
def test_lookup(kernel):
    arguments, options = interpolated()
    assert_runs(kernel, lambda: kernel.fused_embedding_lookup(*arguments, **options), "forward")


@pytest.mark.variant(*EMULATED)
def test_lookup_s_gradient(kernel):
    (indices, table), options = interpolated(requires_grad=True)
    out = kernel.fused_embedding_lookup(indices, table, **options)
    grad = torch.ones_like(out)
    calls = profiled.ops(lambda: torch.autograd.grad(out, table, grad, retain_graph=True))
    names = [name for call, beneath in calls for name in (call, *beneath)]
    assert f"{kernel.__name__}::backward" in names
    assert {name for name in names if name.startswith("aten::")} <= QUEUED, names


@pytest.mark.variant(*EMULATED)
def test_pixels(kernel):
    pixels = torch.rand(70, 48)
    assert_runs(kernel, lambda: kernel.scale_pixels(pixels, torch.bfloat16), "scaling")


def test_transformers_reads_tensors():
    """So that the tests above can fail: what they look for is there in the code that ours replace."""
    calls = profiled.ops(lambda: get_vision_interpolation_indices_and_weights(GRID, 8))
    names = [name for _, beneath in calls for name in beneath]
    assert names.count(READS) >= 4


@pytest.mark.variant("cpu")
def test_two_launches_for_eighty_two(kernel, variant_dir):
    """The whole step in a tower, as transformers has it, patched, and with our layer.

    82 calls of PyTorch by the model, 76 for ids and weights and 6 for the lookup, become two.
    """
    from helpers import vision_towers

    tower = vision_towers.build("qwen3_vl")
    embedding = vision_towers.patched.patch_model(tower).add_pos_embed
    hidden_states = torch.randn(PATCHES, 32)
    arguments = hidden_states, tower.pos_embed, GRID

    def original():
        indices, weights = get_vision_interpolation_indices_and_weights(
            GRID, 8, align_corners=True, spatial_merge_size=2
        )
        embeddings = (tower.pos_embed(indices) * weights[:, :, None]).sum(1)
        return hidden_states + embeddings.to(hidden_states.dtype)

    with torch.no_grad():
        assert torch.equal(original(), embedding(*arguments))
        calls = profiled.ops(original)
        assert len(calls) == 82
        assert sum(beneath.count(READS) for _, beneath in calls) >= 4
        # With the patch alone nothing is read, but for repeat_interleave's own checks on the CPU.
        assert not [
            name for name, _ in profiled.ops(lambda: embedding(*arguments)) if "item" in name
        ]
        ours = vision_towers.swap(tower, variant_dir).add_pos_embed
        assert_runs(kernel, lambda: ours(*arguments), "interpolation", "forward")
