"""Whether the kernel has become slower.

    make gate
    make gate ARGS=--write    # count anew what the committed instructions are compared with

Two things are looked at. Instructions, by callgrind, of one thread in the AVX2 kernels (valgrind has no AVX-512):
steady to 0.05%, so 2% more than the committed count fails. Another compiler makes other ones, and another CPU has
another memset: they are compared with the same compiler and on the same CPU only, and it says so elsewhere.
And times, as ratios to eager's in the same rounds, on any machine. These are noisy, also from machine to machine:
the least that is let through, LEAST, is far below what is measured, and the best of five attempts counts. So CI
sees a kernel that is broken for speed, or has more instructions. It doesn't see one that waits longer.
"""

import argparse
import itertools
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
from cases import LISTS

BASELINE = measure.RESULTS / "baseline.json"
ATTEMPTS = 5
MORE_INSTRUCTIONS = 1.02
LEAST = 2  # times as fast as eager; 7 to 18 were measured


def main():
    parser = measure.parser(__doc__)
    parser.add_argument("--write", action="store_true", help="write the committed counts")
    # What this script calls itself with, under valgrind.
    parser.add_argument("--launches", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    kernel = measure.load_kernel("cpu")
    if args.launches:
        return launches(kernel)
    if shutil.which("valgrind") is None:
        sys.exit("error: valgrind is not installed (Debian: apt-get install valgrind)")
    if args.write:
        row = measure.origin(kernel, "cpu", "make gate ARGS=--write") | {"compiler": compiler()}
        BASELINE.write_text(json.dumps(row | {"instructions": instructions()}, indent=1) + "\n")
        return print(f"Wrote {BASELINE}")

    failed = []
    for name, passed, text in itertools.chain(compare_times(kernel), compare_instructions(kernel)):
        print(f"{'ok' if passed else 'FAILED':6} {name}: {text}", flush=True)
        failed += [] if passed else [name]
    if failed:
        sys.exit(f"error: slower than is let through: {', '.join(failed)}")


def compare_times(kernel):
    """Verdicts: a name, whether it has passed, and what was found."""
    for case in LISTS["gate"]:
        best = 0
        for _ in range(ATTEMPTS):
            ratio, _, _ = measure.measure(kernel, case)["ratio"]["eager"]
            best = max(best, ratio)
            if best >= LEAST:
                break
        text = f"{best:.3g} times as fast as eager, at least {LEAST}"
        yield f"{case.direction} {case.dtype}", best >= LEAST, text


def compare_instructions(kernel):
    """Verdicts like those, none where the counts can't be compared."""
    baseline = json.loads(BASELINE.read_text())
    here = {"machine": measure.machine(kernel, "cpu"), "compiler": compiler()}
    for what, this in here.items():
        if baseline[what] != this:
            print(f"instructions: not compared, the {what} was {baseline[what]}, this is {this}")
            return
    for name, count in instructions().items():
        most = baseline["instructions"][name] * MORE_INSTRUCTIONS
        yield f"{name}, instructions", count <= most, f"{count:,}, at most {most:,.0f}"


def compiler():
    command = [os.environ.get("CXX", "c++"), "--version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")[0]


def instructions():
    """The instructions of each launcher's call, by what `launches` says that it was."""
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
        for number, name in enumerate(run.stdout.splitlines(), start=1):
            dump = Path(folder, f"out.{number}").read_text()
            counts[name] = int(re.search(r"^totals: (\d+)", dump, re.MULTILINE)[1])
    if not counts or not all(counts.values()):
        sys.exit(f"error: callgrind did not see the launchers, it counted {counts}")
    return counts


def launches(kernel):
    """A small problem for each dtype, under callgrind. Dumps the counts after each direction, and says its name."""

    def control(*arguments):
        command = ["callgrind_control", *arguments, str(os.getpid())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    control("-i", "on")
    for dtype in measure.DTYPES:
        given = measure.arguments(kernel, measure.Case(1, 630, rows=64, dtype=dtype))
        out = kernel.fused_embedding_lookup(**given)
        control("--dump")
        print(f"forward {dtype}")
        torch.autograd.grad(out, given["table"], given["residual"])
        control("--dump")
        print(f"backward {dtype}")


if __name__ == "__main__":
    main()
