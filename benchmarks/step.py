"""What share of a whole step the lookup is, before and after our layer is swapped in.

    make step
    make step ARGS="--dtype bf16 --json benchmarks/results/step.json"

The step is a forward of Gemma 4 E2B's vision tower, or a LoRA training step of it (PEFT on the attention's
projections; the position table trained too, or frozen), at its real size with random weights, on one image.
The lookup is timed where it is, inside the step: in the forward from the end of the patch projection to
the end of the patch embedder, in the backward from the embedder's gradient to the table's. With a frozen
table the backward has nothing to look up. Before and after take turns.
"""

import argparse
import copy
import time
from pathlib import Path

import measure
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from tqdm import tqdm
from transformers import Gemma4VisionConfig, Gemma4VisionModel

STEPS = ("forward", "LoRA", "LoRA and table")


class Clock:
    """Sums the time between two kinds of events, in seconds."""

    def __init__(self):
        self.total = 0.0

    def start(self, *_):
        self.started = now()

    def stop(self, *_):
        self.total += now() - self.started


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--step", choices=STEPS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], action="append", help="default: both")
    parser.add_argument("--patches", type=int, default=2520)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers")
    args = parser.parse_args()

    torch.set_default_device(args.device)
    kernel = measure.load_kernel(args.device)
    rows = [
        measure_step(kernel, args, step, dtype)
        for step in args.step or STEPS
        for dtype in args.dtype or ["fp32", "bf16"]
    ]
    table = [
        {
            "step": f"{row['step']} {row['dtype']}",
            "": name,
            "whole (ms)": row["median_ms"][name],
            "quartiles": "{} to {}".format(*row["quartiles_ms"][name]),
            "lookup (ms)": row["lookup_ms"][name],
            "share": f"{row['share'][name]:.3%}",
        }
        for row in rows
        for name in ("before", "ours")
    ]
    print(tabulate(table, headers="keys", tablefmt="simple_outline"))
    if args.json:
        measure.write(args.json, rows)


def measure_step(kernel, args, step, dtype):
    torch.manual_seed(0)
    position_ids, _ = measure.images(1, args.patches)
    pixels = torch.rand(1, args.patches, 768)
    original = Gemma4VisionModel(Gemma4VisionConfig()).to(measure.DTYPES[dtype])
    torch.nn.init.normal_(original.patch_embedder.position_embedding_table)
    models = {"before": original, "ours": copy.deepcopy(original)}
    layer = kernel.layers.Gemma4VisionPatchEmbedder
    measure.swap(models["ours"].patch_embedder, layer.forward)

    clocks, steps = {}, {}
    for name, model in models.items():
        embedder, clocks[name] = model.patch_embedder, Clock()
        embedder.input_proj.register_forward_hook(clocks[name].start)
        embedder.register_forward_hook(clocks[name].stop)
        if step == "forward":
            model.eval()
            steps[name] = lambda model=model: forward(model, pixels, position_ids)
            continue
        trained = step == "LoRA and table"
        model = get_peft_model(
            model, LoraConfig(target_modules=r".*self_attn\.[qkvo]_proj.*linear")
        )
        embedder.position_embedding_table.requires_grad_(trained)
        if trained:
            time_backward(embedder, clocks[name])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        model.train()
        steps[name] = lambda model=model, optimizer=optimizer: train(
            model, optimizer, pixels, position_ids
        )

    times = {name: [] for name in models}
    lookups = {name: [] for name in models}
    for number in tqdm(range(-1, args.rounds), desc=f"{step} {dtype}", unit="round"):
        for name, run in steps.items():
            clocks[name].total = 0.0
            started = now()
            run()
            if number >= 0:
                times[name].append(now() - started)
                lookups[name].append(clocks[name].total)
    options = f"--device {args.device} --step '{step}' --dtype {dtype}"
    options += f" --patches {args.patches} --rounds {args.rounds}"
    return measure.origin(kernel, f'make step ARGS="{options}"') | {
        "step": step,
        "dtype": dtype,
        "patches": args.patches,
        "rounds": args.rounds,
        **measure.summary(times),
        "lookup_ms": {n: float(f"{np.median(t) * 1e3:.4g}") for n, t in lookups.items()},
        "share": {
            name: float(f"{np.median(np.divide(lookups[name], times[name])):.4g}")
            for name in models
        },
    }


def time_backward(embedder, clock):
    def from_the_gradient(module, arguments, output):
        output.register_hook(clock.start)

    embedder.register_forward_hook(from_the_gradient)
    embedder.position_embedding_table.register_post_accumulate_grad_hook(clock.stop)


def now():
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def forward(model, pixels, position_ids):
    model(pixels, position_ids)


def train(model, optimizer, pixels, position_ids):
    model(pixels, position_ids).last_hidden_state.float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    main()
