"""The measuring core: a case, the op's arguments, the peers, interleaved rounds, a row of JSON.

How it is measured is at the top of README.md. On a GPU the times are the GPU's own, between two events; small
calls are replayed ten at a time as a graph, because the host takes longer than the GPU.
"""

import argparse
import ctypes
import importlib
import itertools
import json
import os
import platform
import random
import re
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

import kernels
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REPLAYED = 10  # calls in a graph
QWEN = {"mode": "bilinear", "align_corners": True, "spatial_merge_size": 2}
INTERPOLATED = ("interpolated", "computed")  # ids of four entries of one table, weighted


class Case(NamedTuple):
    """What is measured: a call with the sizes of Gemma 4 E2B, unless told otherwise.

    ids: "grid", images of 3 : 2; "random", any of the rows; "few", of the first 60; "single", one;
    "interpolated", Qwen3-VL's, of square images; "computed", these, made within the call that is timed.
    pages: "small" keeps the system from backing memory with huge pages.
    """

    batch: int = 8
    patches: int = 2520  # of an image
    hidden: int = 768
    rows: int = 10240
    entries: int = 2
    shared: int = 0  # 1: one table for all entries
    weighted: int = 0
    ids: str = "grid"
    dtype: str = "bf16"
    direction: str = "forward"
    pages: str = "huge"
    peers: tuple = ("eager", "torch.compile", "embedding_bag")
    rounds: int = 12

    def __str__(self):
        name = f"{self.direction} {self.dtype}, B={self.batch} N={self.patches} H={self.hidden}"
        implied = ("entries", "shared", "weighted") if self.ids in INTERPOLATED else ()
        for field in ("rows", "entries", "shared", "weighted", "ids", "pages"):
            if field not in implied and getattr(self, field) != self._field_defaults[field]:
                name += f" {field}={getattr(self, field)}"
        return name


# ----- the op's arguments and its peers -------------------------------------------------------------


def arguments(kernel, case):
    """What `fused_embedding_lookup` is called with."""
    tokens, weights, padding = (case.batch, case.patches), None, None
    if case.ids in INTERPOLATED:
        tokens = (case.batch * case.patches,)
        function = kernel.vision_interpolation_indices_and_weights
        ids, weights = function(*square_images(case), num_patches=tokens[0], **QWEN)
    else:
        # 20 of 21 patches are the image's, as 60 x 40 are of 2520; the others are padding.
        unit = int((case.patches * 20 / 21 / 6) ** 0.5)
        x, y = torch.meshgrid(torch.arange(3 * unit), torch.arange(2 * unit), indexing="xy")
        ids = torch.full((*tokens, 2), -1)
        ids[:, : x.numel()] = torch.stack([x, y], dim=-1).reshape(-1, 2)
        padding = (ids[..., 0] < 0) & (case.ids != "few")
        ids = ids[..., torch.arange(case.entries) % 2]
        if case.ids != "grid":
            high = {"random": case.rows, "few": min(60, case.rows), "single": 1}[case.ids]
            ids = torch.randint(high, ids.shape)
        if case.weighted:
            weights = torch.rand(ids.shape)
    tables = () if case.shared else (case.entries,)
    options = {"dtype": DTYPES[case.dtype], "requires_grad": True}
    return {
        "position_ids": ids,
        "table": torch.randn(*tables, case.rows, case.hidden, **options),
        "weights": weights,
        "padding": padding,
        "residual": torch.randn(*tokens, case.hidden, **options),
    }


def square_images(case):
    """The grids of as many images, and the side of a square table."""
    side = round(case.patches**0.5)
    return torch.tensor([[1, side, side]] * case.batch), round(case.rows**0.5)


def bytes_moved(case, position_ids, table, weights, padding, residual):
    """What memory has to move at least."""
    ids = sum(t.nbytes for t in (position_ids, weights, padding) if t is not None)
    if case.direction == "backward":
        used = 1 if padding is None else 1 - padding.float().mean().item()
        return int(residual.nbytes * used) + table.nbytes + ids
    read = position_ids if padding is None else position_ids[~padding]
    of_tables = [read] if case.shared else read.unbind(-1)
    rows = sum(len(ids.clamp(min=0).unique()) for ids in of_tables)
    return 2 * residual.nbytes + ids + rows * case.hidden * table.itemsize


def peers(kernel, case):
    """Functions of the op's arguments. Eager is what transformers does today."""

    def interpolated(position_ids, table, weights, padding, residual):
        embedding = kernel.reference.interpolated(position_ids, table, weights, residual.dtype)
        return residual + embedding

    def with_ids_of(function, lookup, **options):
        """A lookup that makes its ids and weights."""

        def call(position_ids, table, weights, padding, residual):
            ids, weights = function(*square_images(case), **QWEN, **options)
            return lookup(ids, table, weights=weights, padding=padding, residual=residual)

        return call

    ours, eager = kernel.fused_embedding_lookup, kernel.reference.fused_embedding_lookup
    if case.ids in INTERPOLATED:
        eager = interpolated
    if case.ids == "computed":
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        function = kernel.vision_interpolation_indices_and_weights
        ours = with_ids_of(function, ours, num_patches=case.batch * case.patches)
        eager = with_ids_of(get_vision_interpolation_indices_and_weights, eager)
    others = {"eager": eager, "torch.compile": torch.compile(eager)}
    others |= {"embedding_bag": embedding_bag, "one-hot": one_hot}
    return {"ours": ours} | {name: others[name] for name in case.peers}


def embedding_bag(position_ids, table, weights, padding, residual):
    """PyTorch's own fused lookup and sum, which takes weights of the table's dtype only."""
    ids = position_ids.clamp(min=0).flatten(0, -2)
    if table.dim() == 3:
        ids = ids + torch.arange(len(table), device=ids.device) * table.shape[1]
    if weights is not None:
        weights = weights.view(ids.shape).to(table.dtype)
    bags = F.embedding_bag(ids, table.flatten(0, -2), mode="sum", per_sample_weights=weights)
    bags = bags.view(residual.shape)
    return residual + (bags if padding is None else torch.where(padding.unsqueeze(-1), 0.0, bags))


def one_hot(position_ids, table, weights, padding, residual):
    """transformers up to 5.9, which knows no weights and no shared table."""
    encoded = F.one_hot(position_ids.clamp(min=0), num_classes=table.shape[1])
    embedding = (encoded.permute(0, 2, 1, 3).to(table) @ table).sum(dim=1)
    return residual + torch.where(padding.unsqueeze(-1), 0.0, embedding)


# ----- one case -------------------------------------------------------------------------------------


def measure(kernel, case):
    """The row of a case, without its origin."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = not on_gpu()  # where a backward is repeated
    huge_pages(case.pages == "huge")
    given, backward = arguments(kernel, case), case.direction == "backward"
    with torch.set_grad_enabled(backward):
        grad = torch.randn_like(given["residual"]) if backward else None
        functions = peers(kernel, case)
        check(functions, given, kernel.reference.fused_embedding_lookup)
        calls = {name: prepared(peer, given, grad) for name, peer in functions.items()}
        row = {"case": case._asdict(), "bytes": bytes_moved(case, **given)}
        row["peak_bytes"] = {name: peak_bytes(prepare) for name, prepare in calls.items()}
        if case.ids == "computed":
            row["ops"] = {name: count_ops(prepare) for name, prepare in calls.items()}
        source = torch.ones(row["bytes"] // 2, dtype=torch.uint8)
        target = torch.empty_like(source)
        calls["copy"] = lambda: lambda: target.copy_(source)
        row["by_replay"] = on_gpu() and given["residual"].numel() < 2**23
        clocks = {}
        for name, prepare in calls.items():
            try:
                clocks[name] = clock(prepare, row["by_replay"])
            except RuntimeError as error:  # what can't be captured
                if name == "ours" or not row["by_replay"]:
                    raise
                row.setdefault("not_measured", {})[name] = str(error)[:200]
        row |= summary(interleaved(clocks, case.rounds))
    huge_pages(True)
    return row


@torch.no_grad()
def check(functions, given, reference):
    """The peers round in other places than the op does, we don't."""
    expected = reference(**given)
    for name, peer in functions.items():
        tolerance = 0 if name == "ours" else 4 * torch.finfo(expected.dtype).eps
        torch.testing.assert_close(peer(**given), expected, rtol=tolerance, atol=tolerance)


def prepared(peer, given, grad):
    """A function that returns what is timed: a forward, or the backward of one that it has done."""
    if grad is None:
        return lambda: lambda: peer(**given)

    def backward():
        out, inputs = peer(**given), (given["table"], given["residual"])
        # On a GPU one forward serves all rounds.
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=on_gpu())

    return backward


def huge_pages(allowed):
    """Whether this process may have them."""
    PR_SET_THP_DISABLE = 41
    denied = platform.system() != "Linux"
    denied = denied or ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, int(not allowed), 0, 0, 0)
    if denied and not allowed:
        raise OSError("this system doesn't keep huge pages from a process")


# ----- time -----------------------------------------------------------------------------------------


def on_gpu():
    return torch.get_default_device().type == "cuda"


def now():
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


def clock(prepare, by_replay=False):
    """A function that times a call, in seconds. That its result is freed isn't timed."""
    if not on_gpu():
        return lambda: host_seconds(prepare())
    call, times = (captured(prepare), REPLAYED) if by_replay else (prepare(), 1)
    return lambda: gpu_seconds(call) / times


def host_seconds(call):
    start = time.perf_counter()
    result = call()  # noqa: F841
    return time.perf_counter() - start


def gpu_seconds(call):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000)  # about a millisecond for the host to get ahead
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(prepare):
    """Replays a graph of several calls: what a model's step does, without the host."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call = prepare()
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(REPLAYED):
            call()
    return lambda call=call: graph.replay()  # and holds what the graph reads


def interleaved(clocks, rounds, warm_up=3, slow=0.5):
    """Takes every time once a round, in turn.

    What is `slow`, in seconds, takes part in one round of the warm-up and in two others.
    """
    times, too_slow = {name: [] for name in clocks}, set()
    for number in range(-warm_up, rounds):
        for name, seconds in clocks.items():
            if name in too_slow and number not in (0, 1):
                continue
            taken = seconds()
            if number >= 0:
                times[name].append(taken)
            elif taken > slow:
                too_slow.add(name)
    return times


def summary(times):
    """How long each took, in microseconds, and how many times as long as ours."""
    result = {"median_us": {}, "quartiles_us": {}, "ratio": {}}
    for name, taken in times.items():
        several = taken if len(taken) > 1 else taken * 2  # Python 3.13 is the first to take one
        cuts = statistics.quantiles(several, n=4, method="inclusive")
        low, result["median_us"][name], high = (digits(seconds * 1e6) for seconds in cuts)
        result["quartiles_us"][name] = [low, high]
        if name != "ours":  # one of the two may be slow, and have taken part in fewer rounds
            ratios = [theirs / ours for theirs, ours in zip(taken, times["ours"])]
            result["ratio"][name] = median_with_interval(ratios)
    return result


def median_with_interval(values):
    """[median, low, high], 95%, by the percentile bootstrap."""
    draw = random.Random(0).choices
    medians = [statistics.median(draw(values, k=len(values))) for _ in range(2000)]
    low, *_, high = statistics.quantiles(medians, n=40, method="inclusive")
    return [digits(value) for value in (statistics.median(values), low, high)]


def digits(value):
    return float(f"{value:.4g}")


# ----- memory and ops -------------------------------------------------------------------------------


def peak_bytes(prepare):
    """The most memory that a call holds beyond its arguments; a backward, with its forward."""
    if on_gpu():
        now()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        prepare()()
        now()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        prepare()()
    events = profiler.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes, initial=0))


def count_ops(prepare):
    """The ops that PyTorch dispatches, but for those that return a view."""

    class Ops(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += not func.is_view
            return func(*args, **(kwargs or {}))

    with Ops() as ops:
        prepare()()
    return ops.count


# ----- scripts and rows -----------------------------------------------------------------------------


def parser(description):
    """What all scripts begin with: their docstring is the help, line for line."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def measuring_parser(description):
    """With the options of those that write rows."""
    result = parser(description)
    # simt is the engine of tests/simt, with which a day on a GPU is rehearsed.
    result.add_argument("--device", default="cpu", choices=["cpu", "cuda", "simt"])
    result.add_argument("--json", type=Path, metavar="FILE", help="written after each row")
    return result


def load_kernel(device="cpu"):
    """The build for a device, on which tensors are made from now on."""
    folder, backend = (ROOT, device) if device != "simt" else (ROOT / ".build/simt/cuda", "cpu")
    kernel = kernels.get_local_kernel(folder, backend=backend)
    importlib.import_module(f"{kernel.__name__}.reference")  # kernel.reference, the eager code
    if device == "cuda":
        torch.set_default_device(device)
    return kernel


def machine(kernel, device):
    if device != "cpu":
        name = torch.cuda.get_device_name() if on_gpu() else "none: a rehearsal on tests/simt"
        return {"gpu": name, "cuda": torch.version.cuda, "torch": torch.__version__}
    cpuinfo = Path("/proc/cpuinfo")
    named = cpuinfo.exists() and re.search(r"model name\s*: (.*)", cpuinfo.read_text())
    return {
        "cpu": named[1] if named else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "instructions": kernel.op.ops.cpu_capability(),
        "torch": torch.__version__,
    }


def origin(kernel, device, command):
    """What a row starts with: what makes it again, and when, of what and where it was taken."""
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": kernel.__name__.split("_", 5)[-1],
        "machine": machine(kernel, device),
    }


def write(path, rows, text):
    """Shows the last of the rows, and writes all of them if there is a path."""
    print(text, flush=True)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")
