"""Whether the kernel has become slower than the committed baseline.

    make gate
    make gate ARGS=--write    # measure the baseline anew, 5 minutes; best with nothing else running

Two things are compared. Times, as ratios to eager and to a plain copy of as many bytes in the same rounds:
noisy, so the baseline is the median of several processes, what is let through is twice as far above it as
the worst of them was, and never less than 50%, and what is above that is measured again: being slower shows in
each of five processes. They are compared on the machine of the baseline only.
And instructions, by callgrind, of one thread in the AVX2 kernels (valgrind has no AVX-512): steady to 0.05%, but another compiler makes other ones and another CPU has another memset, so they are
compared with the baseline's compiler and on its machine only.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import torch
from tqdm import tqdm

BASELINE = measure.RESULTS / "baseline.json"
ROUNDS = 15
PROCESSES = 8  # for the baseline
ATTEMPTS = 5
DTYPES = ("fp32", "bf16", "fp16")
MIN_THRESHOLD = 0.5
INSTRUCTIONS_THRESHOLD = 0.02


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the baseline")
    # What this script calls itself with.
    parser.add_argument("--ratios", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--launches", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    kernel = measure.load_kernel()
    if args.ratios:
        return print(json.dumps(ratios(kernel)))
    if args.launches:
        return launches(kernel)
    if shutil.which("valgrind") is None:
        sys.exit("error: valgrind is not installed (Debian: apt-get install valgrind)")
    if args.write:
        return write(kernel)
    if not BASELINE.exists():
        sys.exit(f"error: there is no {BASELINE}; `make gate ARGS=--write` measures it")

    baseline = json.loads(BASELINE.read_text())
    measured = {}
    machine = measure.machine(kernel)
    if baseline["machine"] != machine:
        print(f"nothing is compared: the baseline is of {baseline['machine']}, this is {machine}")
    else:
        if baseline["compiler"] == compiler():
            measured |= instructions()
        else:
            print(f"instructions: not compared, the baseline's are of {baseline['compiler']}")
        measured |= best_ratios(baseline["rows"])
    failed = 0
    for name, value in measured.items():
        row = baseline["rows"][name]
        verdict = "ok" if value <= limit(row) else "FAILED"
        failed += verdict == "FAILED"
        print(
            f"{verdict:6} {name}: {value:,.4g}, baseline {row['baseline']:,.4g} "
            f"+ {row['threshold']:.0%} = {limit(row):,.4g}"
        )
    if failed:
        sys.exit(
            f"error: {failed} of {len(measured)} are above what the baseline allows. If that is meant, "
            "or the noise of a busy machine, see `make gate ARGS=--write`."
        )


def limit(row):
    return row["baseline"] * (1 + row["threshold"])


def write(kernel):
    rows = {}
    runs = in_processes(PROCESSES)
    for name in runs[0]:
        values = sorted(run[name] for run in runs)
        median = values[len(values) // 2]
        rows[name] = {
            "baseline": median,
            "spread": [values[0], values[-1]],
            "threshold": round(max(MIN_THRESHOLD, 2 * (values[-1] / median - 1)), 3),
        }
    first, second = instructions(), instructions()
    for name, count in first.items():
        rows[name] = {
            "baseline": count,
            "spread": sorted([count, second[name]]),
            "threshold": INSTRUCTIONS_THRESHOLD,
        }
    report = measure.origin(kernel, "make gate ARGS=--write")
    measure.write(BASELINE, report | {"compiler": compiler(), "processes": PROCESSES, "rows": rows})


def compiler():
    command = [os.environ.get("CXX", "c++"), "--version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")[0]


# ----- times --------------------------------------------------------------------------------------


def best_ratios(rows):
    """The best of as many processes as it takes for all ratios to be let through, up to ATTEMPTS."""
    best = {}
    for _ in range(ATTEMPTS):
        (ratios,) = in_processes(1)
        best = {name: min(value, best.get(name, value)) for name, value in ratios.items()}
        if all(value <= limit(rows[name]) for name, value in best.items()):
            break
    return best


def in_processes(count):
    """The ratios that `count` processes measure, one after the other."""
    command = [sys.executable, __file__, "--ratios"]
    return [
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        for _ in tqdm(range(count), desc="processes", unit="process")
    ]


def ratios(kernel):
    """The median ratio of our time to each peer's, for issue 2's shape: B=8 N=2520 H=768 P=10240."""
    result = {}
    position_ids, padding = measure.images(8, 2520)
    for name in DTYPES[:2]:
        dtype = measure.DTYPES[name]
        table = torch.randn(2, 10240, 768, dtype=dtype, requires_grad=True)
        residual = torch.randn(8, 2520, 768, dtype=dtype, requires_grad=True)
        grad = torch.randn_like(residual)
        # What forward and backward move, but for the ids.
        source = torch.ones_like(residual.detach())
        target = torch.empty_like(source)
        peers = {"ours": measure.fused(kernel), "eager": measure.eager}

        def forward(peer):
            with torch.no_grad():
                return measure.timed(lambda: peer(position_ids, table, padding, residual))  # noqa: B023

        def backward(peer):
            out = peer(position_ids, table, padding, residual)  # noqa: B023
            inputs = (table, residual)  # noqa: B023
            return measure.timed(lambda: torch.autograd.grad(out, inputs, grad))  # noqa: B023

        for direction, run in {"forward": forward, "backward": backward}.items():
            measurements = {n: lambda peer=peer: run(peer) for n, peer in peers.items()}  # noqa: B023
            measurements["copy"] = lambda: measure.timed(lambda: target.copy_(source))  # noqa: B023
            label = f"{direction} {name}"
            summary = measure.summary(measure.interleaved(measurements, ROUNDS, label))
            for peer, (ratio, _, _) in summary["ratio"].items():
                result[f"{label}, time of ours / {peer}"] = round(1 / ratio, 5)
    return result


# ----- instructions -------------------------------------------------------------------------------


def cases():
    return [(name, direction) for name in DTYPES for direction in ("forward", "backward")]


def instructions():
    """The instructions that the launchers execute, for each of `launches`."""
    print("counting instructions under valgrind, half a minute ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out"]
        # Nothing is counted, and little slowed down, before and between the launches.
        command += ["--instr-atstart=no", "--collect-atstart=no"]
        command += ["--toggle-collect=embedding_lookup::launch_*"]
        command += [sys.executable, __file__, "--launches"]
        environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            sys.exit(f"error: the program under valgrind failed\n{run.stdout}{run.stderr}")
        counts = {}
        for number, (name, direction) in enumerate(cases(), start=1):
            dump = Path(folder, f"out.{number}").read_text()
            counts[f"{direction} {name}, instructions"] = int(
                re.search(r"^totals: (\d+)", dump, re.MULTILINE)[1]
            )
    if not all(counts.values()):
        sys.exit(f"error: callgrind did not see the launchers, it counted {counts}")
    return counts


def launches(kernel):
    """A small problem for each dtype, under callgrind. Dumps the counts after each direction."""

    def control(*arguments):
        command = ["callgrind_control", *arguments, str(os.getpid())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    position_ids, padding = measure.images(1, 630)
    control("-i", "on")
    for name in DTYPES:
        table = torch.randn(2, 64, 768, dtype=measure.DTYPES[name], requires_grad=True)
        residual = torch.randn(1, 630, 768, dtype=table.dtype)
        out = measure.fused(kernel)(position_ids, table, padding, residual)
        control("--dump")
        torch.autograd.grad(out, table, residual)
        control("--dump")


if __name__ == "__main__":
    main()
