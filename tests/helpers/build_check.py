"""What a build of the GPUs' sources on tests/simt is looked at with, where the sources may be broken.

    python build_check.py    # then a line each: VARIANT_DIR cuda|metal LOG

Each build is looked at in a process of its own, forked from this one, which has imported what takes seconds.
Its output goes to the file LOG, its exit status to this one's standard output.
"""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from helpers.variants import load_library  # isort: split

import kernels
import torch
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from helpers import bounds, reference
from helpers.engine import (
    check,
    check_a_failed_launch,
    check_grids_of_32_bits,
    check_strides_past_32_bits,
    five_tiles,
    step,
    under_seed,
)
from helpers.memory import total_allocated
from helpers.problems import problem
from simt.traffic import count_traffic


def check_build(variant_dir, backend):
    """Raises what is wrong: what the engine noticed, or "output differs" and the like."""
    kernel = kernels.get_local_kernel(variant_dir.parent, backend="cpu")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # and so, what nobody writes is NaN
    check_seeds(kernel, variant_dir)
    check_many_rows(kernel)
    check_weights(kernel)
    check_rows_apart(kernel)
    torch.use_deterministic_algorithms(False)
    check_strides_past_32_bits(kernel)
    {"cuda": check_cuda, "metal": check_metal}[backend](kernel, variant_dir)


def check_seeds(kernel, variant_dir):
    for hidden in (72, 75):
        arguments = five_tiles(hidden)
        results = [under_seed(kernel, variant_dir, seed, arguments) for seed in range(2)]
        same = all(torch.equal(a, b) for a, b in zip(*results))
        assert same, "depends on the seed"
        out, grad = results[0]
        assert torch.equal(out, reference.eager(**arguments)), "output differs"
        ids, _, padding, residual = arguments.values()
        exact, magnitude = reference.grad_table(residual, ids, 64, padding)
        bounds.assert_sum(grad, exact, magnitude, 240, 2**-23, what="gradient")


def check_many_rows(kernel):
    """More rows than blocks; and rows that many blocks read, in sums that are exact. One of these is a run
    in one place and alone in others."""
    one_each = torch.arange(2600), torch.randn(2600, 8)
    shared = torch.randint(0, 2600, (8000,)), torch.randint(-8, 9, (8000, 8)).float()
    shared[0][:100] = shared[0][3000:8000:1000] = 7
    for ids, grad in (one_each, shared):
        options = None, None, None, 2600, False, torch.float32
        (actual,) = kernel.op.ops.backward(grad, ids[:, None], *options)
        expected = torch.zeros(2600, 8).index_add_(0, ids, grad)
        assert torch.equal(actual, expected), "gradient differs"


def check_weights(kernel):
    """One shared table, more entries than lanes, and a sum of nothing but -0."""
    for tokens, entries in ((12, 4), (50, 40)):
        arguments = problem((tokens, entries), 30, 72, shared=True, weighted=True)
        ids, table, weights = arguments.values()
        weights[0], table[:, 0] = -1, 0  # -0 + -0 from +0 on is +0
        out = kernel.fused_embedding_lookup(ids, table.requires_grad_(), weights=weights)
        expected = reference.eager(**arguments)
        same = torch.equal(out, expected) and torch.equal(out.signbit(), expected.signbit())
        assert same, "output differs"
        ones = torch.ones_like(out)
        out.backward(ones)
        exact, magnitude = reference.grad_table(ones, ids, 30, weights=weights, shared=True)
        bounds.assert_sum(table.grad, exact, magnitude, 70, 2**-23, what="gradient")


def check_rows_apart(kernel):
    """Rows that a vector would fit into, but apart by what it doesn't."""
    residual, table = torch.randn(9, 77)[:, :72], torch.randn(1, 9, 72)
    out = kernel.fused_embedding_lookup(torch.arange(9)[:, None], table, residual=residual)
    assert torch.equal(out, residual + table[0]), "output differs"


def moved(variant_dir, function, *args, **options):
    """What each launch of a call moves, see traffic.py."""
    log = []
    with count_traffic(variant_dir, log):
        function(*args, **options)
    return log


def check_cuda(kernel, variant_dir):
    ids, table, padding, residual = five_tiles(72).values()
    backward = kernel.op.ops.backward
    lookup = kernel.fused_embedding_lookup
    log = moved(variant_dir, lookup, ids, table, padding=padding, residual=residual)
    assert log[0][residual.data_ptr()].read == residual.nbytes, "reads the residual too often"
    options = None, padding, None, 64, False, torch.float32
    log = moved(variant_dir, backward, residual, ids, *options)
    read = sum(launch[residual.data_ptr()].read for launch in log if residual.data_ptr() in launch)
    assert read <= 2 * ((~padding).sum() + 3) * 72 * 4, "reads the gradient too often"

    grad = torch.randn(400, 128).bfloat16()
    options = None, None, None, 64, False, torch.bfloat16
    of_sums = moved(variant_dir, backward, grad, ids[0], *options)[-2][grad.data_ptr()]
    assert of_sums.read_by_blocks <= of_sums.read, "reads sectors for less than their bytes"
    table = torch.randn(1, 64, 72)
    log = moved(variant_dir, lookup, ids[0, :, :1].abs(), table)
    assert log[0][table.data_ptr()].read == 400 * 72 * 4, "reads rows too often"

    def workspace(tokens):
        ids, grad = torch.randint(0, 64, (tokens, 2)), torch.randn(512).expand(tokens, 512)
        options = None, None, None, 64, False, torch.float32
        return total_allocated(lambda: backward(grad, ids, *options))[1]

    assert workspace(4000) <= 2.1 * workspace(2000), "the workspace is not linear"
    check_a_failed_launch(kernel, variant_dir)


def check_metal(kernel, variant_dir):
    emulator = load_library(variant_dir)
    ids = torch.arange(10)[:, None]
    kernel.fused_embedding_lookup(ids, torch.randn(1, 9, 72))  # 9 is too large
    assert emulator.metal_synchronize(), "no error"

    every_id, _, padding, residual = five_tiles(72).values()
    options = None, padding, None, 64, False, torch.float32
    log = moved(variant_dir, kernel.op.ops.backward, residual, every_id, *options)
    read = [one[residual.data_ptr()].read_once for one in log if residual.data_ptr() in one]
    assert sum(read) <= 1.1 * residual.nbytes, "reads the gradient too often"

    interpolate = kernel.vision_interpolation_indices_and_weights
    grid = torch.tensor([[1, 4, 6], [2, 12, 10]])
    for mode in ("bilinear", "bicubic"):
        actual = interpolate(grid, 16, num_patches=264, mode=mode)
        expected = get_vision_interpolation_indices_and_weights(grid, 16, mode=mode)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected)), "patches differ"
        assert not emulator.metal_synchronize()
    interpolate(grid, 16, num_patches=265)
    assert emulator.metal_synchronize(), "no error"
    for images in (grid[:0], grid * 0):
        assert interpolate(images, 16, num_patches=0)[0].shape == (0, 4)

    for pixels in (torch.rand(6143), torch.rand(6140).bfloat16()):
        actual = kernel.scale_pixels(pixels, torch.float16)
        assert torch.equal(actual, (2 * (pixels - 0.5)).half()), "pixels differ"

    emulator.metal_set_max_threads(224)
    torch.use_deterministic_algorithms(True)
    check(*step(kernel))
    emulator.metal_set_max_threads(1024)
    emulator.metal_set_max_threadgroups(3)
    results, expected = step(kernel)
    assert torch.allclose(results[1], expected[1], atol=1e-4), "gradient differs"
    emulator.metal_set_max_threadgroups(0)
    torch.use_deterministic_algorithms(False)
    emulator.metal_run_shaders(False)
    check_grids_of_32_bits(kernel)
    emulator.metal_run_shaders(True)

    together = threading.Barrier(4)

    def on_stream(stream):
        emulator.metal_set_stream(stream)
        table = torch.randn(1, 9, 37).bfloat16()
        together.wait()
        # By a pipeline that isn't made yet.
        out = kernel.fused_embedding_lookup(ids[:9], table, residual=table[0])
        assert torch.equal(out, table[0] * 2), "output differs"

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(on_stream, range(1, 5)))


def main():
    for line in sys.stdin:
        variant_dir, backend, log = line.split()
        child = os.fork()
        if child == 0:
            output = os.open(log, os.O_CREAT | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            return check_build(Path(variant_dir), backend)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
