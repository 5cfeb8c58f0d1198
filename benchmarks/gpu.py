"""What a GPU can tell of the CUDA variant beside its times, in phases that tools/gpu_check.sh runs.

    python benchmarks/gpu.py smoke      # is eager's order of a sum ours? The tests see to all other results
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
    """Qwen3-VL's sum over four rows. That eager takes them in another order is a finding, not a failure.

    Returns the names of what failed.
    """
    failed = []
    for dtype in measure.DTYPES:
        for tokens, hidden in ((4096, 1152), (37, 1152), (4096, 64)) if on_gpu else ((37, 64),):
            case = Case(1, tokens, hidden, rows=2304, entries=4, shared=1, weighted=1, ids="random")
            given = measure.arguments(kernel, case._replace(dtype=dtype))
            given |= {"padding": None, "residual": None}
            eager = kernel.reference.interpolated(
                given["position_ids"], given["table"], given["weights"]
            )
            ours = kernel.fused_embedding_lookup(**given)
            in_order = torch.equal(ours, kernel.reference.fused_embedding_lookup(**given))
            check = f"our order, {dtype}, {tokens} x {hidden}"
            add(check=check, passed=in_order)
            failed += [] if in_order else [check]
            add(
                check=f"eager's order is ours, {dtype}, {tokens} x {hidden}",
                equal=torch.equal(eager, ours),
                share_that_differs=(eager != ours).float().mean().item(),
                largest_difference=(eager.double() - ours.double()).abs().max().item(),
            )
    return failed


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
    bases = [Case(40), Case(1)] if on_gpu else [Case(1, 63, hidden=64, rows=100)]
    for ids in ("grid", "random", "single"):
        for base in bases:
            case = base._replace(ids=ids)
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
