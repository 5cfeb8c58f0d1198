"""The tables of the pages and the plots, from the JSON in benchmarks/results.

make report
make report ARGS=--check    # changes nothing; fails if they disagree with the JSON

They stand between <!-- benchmarks: NAME --> and <!-- /benchmarks -->. What was not measured is not there.
"""

import io
import json
import os
import re
import sys

import matplotlib

matplotlib.use("svg")

import cases
import measure
from cases import DIRECTIONS, each
from matplotlib import pyplot
from matplotlib.ticker import EngFormatter, PercentFormatter
from measure import Case

PAGES = [
    p
    for folder in (".", "benchmarks", "docs", "upstream")
    for p in (measure.ROOT / folder).glob("*.md")
]
AT_MOST = ("us", "ops")  # kinds of goals that are upper limits
TRAINING_BATCH = 40  # of issue 46175 of transformers


def main():
    parser = measure.parser(__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether they disagree")
    args = parser.parse_args()
    files = generated(measure.RESULTS)
    wrong = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    names = ", ".join(str(path.relative_to(measure.ROOT)) for path in wrong)
    if wrong and args.check:
        sys.exit(f"error: {names} disagree with the JSON in benchmarks/results; run `make report`")
    for path in wrong:
        path.write_text(files[path])
    print(f"Wrote {names}" if wrong else "All is as it was measured.")


def generated(folder):
    """{path: text} of all files that come from the JSON in a folder."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        rows += content if isinstance(content, list) else []  # the gate's baseline is no list
    files = {}
    for theme, style in THEMES.items():
        with pyplot.style.context([style, STYLE]):
            for name, (plot, _) in PLOTS.items():
                files[measure.RESULTS / f"{name}_{theme}.svg"] = svg(plot(rows))
    sections = tables(rows)
    return files | {page: filled(page, sections) for page in PAGES}


def filled(page, sections):
    """The text of a page with its sections as they are now."""
    texts = sections | {f"plot {name}": picture(name, page) for name in PLOTS}

    def section(match):
        text = texts[match[2]]
        return f"{match[1]}\n{text}\n\n{match[3]}" if text else match[1] + match[3]

    marked = r"(<!-- benchmarks: (.*?) -->\n).*?(<!-- /benchmarks -->)"
    return re.sub(marked, section, page.read_text(), flags=re.DOTALL)


# ----- tables ---------------------------------------------------------------------------------------


def found(rows, some_cases, peer="eager"):
    """The rows of cases on a CPU that were measured with a peer, in the order of the cases."""
    of = {}
    for row in rows:
        if "case" in row and "cpu" in row["machine"] and peer in row["ratio"]:
            of.setdefault(str(Case(**row["case"])), row)
    return [of[str(case)] for case in some_cases if str(case) in of]


# What stands above tables that may be missing.
COMPUTED = (
    "With the ids and weights made within the call, in eager code by transformers' own function. *Ops* are those that "
    "PyTorch dispatches, without views."
)
QWEN_STEP = "Of a whole forward of Qwen3-VL's tower at its real size, with random weights:"
GPU = "## GPUs", "By `tools/gpu_check.sh`: the GPU's own time, small calls replayed as a graph."
MAC = "## Apple's chips", "By `examples/on_a_mac.py`, forty images: the host's time."


def tables(rows):
    """{section: its text}"""
    timed = [row for row in rows if "ratio" in row]
    on_cpu = [row for row in timed if "cpu" in row["machine"]]
    on_gpu = [row for row in timed if "gpu" in row["machine"]]
    steps = [row for row in timed if "step" in row]
    return {
        "goals": of_each_run(goal_rows, on_cpu + on_gpu),
        "main": of_each_run(op_rows, found(rows, each(cases.MAIN, dtypes=measure.DTYPES))),
        "cpu": of_each_run(op_rows, found(rows, cases.OPS, "torch.compile")),
        "computed": of_each_run(op_rows, found(rows, cases.COMPUTED), COMPUTED),
        "sweeps": of_each_run(sweep_rows, on_cpu),
        "call": of_each_run(call_rows, on_cpu),
        "steps": of_each_run(step_rows, steps),
        "qwen step": of_each_run(step_rows, [r for r in steps if "Qwen" in r["step"]], QWEN_STEP),
        "gpu": of_each_run(op_rows, on_gpu, *GPU),
        "mac": markdown(mac_rows(rows), *MAC),
    }


def markdown(rows, *above):
    """A table below some paragraphs; nothing if it has no rows."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns.sort(key=lambda column: column == "again")  # which stays the last
    lines = [columns, ["---"] * len(columns), *([row.get(c, "") for c in columns] for row in rows)]
    table = "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
    return "\n\n".join([*above, table]) if rows else ""


def of_each_run(function, rows, *above):
    """For each machine, date and commit a table, below their names."""
    runs = {}
    for row in rows:
        machine = row["machine"]
        name = machine.get("gpu") or "{cpu}, {threads} cores, {instructions}".format(**machine)
        run = f"{name}, torch {machine['torch']}, {row['date'][:10]}, commit {row['commit']}:"
        runs.setdefault(run, []).append(row)
    made = [table for run, taken in runs.items() if (table := markdown(function(taken), run))]
    return "\n\n".join([*above, *made]) if made else ""


def amount(what, value):
    """A goal, or what it is compared with: a share of a copy's bandwidth, us, ops, or a ratio to a peer."""
    if what == "copy":
        return f"{value:.0%}"
    return f"{value:g} {what}" if what in AT_MOST else f"{value:.3g}x"


def interval(what, values):
    value, low, high = (amount(what, value) for value in values)
    return value if what in AT_MOST else f"{value} [{low}, {high}]"


def ms(microseconds):
    return f"{microseconds / 1e3:{',.0f' if microseconds > 1e6 else '.3g'}} ms"


def again(row):
    return {"again": f"`{row['command']}`"}


def goal_rows(rows):
    for device, subject, goals in cases.GOALS:
        for row in rows:
            # Those with the one-hot are for their memory, of two rounds.
            if device in row["machine"] and "one-hot" not in row["ratio"]:
                values = measured(row).get(str(subject), {})
                for what in goals:
                    if what in values:
                        yield goal_row(row, subject, what, goals[what], values[what])


def measured(row):
    """{what a goal can be of: {what it can say: [median, low, high]}}"""
    if "call" in row:
        return {f"a call, {name}": {"us": [us] * 3} for name, us in row["median_us"].items()}
    if "step" in row:
        return {f"{row['step']} {row['dtype']}": {"eager": row["ratio"]["before"]}}
    at_most = {"us": row["median_us"], "ops": row.get("ops", {})}
    values = {what: [of["ours"]] * 3 for what, of in at_most.items() if of}
    return {str(Case(**row["case"])): row["ratio"] | values}


def goal_row(row, subject, what, goal, values):
    _, low, high = values
    if what in AT_MOST:
        text, met, missed = f"≤ {amount(what, goal)}", high <= goal, low > goal
    else:
        against = "of a copy's bandwidth" if what == "copy" else what
        text, met, missed = f"≥ {amount(what, goal)} {against}", low >= goal, high < goal
    limit = ""
    if what in row["ratio"] and what != "copy":
        limit = amount(what, row["ratio"][what][0] / row["ratio"]["copy"][0])
    return {
        "": subject,
        "goal": text,
        "measured": interval(what, values),
        "met": "yes" if met else "no" if missed else "not certain",
        "at a copy's bandwidth": limit,
        **again(row),
    }


def op_rows(rows):
    for row in rows:
        if "bytes" not in row:  # a call, on a GPU
            continue
        us, ratio, peak = row["median_us"], row["ratio"], row["peak_bytes"]
        peers = {
            peer: f"{ms(us[peer])}, {interval(peer, ratio[peer])}"
            for peer in ratio
            if peer != "copy"
        }
        ops = {"ops, eager's": "{ours}, {eager}".format(**row["ops"])} if "ops" in row else {}
        yield {
            "": Case(**row["case"]),
            "ours": ms(us["ours"]),
            **peers,
            "must move": f"{row['bytes'] / 1e6:.0f} MB, {row['bytes'] / us['ours'] / 1e3:.0f} GB/s",
            "of a copy's bandwidth": interval("copy", ratio["copy"]),
            "peak, eager's": f"{peak['ours'] / 2**20:,.0f}, {peak['eager'] / 2**20:,.0f} MiB",
            **ops,
            **again(row),
        }


def step_rows(rows):
    for row in rows:
        shares = [f"{share * 100:.3g}%" for share in row["share"].values()]
        yield {
            "": f"{row['step']} {row['dtype']}, {row['patches']:,} patches",
            "whole step before, after": ", ".join(map(ms, row["median_us"].values())),
            "before, times after": interval("eager", row["ratio"]["before"]),
            "lookup before, after": ", ".join(map(ms, row["lookup_us"].values())),
            "share before, after": ", ".join(shares),
            **again(row),
        }


def mac_rows(rows):
    for row in rows:
        if "chip" in row:
            taken = row["median_ms"]
            yield {
                "": f"{row['chip']}, {row['direction']}, {row['problem']}",
                "ours": f"{taken['ours']:.3g} ms",
                "eager": f"{taken['eager'] / taken['ours']:.3g}x",
                "must move": f"{row['floor_bytes'] / 1e6:.0f} MB",
                "of a copy's bandwidth": f"{taken['copy'] / taken['ours']:.0%}",
                "checks failed": len(row["failures"]),
                "measured": f"torch {row['torch']}, commit {row['commit']}, {row['date']}",
            }


def sweep_rows(rows):
    """The ends of each sweep, and where what grows outweighs what doesn't."""
    for name, sweep in cases.SWEEPS.items():
        for direction in DIRECTIONS:
            taken = found(rows, each(*sweep, directions=[direction]))
            if not taken:
                continue
            ends = taken[0], taken[-1]
            sizes = [row["case"][cases.SIZES[name[0]]] for row in taken]
            ours = [row["median_us"]["ours"] for row in taken]
            ratios = [interval("eager", row["ratio"]["eager"]) for row in ends]
            twice = [f"{size:,}" for size, us in zip(sizes, ours) if us >= 2 * ours[0]]
            yield {
                "": f"{direction}, {name}",
                "from, to": f"{sizes[0]:,}, {sizes[-1]:,}",
                "ours (us)": ", ".join(f"{row['median_us']['ours']:,g}" for row in ends),
                "eager (us)": ", ".join(f"{row['median_us']['eager']:,g}" for row in ends),
                "eager, times ours": ", ".join(ratios),
                "first to take twice as long": (twice or ["none here"])[0],
                **again(taken[-1]),
            }


def call_rows(rows):
    for row in rows:
        if "call" in row:
            for name, quartiles in row["quartiles_us"].items():
                between = "{:g} to {:g}".format(*quartiles)
                yield {"": name, "us": row["median_us"][name], "quartiles": between, **again(row)}


# ----- plots ----------------------------------------------------------------------------------------

THEMES = {"light": "default", "dark": "dark_background"}
# Okabe and Ito's colours, which colour-blind people can tell apart.
COLORS = {"ours": "#0072b2", "eager": "#d55e00", "torch.compile": "#009e73"}
COLORS |= {"embedding_bag": "#cc79a7", "one-hot": "#e69f00", "copy": "#8c959f"}
STYLE = {
    "svg.hashsalt": "fused-embedding-lookup",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # matplotlib brings it, so that every machine has it
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
}


def subplots(columns=1, height=3.6):
    return pyplot.subplots(1, columns, figsize=(8, height), layout="constrained")


def svg(figure):
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    # Without a generic name, a browser that lacks the font takes one with serifs.
    text = buffer.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', sans-serif")
    # The last of matplotlib's six decimals depends on the CPU: numpy has other code for AVX-512.
    text = re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.3f}", text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def curves(axis, rows, size, what, unit, title, x_label):
    """A curve for each peer: what it has taken, in a unit, against a size of the cases."""
    sizes = [row["case"][size] for row in rows]
    for name in rows[0][what]:
        values = [row[what][name] / unit for row in rows]
        style = {"linewidth": 2.5, "zorder": 3} if name == "ours" else {"linewidth": 1.3}
        style["linestyle"] = ":" if name == "copy" else "-"
        axis.plot(sizes, values, color=COLORS[name], label=name, marker="o", markersize=3, **style)
    axis.set(xscale="log", yscale="log", xlabel=x_label, title=title)
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(sizes) < 6:
        axis.set_xticks(sizes, sizes)
        axis.minorticks_off()
    axis.legend()


def plot_times(rows, x_label, panels):
    """Against the number of patches."""
    figure, axes = subplots(len(panels))
    for axis, (title, some_cases) in zip(axes, panels.items()):
        title = f"{title}: milliseconds"
        curves(axis, found(rows, some_cases), "patches", "median_us", 1e3, title, x_label)
    return figure


def plot_time(rows):
    panels = {
        f"Forward, {dtype}": each(*cases.TIMES, dtypes=[dtype], directions=["forward"])
        for dtype in cases.BOTH
    }
    return plot_times(rows, "patches of one image", panels)


def plot_scaling(rows):
    panels = {
        f"{direction.capitalize()}, bf16": each(*cases.SWEEPS["N"], directions=[direction])
        for direction in DIRECTIONS
    }
    return plot_times(rows, "tokens, 768 wide", panels)


def plot_memory(rows):
    """Against the batch. What was not run is computed, and looks it."""
    figure, axis = subplots()
    taken = found(rows, cases.MEMORY, "one-hot")
    title = "Peak memory of the forward beyond its inputs: MiB"
    x_label = f"images of 2520 patches, 768 wide, {taken[0]['case']['dtype']}"
    curves(axis, taken, "batch", "peak_bytes", 2**20, title, x_label)
    batches = [row["case"]["batch"] for row in taken] + [TRAINING_BATCH]
    an_image = taken[-1]["peak_bytes"]["one-hot"] / 2**20 / batches[-2]
    style = {"color": COLORS["one-hot"], "markerfacecolor": "none", "label": "one-hot, computed"}
    axis.plot(batches[-2:], [an_image * batch for batch in batches[-2:]], "o--", **style)
    axis.set_xticks(batches, batches)
    axis.legend()
    return figure


def plot_share(rows):
    taken = found(rows, cases.OPS, "torch.compile")[::-1]
    figure, axis = subplots(height=0.6 + 0.22 * len(taken))
    names = [str(Case(**row["case"])) for row in taken]
    shares, lows, highs = zip(*(row["ratio"]["copy"] for row in taken))
    errors = [[s - low for s, low in zip(shares, lows)], [h - s for s, h in zip(shares, highs)]]
    bars = axis.barh(names, shares, xerr=errors, color=COLORS["ours"], ecolor=COLORS["copy"])
    axis.bar_label(bars, fmt="{:.0%}", padding=4)
    axis.axvline(1, color=COLORS["copy"], linewidth=1, linestyle=":")
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.margins(y=0.01)
    figure.suptitle("Share of a copy's bandwidth, with its 95% interval", fontsize=10)
    return figure


PLOTS = {
    "time": (plot_time, "Time of the forward against the number of patches"),
    "share": (plot_share, "Share of a copy's bandwidth, by shape"),
    "memory": (plot_memory, "Peak memory against the batch: one-hot, eager, ours"),
    "scaling": (plot_scaling, "Time against the number of tokens"),
}


def picture(name, page):
    path = os.path.relpath(measure.RESULTS / name, page.parent)
    return (
        f'<picture>\n<source media="(prefers-color-scheme: dark)" srcset="{path}_dark.svg">\n'
        f'<img src="{path}_light.svg" alt="{PLOTS[name][1]}">\n</picture>'
    )


if __name__ == "__main__":
    main()
