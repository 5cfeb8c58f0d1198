"""What a GPU can tell of the CUDA variant, in phases that tools/gpu_check.sh runs one at a time.

    python benchmarks/gpu.py smoke      # are the results right? First of all: eager's order of a sum
    python benchmarks/gpu.py bench      # times of ours, of the peers and of a copy of the same bytes
    python benchmarks/gpu.py profile    # times of each kernel

Needs torch, `kernels` and a build, nothing else. The results are a list of rows in the JSON file, which is
written after each of them. With --device simt the engine of tests/simt stands in for the GPU, at small sizes:
a rehearsal, whose times mean nothing and are marked so.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import kernels
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def load(name, path):
    """A module of this repository, by its path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load("reference", "torch-ext/fused_embedding_lookup/reference.py")


class Rows:
    """The results so far, in the file and on the terminal."""

    def __init__(self, path, origin):
        self.path, self.origin, self.rows = path, origin, []

    def add(self, **row):
        self.rows.append(self.origin | row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n")
        print(json.dumps(row), flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phase", choices=["smoke", "bench", "profile", "first-capture"])
    parser.add_argument("--device", choices=["cuda", "simt"], default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/...")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    torch.set_default_device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    if on_gpu:
        kernel = kernels.get_local_kernel(ROOT, backend="cuda")
    else:
        kernel = kernels.get_local_kernel(ROOT / ".build/simt/cuda", backend="cpu")
    if args.phase == "first-capture":
        return first_capture(kernel)
    origin = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": kernel.__name__.split("_", 5)[-1],
        "gpu": torch.cuda.get_device_name() if on_gpu else "none: a rehearsal on tests/simt",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "phase": args.phase,
    }
    device = origin["gpu"].partition(":")[0].lower().replace(" ", "_")
    path = args.json or ROOT / f"benchmarks/results/gpu_{device}_{args.phase}.json"
    phases = {"smoke": smoke, "bench": bench, "profile": profile_kernels}
    failed = phases[args.phase](kernel, Rows(path, origin), on_gpu)
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")


# ----- smoke ----------------------------------------------------------------------------------------


def smoke(kernel, rows, on_gpu):
    """Returns the names of what failed. That eager sums in another order is a finding, not a failure."""
    failed = []

    def add(check, passed, **details):
        rows.add(check=check, passed=passed, **details)
        if not passed:
            failed.append(check)

    for dtype in FLOATS:  # Qwen3-VL's sum over four rows
        for tokens, hidden in ((4096, 1152), (37, 1152), (4096, 64)) if on_gpu else ((37, 64),):
            ids, weights = torch.randint(0, 2304, (tokens, 4)), torch.rand(tokens, 4)
            table = torch.randn(2304, hidden).to(dtype)
            eager = reference.interpolated(ids, table, weights)
            ours = kernel.fused_embedding_lookup(ids, table, weights=weights)
            in_order = reference.fused_embedding_lookup(ids, table, weights=weights)
            add(f"our order, {dtype}, {tokens} x {hidden}", torch.equal(ours, in_order))
            different = (eager != ours).float().mean().item()
            rows.add(
                check=f"eager's order is ours, {dtype}, {tokens} x {hidden}",
                equal=torch.equal(eager, ours),
                share_that_differs=different,
                largest_difference=(eager.double() - ours.double()).abs().max().item(),
            )
    for entries, shared, weighted in ((2, False, False), (4, True, True), (64, True, False)):
        for dtype in FLOATS:
            problem = arguments(2 if on_gpu else 1, 96, 500, dtype, entries, shared, weighted)
            check = f"K={entries} shared={shared} weighted={weighted} {dtype}"
            add("forward " + check, *compare_forward(kernel, problem))
            add("backward " + check, compare_backward(kernel, problem))
    if on_gpu:
        command = [sys.executable, __file__, "first-capture"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        add("the first call of a process, in a capture", result.returncode == 0,
            output=result.stdout[-500:] + result.stderr[-2000:])  # fmt: skip
    return failed


def arguments(batch, hidden, rows, dtype, entries=2, shared=False, weighted=False, kind="grid"):
    """The op's arguments, of images of 60 x 40 patches, padded to 2520 (a rehearsal: 252)."""
    patches = 2520 if torch.get_default_device().type == "cuda" else 252
    if kind == "grid" and entries == 2:
        x, y = torch.meshgrid(torch.arange(60), torch.arange(patches // 63), indexing="xy")
        ids = torch.full((batch, patches, 2), -1)
        ids[:, : x.numel()] = torch.stack([x, y], dim=-1).reshape(-1, 2)
    elif kind == "one id":
        ids = torch.zeros(batch, patches, entries, dtype=torch.int64)
    else:
        ids = torch.randint(0, rows, (batch, patches, entries))
    padding = torch.zeros(batch, patches, dtype=torch.bool)
    padding[:, patches * 20 // 21 :] = True
    return {
        "position_ids": ids,
        "table": torch.randn(*(() if shared else (entries,)), rows, hidden).to(dtype),
        "weights": torch.rand(batch, patches, entries) if weighted else None,
        "padding": padding,
        "residual": torch.randn(batch, patches, hidden).to(dtype),
    }


def compare_forward(kernel, problem):
    expected = reference.fused_embedding_lookup(**problem)
    return (torch.equal(kernel.fused_embedding_lookup(**problem), expected),)


def compare_backward(kernel, problem):
    """Against autograd's own in float64; and the same bits each time."""
    grads = []
    for _ in range(3):
        table = problem["table"].clone().requires_grad_()
        out = kernel.fused_embedding_lookup(**problem | {"table": table})
        grads += torch.autograd.grad(out, table, problem["residual"])
    ids, weights = problem["position_ids"], problem["weights"]
    table, dtype = problem["table"], problem["table"].dtype
    keep = (~problem["padding"]).double()[..., None]
    terms = problem["residual"].double() * keep
    exact, magnitude = torch.zeros(2, *table.shape, dtype=torch.float64)
    for k, of_entry in enumerate(ids.clamp(min=0).unbind(-1)):
        values = (terms if weights is None else terms * weights[..., k, None].double()).flatten(
            0, 1
        )
        for sums, v in ((exact, values), (magnitude, values.abs())):
            (sums if table.dim() == 2 else sums[k]).index_add_(0, of_entry.flatten(), v)
    error = (grads[0].double() - exact).abs()
    bound = torch.finfo(dtype).eps * exact.abs() + ids.numel() * 2.0**-23 * magnitude + 1e-7
    return bool((error <= bound).all()) and all(torch.equal(grads[0], grad) for grad in grads)


def first_capture(kernel):
    """Nothing of ours has run in this process: a capture must not mind that kernels are loaded in it."""
    problem = arguments(1, 768, 256, torch.bfloat16)
    ids, padding, grad = problem["position_ids"], problem["padding"], problem["residual"]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.fused_embedding_lookup(**problem)
        table = kernel.op.ops.backward(grad, ids, None, padding, None, 256, False, torch.bfloat16)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, reference.fused_embedding_lookup(**problem))
    expected = kernel.op.ops.backward(grad, ids, None, padding, None, 256, False, torch.bfloat16)
    assert torch.equal(table, expected)


# ----- bench ----------------------------------------------------------------------------------------


def embedding_bag(position_ids, table, weights, padding, residual):
    """Both axes in one lookup of PyTorch's own fused lookup-and-sum."""
    entries, hidden = position_ids.shape[-1], table.shape[-1]
    ids = position_ids.clamp(min=0).view(-1, entries)
    if table.dim() == 3:
        ids = ids + torch.arange(entries) * table.shape[1]
    per_sample = None if weights is None else weights.view(-1, entries).to(table.dtype)
    bag = F.embedding_bag(ids, table.view(-1, hidden), mode="sum", per_sample_weights=per_sample)
    return residual + torch.where(padding.unsqueeze(-1), 0.0, bag.view(residual.shape))


def one_hot(position_ids, table, weights, padding, residual):
    """transformers up to 5.9."""
    encoded = F.one_hot(position_ids.clamp(min=0), num_classes=table.shape[1])
    embedding = (encoded.permute(0, 2, 1, 3).to(table) @ table).sum(dim=1)
    return residual + torch.where(padding.unsqueeze(-1), 0.0, embedding)


def bench(kernel, rows, on_gpu):
    """The rows that matter most first."""
    batches = (40, 1) if on_gpu else (1,)
    hidden, table_rows = (768, 10240) if on_gpu else (64, 100)
    for kind in ("grid", "random ids", "one id"):
        for batch in batches:
            problem = arguments(batch, hidden, table_rows, torch.bfloat16, kind=kind)
            name = f"K=2 {kind} B={batch} H={hidden} P={table_rows}"
            bench_one(kernel, rows, on_gpu, name, problem, with_one_hot=False)
    for patches in (4096, 16384) if on_gpu else (64,):
        problem = {
            "position_ids": torch.randint(0, 2304, (1, patches, 4)),
            "table": torch.randn(2304, 1152 if on_gpu else 64).bfloat16(),
            "weights": torch.rand(1, patches, 4),
            "padding": torch.zeros(1, patches, dtype=torch.bool),
            "residual": torch.randn(1, patches, 1152 if on_gpu else 64).bfloat16(),
        }
        bench_one(kernel, rows, on_gpu, f"K=4 weighted, {patches} patches", problem, False)
    problem = arguments(1, hidden, 1024 if on_gpu else 100, torch.bfloat16)
    bench_one(kernel, rows, on_gpu, "K=2 grid B=1, small enough for one-hot", problem, True)


def bench_one(kernel, rows, on_gpu, name, problem, with_one_hot):
    table, residual, ids = problem["table"], problem["residual"], problem["position_ids"]
    table.requires_grad_()
    small = residual.numel() < 2**23
    peers = {"ours": kernel.fused_embedding_lookup, "eager": reference.fused_embedding_lookup}
    if on_gpu:
        peers["torch.compile"] = torch.compile(reference.fused_embedding_lookup)
    peers["embedding_bag"] = embedding_bag
    if with_one_hot:
        peers["one-hot"] = one_hot
    extra = ids.nbytes + problem["padding"].nbytes
    extra += 0 if problem["weights"] is None else problem["weights"].nbytes
    keep = (~problem["padding"]).sum().item() / problem["padding"].numel()
    moved = {
        "forward": 2 * residual.nbytes + extra,
        "backward": int(residual.nbytes * keep) + table.nbytes + extra,
    }
    for direction, bytes_moved in moved.items():
        calls = {}
        for peer, function in peers.items():
            if direction == "forward":
                calls[peer] = lambda function=function: function(**problem)
            else:
                out = function(**problem)
                calls[peer] = lambda out=out: torch.autograd.grad(
                    out, table, residual, retain_graph=True
                )
        source = torch.ones(bytes_moved // 2, dtype=torch.uint8)
        target = torch.empty_like(source)
        calls["copy of as many bytes"] = lambda source=source, target=target: target.copy_(source)
        with torch.set_grad_enabled(direction == "backward"):
            by_replay = small and on_gpu
            times, failures = measure(calls, on_gpu, by_replay)
        rows.add(
            name=f"{direction} {name}",
            bytes=bytes_moved,
            how="graph replay" if by_replay else "events" if on_gpu else "host clock, rehearsal",
            median_us={peer: statistics.median(t) for peer, t in times.items()},
            quartiles_us={peer: statistics.quantiles(t, n=4)[::2] for peer, t in times.items()},
            not_measured=failures,
        )


def measure(calls, on_gpu, by_replay):
    """Microseconds of each call, round by round in turn. What can't be captured is left out, and why."""
    rounds, failures = (20, {}) if on_gpu else (2, {})
    if by_replay:
        graphs = {}
        for peer, call in calls.items():
            try:
                graphs[peer] = capture(call)
            except RuntimeError as error:
                failures[peer] = str(error)[:200]
        calls = {peer: graph.replay for peer, graph in graphs.items()}
    times = {peer: [] for peer in calls}
    for number in range(-2, rounds):
        for peer, call in calls.items():
            microseconds = once(call, on_gpu)
            if number >= 0:
                times[peer].append(microseconds)
    return times, failures


def capture(call):
    """Ten calls as one graph: what a model's step replays, without the host."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(10):
            call()
    graph.calls = 10
    return graph


def once(call, on_gpu):
    if not on_gpu:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
    graph = getattr(call, "__self__", None)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000)  # about a millisecond for the host to get ahead
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / getattr(graph, "calls", 1)


# ----- profile --------------------------------------------------------------------------------------


def profile_kernels(kernel, rows, on_gpu):
    """Each kernel's time and launches, by torch's profiler."""
    batches = (40, 1) if on_gpu else (1,)
    hidden, table_rows = (768, 10240) if on_gpu else (64, 100)
    for kind in ("grid", "random ids", "one id"):
        for batch in batches:
            problem = arguments(batch, hidden, table_rows, torch.bfloat16, kind=kind)
            problem["table"].requires_grad_()

            def step(problem=problem):
                out = kernel.fused_embedding_lookup(**problem)
                torch.autograd.grad(out, problem["table"], problem["residual"])

            step()
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
            with profile(activities=activities) as profiler:
                for _ in range(10 if on_gpu else 1):
                    step()
                if on_gpu:
                    torch.cuda.synchronize()
            averages = profiler.key_averages()
            ours = {
                event.key: {"calls": event.count, "mean_us": event.device_time}
                for event in averages
                if ("embedding_lookup" in event.key and event.device_time > 0) or not on_gpu
            }
            rows.add(name=f"{kind} B={batch} H={hidden}", kernels=ours)


if __name__ == "__main__":
    main()
