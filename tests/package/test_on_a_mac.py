"""The script for the owner of a Mac, on the CPU: that it runs, and that it notices what it is for."""

import argparse
import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT

SCRIPT = ROOT / "examples" / "on_a_mac.py"
SMALL = ["--images", "1", "--patches", "63", "--rows", "64", "--rounds", "1"]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.variant("cpu")
def test_it_writes_what_the_report_reads(variant, tmp_path, monkeypatch):
    command = [sys.executable, SCRIPT, "--here", "--device", "cpu", "--results", tmp_path, *SMALL]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("mac_*.json")
    rows = json.loads(path.read_text())
    assert [(row["problem"], row["direction"]) for row in rows] == [
        (problem, direction)
        for problem in ("image grids", "random ids", "one id", "interpolated")
        for direction in ("forward", "backward")
    ]
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = load(ROOT / "benchmarks" / "report.py")
    table = report.markdown(report.mac_rows(rows))
    assert len(table.splitlines()) == 2 + len(rows)
    assert f"| {rows[0]['chip']}, forward, image grids |" in table


@pytest.mark.variant("cpu")
def test_it_notices(kernel):
    script = load(SCRIPT)
    importlib.import_module(f"{kernel.__name__}.reference")
    args = argparse.Namespace(patches=63, rows=64)

    def spoilt(spoil):
        def op(*arguments, **keywords):
            return spoil(kernel.fused_embedding_lookup(*arguments, **keywords))

        return SimpleNamespace(fused_embedding_lookup=op, reference=kernel.reference)

    def too_much_gradient(out):
        return out * 2 - out.detach()

    def other_gradients(out):
        out.register_hook(lambda grad: grad * torch.rand(()))
        return out

    off = spoilt(lambda out: out * (1 + 1e-6))
    for problem in script.problems(args, 1, 72, torch.float32):
        script.check_output(kernel, *problem)
        script.check_gradient(kernel, *problem)
        with pytest.raises(AssertionError, match=f"{problem[0]}: the output differs"):
            script.check_output(off, *problem)
        with pytest.raises(AssertionError, match=f"{problem[0]}: the gradient differs"):
            script.check_gradient(spoilt(too_much_gradient), *problem)
        with pytest.raises(AssertionError, match=f"{problem[0]}: the gradient changes"):
            script.check_gradient(spoilt(other_gradients), *problem)
    with pytest.raises(AssertionError, match="a copied row has other bits"):
        script.check_copy(spoilt(lambda out: out * 2), torch.bfloat16)
    script.check_error(kernel, "cpu")
    silent = SimpleNamespace(fused_embedding_lookup=lambda ids, table: None)
    with pytest.raises(AssertionError, match="an id out of range: no error"):
        script.check_error(silent, "cpu")


@pytest.mark.parametrize("built", [False, True])
def test_an_environment_for_each_version_that_the_builder_makes(tmp_path, monkeypatch, built):
    """Which commands, in which order: none of them can run here."""
    commands = []
    script = load(SCRIPT)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["on_a_mac.py", "--rounds", "3"])
    monkeypatch.setattr(
        script.subprocess, "run", lambda command, **_: commands.append(list(map(str, command)))
    )
    if built:
        (tmp_path / "build" / "torch212-metal-aarch64-darwin").mkdir(parents=True)
    script.main()
    expected = [] if built else [["kernel-builder", "build-and-copy"]]
    for version in ("2.12.0", "2.13.0"):
        python = f"{tmp_path}/.build/mac/{version}/bin/python"
        expected += [
            [sys.executable, "-m", "venv", f"{tmp_path}/.build/mac/{version}"],
            [python, "-m", "pip", "install", f"torch=={version}", "kernels==0.17.2", "numpy"],
            [python, str(SCRIPT), "--here", "--rounds", "3"],
        ]
    assert commands == expected
