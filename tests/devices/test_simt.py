"""The engine that runs the GPUs' sources on a CPU: what doesn't depend on its seed, and a refused launch."""

import ctypes

import kernels
import pytest
import torch

from helpers import reference


def problem(hidden, dtype):
    """Five tiles of tokens on a grid. With 72 columns, some blocks have only a few. The table doesn't
    begin where its storage does."""
    generator = torch.Generator().manual_seed(0)
    ids = reference.grid(12, 400, 20, 20)
    padding = torch.rand(12, 400, generator=generator) < 0.1
    table = torch.randn(3, 64, hidden, generator=generator).to(dtype)[1:]
    residual = torch.randn(12, 400, hidden, generator=generator).to(dtype)
    return ids, table, padding, residual


def run(folder, seed, dtype=torch.float32, hidden=72):
    """The output and the table's gradient from the build in `folder`, under a seed of the engine."""
    kernel = kernels.get_local_kernel(folder, backend="cpu")
    (extension,) = folder.glob("*/*.abi3.so")
    ctypes.CDLL(extension).simt_seed(seed)
    ids, table, padding, residual = problem(hidden, dtype)
    table.requires_grad_()
    out = kernel.fused_embedding_lookup(ids, table, padding=padding, residual=residual)
    out.backward(residual)
    return out.detach(), table.grad


@pytest.mark.variant("cuda-simt", "metal-simt")
@pytest.mark.parametrize("dtype", reference.FLOATS[:3], ids=str)
@pytest.mark.parametrize("hidden", [72, 75])
def test_results_do_not_depend_on_the_order_of_threads_and_blocks(variant_dir, dtype, hidden):
    expected = run(variant_dir.parent, 0, dtype, hidden)
    for seed in range(1, 8):
        actual = run(variant_dir.parent, seed, dtype, hidden)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected)), seed


@pytest.mark.variant("cuda-simt")
def test_a_failed_launch_is_told_once(kernel, variant_dir):
    """By us, and not by whoever asks CUDA for its last error next."""
    (path,) = variant_dir.glob("*.abi3.so")
    extension = ctypes.CDLL(path)
    ids, table, _, residual = problem(72, torch.float32)
    extension.cuda_refuse_launches(ctypes.c_bool(True))
    try:
        for function in (
            lambda: kernel.fused_embedding_lookup(ids, table),
            lambda: kernel.op.ops.backward(
                residual, ids, None, None, None, 64, False, torch.float32
            ),
        ):
            with pytest.raises(RuntimeError, match="failed: the .*: invalid argument"):
                function()
            assert extension.cuda_last_error() == 0
    finally:
        extension.cuda_refuse_launches(ctypes.c_bool(False))
