"""Verify on a Mac what Linux can't, and measure it. With macOS 26 or later and kernel-builder installed:

    python3 examples/on_a_mac.py

Takes a quarter of an hour and 1 GB. Builds the Metal variant if build/ has none; then, for each version of
torch that it is built for, makes an environment in .build/mac/, checks there that

- outputs have the bits of the eager code on the same device, and one looked-up row those of an index,
- gradients have the same bits in five runs and are what sums in float64 round to,
- an id out of range is an error when PyTorch next synchronises,

and times both directions against eager and against a copy of the bytes that must move. The result goes to
benchmarks/results/mac_<chip>_<torch>.json, which `make report` makes a row for each measurement of.
"""

import argparse
import datetime
import importlib
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_VERSIONS = ["2.12.0", "2.13.0"]  # what the builder makes Metal variants for
REQUIREMENTS = ["kernels==0.17.2", "numpy"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--here", action="store_true", help="in this environment, with its torch")
    parser.add_argument("--device", default="mps", help="default: %(default)s")
    parser.add_argument("--kernel", type=Path, default=ROOT, help="the built kernel's folder")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--images", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--patches", type=int, default=2520, help="each (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=10240, help="of a table (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    args = parser.parse_args()
    if args.here:
        verify_and_measure(args)
        return
    if not list(ROOT.glob("build/torch*-metal-*")):
        subprocess.run(["kernel-builder", "build-and-copy"], cwd=ROOT, check=True)
    for version in TORCH_VERSIONS:
        environment = ROOT / ".build" / "mac" / version
        python = environment / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        install = [python, "-m", "pip", "install", f"torch=={version}", *REQUIREMENTS]
        subprocess.run(install, check=True)
        subprocess.run([python, __file__, "--here", *sys.argv[1:]], check=True)


def verify_and_measure(args):
    """Check everything, then time it and write the JSON. AssertionError if something is wrong."""
    import kernels
    import torch

    backend = {"mps": "metal"}.get(args.device, args.device)
    kernel = kernels.get_local_kernel(args.kernel, backend=backend)
    importlib.import_module(f"{kernel.__name__}.reference")  # the eager code
    with torch.device(args.device):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for hidden in (768, 1152, 771):  # the last without vectors
                for problem in problems(args, max(1, args.images // 5), hidden, dtype):
                    check_output(kernel, *problem)
                    check_gradient(kernel, *problem)
            check_copy(kernel, dtype)
            print(f"{dtype}: outputs and gradients are as they should be", flush=True)
        check_error(kernel, args.device)
        rows = [
            row
            for problem in problems(args, args.images, 768, torch.bfloat16)
            for row in measure(kernel, args, *problem)
        ]

    chip = run_for_text(
        {
            "Darwin": ["sysctl", "-n", "machdep.cpu.brand_string"],
            "Linux": ["uname", "-m"],
        }[platform.system()]
    )
    origin = {
        "chip": chip,
        "torch": torch.__version__,
        "commit": run_for_text(["git", "-C", str(ROOT), "rev-parse", "--short=7", "HEAD"]),
        "date": datetime.date.today().isoformat(),
    }
    name = re.sub(r"\W+", "-", f"{chip} {torch.__version__}".lower())
    path = args.results / f"mac_{name}.json"
    path.write_text(json.dumps([origin | row for row in rows], indent=2) + "\n")
    print(f"All as it should be. Wrote {path}")


def run_for_text(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


# ----- problems -----------------------------------------------------------------------------------


def problems(args, images, hidden, dtype):
    """A name, the op's arguments. Gemma 4's two lookups, and the Qwen family's four weighted ones."""
    import torch

    tokens, width = images * args.patches, 60
    places = torch.arange(tokens) % args.patches
    grid = torch.stack([places % width, places // width], dim=-1)
    residual = torch.randn(tokens, hidden).to(dtype)
    table = torch.randn(2, args.rows, hidden).to(dtype)
    arguments = {"table": table, "residual": residual}
    padding = places >= 20 * args.patches // 21
    yield "image grids", arguments | {"position_ids": grid, "padding": padding}
    yield "random ids", arguments | {"position_ids": torch.randint(0, args.rows, (tokens, 2))}
    yield "one id", arguments | {"position_ids": torch.full((tokens, 2), 7)}
    corner = places * args.rows // args.patches
    corners = (corner[:, None] + torch.tensor([0, 1, 48, 49])).clamp(max=args.rows - 1)
    weights = torch.rand(tokens, 4)
    interpolated = {"position_ids": corners, "table": torch.randn(args.rows, hidden).to(dtype)}
    yield "interpolated", interpolated | {"weights": weights, "residual": residual}


def check_output(kernel, name, arguments):
    import torch

    out = kernel.fused_embedding_lookup(**arguments)
    expected = kernel.reference.fused_embedding_lookup(**arguments)
    assert torch.equal(out, expected), f"{name}: the output differs from eager's"


def check_gradient(kernel, name, arguments):
    import torch

    table = arguments["table"].detach().requires_grad_()
    out = kernel.fused_embedding_lookup(**arguments | {"table": table})
    grad = arguments["residual"]
    grads = [torch.autograd.grad(out, table, grad, retain_graph=True)[0] for _ in range(5)]
    assert all(torch.equal(grads[0], other) for other in grads), f"{name}: the gradient changes"

    on_cpu = {key: tensor.detach().cpu() for key, tensor in arguments.items()}
    ids, weights = on_cpu["position_ids"], on_cpu.get("weights")
    padding = on_cpu.get("padding", torch.zeros(len(ids), dtype=torch.bool, device="cpu"))
    exact = torch.zeros_like(on_cpu["table"], dtype=torch.float64).view(-1, *table.shape[-2:])
    magnitude = exact.clone()
    for k, rows in enumerate(ids.unbind(-1)):
        terms = on_cpu["residual"].double() * (~padding)[:, None]
        if weights is not None:
            terms *= weights[:, k, None]
        exact[k % len(exact)].index_add_(0, rows, terms)
        magnitude[k % len(exact)].index_add_(0, rows, terms.abs())
    bound = torch.finfo(table.dtype).eps * exact.abs() + 1e-4 * magnitude + 1e-7
    wrong = (grads[0].cpu().double().view_as(exact) - exact).abs() > bound
    assert not wrong.any(), f"{name}: the gradient differs from the sum in float64"


def check_copy(kernel, dtype):
    """One row without weights and residual: its bits, those of subnormal numbers too."""
    import torch

    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    table = torch.randint(0, 256, (1, 500, 768), dtype=bits)
    ids = torch.randint(0, 500, (3000, 1))
    out = kernel.fused_embedding_lookup(ids, table.view(dtype))
    assert torch.equal(out.view(bits), table[0, ids[:, 0]]), "a copied row has other bits"


def check_error(kernel, device):
    import torch

    ids = torch.tensor([[0], [500]])
    try:
        kernel.fused_embedding_lookup(ids, torch.randn(1, 500, 768))
        getattr(torch, device).synchronize()
    except (IndexError, RuntimeError) as error:
        message = str(error)
    else:
        message = "no error"
    expected = "position_ids must be less than the 500 rows of the table, got 500 on axis 0"
    assert expected in message, f"an id out of range: {message}"


# ----- times --------------------------------------------------------------------------------------


def measure(kernel, args, name, arguments):
    """A row for each direction: medians of interleaved rounds, in milliseconds."""
    import torch

    table = arguments["table"].detach().requires_grad_()
    residual = arguments["residual"]
    ids_bytes = sum(
        arguments[key].nbytes for key in ("position_ids", "weights", "padding") if key in arguments
    )
    arguments = arguments | {"table": table}
    ops = {"ours": kernel.fused_embedding_lookup, "eager": kernel.reference.fused_embedding_lookup}

    def forward(op):
        with torch.no_grad():
            op(**arguments)

    calls = {op_name: lambda op=op: forward(op) for op_name, op in ops.items()}
    yield {"problem": name, "direction": "forward"} | times(
        args, calls, ids_bytes + 2 * residual.nbytes
    )
    outs = {op_name: op(**arguments) for op_name, op in ops.items()}
    calls = {
        op_name: lambda out=out: torch.autograd.grad(out, table, residual, retain_graph=True)
        for op_name, out in outs.items()
    }
    yield {"problem": name, "direction": "backward"} | times(
        args, calls, ids_bytes + residual.nbytes + table.nbytes
    )


def times(args, calls, floor_bytes):
    import torch

    source = torch.empty(floor_bytes // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    calls = calls | {"copy": lambda: target.copy_(source)}
    synchronize = getattr(torch, args.device).synchronize
    taken = {name: [] for name in calls}
    for _ in range(args.rounds + 2):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(5):
                call()
            synchronize()
            taken[name].append((time.perf_counter() - start) * 200)
    medians = {
        name: statistics.median(values[2:]) for name, values in taken.items()
    }  # 2 to warm up
    return {
        "images": args.images,
        "patches": args.patches,
        "floor_bytes": floor_bytes,
        "median_ms": medians,
    }


if __name__ == "__main__":
    main()
