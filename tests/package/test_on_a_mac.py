"""The script for the owner of a Mac, on the CPU: that it runs, and that it notices what it is for."""

import argparse
import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from helpers import ROOT, process

SCRIPT = ROOT / "examples" / "on_a_mac.py"
SMALL = ["--images", "1", "--patches", "63", "--rows", "64", "--rounds", "1"]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.variant("cpu")
def test_it_writes_what_the_report_reads(variant, tmp_path, monkeypatch):
    process.python(SCRIPT, "--here", "--device", "cpu", "--results", tmp_path, *SMALL)
    (path,) = tmp_path.glob("mac_*.json")
    rows = json.loads(path.read_text())
    assert all(row["failures"] == [] for row in rows)
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
    assert "| checks failed |" in table and "| 0 |" in table


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
    script.check_errors(kernel, "cpu")
    for silent in ("fused_embedding_lookup", "vision_interpolation_indices_and_weights"):
        ops = {name: getattr(kernel, name) for name in kernel.__all__} | {
            silent: lambda *_, **__: 0
        }
        with pytest.raises(AssertionError, match="where an error was to say .*: no error"):
            script.check_errors(SimpleNamespace(**ops), "cpu")


@pytest.mark.variant("cpu")
def test_it_notices_in_the_other_ops(kernel):
    script = load(SCRIPT)

    def interpolate(*arguments, **options):
        ids, weights = kernel.vision_interpolation_indices_and_weights(*arguments, **options)
        return ids, weights * (1 + 1e-6)

    off = SimpleNamespace(
        vision_interpolation_indices_and_weights=interpolate,
        scale_pixels=lambda pixels, dtype: ((pixels.double() - 0.5) * 2).to(dtype),
    )
    script.check_interpolation(kernel, "bicubic", True, "zeros")
    with pytest.raises(AssertionError, match="side 48: [0-9]+ of .* weights differ"):
        script.check_interpolation(off, "bicubic", True, "zeros")
    script.check_pixels(kernel, torch.bfloat16, torch.float16)
    with pytest.raises(AssertionError, match="torch.bfloat16 to torch.float16, differ"):
        script.check_pixels(off, torch.bfloat16, torch.float16)


@pytest.mark.variant("cpu")
def test_a_failure_does_not_end_it(kernel, monkeypatch, tmp_path, capsys):
    """All are in the JSON, beside the times, and the status says so."""
    script = load(SCRIPT)

    def check_output(kernel, name, arguments):
        raise AssertionError(f"{name}: differs")

    def check_errors(kernel, device):
        raise RuntimeError("the op itself failed")

    monkeypatch.setattr(script, "check_output", check_output)
    monkeypatch.setattr(script, "check_errors", check_errors)
    arguments = ["--here", "--device", "cpu", "--results", str(tmp_path), *SMALL]
    monkeypatch.setattr(sys, "argv", ["on_a_mac.py", *arguments])
    with pytest.raises(SystemExit, match="1"):
        script.main()
    (path,) = tmp_path.glob("mac_*.json")
    rows = json.loads(path.read_text())
    assert len(rows) == 8 and all("median_ms" in row for row in rows)
    failures = rows[0]["failures"]
    assert len(failures) == 3 * 3 * 4 + 1 and failures == rows[-1]["failures"]
    assert failures[0] == "check_output: AssertionError: image grids, torch.float32, H=768: differs"
    assert failures[-1] == "check_errors: RuntimeError: the op itself failed"
    assert failures[0] in capsys.readouterr().out


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize("built", [False, True])
def test_an_environment_for_each_version_that_the_builder_makes(
    tmp_path, monkeypatch, built, status
):
    """Which commands, in which order: none of them can run here."""
    commands = []
    script = load(SCRIPT)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["on_a_mac.py", "--rounds", "3"])

    def fake_run(command, **_):
        commands.append(list(map(str, command)))
        return SimpleNamespace(returncode=status if "2.12.0" in str(command[0]) else 0)

    monkeypatch.setattr(script.subprocess, "run", fake_run)
    if built:
        (tmp_path / "build" / "torch212-metal-aarch64-darwin").mkdir(parents=True)
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == status
    expected = [] if built else [["kernel-builder", "build-and-copy"]]
    for version in ("2.12.0", "2.13.0"):
        python = f"{tmp_path}/.build/mac/{version}/bin/python"
        expected += [
            [sys.executable, "-m", "venv", f"{tmp_path}/.build/mac/{version}"],
            [python, "-m", "pip", "install", f"torch=={version}", *script.REQUIREMENTS],
            [python, str(SCRIPT), "--here", "--rounds", "3"],
        ]
    assert commands == expected
