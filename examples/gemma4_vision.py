"""Gemma 4's vision tower on real photos, before and after the kernel is swapped in.

    python examples/gemma4_vision.py                        # two photos that scikit-image ships
    python examples/gemma4_vision.py photo.jpg --plot demo.png

The photos go through transformers' own Gemma 4 image processor and the vision tower at its real
size. Its weights are random: nothing is downloaded. What is compared is the output, the time and
the memory of the patch embedder, the part that the kernel replaces.
"""

import argparse
import copy
import importlib.util
import logging
import os
import signal
import statistics
import sys
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SKIMAGE = Path(importlib.util.find_spec("skimage").origin).parent
PHOTOS = [SKIMAGE / "data" / name for name in ("astronaut.png", "coffee.png")]
LAYER = "Gemma4VisionPatchEmbedder"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
BUILDS = {"cuda": "torch*-cu[0-9]*-*", "mps": "torch*-metal-*", "cpu": "torch*-cpu-*"}
ROUNDS = 20


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, imports included
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("photos", nargs="*", type=Path, default=PHOTOS, help="image files")
    parser.add_argument("--device", choices=BUILDS, help="default: the best there is")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also write a picture")
    args = parser.parse_args()
    photos = [read(path) for path in args.photos]

    step("Loading PyTorch and transformers")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
    logging.disable(logging.WARNING)  # of packages that transformers imports where it finds them
    import kernels
    import torch
    from kernels import LocalLayerRepository, Mode
    from transformers import Gemma4VisionConfig, Gemma4VisionModel
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
    from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionPatchEmbedder

    device = torch.device(choose_device(args.device))
    dtype = getattr(torch, DTYPES[args.dtype])

    step("Preparing the photos with transformers' Gemma4ImageProcessorPil")
    batch = Gemma4ImageProcessorPil()(photos, return_tensors="pt")
    pixel_values = batch["pixel_values"].to(device)
    position_ids = batch["image_position_ids"].to(device)
    padding = (position_ids == -1).all(-1)
    for path, ids in zip(args.photos, position_ids):
        width, height = (ids.amax(dim=0) + 1).tolist()
        print(f"  {path.name}: {width} x {height} patches, padded to {len(ids)}")

    step("Building the vision tower at its real size (random weights, no download)")
    torch.manual_seed(0)
    model = Gemma4VisionModel(Gemma4VisionConfig()).to(device, dtype).eval()
    original = model.patch_embedder
    table = torch.nn.init.normal_(original.position_embedding_table)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"  {size:.0f} M parameters, {args.dtype}, {device}")
    show_layers(model)

    step("Swapping in the kernel with kernels.kernelize")
    # A local build has no Hub repository, so the layer comes from the folder of the variant that was
    # built for this device. With the kernel on the Hub this is LayerRepository(repo, version=1).
    backend = "metal" if device.type == "mps" else device.type
    kernel = kernels.get_local_kernel(ROOT, backend=backend)
    repository = LocalLayerRepository(Path(kernel.__file__).parent, layer_name=LAYER)
    kernels.replace_kernel_forward_from_hub(Gemma4VisionPatchEmbedder, LAYER)
    ours = copy.copy(original)  # with the same weights, so that the two can take turns
    with kernels.use_kernel_mapping({LAYER: {device.type: repository}}, inherit_mapping=False):
        # The whole `model` would do, and warn of each layer that no mapping names.
        kernels.kernelize(ours, mode=Mode.INFERENCE, device=device.type)
    print(f"  {ours.forward.__func__.__module__}")

    with torch.inference_mode():
        step("Running the tower with transformers' own code")
        before = model(pixel_values, position_ids).last_hidden_state
        step("Running the tower with the kernel")
        model.patch_embedder = ours
        after = model(pixel_values, position_ids).last_hidden_state

        step(f"Timing both patch embedders and their parts in {ROUNDS} rounds")
        scaled = (2 * (pixel_values - 0.5)).to(dtype)
        patches = original.input_proj(scaled)
        times = measure(
            {
                "scale": lambda: (2 * (pixel_values - 0.5)).to(dtype),
                "project": lambda: original.input_proj(scaled),
                "F.embedding": lambda: (
                    patches + original._position_embeddings(position_ids, padding)
                ),
                "kernel": lambda: kernel.fused_embedding_lookup(
                    position_ids, table, padding=padding, residual=patches
                ),
                "whole, F.embedding": lambda: original(pixel_values, position_ids, padding),
                "whole, kernel": lambda: ours(pixel_values, position_ids, padding),
            },
            device,
        )
        memory = [
            peak_memory(lambda: embedder(pixel_values, position_ids, padding), device)  # noqa: B023
            for embedder in (original, ours)
        ]

    equal = torch.equal(before, after)
    batch_size, length, axes = position_ids.shape
    rows, hidden = table.shape[1:]
    one_hot = batch_size * axes * length * rows * (torch.int64.itemsize + dtype.itemsize)
    output = batch_size * length * hidden * dtype.itemsize
    print(f"\nOutputs of the tower are torch.equal: {equal}\n")
    print_times(f"Patch embedder, {batch_size} x {length} patches", times)
    print(f"""
Peak memory of the patch embedder, on top of its inputs; its result takes {mib(output)} of it:
  transformers up to 5.9 (one-hot)           {mib(one_hot)}, the one-hot alone; not run
  transformers 5.10 and later (F.embedding)  {mib(memory[0])}
  this kernel                                {mib(memory[1])}""")
    if not equal:
        raise SystemExit("error: the outputs differ")
    if args.plot:
        bars = {"one-hot (up to 5.9)": one_hot, "F.embedding (5.10)": memory[0]}
        bars["this kernel"] = memory[1]
        plot(args.plot, photos, position_ids, {k: v for k, v in bars.items() if v is not None})
        print(f"\nWrote {args.plot}")


def read(path):
    """The photo in RGB, or an end with status 2."""
    try:
        return Image.open(path).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        print(f"error: {path} cannot be read as a photo: {reason}", file=sys.stderr)
        raise SystemExit(2) from None


def choose_device(wanted):
    """The device asked for, or the best one. Both the device and a build of the kernel for it are needed."""
    import torch

    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    for name in [wanted] if wanted else there:
        built = any((ROOT / "build").glob(BUILDS[name]))
        if there[name] and built:
            return name
        reason = "build/ has no variant of the kernel for it" if there[name] else "torch sees none"
        if wanted:
            print(f"error: --device {name}: {reason}", file=sys.stderr)
            raise SystemExit(2)
        if there[name]:
            print(f"  not on {name}: {reason}")
    raise SystemExit("error: build/ has no variant of the kernel: run `make build`")


def step(message):
    print(f"{message} ...", flush=True)


def progress(done, total, what):
    """A line that overwrites itself, where somebody looks on."""
    if sys.stdout.isatty():
        print(f"\r  {what} {done} of {total}\033[K", end="\r\033[K" if done == total else "")
        sys.stdout.flush()


def show_layers(model):
    """Have each layer of the tower say that it is done: on a CPU the whole takes many seconds."""
    layers = model.encoder.layers
    for number, layer in enumerate(layers, 1):
        layer.register_forward_hook(
            lambda *_, number=number: progress(number, len(layers), "layer")
        )


def measure(calls, device):
    """The calls' times in seconds, {name: [time in each round]}. They take turns; the first round warms up."""
    import torch

    synchronize = getattr(torch, device.type).synchronize  # nothing on the CPU
    times = {name: [] for name in calls}
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            times[name].append(time.perf_counter() - start)
        progress(number, ROUNDS, "round")
    return {name: values[1:] for name, values in times.items()}


def print_times(title, times):
    """The parts of both embedders, each whole beneath them, and whether the parts explain it."""
    lookups = ("F.embedding", "kernel")
    wholes = [times[f"whole, {lookup}"] for lookup in lookups]
    parts = [
        [sum(part) for part in zip(times["scale"], times["project"], times[lookup])]
        for lookup in lookups
    ]
    # Round by round, so that what slows a whole round down doesn't count.
    rest = [[w - p for w, p in zip(*pair)] for pair in zip(wholes, parts)]
    spread = [statistics.quantiles(values, n=4) for values in rest]

    def row(name, *columns):
        cells = [f"{statistics.median(column) * 1e3:20.2f} ms" for column in columns]
        print(f"  {name:28}" + "".join(cells))

    print(f"{title:30}{'F.embedding':>23}{'this kernel':>23}    medians of {ROUNDS} rounds")
    row("scaling the pixels", times["scale"], times["scale"])
    row("projection", times["project"], times["project"])
    row("lookup, masked and added", *(times[lookup] for lookup in lookups))
    row("these parts together", *parts)
    row("the whole, measured as one", *wholes)
    ranges = [f"{f'{low * 1e3:.2f} to {high * 1e3:.2f}':>20} ms" for low, _, high in spread]
    print(f"  {'whole less parts':28}{''.join(ranges)}    in half the rounds")
    if all(low <= 0 <= high for low, _, high in spread):
        print("The parts add up to the whole, within that spread.")
    else:
        print("The parts don't add up to the whole: on this machine they can't be told apart.")


def mib(size):
    return "not measured" if size is None else f"{size / 2**20:.1f} MiB"


def peak_memory(function, device):
    """The most bytes that `function` had allocated at any one time, or None where nothing counts them."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if device.type == "mps":
        return None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    allocated = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def plot(path, photos, position_ids, memory):
    """The photos under their patch grids, and the memory of each way to place the patches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(photos) + 1, figsize=(4.5 * len(photos) + 5, 4.5))
    for axis, photo, ids in zip(axes, photos, position_ids):
        width, height = (ids.amax(dim=0) + 1).tolist()
        axis.imshow(photo, extent=(0, width, height, 0), aspect="equal")
        axis.set_xticks(range(width + 1), minor=True)
        axis.set_yticks(range(height + 1), minor=True)
        axis.grid(which="minor", color="white", linewidth=0.3)
        axis.set_title(f"{width} x {height} patches of {len(ids)}")
        axis.set_xlabel("x id")
        axis.set_ylabel("y id")
    bars = axes[-1].barh(list(memory), [size / 2**20 for size in memory.values()], color="#4c72b0")
    axes[-1].bar_label(bars, fmt=" %.0f MiB")
    axes[-1].set_xscale("log")
    axes[-1].set_xlim(1, max(memory.values()) / 2**20 * 8)
    axes[-1].set_xlabel("peak memory (MiB, log)")
    axes[-1].set_title("to place these patches")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
