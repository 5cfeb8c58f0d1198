"""The interpolated position embedding of the Qwen3-VL family: ids, weights, lookup and addition.

    python benchmarks/interpolated.py
    python benchmarks/interpolated.py --patches 16384 --dtype bf16 --json out.json
    python benchmarks/interpolated.py --tower    # what share of a whole vision forward it is

Eager is the code of transformers 5.22.2; ours are the two ops that the layer calls. Both take turns, on one
square image, H = 1152 and a table of 48 x 48, as the models have. `launches` counts the ops that do
something on the device: what PyTorch dispatches, less views. The tower is Qwen3-VL's vision model at its real
size with random weights; before, it is transformers' own, and after, patched and with our layer.
"""

import argparse
import sys
import time
from pathlib import Path

import measure
import numpy as np
import torch
from tabulate import tabulate
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

HIDDEN, SIDE = 1152, 48
OPTIONS = {"mode": "bilinear", "align_corners": True, "spatial_merge_size": 2}


class Launches(TorchDispatchMode):
    """Counts ops, but for those that return a view."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def eager(hidden_states, table, grid):
    indices, weights = get_vision_interpolation_indices_and_weights(grid, SIDE, **OPTIONS)
    embeddings = (torch.nn.functional.embedding(indices, table) * weights[:, :, None]).sum(1)
    return hidden_states + embeddings.to(hidden_states.dtype)


def fused(kernel):
    def ours(hidden_states, table, grid):
        indices, weights = kernel.vision_interpolation_indices_and_weights(
            grid, SIDE, num_patches=hidden_states.shape[0], **OPTIONS
        )
        return kernel.fused_embedding_lookup(
            indices,
            table,
            weights=weights,
            residual=hidden_states,
            embedding_dtype=hidden_states.dtype,
        )

    return ours


@torch.no_grad()
def measure_step(kernel, args, patches, dtype):
    side = int(patches**0.5)
    grid = torch.tensor([[1, side, side]])
    arguments = (
        torch.randn(side * side, HIDDEN, dtype=measure.DTYPES[dtype]),
        torch.randn(SIDE * SIDE, HIDDEN, dtype=measure.DTYPES[dtype]),
        grid,
    )
    peers = {"eager": eager, "ours": fused(kernel)}
    assert torch.equal(*(function(*arguments) for function in peers.values()))
    launches = {}
    for name, function in peers.items():
        with Launches() as ops:
            function(*arguments)
        launches[name] = ops.count
    times = measure.interleaved(
        {
            name: lambda function=function: measure.timed(
                lambda: function(*arguments), args.device == "cuda"
            )
            for name, function in peers.items()
        },
        args.rounds,
        f"{patches} {dtype}",
    )
    options = f"--patches {patches} --dtype {dtype} --rounds {args.rounds} --device {args.device}"
    return measure.origin(kernel, f"python benchmarks/interpolated.py {options}") | {
        "patches": side * side,
        "dtype": dtype,
        "launches": launches,
        **measure.summary(times),
    }


class Clock:
    """The time that is spent in the step within a forward, in seconds."""

    def __init__(self):
        self.total = 0.0

    def start(self, *_):
        self.started = time.perf_counter()

    def stop(self, *_):
        self.total += time.perf_counter() - self.started

    def around(self, function):
        def timed(*args, **kwargs):
            self.start()
            result = function(*args, **kwargs)
            self.stop()
            return result

        return timed


@torch.no_grad()
def measure_tower(kernel, args, patches, dtype):
    """On the CPU: the step lies between the patch projection and the rotary embedding, and in the function."""
    sys.path.append(str(measure.ROOT / "upstream"))
    import patched

    tower = modeling_qwen3_vl.Qwen3VLVisionModel
    original = tower(tower.config_class()).to(measure.DTYPES[dtype]).eval()
    torch.nn.init.normal_(original.pos_embed.weight)
    models = {"before": original, "ours": patched.patch_tower(original)}
    layer = kernel.layers.VisionInterpolatedPositionEmbedding
    measure.swap(models["ours"].add_pos_embed, layer.forward)
    clocks = {name: Clock() for name in models}
    for name, model in models.items():
        model.patch_embed.register_forward_hook(clocks[name].start)
        model.rotary_pos_emb.register_forward_pre_hook(clocks[name].stop)
    function = get_vision_interpolation_indices_and_weights
    setattr(modeling_qwen3_vl, function.__name__, clocks["before"].around(function))
    side = int(patches**0.5)
    grid, pixels = torch.tensor([[1, side, side]]), torch.randn(side * side, 3 * 2 * 16 * 16)
    pixels = pixels.to(measure.DTYPES[dtype])
    times, steps = ({name: [] for name in models} for _ in range(2))
    for number in range(-1, args.rounds):
        for name, model in models.items():
            clocks[name].total = 0.0
            seconds = measure.timed(lambda model=model: model(pixels, grid))
            if number >= 0:
                times[name].append(seconds)
                steps[name].append(clocks[name].total)
    options = f"--tower --patches {patches} --dtype {dtype} --rounds {args.rounds}"
    return measure.origin(kernel, f"python benchmarks/interpolated.py {options}") | {
        "patches": side * side,
        "dtype": dtype,
        **measure.summary(times),
        "step_ms": {n: float(f"{np.median(t) * 1e3:.4g}") for n, t in steps.items()},
        "share": {
            name: float(f"{np.median(np.divide(steps[name], times[name])):.4g}") for name in models
        },
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--patches", type=int, action="append", help="default: 4096")
    parser.add_argument("--dtype", choices=measure.DTYPES, action="append", help="default: bf16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tower", action="store_true", help="a whole vision forward (CPU)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers")
    args = parser.parse_args()

    torch.set_default_device(args.device)
    kernel = measure.load_kernel(args.device)
    measurement = measure_tower if args.tower else measure_step
    rows = [
        measurement(kernel, args, patches, dtype)
        for patches in args.patches or [4096]
        for dtype in args.dtype or ["bf16"]
    ]
    table = [
        {"patches": row["patches"], "dtype": row["dtype"], "": name, "ms": row["median_ms"][name]}
        | {"quartiles": "{} to {}".format(*row["quartiles_ms"][name])}
        | ({"launches": row["launches"][name]} if "launches" in row else {})
        | ({"step (ms)": row["step_ms"][name]} if "share" in row else {})
        | ({"share": f"{row['share'][name]:.3%}"} if "share" in row else {})
        | {"time / ours": row["ratio"].get(name, [1])[0]}
        for row in rows
        for name in row["median_ms"]
    ]
    print(tabulate(table, headers="keys", tablefmt="simple_outline"))
    if args.json:
        measure.write(args.json, rows)


if __name__ == "__main__":
    main()
