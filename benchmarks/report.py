"""The tables of both READMEs and the plots, from the JSON in benchmarks/results.

make report
make report ARGS=--check    # changes nothing; fails if they disagree with the JSON
"""

import argparse
import io
import json
import re
import sys

import matplotlib

matplotlib.use("svg")

import measure
import scaling
from matplotlib import pyplot
from tabulate import tabulate

PAGES = [measure.ROOT / "README.md", measure.ROOT / "benchmarks" / "README.md"]
SOFT_TOKEN_PATCHES = [630, 1260, 2520, 5040, 10080]
TRAINING_BATCH = 40  # of issue 46175 of transformers

# ----- what was promised --------------------------------------------------------------------------

# Device, shape, direction, dtype, peer, the least ratio of its time to ours. Against "copy" it is the
# share of a copy's bandwidth: 2/3 is 1.5 times the time that a copy of the bytes takes.
CPU = {"batch": 8, "patches": 2520, "hidden": 768, "rows": 10240, "ids": "grid"}
INTERPOLATED = {"batch": 1, "hidden": 1152, "rows": 2304, "ids": "interpolated"}
GPU = CPU | {"batch": 40}
IMAGE = CPU | {"batch": 1}
TARGETS = [
    ("cpu", CPU, "forward", "fp32", "eager", 4),
    ("cpu", CPU, "forward", "fp32", "torch.compile", 1.1),
    ("cpu", CPU, "forward", "bf16", "eager", 7),
    ("cpu", CPU, "forward", "bf16", "torch.compile", 1),
    ("cpu", CPU, "backward", "fp32", "eager", 4),
    ("cpu", CPU, "backward", "fp32", "torch.compile", 5),
    ("cpu", CPU, "backward", "bf16", "eager", 4),
    ("cpu", CPU, "backward", "bf16", "torch.compile", 8),
    *(
        ("cpu", INTERPOLATED | {"patches": patches}, direction, dtype, peer, least)
        for direction, dtype, patches, *ratios in (
            ("forward", "bf16", 256, 10, 2),
            ("forward", "bf16", 4096, 30, 1.1),
            ("forward", "bf16", 16384, 20, 1.1),
            ("forward", "fp32", 256, 2, 1.5),
            ("forward", "fp32", 4096, 20, 20),
            ("forward", "fp32", 16384, 8, 8),
            ("backward", "bf16", 256, 2, 8),
            ("backward", "bf16", 4096, 8, 4),
            ("backward", "bf16", 16384, 8, 4),
        )
        for peer, least in zip(("eager", "torch.compile"), ratios)
    ),
    ("cpu", CPU | {"ids": "random"}, "backward", "bf16", "copy", 0.25),
    ("cpu", CPU | {"ids": "random"}, "backward", "fp32", "copy", 0.25),
    *(
        ("gpu", shape, direction, "bf16", peer, least)
        for shape in (GPU, GPU | {"hidden": 1152})
        for direction, peer, least in (
            ("forward", "copy", 0.9),
            ("forward", "eager", 5),
            ("forward", "torch.compile", 1),
            ("forward", "embedding_bag", 1.5),
            ("backward", "copy", 2 / 3),
            ("backward", "eager", 6),
            ("backward", "torch.compile", 6),
        )
    ),
    ("gpu", IMAGE, "forward", "bf16", "eager", 4),
    ("gpu", GPU | {"ids": "random"}, "forward", "bf16", "copy", 0.8),
    ("gpu", GPU | {"ids": "random"}, "backward", "bf16", "copy", 1 / 3),
    *(
        ("gpu", GPU | {"ids": "single"}, "forward", "bf16", peer, least)
        for peer, least in (
            ("copy", 0.9),
            ("eager", 5),
            ("torch.compile", 1),
            ("embedding_bag", 1.5),
        )
    ),
    ("gpu", GPU | {"ids": "single"}, "backward", "bf16", "copy", 1 / 2),
]
HOST_TARGET = 2  # times the host's time for one F.embedding
LAUNCH_TARGETS = {"forward": "1", "backward": "≤ 4"}
NO_GPU = "not measured yet: no GPU"
# Why one isn't met, by the text in its first cell.
REASONS = {}


def target_rows(rows):
    for device, shape, direction, dtype, peer, least in TARGETS:
        of = "of a copy's bandwidth" if peer == "copy" else f"vs {peer}"
        name = f"{device.upper()} {direction} {dtype}, {shape_text(shape)}, {of}"
        result = {"": name, "target": f"≥ {ratio_text(peer, least)}"}
        row = find(rows, device, shape, direction, dtype, peer)
        if row is None:
            result["measured"] = NO_GPU if device == "gpu" else "not measured yet"
        else:
            _, low, high = row["ratio"][peer]
            met = "met" if low >= least else "missed" if high < least else "not certain"
            reason = REASONS.get(name)
            result |= {
                "measured": interval_text(peer, row["ratio"][peer]),
                "met": f"{met}: {reason}" if reason and met != "met" else met,
                **origin(row),
            }
        yield result
    image = f"bf16, {shape_text(IMAGE)}"
    row = find(rows, "gpu", IMAGE, "forward", "bf16", "eager")
    result = {
        "": f"GPU forward {image}, host's time vs one F.embedding",
        "target": f"≤ {HOST_TARGET}x",
    }
    if row is None:
        result["measured"] = NO_GPU
    else:
        times = row["host_us"]["ours"] / row["host_us"]["one F.embedding"]
        result |= {
            "measured": f"{times:.3g}x",
            "met": "met" if times <= HOST_TARGET else "missed",
            **origin(row),
        }
    yield result
    for direction, launches in LAUNCH_TARGETS.items():
        name = f"GPU {direction} {image}, launches"
        yield {
            "": name,
            "target": launches,
            "measured": "in tests/devices/test_cuda.py, not run yet: no GPU",
        }


def find(rows, device, shape, direction, dtype, peer):
    matching = [
        row
        for row in rows
        if device in row["machine"]
        and (row["shape"], row["direction"], row["dtype"]) == (shape, direction, dtype)
        and peer in row["ratio"]
    ]
    # The one with most rounds: the memory's rows have few.
    return max(matching, key=lambda row: row["rounds"], default=None)


# ----- tables -------------------------------------------------------------------------------------


def shape_text(shape):
    rows = "" if shape["rows"] == 10240 else f" P={shape['rows']}"
    ids = "" if shape["ids"] == "grid" else f" {shape['ids']} ids"
    return f"B={shape['batch']} N={shape['patches']} H={shape['hidden']}{rows}{ids}"


def ratio_text(peer, ratio):
    return f"{ratio:.0%}" if peer == "copy" else f"{ratio:.3g}x"


def interval_text(peer, interval):
    ratio, low, high = (ratio_text(peer, value) for value in interval)
    return f"{ratio} [{low}, {high}]"


def origin(row):
    machine = row["machine"]
    name = machine["gpu"] if "gpu" in machine else f"{machine['cpu']}, {machine['threads']} cores"
    return {
        "machine": name,
        "date": row["date"][:10],
        "commit": row["commit"],
        "again": f"`{row['command']}`",
    }


def main_origin(rows):
    row = find(rows, "cpu", CPU, "forward", "fp32", "eager")
    machine, from_row = row["machine"], origin(row)
    return (
        f"{from_row['machine']}, {machine['instructions']}, torch {machine['torch']}, {from_row['date']}, "
        f"commit {from_row['commit']}, {row['rounds']} rounds:\n\n"
    )


def main_rows(rows):
    for row in op_rows("cpu", [row for row in rows if row["shape"] == CPU]):
        del row["again"]
        yield row


def op_rows(device, rows):
    for row in rows:
        if device not in row["machine"] or "torch.compile" not in row["ratio"]:
            continue  # taken for its memory
        times = row["median_ms"]
        yield {
            "": f"{row['direction']} {row['dtype']}, {shape_text(row['shape'])}",
            "ours": f"{times['ours']:.3g} ms",
            **{
                f"vs {peer}": interval_text(peer, row["ratio"][peer])
                for peer in ("eager", "torch.compile", "embedding_bag")
            },
            "must move": f"{row['bytes'] / 1e6:.0f} MB",
            "ours, GB/s": f"{row['bytes'] / times['ours'] / 1e6:.0f}",
            "of a copy's bandwidth": interval_text("copy", row["ratio"]["copy"]),
            "peak memory, eager's": " MiB, ".join(
                f"{row['peak_bytes'][peer] / 2**20:,.0f}" for peer in ("ours", "eager")
            )
            + " MiB",
            "again": f"`{row['command']}`",
        }


def step_rows(rows):
    for row in rows:
        if "step" in row:
            yield {
                "": f"{row['step']} {row['dtype']}, {row['patches']} patches",
                "whole step, before": f"{row['median_ms']['before']:.0f} ms",
                "after": f"{row['median_ms']['ours']:.0f} ms",
                "lookup, before": f"{row['lookup_ms']['before']:.3g} ms",
                "after ": f"{row['lookup_ms']['ours']:.3g} ms",
                "share, before": f"{row['share']['before']:.3%}",
                "after  ": f"{row['share']['ours']:.3%}",
                **origin(row),
            }


def microseconds(value):
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def mac_rows(rows):
    for row in rows:
        if "chip" in row:
            times = row["median_ms"]
            yield {
                "": f"{row['chip']}, {row['direction']}, {row['problem']}",
                "ours": f"{times['ours']:.3g} ms",
                "vs eager": f"{times['eager'] / times['ours']:.3g}x",
                "must move": f"{row['floor_bytes'] / 1e6:.0f} MB",
                "of a copy's bandwidth": f"{times['copy'] / times['ours']:.0%}",
                "torch": row["torch"],
                "commit": f"{row['commit']}, {row['date']}",
            }


def sweep_rows(rows):
    """The ends of each sweep, and for N where the cost of a call is no longer all there is."""
    sweeps = {}
    for row in rows:
        if "sweep" in row and "direction" in row:
            sweeps.setdefault((row["sweep"], row["direction"]), []).append(row)
    for (sweep, direction), taken in sweeps.items():
        axis = scaling.AXES[sweep[0]]
        ours = [row["median_us"]["ours"] for row in taken]
        yield {
            "": f"{direction}, {sweep}",
            "from, to": f"{taken[0]['shape'][axis]:,}, {taken[-1]['shape'][axis]:,}",
            "ours (us)": ", ".join(microseconds(ours[i]) for i in (0, -1)),
            "eager (us)": ", ".join(microseconds(taken[i]["median_us"]["eager"]) for i in (0, -1)),
            "vs eager": ", ".join(
                interval_text("eager", taken[i]["ratio"]["eager"]) for i in (0, -1)
            ),
            "first to take twice the least": scaling.doubled(axis, taken),
            "again": f"`{taken[0]['command']}`",
        }


def call_rows(rows):
    for row in rows:
        if row.get("sweep") == "call":
            for name, quartiles in row["quartiles_us"].items():
                yield {
                    "": name,
                    "us": row["median_us"][name],
                    "quartiles": "{} to {}".format(*quartiles),
                    "again": f"`{row['command']}`",
                }


def markdown(rows):
    rows = list(rows)
    # Numbers as they are written, so that no column's format depends on its other rows.
    table = tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)
    return (
        re.sub(r" {2,}", " ", re.sub(r":?-{3,}:?", "---", table)) if rows else "Not measured yet."
    )


# ----- plots --------------------------------------------------------------------------------------

# Okabe and Ito's colours, which colour-blind people can tell apart; on dark, lighter where needed.
THEMES = {
    "light": {"text": "#24292f", "faint": "#8c959f", "ours": "#0072b2"},
    "dark": {"text": "#d1d7e0", "faint": "#6e7781", "ours": "#56b4e9"},
}
COLORS = {
    "eager": "#d55e00",
    "torch.compile": "#009e73",
    "embedding_bag": "#cc79a7",
    "one-hot": "#e69f00",
}


def color(name, theme):
    return COLORS.get(name) or THEMES[theme]["ours" if name == "ours" else "faint"]


def figure(columns, theme, height=3.6, width=8.0):
    matplotlib.rcdefaults()
    text, faint = THEMES[theme]["text"], THEMES[theme]["faint"]
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "fused-embedding-lookup",
            "svg.fonttype": "none",
            "font.family": "DejaVu Sans",  # matplotlib brings it, so that every machine has it
            "font.size": 9,
            "text.color": text,
            "axes.labelcolor": text,
            "axes.edgecolor": faint,
            "xtick.color": text,
            "ytick.color": text,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 10,
        }
    )
    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)


def svg(drawing):
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None}
    drawing.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    pyplot.close(drawing)
    # Without a generic name, a browser that lacks the font takes one with serifs.
    text = buffer.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', sans-serif")
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def finish(axis, sizes, x_label, title, ends, theme):
    """Logarithmic axes, and the name of each line at its end, moved apart where they would touch."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.set_xlabel(x_label)
    axis.set_title(title)
    bottom, top = axis.transData.inverted().transform(axis.transAxes.transform([(0, 0), (0, 1)]))[
        :, 1
    ]
    step = (top / bottom) ** 0.065
    previous = 0.0
    for name, x, y, label in sorted(ends, key=lambda end: end[2]):
        previous = max(y, previous * step)
        axis.annotate(
            label,
            (x, previous),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=color(name, theme),
            fontweight="bold" if name == "ours" else "normal",
            annotation_clip=False,
        )


def plot_time(rows, theme):
    """Time of the forward against the number of patches of one image."""
    drawing, axes = figure(2, theme)
    for axis, (dtype, title) in zip(axes[0], (("fp32", "float32"), ("bf16", "bfloat16"))):
        found = {
            n: find(rows, "cpu", IMAGE | {"patches": n}, "forward", dtype, "torch.compile")
            for n in SOFT_TOKEN_PATCHES
        }
        found = {n: row for n, row in found.items() if row}
        if not found:
            continue
        sizes, ends = list(found), []
        for name in found[sizes[0]]["median_ms"]:
            times = [row["median_ms"][name] for row in found.values()]
            ours = name == "ours"
            axis.plot(
                sizes,
                times,
                color=color(name, theme),
                marker="o",
                markersize=3,
                linewidth=2.5 if ours else 1.3,
                linestyle=":" if name == "copy" else "-",
                zorder=3 if ours else 2,
            )
            label = "a copy of the bytes" if name == "copy" else name
            ends.append((name, sizes[-1], times[-1], label))
        finish(axis, sizes, "patches of one image", f"Forward, {title}: milliseconds", ends, theme)
    return svg(drawing)


def plot_share(rows, theme):
    """What share of a copy's bandwidth is reached, for each shape."""
    bars = [
        (f"{row['direction']} {row['dtype']}, {shape_text(row['shape'])}", row["ratio"]["copy"])
        for row in rows
        if "cpu" in row["machine"] and "torch.compile" in row["ratio"]
    ]
    drawing, axes = figure(1, theme, height=0.6 + 0.22 * len(bars))
    axis = axes[0][0]
    names = [name for name, _ in bars][::-1]
    shares, lows, highs = zip(*[interval for _, interval in bars][::-1])
    errors = [[s - low for s, low in zip(shares, lows)], [h - s for s, h in zip(shares, highs)]]
    axis.barh(names, shares, color=THEMES[theme]["ours"], height=0.7)
    axis.errorbar(
        shares, names, xerr=errors, fmt="none", ecolor=THEMES[theme]["text"], elinewidth=1
    )
    for name, share, high in zip(names, shares, highs):
        axis.annotate(
            f"{share:.0%}", (high, name), xytext=(4, 0), textcoords="offset points", va="center"
        )
    axis.axvline(1, color=THEMES[theme]["faint"], linewidth=1, linestyle=":")
    axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axis.margins(y=0.01)
    axis.tick_params(axis="y", length=0)
    axis.set_title("Share of a copy's bandwidth, with its 95% interval")
    return svg(drawing)


def plot_memory(rows, theme):
    """What a forward allocates, against the batch. What was not run is computed, and looks it."""
    drawing, axes = figure(1, theme)
    axis, ends = axes[0][0], []
    found = {
        batch: find(rows, "cpu", CPU | {"batch": batch}, "forward", "bf16", "one-hot")
        for batch in (1, 2, 4, 8)
    }
    found = {batch: row for batch, row in found.items() if row}
    for name in ("one-hot", "eager", "ours"):
        sizes = [row["peak_bytes"][name] / 2**20 for row in found.values()]
        axis.plot(
            list(found),
            sizes,
            color=color(name, theme),
            marker="o",
            linewidth=2.5 if name == "ours" else 1.3,
        )
        ends.append((name, max(found), sizes[-1], name))
    last = max(found)
    computed = [
        measure.one_hot_bytes(batch, 2520, 10240, measure.DTYPES["bf16"]) / 2**20
        for batch in (last, TRAINING_BATCH)
    ]
    style = {"color": color("one-hot", theme), "linestyle": "--", "linewidth": 1.3}
    axis.plot((last, TRAINING_BATCH), computed, marker="o", markerfacecolor="none", **style)
    ends[0] = ("one-hot", TRAINING_BATCH, computed[-1], "one-hot, computed:\nthe one-hot alone")
    finish(
        axis,
        [*found, TRAINING_BATCH],
        "images of 2520 patches, 768 wide, bfloat16",
        "Peak memory of the forward beyond its inputs: MiB",
        ends,
        theme,
    )
    return svg(drawing)


def plot_scaling(rows, theme):
    """Time against the number of tokens, from one on."""
    drawing, axes = figure(2, theme)
    for axis, direction in zip(axes[0], ("forward", "backward")):
        taken = [r for r in rows if r.get("sweep") == "N" and r["direction"] == direction]
        sizes = [row["shape"]["patches"] for row in taken]
        ends = []
        for name in ("eager", "ours"):
            times = [row["median_us"][name] / 1e3 for row in taken]
            axis.plot(
                sizes, times, color=color(name, theme), linewidth=2.5 if name == "ours" else 1.3
            )
            ends.append((name, sizes[-1], times[-1], name))
        finish(
            axis,
            [1, 100, 10_000, 1_000_000],
            "tokens, 768 wide, bfloat16",
            f"{direction.capitalize()}: milliseconds",
            ends,
            theme,
        )
    return svg(drawing)


PLOTS = {
    "time": (plot_time, "Time of the forward against the number of patches"),
    "share": (plot_share, "Share of a copy's bandwidth, by shape"),
    "memory": (plot_memory, "Peak memory against the batch: one-hot, eager, ours"),
    "scaling": (plot_scaling, "Time against the number of tokens"),
}


def picture(name, page):
    path = "" if page.parent == measure.RESULTS.parent else "benchmarks/"
    path += f"results/{name}"
    return (
        f'<picture>\n<source media="(prefers-color-scheme: dark)" srcset="{path}_dark.svg">\n'
        f'<img src="{path}_light.svg" alt="{PLOTS[name][1]}">\n</picture>\n'
    )


# ----- all of it ----------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say whether they disagree")
    args = parser.parse_args()
    wrong = []
    for path, text in generated().items():
        if path.exists() and path.read_text() == text:
            continue
        wrong.append(str(path.relative_to(measure.ROOT)))
        if not args.check:
            path.write_text(text)
            print(f"Wrote {path}")
    if wrong and args.check:
        sys.exit(
            f"error: {', '.join(wrong)} disagree with the JSON in benchmarks/results; run `make report`"
        )


def generated():
    """The text of every file that comes from the JSON."""
    rows = []
    for path in sorted(measure.RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        rows += content if isinstance(content, list) else []  # the gate's baseline is no list
    op = [row for row in rows if "bytes" in row]
    files = {
        measure.RESULTS / f"{name}_{theme}.svg": plot(rows if name == "scaling" else op, theme)
        for name, (plot, _) in PLOTS.items()
        for theme in THEMES
    }
    sections = {
        "targets": target_rows(op),
        "main": main_rows(op),
        "cpu": op_rows("cpu", op),
        "gpu": op_rows("gpu", op),
        "mac": mac_rows(rows),
        "step": step_rows(rows),
        "sweeps": sweep_rows(rows),
        "call": call_rows(rows),
    }
    sections = {name: markdown(taken) for name, taken in sections.items()}
    sections["main"] = main_origin(op) + sections["main"]
    for page in PAGES:
        available = sections | {f"plot {name}": picture(name, page) for name in PLOTS}

        def fill(match, available=available):
            return f"{match[1]}\n{available[match[2]].strip()}\n\n{match[3]}"

        marked = r"(<!-- benchmarks: (.*?) -->\n).*?(<!-- /benchmarks -->)"
        files[page] = re.sub(marked, fill, page.read_text(), flags=re.DOTALL)
    return files


if __name__ == "__main__":
    main()
