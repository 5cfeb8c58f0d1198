"""How the cost grows: with N, B, H, P and K; and what a call costs the host before there is any work.

    make scaling
    make scaling ARGS="--json benchmarks/results/scaling.json"

Each sweep changes one of the sizes and leaves the others at one image of Gemma 4 E2B. For N the first
size that takes twice as long as a single token is printed: up to there, a call's own cost is what is
paid. The breakdown calls the op on one token of one element, so that next to nothing is computed.
"""

import argparse
from pathlib import Path

import measure
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch.utils.benchmark import Timer
from tqdm import tqdm

BASE = {"batch": 1, "patches": 2520, "hidden": 768, "rows": 10240, "axes": 2}
TOKENS = [1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000]
SWEEPS = {
    "N, H=64": [BASE | {"patches": n, "hidden": 64} for n in TOKENS],
    "N": [BASE | {"patches": n} for n in TOKENS],
    "B": [BASE | {"batch": b} for b in (1, 2, 4, 8, 16, 32)],
    "H": [BASE | {"hidden": h} for h in (64, 128, 256, 768, 1152, 2304, 3840)],
    "P": [BASE | {"rows": p} for p in (128, 1024, 10240, 65_536, 262_144)],
    "K": [BASE | {"axes": k} for k in (1, 2, 3, 4)],
    # The ids of a language model, and audio codebooks: nothing grows with a product of sizes.
    "N, all of P=262,144, H=64": [
        BASE | {"patches": n, "rows": 262_144, "hidden": 64, "axes": 1, "distinct": 262_144}
        for n in (1000, 10_000, 100_000, 1_000_000)
    ],
    "K, all of P=2,050, H=1,024": [
        BASE | {"rows": 2050, "hidden": 1024, "axes": k, "distinct": 2050} for k in (1, 4, 16, 64)
    ],
}
AXES = {"N": "patches", "B": "batch", "H": "hidden", "P": "rows", "K": "axes"}  # a sweep's size
ROUNDS = 15
CALLS = 1000  # between two looks at the clock, for the breakdown


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", choices=[*SWEEPS, "call"], action="append", help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers")
    args = parser.parse_args()

    kernel = measure.load_kernel()
    rows = []
    for sweep in args.sweep or [*SWEEPS, "call"]:
        origin = measure.origin(kernel, f"make scaling ARGS=\"--sweep '{sweep}'\"")
        if sweep == "call":
            rows.append(origin | {"sweep": sweep, **host_breakdown(kernel)})
            print_breakdown(rows[-1])
            continue
        taken = [
            origin | {"sweep": sweep, "shape": shape, "dtype": "bf16", **times}
            for shape in tqdm(SWEEPS[sweep], desc=f"sweep of {sweep}", unit="size")
            for times in measure_shape(kernel, shape)
        ]
        print_sweep(sweep, taken)
        rows += taken
    if args.json:
        measure.write(args.json, rows)


def measure_shape(kernel, shape):
    """Ours and eager, for one set of sizes. Yields the times of each direction."""
    batch, patches, axes = shape["batch"], shape["patches"], shape["axes"]
    # Unless told otherwise as images have them: few distinct ids, each many times.
    distinct = shape.get("distinct", min(60, shape["rows"]))
    position_ids = torch.randint(0, distinct, (batch, patches, axes))
    padding = torch.zeros(batch, patches, dtype=torch.bool)
    table = torch.randn(axes, shape["rows"], shape["hidden"]).bfloat16().requires_grad_()
    residual = torch.randn(batch, patches, shape["hidden"], dtype=torch.bfloat16)
    grad = torch.randn_like(residual)
    peers = {"ours": measure.fused(kernel), "eager": measure.eager}

    def forward(peer):
        with torch.no_grad():
            return measure.timed(lambda: peer(position_ids, table, padding, residual))

    def backward(peer):
        out = peer(position_ids, table, padding, residual)
        return measure.timed(lambda: torch.autograd.grad(out, table, grad))

    for direction, run in {"forward": forward, "backward": backward}.items():
        measurements = {name: lambda peer=peer: run(peer) for name, peer in peers.items()}  # noqa: B023
        times = measure.interleaved(measurements, ROUNDS, direction)
        yield {"direction": direction, **measure.summary(times, "us")}


def doubled(axis, rows):
    """The first size that takes us twice as long as the smallest one does."""
    least = rows[0]["median_us"]["ours"]
    sizes = [row["shape"][axis] for row in rows if row["median_us"]["ours"] >= 2 * least]
    return f"{sizes[0]:,}" if sizes else "none here"


def print_sweep(sweep, rows):
    axis = AXES[sweep[0]]
    for direction in ("forward", "backward"):
        of_direction = [row for row in rows if row["direction"] == direction]
        table = [
            {
                sweep: f"{row['shape'][axis]:,}",
                "ours (us)": row["median_us"]["ours"],
                "eager (us)": row["median_us"]["eager"],
                "vs eager": "{:.2f}x [{:.2f}, {:.2f}]".format(*row["ratio"]["eager"]),
            }
            for row in of_direction
        ]
        print(f"{direction}, bf16, the rest as in B=1 N=2520 H=768 P=10240 K=2")
        print(tabulate(table, headers="keys", tablefmt="simple_outline"))
        if axis == "patches":
            print(f"Twice the time of one token is reached at N = {doubled(axis, of_direction)}.\n")


def host_breakdown(kernel):
    """What a call costs with next to nothing to compute, and with less and less of the way to it."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    table = torch.randn(2, 1, 1)
    names = {
        "function": kernel.fused_embedding_lookup,
        "op": kernel.op.ops.forward,
        "overload": kernel.op.ops.forward.default,
        "nothing": kernel.op.ops.cpu_capability.default,
        "embedding": F.embedding,
        "ids": ids,
        "none": ids[:0],
        "no_padding": torch.zeros(0, dtype=torch.bool),
        "no_residual": torch.zeros(0, 1),
        "x": ids[:, 0],
        "table": table,
        "trained": table.clone().requires_grad_(),
        "rows": table[0],
        "residual": torch.randn(1, 1),
        "padding": torch.zeros(1, dtype=torch.bool),
    }
    with torch.inference_mode():  # such tensors skip what is registered for autograd
        names |= {
            f"inference_{name}": names[name].clone()
            for name in ("ids", "table", "padding", "residual")
        }
    all_arguments = "padding=padding, residual=residual"
    statements = {
        "ours": f"function(ids, table, {all_arguments})",
        "recording for autograd": f"function(ids, trained, {all_arguments})",
        "no_grad, a table that is trained": f"function(ids, trained, {all_arguments})",
        "the op, without the function": "op(ids, table, None, padding, residual, None, None)",
        "its overload": "overload(ids, table, None, padding, residual, None, None)",
        "its overload, no tokens (checks, no launch)": (
            "overload(none, table, None, no_padding, no_residual, None, None)"
        ),
        "its overload, inference tensors (no autograd layer)": (
            "overload(inference_ids, inference_table, None, inference_padding, inference_residual, None, None)"
        ),
        "an op of ours that only returns a string": "nothing()",
        "one F.embedding": "embedding(x, rows)",
    }
    threads = torch.get_num_threads()

    def seconds(name, statement):
        timer = Timer(statement, globals=names, num_threads=threads)
        with torch.set_grad_enabled(not name.startswith("no_grad")):
            return timer.timeit(CALLS).median

    measurements = {
        name: lambda name=name, statement=statement: seconds(name, statement)
        for name, statement in statements.items()
    }
    times = measure.interleaved(measurements, ROUNDS, "a call's cost")
    return {"statements": statements, **measure.summary(times, "us")}


def print_breakdown(row):
    table = [
        {
            "": name,
            "us": row["median_us"][name],
            "quartiles": "{} to {}".format(*row["quartiles_us"][name]),
            "statement": statement,
        }
        for name, statement in row["statements"].items()
    ]
    print("A call with one token of one element")
    print(tabulate(table, headers="keys", tablefmt="simple_outline"))


if __name__ == "__main__":
    main()
