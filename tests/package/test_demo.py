"""The demo: its own lines and no others, an account of the time that adds up, and clear ends."""

import runpy
import signal
import sys

import pytest

from helpers import ROOT, process

pytestmark = pytest.mark.variant("cpu")

DEMO = ROOT / "examples" / "photos.py"


@pytest.mark.check("the demo at its real size")
def test_prints_its_own_lines(variant):
    result = process.python(DEMO, "--device", "cpu")
    assert result.stderr == ""
    first, *rest = result.stdout.split(": outputs are torch.equal: True\n")
    steps, _, model = first.rpartition("\n\n")
    assert model == "Gemma 4"
    assert all(line.endswith(" ...") or line[:2] == "  " for line in steps.splitlines()), steps
    assert len(rest) == 2 and rest[0].endswith("\nQwen3-VL")
    assert all("\nThe parts " in part and "\nPeak memory " in part for part in rest)
    assert ".patch, which transformers needs for this tower ...\n" in rest[0]


def test_a_photo_that_cannot_be_read(tmp_path):
    for path, reason in [
        (tmp_path / "none.jpg", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (DEMO, f"cannot identify image file '{DEMO}'"),
    ]:
        result = process.python(DEMO, path, fails=True)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"error: {path} cannot be read as a photo: {reason}\n"


def test_a_device_that_is_not_there():
    missing = "mps" if sys.platform == "linux" else "cuda"
    result = process.python(DEMO, "--device", missing, fails=True)
    assert (result.returncode, result.stderr) == (
        2,
        f"error: --device {missing}: torch sees none\n",
    )


def test_ctrl_c_ends_it_without_a_trace():
    with process.start(sys.executable, DEMO) as demo:
        assert demo.stdout.readline().startswith("Loading")
        demo.send_signal(signal.SIGINT)
        assert demo.communicate() == ("", "")
    assert demo.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    ("whole", "verdict"), [(0.050, "The parts add up"), (0.070, "The parts don't add up")]
)
def test_whether_the_parts_add_up_is_said(capsys, whole, verdict):
    """Parts of 10, 30 and 10 ms in every round; the whole varies by 5 ms either way."""
    rounds = [whole + 0.001 * (i % 11 - 5) for i in range(20)]
    parts = {name: ([time] * 20,) * 2 for name, time in zip("abc", (0.01, 0.03, 0.01))}
    runpy.run_path(str(DEMO))["print_times"]("", parts, (rounds, [0.050] * 20))
    assert verdict in capsys.readouterr().out
