"""Gemma 4's vision tower on real photos, before and after the kernel is swapped in.

    python examples/gemma4_vision.py                        # two photos that scikit-image ships
    python examples/gemma4_vision.py photo.jpg --plot demo.png

The photos go through transformers' own Gemma 4 image processor and the vision tower at its real
size. Its weights are random: nothing is downloaded. What is compared is the output, the time and
the memory of the patch embedder, the part that the kernel replaces.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

import kernels
import skimage
import torch
from kernels import LocalLayerRepository, Mode, replace_kernel_forward_from_hub, use_kernel_mapping
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from transformers import Gemma4VisionConfig, Gemma4VisionModel
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionPatchEmbedder

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = [Path(skimage.__file__).parent / "data" / name for name in ("astronaut.png", "coffee.png")]
LAYER = "Gemma4VisionPatchEmbedder"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("photos", nargs="*", type=Path, default=PHOTOS, help="image files")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also write a picture")
    args = parser.parse_args()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        if any((ROOT / "build").glob("torch*-cu*")):
            device = torch.device("cuda")
        else:
            print(
                "There is a GPU, but build/ has no CUDA variant of the kernel: running on the CPU."
            )
    dtype = DTYPES[args.dtype]

    step("Preparing the photos with transformers' Gemma4ImageProcessorPil")
    photos = [Image.open(path).convert("RGB") for path in args.photos]
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
    embedder = model.patch_embedder
    torch.nn.init.normal_(embedder.position_embedding_table)
    print(
        f"  {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {args.dtype}, {device}"
    )

    def embed():
        return embedder(pixel_values, position_ids, padding)

    def project():
        return embedder.input_proj((2 * (pixel_values - 0.5)).to(dtype))

    step("Running transformers' own code")
    with torch.inference_mode():
        before = model(pixel_values, position_ids).last_hidden_state
        before_memory = peak_memory(embed, device)
        before_time = median_time(embed, device)
        projection_time = median_time(project, device)

    step("Swapping in the kernel with kernels.kernelize")
    # A local build has no Hub repository, so the layer comes from the folder of the variant that was
    # built for this device. With the kernel on the Hub this is LayerRepository(repo, version=1).
    kernel = kernels.get_local_kernel(ROOT, backend=device.type)
    repository = LocalLayerRepository(Path(kernel.__file__).parent, layer_name=LAYER)
    replace_kernel_forward_from_hub(Gemma4VisionPatchEmbedder, LAYER)
    with use_kernel_mapping({LAYER: {device.type: repository}}, inherit_mapping=False):
        # The whole `model` would do, and warn of each layer that no mapping names.
        kernels.kernelize(embedder, mode=Mode.INFERENCE, device=device.type)
    print(f"  {embedder.forward.__func__.__module__}")

    step("Running with the kernel")
    with torch.inference_mode():
        after = model(pixel_values, position_ids).last_hidden_state
        after_memory = peak_memory(embed, device)
        after_time = median_time(embed, device)

    batch_size, patches, axes = position_ids.shape
    rows, hidden = embedder.position_embedding_table.shape[1:]
    one_hot = batch_size * axes * patches * rows * (torch.int64.itemsize + dtype.itemsize)
    output = batch_size * patches * hidden * dtype.itemsize

    print(f"""
Outputs of the tower are torch.equal: {torch.equal(before, after)}

Patch embedder, {batch_size} x {patches} patches        time    peak memory
  transformers 5.10 and later (F.embedding)  {before_time * 1e3:7.2f} ms  {mib(before_memory)}
  this kernel                                {after_time * 1e3:7.2f} ms  {mib(after_memory)}
  transformers up to 5.9 (one-hot)               not run  {mib(one_hot)}  (the one-hot alone)

Of the time, {projection_time * 1e3:.2f} ms are the projection of the patches, the same in both. Peak memory is what
the embedder allocates on top of its inputs; its result takes {output / 2**20:.1f} MiB of it.""")
    if not torch.equal(before, after):
        raise SystemExit("error: the outputs differ")
    if args.plot:
        memory = {"one-hot (up to 5.9)": one_hot, "F.embedding (5.10)": before_memory}
        plot(args.plot, photos, position_ids, memory | {"this kernel": after_memory})
        print(f"\nWrote {args.plot}")


def step(message):
    print(f"{message} ...", flush=True)


def mib(size):
    return f"{size / 2**20:8.1f} MiB"


def median_time(function, device, runs=20):
    """The median of `runs` times in seconds, after a warm-up."""
    times = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def peak_memory(function, device):
    """The most bytes that `function` had allocated at any one time."""
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
