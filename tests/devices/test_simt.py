"""The GPUs' sources on the engine that runs them on a CPU: what doesn't depend on its seed, a refused launch."""

import pytest
import torch

from helpers.engine import check_a_failed_launch, five_tiles, under_seed
from helpers.reference import FLOATS


@pytest.mark.variant("cuda-simt", "metal-simt")
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("hidden", [72, 75])
def test_results_do_not_depend_on_the_order_of_threads_and_blocks(
    kernel, variant_dir, dtype, hidden
):
    arguments = five_tiles(hidden, dtype)
    expected = under_seed(kernel, variant_dir, 0, arguments)
    for seed in range(1, 8):
        actual = under_seed(kernel, variant_dir, seed, arguments)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected)), seed


@pytest.mark.variant("cuda-simt")
def test_a_failed_launch_is_told_once(kernel, variant_dir):
    check_a_failed_launch(kernel, variant_dir)
