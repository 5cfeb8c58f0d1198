"""The suite itself: what was not tested is said at its end, and where .ci/run runs it a skip is a failure (conftest.py)."""

import sys
from pathlib import Path

import pytest

from helpers import ROOT, process

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


def run_tests(tmp_path, *arguments, tests=TESTS, file=None, **variables):
    """Run some tests with the suite's conftest. Returns the status and what was printed."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if file is None:
        file = tmp_path / "test_some.py"
        file.write_text(tests)
        command += ["-p", "conftest"]
    command += ["-c", ROOT / "pytest.ini", "--rootdir", tmp_path, file]
    variables = {"NOTHING_MAY_BE_MISSING": None} | variables
    result = process.python(*command, *arguments, fails=None, **variables)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_was_not_tested_is_said_at_the_end(tmp_path, workers):
    status, output = run_tests(tmp_path, "-m", "not check", "-n", workers)
    assert status == 0, output
    for line in (
        "    1 skipped, because the test needs a GPU",
        "    1 skipped, because the test needs a tool",
        "    3 left to maintainers: three of them",
        "What can be tested here is, by `sudo apt-get install tool && make check`.",
    ):
        assert line in output.splitlines(), output


def test_nothing_is_said_if_all_was_tested(tmp_path):
    status, output = run_tests(tmp_path, "-k", "passes or maintainers")
    assert status == 0 and "not tested" not in output, output


def test_only_what_the_mark_leaves_out_is_counted(tmp_path):
    """Not what -k left out before."""
    status, output = run_tests(tmp_path, "-m", "not check", "-k", "passes or maintainers and [2]")
    assert status == 0, output
    assert "    1 left to maintainers: three of them" in output.splitlines(), output


def test_a_failure_stays_one(tmp_path):
    """Beside what was not tested."""
    status, output = run_tests(tmp_path, tests=TESTS + "\ndef test_fails():\n    assert False\n")
    assert status == 1 and "1 failed, 4 passed, 2 skipped" in output, output
    assert "    1 skipped, because the test needs a GPU" in output.splitlines(), output


def test_what_clang_is_for_is_said_where_there_is_none(tmp_path):
    """Of the suite itself, with a PATH on which it isn't: a reason and a command, and red for .ci/run."""
    (file,) = (ROOT / "tests").rglob("test_metal.py")
    without = {"file": file, "PATH": str(Path(sys.executable).parent)}
    command = "`sudo apt-get install clang-19 gobjc++ && make check`"
    status, output = run_tests(tmp_path, "-k", "loads_of_a_batch", **without)
    assert status == 0 and f"What can be tested here is, by {command}." in output, output
    status, output = run_tests(
        tmp_path, "-k", "loads_of_a_batch", NOTHING_MAY_BE_MISSING="1", **without
    )
    assert status == 1 and "may not be skipped here: needs clang 19" in output, output


STRICT = {"NOTHING_MAY_BE_MISSING": "1"}


def test_a_skip_that_is_not_listed_is_a_failure_for_ci(tmp_path):
    status, output = run_tests(tmp_path, **STRICT)
    assert status == 1 and "4 passed, 1 skipped, 1 error" in output, output
    assert "test_with_a_tool\nmay not be skipped here: needs a tool" in output, output


def test_a_file_that_is_skipped_is_a_failure_for_ci(tmp_path):
    tests = "import pytest\npytest.importorskip('no_such_module')\n"
    assert run_tests(tmp_path, tests=tests)[0] == 5  # nothing collected
    status, output = run_tests(tmp_path, tests=tests, **STRICT)
    assert status == 2 and "may not be skipped here: could not import" in output, output


def test_githubs_own_variable_asks_for_nothing(tmp_path):
    """It is set for the builder's tests, too, where one variant is all there is."""
    status, output = run_tests(tmp_path, "-m", "not check", CI="true")
    assert status == 0 and "1 passed, 2 skipped" in output, output
