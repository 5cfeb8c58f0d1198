"""tools/gpu_check.sh, with the engine of tests/simt in place of the GPU."""

import json
import os
import re
import subprocess
import sys

import pytest
from test_cuda_binary import NOT_BUILT

from conftest import ROOT, why_not

pytestmark = pytest.mark.check("tools/gpu_check.sh, rehearsed")


@pytest.mark.skipif(bool(why_not("cuda-simt")), reason=why_not("cuda-simt") or "")
@pytest.mark.parametrize("phase", ["smoke", "bench", "test", "sanitize", "profile"])
def test_rehearsal(phase):
    """Every phase runs and passes; the JSON says that no GPU was there."""
    result = subprocess.run(
        ["tools/gpu_check.sh", "--device", "simt", phase],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    if phase in ("test", "sanitize"):
        assert re.search(r"\d+ passed", result.stdout)
        return
    rows = json.loads((ROOT / ".build" / "rehearsal" / f"{phase}.json").read_text())
    assert rows and all(row["machine"]["gpu"].startswith("none: a rehearsal") for row in rows)
    if phase == "smoke":
        orders = [row["equal"] for row in rows if row["check"].startswith("eager's order")]
        assert len(orders) == 3 and all(orders)
        assert all(row["passed"] for row in rows if "passed" in row)
    if phase == "bench":
        assert {"ours", "eager", "embedding_bag", "copy"} == set(rows[0]["median_us"])


def test_a_phase_that_fails_is_the_status():
    """Without a GPU every phase fails, says so, and the next one runs all the same."""
    command = ["tools/gpu_check.sh", "--device", "cuda", "smoke", "profile"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "FAILED: smoke" in result.stdout and "FAILED: profile" in result.stdout


def test_the_prediction_is_of_this_build():
    if not list((ROOT / "build").glob("torch*-cu[0-9]*-*")):
        pytest.skip(NOT_BUILT)
    result = subprocess.run(
        [sys.executable, "benchmarks/predict.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
