"""The second op: ids and weights of an interpolated position embedding, against transformers' own."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

pytestmark = pytest.mark.variant("cpu", "cuda-simt", "metal-simt", "cuda")

MODES = list(itertools.product(["bilinear", "bicubic"], [False, True], ["border", "zeros"]))


def patches(grid):
    return int(grid.long().prod(1).sum())


def check(kernel, grid, side, **options):
    """Both functions' results, which are the same bits."""
    options = {"mode": "bilinear", "align_corners": False, "padding": "border"} | options
    expected = get_vision_interpolation_indices_and_weights(grid, side, **options)
    actual = kernel.vision_interpolation_indices_and_weights(
        grid, side, num_patches=patches(grid), **options
    )
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.is_contiguous()
        assert torch.equal(ours, theirs), (grid.tolist(), side, options)
    return actual


@pytest.mark.parametrize(("mode", "align_corners", "padding"), MODES)
@pytest.mark.parametrize("merge", [1, 2, 3])
def test_equal_to_transformers(kernel, poison, mode, align_corners, padding, merge):
    """Images and a video, larger and smaller than the table, not multiples of the merge size."""
    grid = torch.tensor(
        [[1, 32, 48], [1, 48, 32], [4, 6, 10], [1, 3, 5], [2, 7, 4], [1, 100, 3], [1, 64, 64]]
    )
    options = {"mode": mode, "align_corners": align_corners, "padding": padding}
    for side in (48, 27, 1, 2):
        ids, _ = check(kernel, grid, side, spatial_merge_size=merge, **options)
        assert ids.min() >= 0 and ids.max() < side * side


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_random_grids(kernel, data):
    mode, align_corners, padding = data.draw(st.sampled_from(MODES))
    merge = data.draw(st.integers(1, 4))
    size = st.tuples(st.integers(0, 4), st.integers(0, 40), st.integers(merge, 40))
    grid = torch.tensor(data.draw(st.lists(size, min_size=1, max_size=5)))
    grid = grid.to(data.draw(st.sampled_from([torch.int64, torch.int32])))
    if data.draw(st.booleans()):
        grid = grid.repeat_interleave(2, dim=1)[:, ::2]
    check(
        kernel,
        grid,
        data.draw(st.integers(1, 100)),
        mode=mode,
        align_corners=align_corners,
        padding=padding,
        spatial_merge_size=merge,
    )


def test_more_patches_than_a_thread_takes(kernel):
    """Ranges that begin within an image, and images shorter than a range."""
    grid = torch.tensor([[1, 9, 7]] * 40 + [[3, 61, 83]] + [[1, 2, 2]] * 300)
    check(kernel, grid, 48, align_corners=True, spatial_merge_size=2)


def test_a_side_beyond_float32(kernel):
    """Coordinates are rounded as transformers rounds them."""
    grid = torch.tensor([[1, 2**12 + 1, 3]])
    for side in (2**24 + 3, 2**31 - 1):
        for align_corners in (False, True):
            check(kernel, grid, side, align_corners=align_corners)


def test_transposed_grid(kernel):
    """As MuseSpark passes it, and as a transposed view of what lies in memory."""
    grid = torch.tensor([[1, 6, 10], [3, 4, 9]])
    check(kernel, grid[:, [0, 2, 1]], 16, padding="zeros")
    columns = torch.stack([grid[:, 0], grid[:, 2], grid[:, 1]]).t()
    assert not columns.is_contiguous()
    check(kernel, columns, 16, padding="zeros")


@pytest.mark.parametrize("grid", [[[1, 0, 4]], [[0, 4, 4]], [[1, 4, 0], [1, 0, 1]]], ids=str)
def test_grids_without_patches(kernel, grid):
    ids, weights = check(kernel, torch.tensor(grid), 8, spatial_merge_size=2)
    assert ids.shape == weights.shape == (0, 4)


def test_no_images(kernel):
    """transformers fails on it. Here it is an empty result, as of any op on an empty tensor."""
    grid = torch.empty(0, 3, dtype=torch.int64)
    ids, weights = kernel.vision_interpolation_indices_and_weights(
        grid, 8, num_patches=0, mode="bicubic"
    )
    assert ids.shape == weights.shape == (0, 16)


def test_lower_than_a_block(kernel):
    """transformers takes it; rows past the frame read the table's last one."""
    check(kernel, torch.tensor([[1, 1, 4]]), 8, spatial_merge_size=2)


GRID = torch.tensor([[1, 4, 6], [2, 2, 2]])

FAULTS = {
    "a number of patches too few": ({"num_patches": 31}, "num_patches must be .* more than"),
    "a number of patches too many": ({"num_patches": 33}, "num_patches must be .* 32, got 33"),
    "a negative number of patches": (
        {"num_patches": -1},
        "num_patches must be from 0 to 2147483646",
    ),
    "a narrow grid": (
        {"grid_thw": torch.tensor([[1, 4, 1]]), "num_patches": 4, "spatial_merge_size": 2},
        r"narrower than spatial_merge_size, 2, got \[1, 4, 1\] for image 0",
    ),
    "a negative size": (
        {"grid_thw": torch.tensor([[1, 4, 8], [1, -2, -2]]), "num_patches": 36},
        r"must not be negative, got \[1, -2, -2\] for image 1",
    ),
    "sizes whose product overflows": (
        {"grid_thw": torch.tensor([[2**31, 2**31, 4]]), "num_patches": 0},
        "more than the given 0",
    ),
    "sizes whose product overflows to the number": (
        {"grid_thw": torch.tensor([[2**32, 2**32, 7], [1, 4, 8]]), "num_patches": 32},
        "more than the given 32",
    ),
    "floating sizes": ({"grid_thw": GRID.float()}, "grid_thw must be int64 or int32, got Float"),
    "a grid without a time": (
        {"grid_thw": GRID[:, 1:]},
        r"grid_thw must have shape \[images, 3\], got \[2, 2\]",
    ),
    "one image's grid": ({"grid_thw": GRID[0]}, r"shape \[images, 3\], got \[3\]"),
    "a side of 0": ({"num_grid_per_side": 0}, "num_grid_per_side must be from 1 to 2147483647"),
    "a side too large": ({"num_grid_per_side": 2**31}, "num_grid_per_side must be from 1 to"),
    "a merge size of 0": ({"spatial_merge_size": 0}, "spatial_merge_size must be from 1"),
    "a merge size too large": (
        {"spatial_merge_size": 2**15},
        "spatial_merge_size must be from 1 to 32767",
    ),
    "another mode": ({"mode": "nearest"}, "mode must be one of .* got 'nearest'"),
    "another padding": ({"padding": "reflection"}, "padding must be one of .* got 'reflection'"),
}


# What a GPU's launcher cannot see.
IN_THE_GRIDS = {
    "a number of patches too few": "num_patches must be the number of patches of all grids",
    "a number of patches too many": "num_patches must be the number of patches of all grids",
    "a narrow grid": "grid_thw must not be narrower than spatial_merge_size",
    "a negative size": "grid_thw must not be negative",
    "sizes whose product overflows": "num_patches must be the number of patches of all grids",
    "sizes whose product overflows to the number": "num_patches must be the number of patches",
}


@pytest.mark.variant("cpu", "cuda-simt", "metal-simt")
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(request, variant, kernel, fault):
    changed, message = FAULTS[fault]
    arguments = {"grid_thw": GRID, "num_grid_per_side": 16, "num_patches": 32} | changed
    if variant.name == "cpu" or fault not in IN_THE_GRIDS:
        with pytest.raises(ValueError, match=message):
            kernel.vision_interpolation_indices_and_weights(**arguments)
    elif variant.name == "cuda-simt":
        with pytest.raises(RuntimeError, match=f"assert triggered.*{IN_THE_GRIDS[fault]}"):
            kernel.vision_interpolation_indices_and_weights(**arguments)
    else:
        synchronize = request.getfixturevalue("synchronize")
        kernel.vision_interpolation_indices_and_weights(**arguments)
        assert synchronize().startswith(f"fused_embedding_lookup: {IN_THE_GRIDS[fault]}")
        assert synchronize() is None  # one thread says it


def test_fake_tensors(kernel):
    """The results' sizes need no value of a tensor. (What the launchers do is in test_launches.py.)"""
    with FakeTensorMode():
        grid = torch.empty(3, 3, dtype=torch.int64)
        ids, weights = kernel.vision_interpolation_indices_and_weights(
            grid, 48, num_patches=100, spatial_merge_size=2
        )
        assert ids.shape == weights.shape == (100, 4)
        assert ids.dtype == torch.int64 and weights.dtype == torch.float32
        with pytest.raises(Exception, match="repeat_interleave|data-dependent|dynamic"):
            get_vision_interpolation_indices_and_weights(grid, 48, spatial_merge_size=2)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_opcheck(kernel, mode):
    namespace = kernel.__name__
    op = getattr(torch.ops, namespace).interpolation.default
    torch.library.opcheck(op, (GRID, 16, 32, mode == "bicubic", True, 2, False))


def test_compile_with_any_number_of_patches(kernel):
    """One graph, without a break, for all sizes."""

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def run(hidden_states, grid):
        ids, weights = kernel.vision_interpolation_indices_and_weights(
            grid, 16, num_patches=hidden_states.shape[0], align_corners=True
        )
        return ids + 1, weights * 2

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for grid in (GRID, torch.tensor([[1, 8, 6], [3, 2, 4]])):
            ids, weights = run(torch.empty(patches(grid), 1), grid)
            expected = get_vision_interpolation_indices_and_weights(grid, 16, align_corners=True)
            assert torch.equal(ids - 1, expected[0]) and torch.equal(weights / 2, expected[1])


def test_export_with_any_number_of_patches(kernel):
    class Module(torch.nn.Module):
        def forward(self, hidden_states, grid):
            return kernel.vision_interpolation_indices_and_weights(
                grid, 16, num_patches=hidden_states.shape[0]
            )

    shapes = {"hidden_states": {0: torch.export.Dim.DYNAMIC}, "grid": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(
        Module(), (torch.empty(32, 1), GRID), dynamic_shapes=shapes, strict=False
    )
    grid = torch.tensor([[1, 8, 6], [3, 2, 4], [1, 5, 5]])
    actual = program.module()(torch.empty(patches(grid), 1), grid)
    expected = get_vision_interpolation_indices_and_weights(grid, 16)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
