"""Verify on a Mac what Linux can't, and measure it. With macOS 26 or later and kernel-builder installed:

    python3 examples/on_a_mac.py

Takes a quarter of an hour and 1 GB. Builds the Metal variant if build/ has none; then, for each version of
torch that it is built for, makes an environment in .build/mac/, checks there that

- outputs have the bits of the eager code on the same device, and one looked-up row those of an index,
- gradients have the same bits in five runs and are what sums in float64 round to,
- ids and weights of interpolated positions have the bits that transformers has on the CPU, and scaled
  pixels those of the eager code on the same device,
- an id out of range and a wrong num_patches are errors when PyTorch next synchronises,

and times both directions against eager and against a copy of the bytes that must move. The result goes to
benchmarks/results/mac_<chip>_<torch>.json, which `make report` makes a row for each measurement of. What was
not as it should be is printed and is in the JSON, under "failures"; then the exit status is 1.
"""

import argparse
import datetime
import importlib
import itertools
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
REQUIREMENTS = ["kernels==0.17.2", "numpy", "transformers==5.22.2"]


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
        sys.exit(1 if verify_and_measure(args) else 0)
    if not list(ROOT.glob("build/torch*-metal-*")):
        subprocess.run(["kernel-builder", "build-and-copy"], cwd=ROOT, check=True)
    failed = False
    for version in TORCH_VERSIONS:
        environment = ROOT / ".build" / "mac" / version
        python = environment / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        install = [python, "-m", "pip", "install", f"torch=={version}", *REQUIREMENTS]
        subprocess.run(install, check=True)
        here = subprocess.run([python, __file__, "--here", *sys.argv[1:]], check=False)
        failed = failed or here.returncode != 0
    sys.exit(1 if failed else 0)


def verify_and_measure(args):
    """Check everything, then time it and write the JSON. Returns what is wrong, a line each."""
    import kernels
    import torch

    backend = {"mps": "metal"}.get(args.device, args.device)
    kernel = kernels.get_local_kernel(args.kernel, backend=backend)
    importlib.import_module(f"{kernel.__name__}.reference")  # the eager code
    with torch.device(args.device):
        failures = verify(kernel, args)
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
        "failures": failures,
    }
    name = re.sub(r"\W+", "-", f"{chip} {torch.__version__}".lower())
    path = args.results / f"mac_{name}.json"
    path.write_text(json.dumps([origin | row for row in rows], indent=2) + "\n")
    print(f"{len(failures)} failures. Wrote {path}")
    return failures


def verify(kernel, args):
    """Run every check, whatever the ones before found. Returns what is wrong, a line each."""
    import torch

    failures = []

    def run(check, *arguments):
        try:
            check(kernel, *arguments)
        except Exception as error:  # noqa: BLE001  an op that fails is a finding like any other
            failures.append(f"{check.__name__}: {type(error).__name__}: {error}")
            print(failures[-1], flush=True)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for hidden in (768, 1152, 771):  # the last without vectors
            for name, arguments in problems(args, max(1, args.images // 5), hidden, dtype):
                name = f"{name}, {dtype}, H={hidden}"
                run(check_output, name, arguments)
                run(check_gradient, name, arguments)
        run(check_copy, dtype)
        for out_dtype in (torch.float32, torch.float16, torch.bfloat16):
            run(check_pixels, dtype, out_dtype)
        print(f"{dtype}: checked", flush=True)
    for options in itertools.product(("bilinear", "bicubic"), (False, True), ("border", "zeros")):
        run(check_interpolation, *options)
    run(check_errors, args.device)
    return failures


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


def check_interpolation(kernel, mode, align_corners, padding):
    """The bits of the CPU: a GPU's division has to round as its does."""
    import torch
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    options = {"mode": mode, "align_corners": align_corners, "padding": padding}
    for side, merge in ((48, 2), (27, 1)):
        with torch.device("cpu"):
            grid = torch.tensor([[1, 32, 48], [2, 100, 36], [1, 6, 1000], [3, 4, 2]])
            expected = get_vision_interpolation_indices_and_weights(
                grid, side, spatial_merge_size=merge, **options
            )
        actual = kernel.vision_interpolation_indices_and_weights(
            grid.to(torch.empty(0).device),
            side,
            num_patches=len(expected[0]),
            spatial_merge_size=merge,
            **options,
        )
        for what, ours, theirs in zip(("ids", "weights"), actual, expected):
            differ = (ours.cpu() != theirs).sum().item()
            assert differ == 0, (
                f"{options}, side {side}: {differ} of {theirs.numel()} {what} differ"
            )


def check_pixels(kernel, dtype, out_dtype):
    import torch

    for count in (2520 * 768, 2520 * 768 - 1):  # with vectors, and without
        pixels = torch.rand(count).to(dtype)
        actual = kernel.scale_pixels(pixels, out_dtype)
        assert torch.equal(actual, (2 * (pixels - 0.5)).to(out_dtype)), (
            f"scaled pixels, {dtype} to {out_dtype}, differ from eager's"
        )


def check_errors(kernel, device):
    import torch

    ids, table = torch.tensor([[0], [500]]), torch.randn(1, 500, 768)
    grid = torch.tensor([[1, 4, 6]])
    calls = {
        "position_ids must be less than the 500 rows of the table, got 500 on axis 0": lambda: (
            kernel.fused_embedding_lookup(ids, table)
        ),
        "num_patches must be ": lambda: kernel.vision_interpolation_indices_and_weights(
            grid, 16, num_patches=25
        ),
    }
    for expected, call in calls.items():
        message = "no error"
        try:
            call()
            getattr(torch, device).synchronize()
        except (IndexError, ValueError, RuntimeError) as error:
            message = str(error)
        assert expected in message, f"where an error was to say `{expected}`: {message}"


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
