"""Whether the kernel has become slower.

    make gate
    make gate ARGS=--write    # count anew what the committed instructions are compared with

Two things are looked at. Instructions, by callgrind, of one thread in the AVX2 kernels (valgrind has no AVX-512):
steady to 0.05%, so 2% more than the committed count fails. Another compiler makes other ones, and another CPU has
another memset: they are compared with the same compiler and on the same CPU only, and it says so elsewhere.
And times, as ratios to eager's in the same rounds, on any machine. These are noisy, also from machine to machine:
the least that is let through, LEAST, is far below what is measured, and the best of five processes counts. So CI
sees a kernel that is broken for speed, or has more instructions. It doesn't see one that waits longer.
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

BASELINE = measure.RESULTS / "baseline.json"
ROUNDS = 15
ATTEMPTS = 5
DTYPES = ("fp32", "bf16", "fp16")
MORE_INSTRUCTIONS = 1.02
LEAST = 2  # times as fast as eager; 7 to 18 were measured


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the committed counts")
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

    failed = compare_times() + compare_instructions(kernel)
    if failed:
        sys.exit(f"error: slower than is let through: {', '.join(failed)}")


def report(name, passed, text):
    """Prints a verdict. Returns the names of what failed."""
    print(f"{'ok' if passed else 'FAILED':6} {name}: {text}")
    return [] if passed else [name]


def compare_times():
    best = {}
    for _ in range(ATTEMPTS):
        command = [sys.executable, __file__, "--ratios"]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        ratios = json.loads(run.stdout)
        best = {name: max(ratio, best.get(name, 0)) for name, ratio in ratios.items()}
        if all(ratio >= LEAST for ratio in best.values()):
            break
    failed = []
    for name, ratio in best.items():
        failed += report(
            name, ratio >= LEAST, f"{ratio:.3g} times as fast as eager, at least {LEAST}"
        )
    return failed


def compare_instructions(kernel):
    baseline = json.loads(BASELINE.read_text())
    for what, here in (("machine", measure.machine(kernel)), ("compiler", compiler())):
        if baseline[what] != here:
            print(
                f"instructions: not compared, counted with {what} {baseline[what]}, this is {here}"
            )
            return []
    failed = []
    for name, count in instructions().items():
        most = baseline["instructions"][name] * MORE_INSTRUCTIONS
        failed += report(f"{name}, instructions", count <= most, f"{count:,}, at most {most:,.0f}")
    return failed


def write(kernel):
    rows = measure.origin(kernel, "make gate ARGS=--write") | {"compiler": compiler()}
    measure.write(BASELINE, rows | {"instructions": instructions()})


def compiler():
    command = [os.environ.get("CXX", "c++"), "--version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")[0]


# ----- times --------------------------------------------------------------------------------------


def ratios(kernel):
    """How many times as fast as eager, by the median: B=8 N=2520 H=768 P=10240."""
    result = {}
    position_ids, padding = measure.images(8, 2520)
    for name in DTYPES[:2]:
        table = torch.randn(2, 10240, 768, dtype=measure.DTYPES[name], requires_grad=True)
        residual = torch.randn(8, 2520, 768, dtype=table.dtype, requires_grad=True)
        grad = torch.randn_like(residual)

        def forward(peer):
            with torch.no_grad():
                return measure.timed(lambda: peer(position_ids, table, padding, residual))  # noqa: B023

        def backward(peer):
            out = peer(position_ids, table, padding, residual)  # noqa: B023
            inputs = (table, residual)  # noqa: B023
            return measure.timed(lambda: torch.autograd.grad(out, inputs, grad))  # noqa: B023

        for run in (forward, backward):
            label = f"{run.__name__} {name}"
            peers = {"ours": measure.fused(kernel), "eager": measure.eager}
            measurements = {n: lambda peer=peer: run(peer) for n, peer in peers.items()}  # noqa: B023
            times = measure.interleaved(measurements, ROUNDS, label)
            result[label] = measure.summary(times)["ratio"]["eager"][0]
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
            counts[f"{direction} {name}"] = int(re.search(r"^totals: (\d+)", dump, re.MULTILINE)[1])
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
