"""What a GPU can tell of the CUDA variant beside its times, in phases that tools/gpu_check.sh runs.

    python benchmarks/gpu.py smoke      # are the results right? First of all: eager's order of a sum
    python benchmarks/gpu.py profile    # times of each kernel

Needs torch, `kernels` and a build, nothing else. With --device simt the engine of tests/simt stands in for the GPU, at
small sizes: a rehearsal, whose times mean nothing and are marked so.
"""

import json
import subprocess
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

    def verdict(check, passed, **details):
        add(check=check, passed=passed, **details)
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
    for entries, shared, weighted, ids in (
        (2, 0, 0, "grid"),
        (4, 1, 1, "random"),
        (64, 1, 0, "random"),
    ):
        for dtype in measure.DTYPES:
            case = Case(
                **sizes, entries=entries, shared=shared, weighted=weighted, ids=ids, dtype=dtype
            )
            given = measure.arguments(kernel, case)
            expected = kernel.reference.fused_embedding_lookup(**given)
            check = f"K={entries} shared={shared} weighted={weighted} {dtype}"
            out = kernel.fused_embedding_lookup(**given)
            verdict(f"forward {check}", torch.equal(out, expected))
            verdict(f"backward {check}", gradient_is_right(kernel, **given))
    if on_gpu:
        command = [sys.executable, __file__, "first-capture"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        output = result.stdout[-500:] + result.stderr[-2000:]
        verdict("the first call of a process, in a capture", result.returncode == 0, output=output)
    return failed


def gradient_is_right(kernel, position_ids, table, weights, padding, residual):
    """Against sums in float64; and the same bits each time."""
    call = partial(kernel.fused_embedding_lookup, position_ids, table, weights=weights)
    grads = [
        torch.autograd.grad(call(padding=padding, residual=residual), table, residual.detach())[0]
        for _ in range(3)
    ]
    terms = residual.detach().double() * (~padding).double()[..., None]
    exact, magnitude = torch.zeros(2, *table.shape, dtype=torch.float64)
    for k, ids in enumerate(position_ids.clamp(min=0).unbind(-1)):
        values = terms if weights is None else terms * weights[..., k, None].double()
        for sums, v in ((exact, values), (magnitude, values.abs())):
            sums = sums if table.dim() == 2 else sums[k]
            sums.index_add_(0, ids.flatten(), v.flatten(0, 1))
    error = (grads[0].double() - exact).abs()
    eps = torch.finfo(table.dtype).eps
    bound = eps * exact.abs() + position_ids.numel() * 2.0**-23 * magnitude + 1e-7
    return bool((error <= bound).all()) and all(torch.equal(grads[0], grad) for grad in grads)


def first_capture(kernel):
    """Nothing of ours has run in this process: a capture must not mind that kernels are loaded in it."""
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
