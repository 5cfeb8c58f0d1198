"""The kernel against its peers, interleaved in one run.

    make bench
    make bench ARGS="--batch 40 --dtype bf16 --json out.json"
    make bench ARGS="--device cuda --batch 40 --ids random"

Every round times each peer once, forward and backward, in turn: what disturbs the machine disturbs
all of them. The table shows medians, our speed-up over each peer, and what share of the bandwidth of
a plain copy we reach on the bytes that the op has to move. Results are fresh tensors, as in a model,
so page faults count; the copy's are warm, so it is the memory's limit and not the allocator's.

On a GPU the times are the GPU's own, between two events, with the host far enough ahead that no
launch is waited for. The host's time per call is beside them, and one F.embedding's to compare with;
so is the most memory that a forward and backward hold beyond the arguments.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import kernels
import torch
import torch.nn.functional as F
from tabulate import tabulate
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ids", default="grid", choices=["grid", "random", "single"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--patches", type=int, default=2520, help="per image; 1 in 21 is padding")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--rows", type=int, default=10240, help="P, the table's rows per axis")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: fp32 and bf16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers")
    args = parser.parse_args()

    torch.set_default_device(args.device)
    kernel = kernels.get_local_kernel(ROOT, backend=args.device)
    report = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": kernel.__name__.split("_", 5)[-1],
        "machine": machine(kernel),
        "shape": {key: getattr(args, key) for key in ("batch", "patches", "hidden", "rows", "ids")},
        "rounds": args.rounds,
        "results": [],
    }
    for dtype in args.dtype or ["fp32", "bf16"]:
        for direction, result in measure(kernel, args, dtype).items():
            report["results"].append({"dtype": dtype, "direction": direction, **result})

    print(", ".join(f"{key}: {value}" for key, value in report["machine"].items()))
    print(
        f"B={args.batch} N={args.patches} H={args.hidden} P={args.rows} {args.ids} ids, "
        f"medians of {args.rounds}"
    )
    rows = []
    for result in report["results"]:
        times = result["median_ms"]
        row = {"": f"{result['direction']} {result['dtype']}"}
        row["ours (ms)"] = f"{times['ours']:.2f}"
        for peer in times:
            if peer not in ("ours", "copy"):
                row[f"vs {peer}"] = f"{times[peer] / times['ours']:.2f}x"
        row["must move"] = f"{result['bytes'] / 1e6:.0f} MB"
        row["copy"] = f"{result['bytes'] / times['copy'] / 1e6:.0f} GB/s"
        row["share"] = f"{times['copy'] / times['ours']:.0%}"
        if "host_us" in result:
            row["host"] = f"{result['host_us']['ours']:.0f} us"
        if "peak_bytes" in result:
            row["peak"] = f"{result['peak_bytes']['ours'] / 2**20:.0f} MiB"
        rows.append(row)
    print(tabulate(rows, headers="keys", tablefmt="simple_outline"))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
        print(f"Wrote {args.json}")


def measure(kernel, args, dtype_name):
    """Time all peers for one dtype. Returns, per direction, medians, quartiles and bytes."""
    dtype = DTYPES[dtype_name]
    position_ids, padding = images(args.batch, args.patches)
    if args.ids == "random":
        position_ids.random_(0, args.rows)
    elif args.ids == "single":
        position_ids.zero_()
    on_gpu = args.device == "cuda"
    table = torch.randn(2, args.rows, args.hidden, dtype=dtype, requires_grad=True)
    residual = torch.randn(args.batch, args.patches, args.hidden, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(residual)
    arguments = (position_ids, table, padding, residual)

    def ours(position_ids, table, padding, residual):
        return kernel.fused_embedding_lookup(
            position_ids, table, padding=padding, residual=residual
        )

    torch._dynamo.reset()
    peers = {
        "ours": ours,
        "eager": eager,
        "torch.compile": torch.compile(eager),
        "embedding_bag": embedding_bag,
    }
    if on_gpu and 2 * position_ids.numel() * args.rows * 10 < torch.cuda.mem_get_info()[0]:
        peers["one-hot"] = one_hot
    expected = eager(*arguments)
    for peer in peers.values():  # the peers round in other places than eager does, we don't
        atol = 0 if peer is ours else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(peer(*arguments), expected, rtol=atol, atol=atol)

    distinct = sum(len(position_ids[..., axis].unique()) for axis in range(2))
    element = residual.element_size()
    ids_bytes = position_ids.nbytes + padding.nbytes
    bytes_moved = {
        "forward": 2 * residual.nbytes + ids_bytes + distinct * args.hidden * element,
        "backward": grad.nbytes + table.nbytes + ids_bytes,
    }
    copies = {}
    for direction, size in bytes_moved.items():
        source = torch.ones(size // 2, dtype=torch.uint8)
        copies[direction] = (torch.empty_like(source), source)

    def forward(peer):
        with torch.no_grad():
            return timed(lambda: peer(*arguments), on_gpu)

    def backward(peer):
        out = peer(*arguments)
        return timed(lambda: torch.autograd.grad(out, (table, residual), grad), on_gpu)

    times = {direction: {name: [] for name in [*peers, "copy"]} for direction in bytes_moved}
    for direction, run in (("forward", forward), ("backward", backward)):
        target, source = copies[direction]
        for _ in tqdm(range(-3, args.rounds), desc=f"{direction} {dtype_name}", unit="round"):
            for name, peer in peers.items():
                times[direction][name].append(run(peer))
            times[direction]["copy"].append(timed(lambda: target.copy_(source), on_gpu))  # noqa: B023

    result = {}
    for direction, of_peer in times.items():
        milliseconds = {name: [s * 1e3 for s in seconds[3:]] for name, seconds in of_peer.items()}
        quartiles = {name: statistics.quantiles(ms, n=4) for name, ms in milliseconds.items()}
        result[direction] = {
            "bytes": bytes_moved[direction],
            "median_ms": {name: round(q[1], 4) for name, q in quartiles.items()},
            "quartiles_ms": {
                name: [round(q[0], 4), round(q[2], 4)] for name, q in quartiles.items()
            },
        }
    if on_gpu:
        x = position_ids[..., 0].clamp(min=0)
        with torch.no_grad():
            calls = {name: lambda peer=peer: peer(*arguments) for name, peer in peers.items()}
            calls["one F.embedding"] = lambda: F.embedding(x, table[0])
            result["forward"]["host_us"] = {n: host_microseconds(c) for n, c in calls.items()}
        result["backward"]["peak_bytes"] = {
            name: peak_bytes(
                lambda peer=peer: torch.autograd.grad(peer(*arguments), (table, residual), grad)
            )
            for name, peer in peers.items()
        }
    return result


def images(batch, patches):
    """Ids and padding of images of 3 : 2 that fill 20/21 of `patches`, as 60 x 40 does of 2520."""
    unit = int((patches * 20 / 21 / 6) ** 0.5)
    x, y = torch.meshgrid(torch.arange(3 * unit), torch.arange(2 * unit), indexing="xy")
    position_ids = torch.full((batch, patches, 2), -1)
    position_ids[:, : x.numel()] = torch.stack([x, y], dim=-1).reshape(-1, 2)
    return position_ids, (position_ids == -1).all(-1)


def eager(position_ids, table, padding, residual):
    """transformers since 5.10."""
    x, y = position_ids.clamp(min=0).unbind(-1)
    embedding = F.embedding(x, table[0]) + F.embedding(y, table[1])
    return residual + torch.where(padding.unsqueeze(-1), 0.0, embedding)


def embedding_bag(position_ids, table, padding, residual):
    """Both axes in one lookup of PyTorch's own fused lookup-and-sum."""
    axes, rows, hidden = table.shape
    ids = position_ids.clamp(min=0) + torch.arange(axes, device=position_ids.device) * rows
    embedding = F.embedding_bag(ids.view(-1, axes), table.view(-1, hidden), mode="sum")
    embedding = embedding.view(*position_ids.shape[:-1], hidden)
    return residual + torch.where(padding.unsqueeze(-1), 0.0, embedding)


def one_hot(position_ids, table, padding, residual):
    """transformers up to 5.9."""
    encoded = F.one_hot(position_ids.clamp(min=0), num_classes=table.shape[1])
    encoded = encoded.permute(0, 2, 1, 3).to(table)
    embedding = (encoded @ table).sum(dim=1)
    return residual + torch.where(padding.unsqueeze(-1), 0.0, embedding)


def timed(function, on_gpu):
    """Seconds."""
    if on_gpu:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000)  # about a millisecond for the host to get ahead
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    del result  # freeing it is not what is timed
    return seconds


def host_microseconds(function):
    """The host's time for a call that only queues work, the median of 5 times 20 calls."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            function()
        times.append((time.perf_counter() - start) / 20 * 1e6)
    torch.cuda.synchronize()
    return round(statistics.median(times), 2)


def peak_bytes(function):
    """The most GPU memory that a call holds beyond what is held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def machine(kernel):
    if torch.get_default_device().type == "cuda":
        query = "--query-gpu=driver_version"
        driver = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()[0]
        return {
            "gpu": torch.cuda.get_device_name(),
            "driver": driver,
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
        }
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "instructions": kernel.op.ops.cpu_capability(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
