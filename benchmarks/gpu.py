"""What a GPU can tell of the CUDA variant beside its times, in phases that tools/gpu_check.sh runs.

    python benchmarks/gpu.py smoke      # are the results right? First of all: eager's order of a sum
    python benchmarks/gpu.py profile    # times of each kernel

Needs torch, `kernels` and a build, nothing else. With --device simt the engine of tests/simt stands in for the GPU, at
small sizes: a rehearsal, whose times mean nothing and are marked so.
"""

import json
import sys
from functools import partial

import measure
import torch
from measure import Case
from torch.profiler import ProfilerActivity, profile

# A rehearsal's sizes.
SMALL = {"batch": 1, "patches": 63, "hidden": 64, "rows": 100}


def main():
    parser = measure.measuring_parser(__doc__)
    parser.set_defaults(device="cuda")
    parser.add_argument("phase", choices=["smoke", "profile", "first-capture"])
    args = parser.parse_args()
    kernel = measure.load_kernel(args.device)
    torch.manual_seed(0)
    if args.phase == "first-capture":
        return first_capture(kernel)
    rows = []

    def add(**row):
        origin = measure.origin(kernel, args.device, f"python benchmarks/gpu.py {args.phase}")
        rows.append(origin | row)
        measure.write(args.json, rows, json.dumps(row))

    phase = {"smoke": smoke, "profile": profile_kernels}[args.phase]
    failed = phase(kernel, add, args.device == "cuda")
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")


# ----- smoke ----------------------------------------------------------------------------------------


def smoke(kernel, add, on_gpu):
    """Returns the names of what failed. That eager sums in another order is a finding, not a failure."""
    failed = []

    def verdict(check, passed):
        add(check=check, passed=passed)
        if not passed:
            failed.append(check)

    for dtype in measure.DTYPES:  # Qwen3-VL's sum over four rows
        for tokens, hidden in ((4096, 1152), (37, 1152), (4096, 64)) if on_gpu else ((37, 64),):
            case = Case(1, tokens, hidden, rows=2304, entries=4, shared=1, weighted=1, ids="random")
            given = measure.arguments(kernel, case._replace(dtype=dtype))
            given |= {"padding": None, "residual": None}
            eager = kernel.reference.interpolated(
                given["position_ids"], given["table"], given["weights"]
            )
            ours = kernel.fused_embedding_lookup(**given)
            in_order = kernel.reference.fused_embedding_lookup(**given)
            verdict(f"our order, {dtype}, {tokens} x {hidden}", torch.equal(ours, in_order))
            add(
                check=f"eager's order is ours, {dtype}, {tokens} x {hidden}",
                equal=torch.equal(eager, ours),
                share_that_differs=(eager != ours).float().mean().item(),
                largest_difference=(eager.double() - ours.double()).abs().max().item(),
            )
    sizes = {"batch": 2, "hidden": 96, "rows": 500} if on_gpu else SMALL
    for case in (
        Case(**sizes),
        Case(**sizes, entries=4, shared=1, weighted=1, ids="random"),
        Case(**sizes, entries=64, shared=1, ids="random"),
    ):
        for dtype in measure.DTYPES:
            given = measure.arguments(kernel, case._replace(dtype=dtype))
            expected = kernel.reference.fused_embedding_lookup(**given)
            check = f"K={case.entries} shared={case.shared} weighted={case.weighted} {dtype}"
            out = kernel.fused_embedding_lookup(**given)
            verdict(f"forward {check}", torch.equal(out, expected))
            verdict(f"backward {check}", gradient_is_right(kernel, **given))
    return failed


def gradient_is_right(kernel, table, weights, residual, **given):
    """The same bits each time; and of whole numbers, whose sums are exact, eager's in float64."""

    def gradient(lookup, table, weights, grad):
        out = lookup(table=table, weights=weights, residual=residual, **given)
        return torch.autograd.grad(out, table, grad)[0]

    ours, eager = kernel.fused_embedding_lookup, kernel.reference.fused_embedding_lookup
    first, *others = (gradient(ours, table, weights, residual.detach()) for _ in range(3))
    grad = torch.randint_like(residual, -1, 2)
    weights = None if weights is None else (4 * weights).round()
    exact = gradient(eager, table.double(), weights, grad.double()).to(table.dtype)
    same = all(torch.equal(first, other) for other in others)
    return same and torch.equal(gradient(ours, table, weights, grad), exact)


def first_capture(kernel):
    """Nothing of ours has run in this process: a capture must not mind that kernels are loaded in it.

    tests/devices/test_cuda.py starts it.
    """
    given = measure.arguments(kernel, Case(1, rows=256))
    ids, padding, grad = given["position_ids"], given["padding"], given["residual"].detach()
    backward = partial(
        kernel.op.ops.backward, grad, ids, None, padding, None, 256, False, grad.dtype
    )
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            out = kernel.fused_embedding_lookup(**given)
            table = backward()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, kernel.reference.fused_embedding_lookup(**given))
        assert torch.equal(table, backward())


# ----- profile --------------------------------------------------------------------------------------


def profile_kernels(kernel, add, on_gpu):
    """Each kernel's time and launches, by torch's profiler."""
    for ids in ("grid", "random", "single"):
        for case in (Case(40, ids=ids), Case(1, ids=ids)) if on_gpu else (Case(**SMALL, ids=ids),):
            given = measure.arguments(kernel, case)

            def step(given=given):
                out = kernel.fused_embedding_lookup(**given)
                torch.autograd.grad(out, given["table"], given["residual"].detach())

            step()
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
            with profile(activities=activities) as profiler:
                for _ in range(10 if on_gpu else 1):
                    step()
                measure.now()
            ours = {
                event.key: {"calls": event.count, "mean_us": event.device_time}
                for event in profiler.key_averages()
                if ("embedding_lookup" in event.key and event.device_time > 0) or not on_gpu
            }
            add(case=case._asdict(), kernels=ours)


if __name__ == "__main__":
    main()
