"""Predict the CUDA variant's times from its machine code. Nothing here was measured on a GPU.

    python benchmarks/predict.py            # write benchmarks/prediction.md
    python benchmarks/predict.py --check    # fail if it isn't what this build gives

Needs a build of the CUDA variant (make cuda). The model is on the page that it writes.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "benchmarks" / "prediction.md"
CUOBJDUMP = ROOT / ".build/cuda-toolkit/triton/backends/nvidia/bin/cuobjdump"


class Device(NamedTuple):
    name: str
    arch: str
    sms: int
    threads: int  # a multiprocessor takes
    shared: int  # bytes a multiprocessor has for its blocks
    clock: float  # Hz
    copy: float  # bytes/s, read plus written
    l2: float  # bytes/s, assumed
    l2_bytes: float
    latency: float  # s, of a load under load; assumed
    gap: float  # s, from kernel to kernel; assumed
    overlaps: bool  # a kernel may start before the one before it ends
    why: str


DEVICES = [
    Device("H200", "sm_90", 132, 2048, 227 << 10, 1.755e9, 4.3e12, 5.5e12, 50e6, 0.7e-6, 1.0e-6,
           True, "copy bandwidth as in the design's notes"),
    Device("RTX 4090", "sm_89", 128, 1536, 100 << 10, 2.52e9, 0.92e12, 5.0e12, 72e6, 0.6e-6, 1.5e-6,
           False, "copy bandwidth 91% of the data sheet's 1008 GB/s"),
]  # fmt: skip


class Code(NamedTuple):
    """What the compiler made of a kernel."""

    registers: int
    instructions: (
        int  # once through, loops once: an upper bound, asserts and unused branches included
    )
    loop: int  # in the longest loop


def read_code():
    """{arch: {kernel: Code}} of the build."""
    folders = sorted((ROOT / "build").glob("torch*-cu[0-9]*-*"))
    if not folders:
        sys.exit("error: the CUDA variant is not built (make cuda)")
    (extension,) = folders[0].glob("*.abi3.so")
    registers = {}
    for log in (ROOT / ".build" / folders[0].name / "csrc" / "cuda").glob("*.log"):
        pattern = r"Compiling entry function '(\S+)' for '(\S+)'.*?Used (\d+) registers"
        for name, arch, count in re.findall(pattern, log.read_text(), re.DOTALL):
            registers[arch, name] = int(count)
    code = {}
    for arch in {device.arch for device in DEVICES}:
        listing = subprocess.run(
            [CUOBJDUMP, "--dump-sass", "--gpu-architecture", arch, extension],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        code[arch] = {}
        for name, body in re.findall(
            r"Function : (\S+)\n(.*?)(?=Function : |\Z)", listing, re.DOTALL
        ):
            found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", body)
            addresses = [int(address, 16) for address, _ in found]
            # What lies behind is for lanes that have parted, and is not run.
            parted = (i for i, (_, text) in enumerate(found) if text.startswith("WARPSYNC.COLL"))
            found = found[: next(parted, None)]
            last = max(i for i, (_, text) in enumerate(found) if "EXIT" in text)
            loops = [0]
            for i, (_, text) in enumerate(found):
                target = re.search(r"BRA(?:\.U)?\b.*?0x([0-9a-f]+)", text)
                if target and int(target[1], 16) < addresses[i]:
                    loops.append(i + 1 - addresses.index(int(target[1], 16)))
            code[arch][short(name)] = Code(registers[arch, name], last + 1, max(loops))
    return code


def short(name):
    """forward_kernel<BFloat16, BFloat16, BFloat16, 8, 2, false, true>"""
    full = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"(\w+_kernel(?:<.*>)?)\(", full.replace("(anonymous namespace)::", ""))
    return re.sub(r"[\w]+::", "", found[1])


class Launch(NamedTuple):
    """One kernel's work. Bytes are those of the README's table."""

    kernel: str
    blocks: float  # that do the work
    light: float  # that do next to nothing: a share of the zeros, or find no run that crosses tiles
    threads: int
    shared: int  # bytes a block
    memory: float  # bytes that memory moves
    l2: float  # bytes that blocks read from the level 2 cache
    in_flight: int  # bytes that a thread has requested while it waits
    instructions: object  # of a warp, from Code
    serial: float  # round trips that a block waits for, one after the other
    barriers: int = 0
    zeros: float = 0  # bytes that are filled beside the work, which doesn't wait for them


H, P, TILE, SLAB = 768, 10240, 512, 64  # columns; rows; entries a tile; columns a slab
WIDE = 1152  # Qwen3-VL's columns
MAIN = "forward_kernel<BFloat16, BFloat16, BFloat16, 8, 2, false, true>"
WEIGHTED = "forward_kernel<BFloat16, BFloat16, BFloat16, 8, 4, true, true>"
INTERPOLATION = "interpolation_kernel<2>"
SCALING = "scaling_kernel<float, BFloat16, 4>"


# Of a light block, with its exit.
LIGHT = 100


def forward(tokens, entries, columns, distinct, rows_used):
    """`distinct`: the rows that the eight tokens of a block read, the others are in its cache; `rows_used`: those
    that all read."""
    kernel, unroll = (MAIN, 3) if entries == 2 else (WEIGHTED, 1)
    steps = math.ceil(columns / (unroll * 256))
    row = 2 * columns
    ids = tokens * (8 * entries + (4 * entries if entries == 4 else 1))
    return Launch(
        kernel=kernel, blocks=tokens / 8, light=0, threads=256, shared=0,
        memory=2 * tokens * row + rows_used * row + ids,
        l2=tokens * row + tokens / 8 * distinct * row + ids,
        in_flight=16 * unroll * (1 if entries == 2 else 1 + entries),
        # The ids, and then the rows; the residual comes with one or the other.
        instructions=lambda c: c.instructions + (steps - 1) * c.loop, serial=1 + steps,
    )  # fmt: skip


def interpolation(patches):
    """Of one image, bilinear."""
    return Launch(
        kernel=INTERPOLATION, blocks=patches / 128, light=0, threads=128, shared=0,
        memory=48 * patches, l2=0, in_flight=48, instructions=lambda c: c.instructions, serial=1,
    )  # fmt: skip


def scaling(pixels):
    """From float32 to bfloat16."""
    return Launch(
        kernel=SCALING, blocks=pixels / 4096, light=0, threads=256, shared=0, memory=6 * pixels,
        l2=4 * pixels, in_flight=64, instructions=lambda c: c.instructions, serial=1,
    )  # fmt: skip


def backward(tokens, used, kind, device):
    """`used` tokens aren't padding."""
    entries = 2 * tokens
    tiles = math.ceil(2 * used / TILE)
    rows_used = {"grid": 102, "one id": 2}.get(kind, min(2 * P, 2 * used))
    sort_tile = 2048
    while math.ceil(entries / sort_tile) > 128:
        sort_tile *= 2
    sort_tiles, steps = math.ceil(entries / sort_tile), sort_tile / 2048
    zeros = 2 * P * H * 2 / 3  # a share
    fill = zeros / (512 * 8 * 16)  # blocks
    rows = Launch(
        kernel="rows_kernel", blocks=sort_tiles, light=fill, threads=512, shared=1 << 10,
        memory=entries * 16.5, l2=entries * 9, in_flight=36,
        instructions=lambda c: c.instructions + (steps - 1) * c.loop, serial=steps, barriers=2,
        zeros=zeros,
    )  # fmt: skip
    sort = Launch(
        kernel="sort_kernel", blocks=sort_tiles, light=fill, threads=512, shared=20 << 10,
        memory=16 * entries, l2=8 * entries + sort_tiles * sort_tiles * 1024, in_flight=64,
        instructions=lambda c: c.instructions + (steps - 1) * c.loop,
        # The tiles' counts, 32 at a time, with the first of them a step's entries; the other steps'.
        serial=math.ceil(sort_tiles / 32) + steps - 1, barriers=4 + 3 * int(steps), zeros=zeros,
    )  # fmt: skip
    # What the cache can't hold of a slab of all tokens, and of the blocks under way, is read again.
    window = (tokens * 128 + device.sms * 4 * (64 << 10) / 2) / device.l2_bytes
    read = used * 2 * H
    partials = 2 * tiles * 4 * H
    ends = min(1, (rows_used + 32 * tiles) / (2 * used))  # of a run or a stretch, an entry
    sums = Launch(
        kernel="sum_kernel<BFloat16, BFloat16, 8>", blocks=tiles * H / SLAB, light=0, threads=256,
        shared=547 * 16 + 16384,
        memory=read * min(2, max(1, window)) + rows_used * 2 * H + 8 * entries,
        l2=2 * read + tiles * H / SLAB * TILE * 8, in_flight=64,
        # Four batches; about half of the loop is there for the ends.
        instructions=lambda c: c.instructions - c.loop + 4 * c.loop * (1 + ends) / 2,
        serial=1 + 4, barriers=2,
    )  # fmt: skip
    run = {"grid": tiles / 102, "one id": tiles / 2}.get(kind, 1)
    crossing = min(rows_used, tiles) * 6
    finish = Launch(
        kernel="finish_kernel<BFloat16, 4>", blocks=crossing, light=tiles * 6 - crossing,
        threads=256, shared=5 << 10, memory=rows_used * H, l2=partials, in_flight=64,
        # The rows at the tile's ends; the tiles that begin with the run's, 256 at a time; the partials, 32.
        instructions=lambda c: c.instructions, serial=1 + math.ceil(run / 256) + math.ceil(run / 32),
        barriers=3,
    )  # fmt: skip
    return [rows, sort, sort, sums, finish]


def time(launch, device, code):
    """Seconds, and what bounds it."""
    c = code[device.arch][launch.kernel]
    per_sm = min(
        65536 // (-(-c.registers // 8) * 8 * launch.threads),
        device.threads // launch.threads,
        device.shared // (launch.shared + 1024),
    )
    resident = min(per_sm, max(1, launch.blocks / device.sms))
    warps = launch.threads / 32
    instructions = warps * (launch.blocks * launch.instructions(c) + launch.light * LIGHT)
    bounds = {
        "memory": (launch.memory + launch.zeros) / device.copy,
        "level 2": launch.l2 / device.l2,
        "issue": instructions / (min(device.sms, launch.blocks + launch.light) * 4 * device.clock),
        "flight": launch.l2
        / (resident * device.sms * launch.threads * launch.in_flight / device.latency),
    }
    what = max(bounds, key=bounds.get)
    chain = launch.serial * device.latency + launch.barriers * 30e-9
    if chain > bounds[what]:
        return chain, "latency"
    # The first block's requests, before anything arrives.
    return bounds[what] + device.latency, what


LAUNCH = 1e-6  # s, before the first kernel; assumed


def predict(launches, device, code):
    """Seconds, and what each kernel takes, in words."""
    filling = [launch for launch in launches if launch.zeros and device.overlaps]
    launches = [launch._replace(zeros=0) for launch in filling] + launches[len(filling) :]
    times = [time(launch, device, code) for launch in launches]
    total = sum(seconds for seconds, _ in times) + device.gap * (len(times) - 1) + LAUNCH
    words = ", ".join(
        f"{launch.kernel.partition('_')[0]} {seconds * 1e6:.1f} {what}"
        for launch, (seconds, what) in zip(launches, times)
    )
    if filling:
        beside = sum(seconds for seconds, _ in times[: len(filling)])
        beside += device.gap * (len(filling) - 1)
        moved = sum(launch.memory + launch.zeros for launch in filling)
        zeros = moved / device.copy + device.latency
        total += max(0, zeros - beside)
        words += f"; the zeros {zeros * 1e6:.1f} beside the first {len(filling)}"
    return total, words


def measured(device, wanted):
    """What compare.py has measured of a case on such a GPU, in seconds, or None. A result is a row whose machine's
    "gpu" contains the device's name and whose case has all that is wanted."""
    for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
        for row in json.loads(path.read_text()):
            if not isinstance(row, dict) or device.name not in row.get("machine", {}).get(
                "gpu", ""
            ):
                continue
            case = row.get("case", {})
            if all(case.get(name) == value for name, value in wanted.items()):
                return row["median_us"]["ours"] * 1e-6
    return None


MODEL = """\
# Predicted times of the CUDA variant

**Predictions. No GPU has run this code.** Made by `benchmarks/predict.py` from the machine code of a build and
from the assumptions below; a measured column will stand beside them when there is one. bfloat16, H = 768,
P = 10240, K = 2, 2520 patches an image, of which 2400 aren't padding.

*Floor* is the bytes that must move, at the bandwidth of a copy; each row of the table that is read counts once. *Copy* is
a copy of as many bytes with its own launch and its own first round trip. *Measured* is what `benchmarks/compare.py`
found on that GPU, where it has run.

A kernel takes the longest of four times, and one round trip for the first bytes to come:

- *memory*: the bytes that must come from memory or go there, at the bandwidth of a copy;
- *level 2*: the bytes that blocks read from the level 2 cache, at its bandwidth: of the rows, those that
  differ among the eight tokens of a block, 9 of 16 on a grid, and of Qwen3-VL's, whose 48 x 48 rows are
  stretched over the patches, 16 of 32 for 4096 patches and 10 for 16384; random rows are taken to be all different;
- *issue*: the warps' instructions, four a clock and multiprocessor. Instructions are counted in the machine
  code, those of loops as often as they are run; branches not taken count too, so this is an upper bound;
- *flight* (Little's law): the level 2 cache's bytes, of which all resident threads together have a few
  under way for the time of one round trip. Residency is what registers, shared memory and threads allow;

or, if that is longer, the round trips that a block waits for one after the other (*latency*), 30 ns for each
barrier among them. Between kernels lies a gap, and before the first one microsecond. The zeros of the backward are
filled by its first three kernels: where kernels overlap without a pause, beside what else these do; elsewhere each
kernel's share adds to its bytes.

Of a token's gradient the second entry's reading comes from the level 2 cache, as long as 128 bytes of every
token and what the blocks under way hold fit in there.

By this model an H200 misses the goals of the large backward on a grid and with one id: two axes read 295 MB from its
level 2 cache, whose bandwidth is the assumption that matters most. The goals in microseconds are an H200's; an RTX 4090
takes longer to write the table's gradient alone.

The goal for ids, weights and lookup together is what TensorRT-LLM's authors published for their fused kernel on an
H200: 19 us for 4096 patches and 22 for 16384.
"""


def page(code):
    lines = [MODEL]
    lines += ["| assumed | " + " | ".join(device.name for device in DEVICES) + " |"]
    lines += ["| --- |" + " --- |" * len(DEVICES)]
    for label, value in [
        ("machine code", lambda d: d.arch),
        ("multiprocessors, threads each", lambda d: f"{d.sms}, {d.threads}"),
        ("clock", lambda d: f"{d.clock / 1e9:.2f} GHz"),
        ("copy, read plus written", lambda d: f"{d.copy / 1e12:.2f} TB/s"),
        ("level 2 cache", lambda d: f"{d.l2 / 1e12:.1f} TB/s, {d.l2_bytes / 1e6:.0f} MB"),
        ("round trip under load", lambda d: f"{d.latency * 1e9:.0f} ns"),
        ("gap between kernels", lambda d: f"{d.gap * 1e6:.1f} us"),
        ("source", lambda d: f"{d.why}; kernels {'' if d.overlaps else 'do not '}overlap"),
    ]:
        lines.append(f"| {label} | " + " | ".join(value(device) for device in DEVICES) + " |")
    kernels = [MAIN, WEIGHTED, "rows_kernel", "sort_kernel", "sum_kernel<BFloat16, BFloat16, 8>"]
    kernels += ["finish_kernel<BFloat16, 4>", INTERPOLATION, SCALING]
    lines += ["", "Registers, instructions once through, instructions of the longest loop:", ""]
    lines += ["| kernel | " + " | ".join(device.arch for device in DEVICES) + " |"]
    lines += ["| --- |" + " --- |" * len(DEVICES)]
    for kernel in kernels:
        cells = [", ".join(map(str, code[device.arch][kernel])) for device in DEVICES]
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    for device in DEVICES:
        lines += ["", f"## {device.name}, predicted", ""]
        head = [
            "",
            "floor, us",
            "copy, us",
            "predicted, us",
            "measured, us",
            "goal",
            "by the prediction",
        ]
        lines += ["| " + " | ".join([*head, "kernels, us, and bound"]) + " |"]
        lines += ["| --- |" + " --- |" * len(head)]
        for label, case, least, launches, goal in workloads(device):
            total, parts = predict(launches, device, code)
            floor = least / device.copy
            copy = floor + device.latency + LAUNCH
            seconds = measured(device, case | {"dtype": "bf16"}) if case else None
            cells = [
                f"{floor * 1e6:.1f}",
                f"{copy * 1e6:.1f}",
                f"{total * 1e6:.1f}",
                f"{seconds * 1e6:.1f}" if seconds else "",
                str(goal or ""),
                goal.verdict(floor, copy, total) if goal else f"{total / copy:.2f} x copy",
                parts,
            ]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


class Goal(NamedTuple):
    """At most `most` times what a copy takes, or the floor, or microseconds."""

    most: float
    of: str

    def __str__(self):
        return f"{self.most:g} us" if self.of == "us" else f"{self.most:g} x {self.of}"

    def verdict(self, floor, copy, total):
        unit = {"floor": floor, "copy": copy, "us": 1e-6}[self.of]
        value = total / unit
        text = f"{value:.1f} us" if self.of == "us" else f"{value:.2f} x {self.of}"
        if value <= self.most:
            return f"{text}: met"
        return f"{text}: **missed**" + (
            ", the floor is above it" if self.most * unit < floor else ""
        )


# Forward and backward, by kind of ids.
GOALS = {
    (40, "grid"): (Goal(1.05, "copy"), Goal(1.3, "floor")),
    (40, "random ids"): (Goal(1.11, "copy"), Goal(1.9, "floor")),
    (40, "one id"): (Goal(1.05, "copy"), Goal(1.4, "floor")),
    (1, "grid"): (None, Goal(20, "us")),
    (1, "random ids"): (None, Goal(30, "us")),
    (1, "one id"): (None, Goal(20, "us")),
}
# As compare.py calls them.
IDS = {"grid": "grid", "random ids": "random", "one id": "single"}


def workloads(device):
    """A name, the case of compare.py, the bytes that must move, the launches, and the goal."""
    for (batch, kind), (forward_goal, backward_goal) in GOALS.items():
        tokens, used = batch * 2520, batch * 2400
        case = {"batch": batch, "patches": 2520, "hidden": H, "rows": P, "entries": 2}
        case |= {"ids": IDS[kind], "weighted": 0}
        distinct = {"grid": 9, "one id": 2}.get(kind, 16)
        used_rows = {"grid": 102, "one id": 2}.get(kind, min(2 * P, 2 * used))
        least = tokens * (4 * H + 17) + used_rows * 2 * H
        launch = forward(tokens, 2, H, distinct, used_rows)
        label = f"forward, B={batch}, {kind}"
        yield label, case | {"direction": "forward"}, least, [launch], forward_goal
        least = used * 2 * H + tokens * 17 + 4 * P * H
        launches = backward(tokens, used, kind, device)
        label = f"backward, B={batch}, {kind}"
        yield label, case | {"direction": "backward"}, least, launches, backward_goal
    for patches, distinct in ((4096, 16), (16384, 10)):
        case = {"batch": 1, "patches": patches, "hidden": WIDE, "entries": 4, "weighted": 1}
        case |= {"direction": "forward"}
        least = patches * (4 * WIDE + 48) + 2304 * 2 * WIDE
        launch = forward(patches, 4, WIDE, distinct, 2304)
        label = f"weighted forward, K=4, H={WIDE}, {patches} patches"
        yield label, case | {"ids": "interpolated"}, least, [launch], Goal(1.11, "copy")
        both = [interpolation(patches), launch]
        label = f"the same, and its ids and weights made, {patches} patches"
        goal = Goal({4096: 19, 16384: 22}[patches], "us") if device.name == "H200" else None
        yield label, case | {"ids": "computed"}, least + 48 * patches, both, goal
    pixels = 40 * 2520 * H
    yield "pixels scaled, float32, B=40", None, 6 * pixels, [scaling(pixels)], None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    check = parser.parse_args().check
    text = page(read_code())
    if not check:
        PAGE.write_text(text)
    elif PAGE.read_text() != text:
        sys.exit(f"error: {PAGE.relative_to(ROOT)} is not what this build gives; run predict.py")


if __name__ == "__main__":
    main()
