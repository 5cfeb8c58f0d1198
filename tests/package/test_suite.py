"""The suite itself: what was not tested is said at its end, and in CI a skip is a failure (conftest.py)."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT

pytestmark = pytest.mark.check("the suite itself")

TESTS = """
import pytest

def test_passes():
    pass

def test_on_a_gpu():
    pytest.skip("needs a GPU")

@pytest.mark.skip(reason="needs a tool: apt-get install tool")
def test_with_a_tool():
    pass

@pytest.mark.parametrize("number", range(3))
def test_for_maintainers(number):
    pass

test_for_maintainers = pytest.mark.check("three of them")(test_for_maintainers)
"""


def run(tmp_path, *arguments, tests=TESTS, ci="false"):
    """Run some tests with the suite's conftest. Returns the status and what was printed."""
    (tmp_path / "test_some.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider"]
    command += ["-c", ROOT / "pytest.ini", "--rootdir", tmp_path, tmp_path / "test_some.py"]
    result = subprocess.run(
        [*command, *arguments],
        env=os.environ | {"CI": ci, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_was_not_tested_is_said_at_the_end(tmp_path, workers):
    status, output = run(tmp_path, "-m", "not check", "-n", workers)
    assert status == 0, output
    for line in (
        "    1 skipped, because the test needs a GPU",
        "    1 skipped, because the test needs a tool",
        "    3 left to maintainers: three of them",
        "What can be tested here is, by `sudo apt-get install tool && make check`.",
    ):
        assert line in output.splitlines(), output


def test_nothing_is_said_if_all_was_tested(tmp_path):
    status, output = run(tmp_path, "-k", "passes or maintainers")
    assert status == 0 and "not tested" not in output, output


def test_in_ci_a_skip_that_is_not_listed_is_a_failure(tmp_path):
    status, output = run(tmp_path, ci="true")
    assert status == 1 and "4 passed, 1 skipped, 1 error" in output, output
    assert "test_with_a_tool\nmay not be skipped in CI: needs a tool" in output, output


def test_in_ci_a_file_that_is_skipped_is_a_failure(tmp_path):
    tests = "import pytest\npytest.importorskip('no_such_module')\n"
    assert run(tmp_path, tests=tests)[0] == 5  # nothing collected
    status, output = run(tmp_path, tests=tests, ci="true")
    assert status == 2 and "may not be skipped in CI: could not import" in output, output
