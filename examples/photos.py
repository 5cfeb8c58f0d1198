"""The vision towers of Gemma 4 and Qwen3-VL on real photos, before and after the kernel is swapped in.

    python examples/photos.py                        # two photos that scikit-image ships
    python examples/photos.py photo.jpg --plot demo.png

The photos go through transformers' own image processors and vision towers, at their real sizes.
Their weights are random: nothing is downloaded. What is compared is the output of the towers, for
the first photo, and the time and the memory of the step that the kernel replaces, for all of them.
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
from typing import NamedTuple

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SKIMAGE = Path(importlib.util.find_spec("skimage").origin).parent
PHOTOS = [SKIMAGE / "data" / name for name in ("astronaut.png", "coffee.png")]
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
BUILDS = {"cuda": "torch*-cu[0-9]*-*", "mps": "torch*-metal-*", "cpu": "torch*-cpu-*"}
ROUNDS = 20


class Result(NamedTuple):
    """What is shown of a tower."""

    model: str
    step: str  # what the kernel replaces
    grids: list  # width and height of each photo, in patches
    equal: bool  # are the outputs of the tower and of the step, before and after
    seconds: float  # that transformers' own tower takes for the first photo
    parts: dict  # {part: (times before, times after)}
    whole: tuple  # the same of the step as one
    memory: dict  # {way: bytes at the step's peak, or None}, the last of them ours
    output: int  # bytes of the step's result


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, imports included
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("photos", nargs="*", type=Path, default=PHOTOS, help="image files")
    parser.add_argument("--device", choices=BUILDS, help="default: the best there is")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16, if that is fast there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also write a picture")
    args = parser.parse_args()
    photos = [read(path) for path in args.photos]

    step("Loading PyTorch and transformers")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
    logging.disable(logging.WARNING)  # of packages that transformers imports where it finds them
    import kernels
    import torch

    device = torch.device(choose_device(args.device))
    dtype = choose_dtype(args.dtype, device)
    # A local build has no Hub repository, so the kernel comes from the variant that was built for this device.
    backend = "metal" if device.type == "mps" else device.type
    kernel = kernels.get_local_kernel(ROOT, backend=backend)
    print(f"  {kernel.__name__}, {dtype} on {device}")

    results = []
    for tower in (gemma4, qwen3_vl):
        torch.manual_seed(0)
        with torch.inference_mode():
            results.append(tower(photos, kernel, device, dtype))
        report(results[-1])
    if args.plot:
        plot(args.plot, photos, results)
        print(f"\nWrote {args.plot}")
    different = [result.model for result in results if not result.equal]
    if different:
        raise SystemExit(f"error: the outputs of {' and '.join(different)} differ")


def gemma4(photos, kernel, device, dtype):
    """Gemma 4's vision tower: an embedding for each patch's x and one for its y."""
    import kernels
    import torch
    from transformers import Gemma4VisionConfig, Gemma4VisionModel
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
    from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionPatchEmbedder

    step("Gemma 4: preparing the photos with transformers' Gemma4ImageProcessorPil")
    batch = Gemma4ImageProcessorPil()(photos, return_tensors="pt")
    pixel_values = batch["pixel_values"].to(device)
    position_ids = batch["image_position_ids"].to(device)
    padding = (position_ids == -1).all(-1)
    arguments = pixel_values, position_ids, padding
    grids = [(ids.amax(dim=0) + 1).tolist() for ids in position_ids]

    model = build(Gemma4VisionModel, Gemma4VisionConfig(), device, dtype)
    show_layers(model.encoder.layers)
    original = model.patch_embedder
    table = torch.nn.init.normal_(original.position_embedding_table)
    kernels.replace_kernel_forward_from_hub(Gemma4VisionPatchEmbedder, "Gemma4VisionPatchEmbedder")
    ours = swapped(original, kernel, device)

    first = pixel_values[:1], position_ids[:1]
    before, seconds = timed("transformers' own code", model, *first)
    model.patch_embedder = ours
    after, _ = timed("the kernel", model, *first)

    scaled = (2 * (pixel_values - 0.5)).to(dtype)
    patches = original.input_proj(scaled)
    parts = {
        "scaling the pixels": (
            lambda: (2 * (pixel_values - 0.5)).to(dtype),
            lambda: kernel.scale_pixels(pixel_values, dtype),
        ),
        "projection": (lambda: original.input_proj(scaled),) * 2,
        "lookup, masked and added": (
            lambda: patches + original._position_embeddings(position_ids, padding),
            lambda: kernel.fused_embedding_lookup(
                position_ids, table, padding=padding, residual=patches
            ),
        ),
    }
    whole = (lambda: original(*arguments), lambda: ours(*arguments))
    one_hot = position_ids.numel() * table.shape[1] * (torch.int64.itemsize + dtype.itemsize)
    return Result(
        "Gemma 4",
        "patch embedder",
        grids,
        torch.equal(before.last_hidden_state, after.last_hidden_state)
        and torch.equal(whole[0](), whole[1]()),
        seconds,
        *measure(parts, whole, device),
        {
            "transformers up to 5.9 (one-hot; not run)": one_hot,
            "transformers 5.10 and later": peak_memory(whole[0], device),
            "this kernel": peak_memory(whole[1], device),
        },
        patches.nbytes,
    )


def qwen3_vl(photos, kernel, device, dtype):
    """Qwen3-VL's vision tower: four embeddings for each patch, weighted."""
    import torch
    from transformers import Qwen3VLVisionConfig, Qwen3VLVisionModel
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    sys.path.append(str(ROOT / "upstream"))
    import patched

    step("Qwen3-VL: preparing the photos with transformers' Qwen2VLImageProcessorPil")
    config = Qwen3VLVisionConfig()
    processor = Qwen2VLImageProcessorPil(
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.spatial_merge_size,
    )
    batch = processor(photos, return_tensors="pt")
    pixel_values = batch["pixel_values"].to(device, dtype)
    grid = batch["image_grid_thw"].to(device)
    grids = [(width, height) for _, height, width in grid.tolist()]

    model = build(Qwen3VLVisionModel, config, device, dtype)
    show_layers(model.blocks)
    first = pixel_values[: grid[0].prod()], grid[:1]
    before, seconds = timed("transformers' own code", model, *first)
    step(
        "Applying upstream/qwen3_vl-transformers-5.22.patch, which transformers needs for this tower"
    )
    patched.patch_tower(model)
    original = model.add_pos_embed
    model.add_pos_embed = ours = swapped(original, kernel, device)
    after, _ = timed("the kernel", model, *first)

    patches = model.patch_embed(pixel_values)
    table = model.pos_embed
    options = {
        "mode": original.interpolation_mode,
        "align_corners": original.interpolation_align_corners,
        "spatial_merge_size": original.spatial_merge_size,
        "num_patches": len(patches),
    }
    side = original.num_grid_per_side
    eager_indices_and_weights = patched.modeling(
        "qwen3_vl"
    ).get_vision_interpolation_indices_and_weights
    indices, weights = eager_indices_and_weights(grid, side, **options)
    parts = {
        "ids and weights": (
            lambda: eager_indices_and_weights(grid, side, **options),
            lambda: kernel.vision_interpolation_indices_and_weights(grid, side, **options),
        ),
        "lookup, weighted and added": (
            lambda: patches + (table(indices) * weights[:, :, None]).sum(1).to(dtype),
            lambda: kernel.fused_embedding_lookup(
                indices, table.weight, weights=weights, residual=patches
            ),
        ),
    }
    whole = (lambda: original(patches, table, grid), lambda: ours(patches, table, grid))
    return Result(
        "Qwen3-VL",
        "position embedding",
        grids,
        torch.equal(before.pooler_output, after.pooler_output)
        and torch.equal(whole[0](), whole[1]()),
        seconds,
        *measure(parts, whole, device),
        {
            "transformers": peak_memory(whole[0], device),
            "this kernel": peak_memory(whole[1], device),
        },
        patches.nbytes,
    )


def build(cls, config, device, dtype):
    """A vision tower at its real size."""
    step(f"Building {cls.__name__} at its real size (random weights, no download)")
    model = cls(config).to(device, dtype).eval()
    print(f"  {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
    return model


def swapped(original, kernel, device):
    """A module that shares the original's weights, so that the two can take turns, with the kernel's forward."""
    from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping

    name = type(original).kernel_layer_name
    step(f"Swapping in the layer {name} with kernels.kernelize")
    # With the kernel on the Hub this is LayerRepository(repo, layer_name=name, version=1).
    repository = LocalLayerRepository(Path(kernel.__file__).parent, layer_name=name)
    ours = copy.copy(original)
    with use_kernel_mapping({name: {device.type: repository}}, inherit_mapping=False):
        # The whole `model` would do, and warn of each layer that no mapping names.
        kernelize(ours, mode=Mode.INFERENCE, device=device.type)
    print(f"  {ours.forward.__func__.__module__}")
    return ours


def timed(code, model, *arguments):
    """The tower's output and the seconds it took, once."""
    import torch

    step(f"Running the tower on the first photo with {code}")
    synchronize = getattr(torch, arguments[0].device.type).synchronize  # nothing on the CPU
    synchronize()
    start = time.perf_counter()
    output = model(*arguments)
    synchronize()
    return output, time.perf_counter() - start


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


def choose_dtype(wanted, device):
    """The dtype asked for; else bfloat16, unless it is slow there, as on a CPU without instructions for it."""
    import torch

    if wanted or device.type != "cpu":
        return getattr(torch, DTYPES[wanted or "bf16"])

    def seconds(dtype):
        left, right = torch.randn(128, 1024, dtype=dtype), torch.randn(1024, 512, dtype=dtype)
        left @ right
        start = time.perf_counter()
        left @ right
        return time.perf_counter() - start

    ratio = seconds(torch.bfloat16) / seconds(torch.float32)
    if ratio < 2:
        return torch.bfloat16
    print(f"  not in bf16: this CPU multiplies matrices {ratio:.0f} times faster in fp32")
    return torch.float32


def step(message):
    print(f"{message} ...", flush=True)


def progress(done, total, what):
    """A line that overwrites itself, where somebody looks on."""
    if sys.stdout.isatty():
        print(f"\r  {what} {done} of {total}\033[K", end="\r\033[K" if done == total else "")
        sys.stdout.flush()


def show_layers(layers):
    """Have each layer of a tower say that it is done: on a CPU the whole takes many seconds."""
    for number, layer in enumerate(layers, 1):
        layer.register_forward_hook(
            lambda *_, number=number: progress(number, len(layers), "layer")
        )


def measure(parts, whole, device):
    """The times of the parts and of the whole, each before and after, in seconds, a list of the rounds'.

    All take turns; the first round warms up.
    """
    import torch

    step(f"Timing the step and its parts, before and after, in {ROUNDS} rounds")
    synchronize = getattr(torch, device.type).synchronize  # nothing on the CPU
    calls = {(part, i): call for part in parts for i, call in enumerate(parts[part])}
    calls |= {("", i): call for i, call in enumerate(whole)}
    times = {name: [] for name in calls}
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            times[name].append(time.perf_counter() - start)
        progress(number, ROUNDS, "round")
    pairs = {part: tuple(times[part, i][1:] for i in (0, 1)) for part in (*parts, "")}
    return {part: pairs[part] for part in parts}, pairs[""]


def report(result):
    patches = " and ".join(f"{width} x {height}" for width, height in result.grids)
    print(f"\n{result.model}: outputs are torch.equal: {result.equal}\n")
    print_times(f"The {result.step} of {patches} patches", result.parts, result.whole)
    print(f"For scale: transformers' whole tower took {result.seconds:.2f} s for the first photo.")
    print(f"\nPeak memory of the {result.step}, on top of its inputs:")
    for way, size in result.memory.items():
        print(f"  {way:43}{mib(size)}")
    print(f"  {'of this, its result':43}{mib(result.output)}")
    print()


def print_times(title, parts, whole):
    """The parts before and after, each whole beneath them, and whether the parts explain it."""
    sums = [[sum(part) for part in zip(*times)] for times in zip(*parts.values())]
    # Round by round, so that what slows a whole round down doesn't count.
    rest = [[w - p for w, p in zip(*pair)] for pair in zip(whole, sums)]
    spread = [statistics.quantiles(values, n=4) for values in rest]

    def row(name, columns):
        cells = [f"{statistics.median(column) * 1e3:18.2f} ms" for column in columns]
        print(f"  {name:30}" + "".join(cells))

    print(f"{title}, medians of {ROUNDS} rounds:")
    print(f"  {'':30}{'transformers':>21}{'this kernel':>21}")
    for part, times in parts.items():
        row(part, times)
    row("these parts together", sums)
    row("the whole, measured as one", whole)
    ranges = [f"{f'{low * 1e3:.2f} to {high * 1e3:.2f}':>18} ms" for low, _, high in spread]
    print(f"  {'whole less parts':30}{''.join(ranges)}    in half the rounds")
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


def plot(path, photos, results):
    """The photos under each tower's grid of patches; beside them the time and the memory of the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = 3.6 * len(photos) + 9, 3.6 * len(results)
    figure, rows = pyplot.subplots(len(results), len(photos) + 2, figsize=size, squeeze=False)
    for axes, result in zip(rows, results):
        for axis, photo, (width, height) in zip(axes, photos, result.grids):
            axis.imshow(photo, extent=(0, width, height, 0), aspect="equal")
            axis.set_xticks(range(width + 1), minor=True)
            axis.set_yticks(range(height + 1), minor=True)
            axis.grid(which="minor", color="white", linewidth=0.3)
            axis.set_title(f"{result.model}: {width} x {height} patches")
        times = {
            name: statistics.median(values) * 1e3
            for name, values in zip(("transformers", "this kernel"), result.whole)
        }
        memory = {
            way.partition(" (")[0]: size / 2**20
            for way, size in result.memory.items()
            if size is not None
        }
        for axis, bars, unit in zip(axes[-2:], (times, memory), ("ms", "MiB")):
            drawn = axis.barh(list(bars), list(bars.values()), color="#4c72b0")
            axis.bar_label(drawn, fmt=f" %.1f {unit}")
            axis.invert_yaxis()
            axis.margins(x=0.5)
        axes[-2].set_title(f"{result.step}: time")
        axes[-1].set_title("peak memory")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
