"""The benchmarks run, and the README says what was measured. How fast anything is, is not tested."""

import json
import subprocess
import sys

import pytest
from kernels.cli import benchmark

from conftest import ROOT, needs_torch_for_cpu

BENCHMARKS = ROOT / "benchmarks"
# What they measure is the CPU variant; on a GPU tools/gpu_check.sh runs them.
pytestmark = pytest.mark.variant("cpu")


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments],
        check=False,
        capture_output=True,
        text=True,
    )


def test_readme_and_plots_are_made_from_the_measurements():
    result = run("report.py", "--check")
    assert result.returncode == 0, result.stderr


def test_compare(variant, tmp_path):
    shape = ["--batch", "1", "--patches", "90", "--hidden", "64", "--rows", "32", "--dtype", "bf16"]
    peers = ["--peers", "eager", "one-hot", "--rounds", "2"]
    result = run("compare.py", *shape, *peers, "--json", tmp_path / "rows.json")
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["direction"] for row in rows] == ["forward", "backward"]
    for row in rows:
        assert set(row["median_ms"]) == {"ours", "eager", "one-hot", "copy"}
        for ratio, low, high in row["ratio"].values():
            assert 0 < low <= ratio <= high
        # The one-hot of 90 x 2 ids and 32 rows, and its copy in bfloat16.
        assert row["peak_bytes"]["one-hot"] > 90 * 2 * 32 * (8 + 2)
    assert rows[0]["peak_bytes"]["ours"] == 90 * 64 * 2  # its result
    assert rows[0]["command"].startswith(
        'make bench ARGS="--dtype bf16 --direction forward --batch 1'
    )


@needs_torch_for_cpu
@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("benchmark.py", "Inference"),
        ("benchmark.py", "Training"),
        ("benchmark_layers.py", "Layers"),
    ],
)
def test_kernels_benchmark(variant, script, name):
    """Its own runner finds the classes, runs each of their cases and compares it with its reference."""
    classes = {
        c.__name__: c for c in benchmark.discover_benchmark_classes(BENCHMARKS / script, ROOT)
    }
    results, _ = benchmark.run_benchmark_class(
        classes[name], iterations=1, warmup=0, repo_id=str(ROOT), is_local=True, revision="local"
    )
    assert results and all(result.verified for result in results.values())
