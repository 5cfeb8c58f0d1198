"""The kernel against its peers, interleaved in one run.

    make bench
    make bench ARGS="--batch 40 --dtype bf16 --json out.json"
    make bench ARGS="--device cuda --batch 40 --ids random"
    make bench ARGS="--suite --json benchmarks/results/cpu.json"

Every round times each peer once, in turn: what disturbs the machine disturbs all of them. The table
shows medians, our speed-up over each peer with its 95% interval, and what share of the bandwidth of a
plain copy we reach on the bytes that the op has to move. Results are fresh tensors, as in a model, so
page faults count; the copy's are warm, so it is the memory's limit and not the allocator's. The peak is
the most memory that a call (backward: a forward and backward) holds beyond its arguments.

On a GPU the times are the GPU's own, between two events, with the host far enough ahead that no
launch is waited for. The host's time per call is beside them, and one F.embedding's to compare with.
"""

import argparse
import statistics
import time
from pathlib import Path

import measure
import psutil
import torch
import torch.nn.functional as F
from tabulate import tabulate
from tqdm import tqdm

IDS = ("grid", "random", "single", "interpolated")
PEERS = ("eager", "torch.compile", "embedding_bag", "one-hot")
FAST = "--peers eager torch.compile embedding_bag"  # one-hot takes seconds
MEMORY = "--dtype bf16 --direction forward --peers eager one-hot --rounds 2"
# What the README shows.
SUITE = [
    f"--dtype fp32 --dtype bf16 --dtype fp16 {FAST} --rounds 60",
    f"--dtype fp32 --dtype bf16 {FAST} --ids random",
    f"--dtype fp32 --dtype bf16 {FAST} --ids single",
    f"--dtype bf16 {FAST} --hidden 1152",
    f"--dtype bf16 {FAST} --hidden 3840 --patches 1120 --rows 1120",  # Gemma 4 Unified
    f"--dtype fp32 --dtype bf16 {FAST} --batch 1",
    *(
        f"--dtype fp32 --dtype bf16 --direction forward {FAST} --batch 1 --patches {patches}"
        for patches in (630, 1260, 5040, 10080)
    ),
    # The Qwen3-VL family: weights, and one table that all axes read.
    *(
        f"--dtype bf16 --dtype fp32 {FAST} --ids interpolated --patches {patches} --hidden 1152 "
        f"--rows 2304 --batch 1"
        for patches in (256, 4096, 16384)
    ),
    *(f"{MEMORY} --batch {batch}" for batch in (1, 2, 4, 8)),
]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ids", default="grid", choices=IDS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--patches", type=int, default=2520, help="per image; 1 in 21 is padding")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--rows", type=int, default=10240, help="P, the table's rows per axis")
    parser.add_argument(
        "--dtype", choices=measure.DTYPES, action="append", help="default: fp32 and bf16"
    )
    parser.add_argument(
        "--direction", choices=["forward", "backward"], action="append", help="default: both"
    )
    parser.add_argument("--peers", choices=PEERS, nargs="+", help="default: all that fit in memory")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--suite", action="store_true", help="what the README shows, 10 minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: an interval needs more than one")

    torch.set_default_device(args.device)
    kernel = measure.load_kernel(args.device)
    suite = [f"--device {args.device} {line}" for line in SUITE] if args.suite else None
    cells = [parser.parse_args(line.split()) for line in suite] if suite else [args]
    cells = [(cell, dtype) for cell in cells for dtype in cell.dtype or ["fp32", "bf16"]]
    rows = []
    for cell, dtype in tqdm(cells, desc="cells", unit="cell", disable=len(cells) == 1):
        rows += rows_of(kernel, cell, dtype)

    print(", ".join(f"{key}: {value}" for key, value in rows[0]["machine"].items()))
    print(tabulate(map(table_row, rows), headers="keys", tablefmt="simple_outline"))
    if args.json:
        measure.write(args.json, rows)


def table_row(row):
    shape, times = row["shape"], row["median_ms"]
    result = {
        "": f"{row['direction']} {row['dtype']}",
        "shape": f"B={shape['batch']} N={shape['patches']} H={shape['hidden']} {shape['ids']}",
        "ours (ms)": f"{times['ours']:.2f}",
    }
    for peer, (ratio, low, high) in row["ratio"].items():
        if peer != "copy":
            result[f"vs {peer}"] = f"{ratio:.2f}x [{low:.2f}, {high:.2f}]"
    result["ours"] = f"{row['bytes'] / times['ours'] / 1e6:.0f} GB/s"
    result["copy"] = f"{row['bytes'] / times['copy'] / 1e6:.0f} GB/s"
    result["share"] = f"{row['ratio']['copy'][0]:.0%}"
    result["peak"] = f"{row['peak_bytes']['ours'] / 2**20:.0f} MiB"
    if "host_us" in row:
        result["host"] = f"{row['host_us']['ours']:.0f} us"
    return result


def command(args, dtype, direction, peers):
    """The line that measures one row again."""
    options = [f"--device {args.device}"] if args.device != "cpu" else []
    options += [f"--dtype {dtype}", f"--direction {direction}"]
    defaults = {"batch": 8, "patches": 2520, "hidden": 768, "rows": 10240, "ids": "grid"}
    for name, default in (defaults | {"rounds": 30}).items():
        if getattr(args, name) != default:
            options.append(f"--{name} {getattr(args, name)}")
    options += ["--peers", *(peer for peer in peers if peer != "ours")]
    return f'make bench ARGS="{" ".join(options)}"'


def rows_of(kernel, args, dtype_name):
    """Time all peers for one dtype. Returns a row for each direction."""
    dtype = measure.DTYPES[dtype_name]
    position_ids, padding = measure.images(args.batch, args.patches)
    table_shape, activation_shape = (2, args.rows), (args.batch, args.patches)
    weights = ()
    if args.ids == "interpolated":
        position_ids, *weights = measure.interpolated(args.patches, args.rows)
        padding, table_shape, activation_shape = None, (args.rows,), (args.patches,)
    elif args.ids == "random":
        position_ids.random_(0, args.rows)
    elif args.ids == "single":
        position_ids.zero_()
    on_gpu = args.device == "cuda"
    table = torch.randn(*table_shape, args.hidden, dtype=dtype, requires_grad=True)
    residual = torch.randn(*activation_shape, args.hidden, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(residual)
    arguments = (position_ids, table, padding, residual, *weights)

    torch._dynamo.reset()
    ours = measure.fused(kernel)
    peers = {
        "eager": measure.eager,
        "torch.compile": torch.compile(measure.eager),
        "embedding_bag": measure.embedding_bag,
        "one-hot": measure.one_hot,
    }
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    # Half of what is free: its backward wants as much again.
    if weights:
        del peers["one-hot"]
    elif 2 * measure.one_hot_bytes(args.batch, args.patches, args.rows, dtype) > free:
        print("one-hot: doesn't fit in memory, not measured")
        del peers["one-hot"]
    peers = {"ours": ours} | {n: p for n, p in peers.items() if not args.peers or n in args.peers}
    expected = measure.eager(*arguments)
    for peer in peers.values():  # the peers round in other places than eager does, we don't
        atol = 0 if peer is ours else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(peer(*arguments), expected, rtol=atol, atol=atol)

    if weights:
        distinct = len(position_ids.unique())
    else:
        distinct = sum(len(position_ids[..., axis].unique()) for axis in range(2))
    ids_bytes = sum(t.nbytes for t in (position_ids, padding, *weights) if t is not None)
    bytes_moved = {
        "forward": 2 * residual.nbytes + ids_bytes + distinct * args.hidden * dtype.itemsize,
        "backward": grad.nbytes + table.nbytes + ids_bytes,
    }

    def forward(peer):
        with torch.no_grad():
            return measure.timed(lambda: peer(*arguments), on_gpu)

    def backward(peer):
        out = peer(*arguments)
        return measure.timed(lambda: torch.autograd.grad(out, (table, residual), grad), on_gpu)

    @torch.no_grad()
    def inference(peer):
        return peer(*arguments)

    def training(peer):
        return torch.autograd.grad(peer(*arguments), (table, residual), grad)

    rows = []
    for direction in args.direction or bytes_moved:
        run, whole = {"forward": (forward, inference), "backward": (backward, training)}[direction]
        source = torch.ones(bytes_moved[direction] // 2, dtype=torch.uint8)
        target = torch.empty_like(source)
        measurements = {name: lambda peer=peer: run(peer) for name, peer in peers.items()}  # noqa: B023
        measurements["copy"] = lambda: measure.timed(lambda: target.copy_(source), on_gpu)  # noqa: B023
        label = f"{direction} {dtype_name}"
        row = measure.origin(kernel, command(args, dtype_name, direction, peers)) | {
            "shape": {
                key: getattr(args, key) for key in ("batch", "patches", "hidden", "rows", "ids")
            },
            "dtype": dtype_name,
            "direction": direction,
            "rounds": args.rounds,
            "bytes": bytes_moved[direction],
            **measure.summary(measure.interleaved(measurements, args.rounds, label)),
            "peak_bytes": {
                name: measure.peak_bytes(lambda peer=peer: whole(peer), on_gpu)  # noqa: B023
                for name, peer in peers.items()
            },
        }
        if on_gpu and direction == "forward":
            x, rows_of_x = position_ids[..., 0].clamp(min=0), table if weights else table[0]
            calls = {name: lambda peer=peer: peer(*arguments) for name, peer in peers.items()}
            calls["one F.embedding"] = lambda x=x, w=rows_of_x: F.embedding(x, w)
            with torch.no_grad():
                row["host_us"] = {name: host_microseconds(call) for name, call in calls.items()}
        rows.append(row)
    return rows


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


if __name__ == "__main__":
    main()
