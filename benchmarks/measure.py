"""What the scripts here share: the peers, their inputs, interleaved timing, and rows of results.

A row is one measurement as JSON: the command that repeats it, when, of which commit and where it was
taken, and for each peer the median and quartiles of its times, the peak of its memory, and the ratio
of its time to ours. A ratio is taken in every round, between two times that are milliseconds apart; its
median is given with a 95% interval, bootstrapped.
"""

import json
import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from types import MethodType

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

import kernels
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import bootstrap
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = 3  # rounds
SLOW = 0.5  # seconds


# ----- the peers ----------------------------------------------------------------------------------


def load_kernel(device="cpu"):
    return kernels.get_local_kernel(ROOT, backend=device)


def fused(kernel):
    """Ours, with the peers' signature."""

    def ours(position_ids, table, padding, residual, weights=None):
        return kernel.fused_embedding_lookup(
            position_ids, table, weights=weights, padding=padding, residual=residual
        )

    return ours


def eager(position_ids, table, padding, residual, weights=None):
    """transformers since 5.10: Gemma 4, or with weights the Qwen3-VL family."""
    if weights is not None:
        embedding = (F.embedding(position_ids, table) * weights[:, :, None]).sum(1)
        return residual + embedding.to(residual.dtype)
    embedding = None
    for axis, ids in enumerate(position_ids.clamp(min=0).unbind(-1)):
        term = F.embedding(ids, table[axis])
        embedding = term if embedding is None else embedding + term
    return residual + torch.where(padding.unsqueeze(-1), 0.0, embedding)


def embedding_bag(position_ids, table, padding, residual, weights=None):
    """All axes in one lookup of PyTorch's own fused lookup-and-sum, which rounds the weights."""
    if weights is not None:
        weights = weights.to(table.dtype)
        bags = F.embedding_bag(position_ids, table, per_sample_weights=weights, mode="sum")
        return residual + bags
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


def one_hot_bytes(batch, patches, rows, dtype, axes=2):
    """The one-hot of the ids, and its copy in the table's dtype."""
    return batch * patches * axes * rows * (torch.int64.itemsize + dtype.itemsize)


def swap(module, forward):
    """What kernels.kernelize does with a layer: its forward on the module that is there."""
    module.forward = MethodType(forward, module)


# ----- their inputs -------------------------------------------------------------------------------


def images(batch, patches):
    """Ids and padding of images of 3 : 2 that fill 20/21 of `patches`, as 60 x 40 does of 2520."""
    unit = int((patches * 20 / 21 / 6) ** 0.5)
    x, y = torch.meshgrid(torch.arange(3 * unit), torch.arange(2 * unit), indexing="xy")
    position_ids = torch.full((batch, patches, 2), -1)
    position_ids[:, : x.numel()] = torch.stack([x, y], dim=-1).reshape(-1, 2)
    return position_ids, (position_ids == -1).all(-1)


def interpolated(patches, rows):
    """Ids and weights of one square image in a square table, as Qwen3-VL's tower makes them."""
    side = round(patches**0.5)
    grid = torch.tensor([[1, side, side]])
    return get_vision_interpolation_indices_and_weights(
        grid, round(rows**0.5), align_corners=True, spatial_merge_size=2
    )


# ----- time ---------------------------------------------------------------------------------------


def timed(function, on_gpu=False):
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


def interleaved(measurements, rounds, label):
    """Takes every measurement (a function that returns seconds) once a round, in turn.

    What is slow takes part in one round of the warm-up and in two others.
    """
    times = {name: [] for name in measurements}
    slow = set()
    for number in tqdm(range(-WARM_UP, rounds), desc=label, unit="round", leave=False):
        for name, measure in measurements.items():
            if name in slow and number not in (0, 1):
                continue
            seconds = measure()
            if number >= 0:
                times[name].append(seconds)
            elif seconds > SLOW:
                slow.add(name)
    return times


def summary(times, unit="ms"):
    """The part of a row that says how long each peer took, and how many times as long as ours."""
    scale = {"ms": 1e3, "us": 1e6}[unit]
    quartiles = {
        name: [float(f"{q:.4g}") for q in np.percentile(seconds, [25, 50, 75]) * scale]
        for name, seconds in times.items()
    }
    ours = times["ours"]  # one of the two may be slow, and have taken part in fewer rounds
    return {
        f"median_{unit}": {name: q[1] for name, q in quartiles.items()},
        f"quartiles_{unit}": {name: [q[0], q[2]] for name, q in quartiles.items()},
        "ratio": {
            name: median_with_interval([peer / our for peer, our in zip(seconds, ours)])
            for name, seconds in times.items()
            if name != "ours"
        },
    }


def median_with_interval(values):
    """[median, low, high], by the percentile bootstrap."""
    interval = bootstrap((values,), np.median, method="percentile", rng=0).confidence_interval
    return [float(f"{v:.4g}") for v in (np.median(values), interval.low, interval.high)]


# ----- memory -------------------------------------------------------------------------------------


def peak_bytes(function, on_gpu=False):
    """The most memory that a call holds beyond what is held before."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    allocated = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


# ----- rows ---------------------------------------------------------------------------------------


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


def origin(kernel, command):
    """What a row starts with: what makes it again, and of what and where it was taken."""
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": kernel.__name__.split("_", 5)[-1],
        "machine": machine(kernel),
    }


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"Wrote {path}")
