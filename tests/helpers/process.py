"""How tests start a process."""

import os
import subprocess
import sys
import textwrap

from helpers import ROOT


def start(*command, cwd=ROOT, **environment):
    """A process that finds the helpers. An environment variable that is None is taken out."""
    variables = os.environ | {"PYTHONPATH": ROOT / "tests"} | environment
    return subprocess.Popen(
        [str(argument) for argument in command],
        cwd=cwd,
        env={name: str(value) for name, value in variables.items() if value is not None},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*command, fails=False, **options):
    """Run a command, which must succeed; or fail, with `fails`; or either, if that is None."""
    with start(*command, **options) as process:
        stdout, stderr = process.communicate()
    if fails is not None:
        assert (process.returncode != 0) == fails, (
            f"status {process.returncode} of {process.args}:\n{stdout}{stderr}"
        )
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def python(*arguments, **options):
    """Run this Python: a file, or what -m names."""
    return run(sys.executable, *arguments, **options)


def script(code, *arguments, **options):
    """Run lines of Python."""
    return python("-c", textwrap.dedent(code), *arguments, **options)
