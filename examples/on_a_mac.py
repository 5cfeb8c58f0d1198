"""Verify on a Mac what Linux can't, and measure it. macOS 26 or later, with the Metal variant built here:

    kernel-builder build-and-copy && pip install torch kernels && python examples/on_a_mac.py

Outputs must have the bits of F.embedding on the same device; gradients the same bits in five runs, and
be close to sums in float64. Prints times, medians of 20 rounds of 10 calls.
"""

import statistics
import sys
import time
from pathlib import Path

import kernels
import torch
import torch.nn.functional as F

device = sys.argv[1] if len(sys.argv) > 1 else "mps"
backend = {"mps": "metal"}.get(device, device)
kernel = kernels.get_local_kernel(Path(__file__).resolve().parent.parent, backend=backend)
ours = kernel.fused_embedding_lookup


def eager(ids, table, padding, residual):
    embedding = F.embedding(ids[..., 0], table[0]) + F.embedding(ids[..., 1], table[1])
    return residual + torch.where(padding[..., None], 0.0, embedding)


def milliseconds(call):
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(10):
            call()
        if device == "mps":
            torch.mps.synchronize()
        times.append((time.perf_counter() - start) * 100)
    return statistics.median(times)


for hidden in (768, 1152, 771):  # the last without vectors
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        ids = torch.randint(0, 60, (8, 2520, 2), device=device)
        padding = torch.rand(8, 2520, device=device) < 0.1
        table = torch.randn(2, 10240, hidden, device=device, dtype=dtype, requires_grad=True)
        residual = torch.randn(8, 2520, hidden, device=device, dtype=dtype)
        arguments = (ids, table, padding, residual)

        out = ours(ids, table, padding=padding, residual=residual)
        assert torch.equal(out, eager(*arguments)), "the output differs from eager's"
        grads = [torch.autograd.grad(out, table, residual, retain_graph=True)[0] for _ in range(5)]
        assert all(torch.equal(grads[0], grad) for grad in grads), "the gradient changes"
        on_cpu = [tensor.detach().cpu().double() for tensor in (table, residual)]
        reference = on_cpu[0].requires_grad_()
        eager(ids.cpu(), reference, padding.cpu(), on_cpu[1]).backward(on_cpu[1])
        gradient = grads[0].cpu().double()
        torch.testing.assert_close(gradient, reference.grad, rtol=2**-7, atol=1e-3)

        with torch.no_grad():
            forward = [
                milliseconds(lambda: ours(ids, table, padding=padding, residual=residual)),  # noqa: B023
                milliseconds(lambda: eager(*arguments)),  # noqa: B023
            ]
        backward = [
            milliseconds(lambda: torch.autograd.grad(o, table, residual, retain_graph=True))  # noqa: B023
            for o in (out, eager(*arguments))
        ]
        print(
            f"H={hidden} {dtype}: forward {forward[0]:.2f} ms, eager {forward[1]:.2f}; "
            f"backward {backward[0]:.2f} ms, eager {backward[1]:.2f}"
        )

if device == "mps":
    ids[0, 0, 0] = 10240
    out = ours(ids, table, residual=residual)
    assert out[0, 0].isnan().all() and not out[0, 1].isnan().any(), "an id out of range is not NaN"
print("all as it should be")
