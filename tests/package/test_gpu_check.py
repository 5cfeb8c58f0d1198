"""tools/gpu_check.sh, with the engine of tests/simt in place of the GPU."""

import json
import re
import sys

import pytest

from helpers import ROOT, process
from helpers.variants import NEEDS_ALL_OF_CUDA, builds, why_not

CHECK = ROOT / "tools" / "gpu_check.sh"
pytestmark = pytest.mark.check("tools/gpu_check.sh, rehearsed")


@pytest.mark.skipif(bool(why_not("cuda-simt")), reason=why_not("cuda-simt") or "")
@pytest.mark.parametrize("phase", ["smoke", "bench", "test", "sanitize", "profile"])
def test_rehearsal(phase):
    """Every phase runs and passes; the JSON says that no GPU was there."""
    result = process.run(CHECK, "--device", "simt", phase, PYTHON=sys.executable)
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
    environment = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    result = process.run(CHECK, "--device", "cuda", "smoke", "profile", fails=True, **environment)
    assert result.returncode == 2
    assert "FAILED: smoke" in result.stdout and "FAILED: profile" in result.stdout


def test_the_prediction_is_of_this_build():
    if not builds("cu[0-9]*"):
        pytest.skip(NEEDS_ALL_OF_CUDA)
    process.python(ROOT / "benchmarks" / "predict.py", "--check")
