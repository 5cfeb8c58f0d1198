"""The benchmarks run, and the README says what was measured. How fast anything is, is not tested."""

import importlib
import json

import pytest
import torch
from kernels.cli import benchmark

from helpers import ROOT, process
from helpers.reference import SMALL_VISION_CONFIG
from helpers.variants import needs_torch_for_cpu

BENCHMARKS = ROOT / "benchmarks"
# What they measure is the CPU variant; on a GPU tools/gpu_check.sh runs them.
pytestmark = pytest.mark.variant("cpu")


def test_readme_and_plots_are_made_from_the_measurements():
    process.python(BENCHMARKS / "report.py", "--check")


def test_compare(variant, tmp_path):
    shape = ["--batch", "1", "--patches", "90", "--hidden", "64", "--rows", "32"]
    options = ["--direction", "forward", "backward", "--peers", "eager", "one-hot", "--rounds", "2"]
    json_file = ["--json", tmp_path / "rows.json"]
    process.python(BENCHMARKS / "compare.py", *shape, *options, *json_file)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["case"]["direction"] for row in rows] == ["forward", "backward"]
    for row in rows:
        assert set(row["median_us"]) == {"ours", "eager", "one-hot", "copy"}
        for ratio, low, high in row["ratio"].values():
            assert 0 < low <= ratio <= high
        # The one-hot of 90 x 2 ids and 32 rows, and its copy in bfloat16.
        assert row["peak_bytes"]["one-hot"] > 90 * 2 * 32 * (8 + 2)
    assert rows[0]["peak_bytes"]["ours"] == 90 * 64 * 2  # its result
    assert rows[0]["command"] == (
        'make bench ARGS="--batch 1 --patches 90 --hidden 64 --rows 32 --peers eager one-hot --rounds 2"'
    )


@pytest.mark.check("the lists of benchmarks")
def test_every_list_runs(variant, tmp_path):
    """All cases that are measured, at a size at which they take no time."""
    small = ["--batch", "1", "--patches", "16", "--hidden", "8", "--rows", "64", "--rounds", "2"]
    for name in ("cpu", "scaling", "gpu", "gate"):
        options = ["--list", name, *small, "--peers", "eager", "--json", tmp_path / f"{name}.json"]
        process.python(BENCHMARKS / "compare.py", *options)
    rows = json.loads((tmp_path / "cpu.json").read_text())
    assert {row["ops"]["ours"] for row in rows if "ops" in row} == {2}


def test_a_call(variant, tmp_path):
    process.python(BENCHMARKS / "call.py", "--rounds", "2", "--json", tmp_path / "call.json")
    (row,) = json.loads((tmp_path / "call.json").read_text())
    assert set(row["median_us"]) == set(row["call"]) > {"ours", "inference_mode"}


@pytest.mark.parametrize(
    "step", ["Gemma 4 embedder", "Gemma 4 forward", "Gemma 4 LoRA and table", "Qwen3-VL forward"]
)
def test_step(kernel, monkeypatch, step):
    """On towers that are small: their shares are of no meaning."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("step")
    importlib.import_module(f"{kernel.__name__}.reference")
    gemma, qwen = module.Gemma4VisionConfig, module.Qwen3VLVisionConfig
    monkeypatch.setattr(module, "Gemma4VisionConfig", lambda: gemma(**SMALL_VISION_CONFIG))
    sizes = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2}
    small = qwen(**sizes, out_hidden_size=64, deepstack_visual_indexes=[0])
    monkeypatch.setattr(module, "Qwen3VLVisionConfig", lambda: small)
    row = module.measure_step(kernel, step, torch.float32, 36, rounds=2)
    for name in ("before", "ours"):
        assert 0 < row["lookup_us"][name] < row["median_us"][name] and 0 < row["share"][name] < 1


def test_what_is_measured_later_appears(variant, monkeypatch, tmp_path):
    """Rows of a GPU or a Mac make a section, which isn't there before."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    report = importlib.import_module("report")
    rows = json.loads((BENCHMARKS / "results" / "cpu.json").read_text())[:1]
    gpu = rows[0] | {
        "machine": {"gpu": "A GPU", "torch": "2.13.0"},
        "case": {**rows[0]["case"], "batch": 40, "dtype": "bf16"},
    }
    assert report.tables(rows)["gpu"] == "" and "| A GPU" not in report.tables(rows)["goals"]
    sections = report.tables([*rows, gpu])
    assert sections["gpu"].startswith("## GPUs\n") and "B=40" in sections["gpu"]
    assert "A GPU, torch 2.13.0" in sections["goals"]


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
