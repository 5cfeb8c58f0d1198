"""The GitHub workflows, which run only on GitHub: all that can be checked without it."""

import re
import subprocess
import sys

from ruamel.yaml import YAML

from conftest import ROOT

FILES = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
# YAML 1.2, in which `on` is a string and not true.
WORKFLOWS = {path.name: YAML(typ="safe", pure=True).load(path.read_text()) for path in FILES}


def test_workflows_are_what_github_takes():
    """By the schema that check-jsonschema brings with it."""
    command = [sys.executable, "-m", "check_jsonschema"]
    command += ["--builtin-schema", "vendor.github-workflows", *FILES]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_version_tag_publishes_and_nothing_else():
    assert WORKFLOWS["publish.yml"]["on"] == {"push": {"tags": ["v*"]}}


def test_workflows_make_targets_that_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {
        target
        for workflow in WORKFLOWS.values()
        for job in workflow["jobs"].values()
        for step in job.get("steps", [])
        for target in re.findall(r"\bmake (\S+)", step.get("run", ""))
    }
    assert called and called <= targets
