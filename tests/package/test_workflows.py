"""The GitHub workflows, which run only on GitHub: all that can be checked without it."""

import os
import re
import shutil

import pytest
import tomllib
from ruamel.yaml import YAML

from helpers import ROOT, process

pytestmark = pytest.mark.check("the GitHub workflows")
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FILES = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
# YAML 1.2, in which `on` is a string and not true.
WORKFLOWS = {path.name: YAML(typ="safe", pure=True).load(path.read_text()) for path in FILES}


def test_workflows_are_what_github_takes():
    """By the schema that check-jsonschema brings with it."""
    schema = ["--builtin-schema", "vendor.github-workflows"]
    process.python("-m", "check_jsonschema", *schema, *FILES)


def test_issue_forms_are_what_github_takes():
    assert FORMS
    schema = ["--builtin-schema", "vendor.github-issue-forms"]
    process.python("-m", "check_jsonschema", *schema, *FORMS)


def test_a_version_tag_publishes_and_nothing_else():
    assert WORKFLOWS["publish.yml"]["on"] == {"push": {"tags": ["v*"]}}


def stub(folder, name, body):
    """A command in place of one that can't run here, which notes how it was called."""
    (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "$CALLS"\n{body}\n')
    (folder / name).chmod(0o755)


def test_publish_builds_then_signs_then_uploads(tmp_path):
    """Every shell step as it is written, with commands that stand in for Nix, Xcode and cosign."""
    commands, checkout = tmp_path / "bin", tmp_path / "checkout"
    commands.mkdir()
    checkout.mkdir()
    stub(
        commands,
        "nix",
        '[ "$1" = build ] && cp -r --no-preserve=mode "$STORE" store; '
        "chmod -R a-w store; [ -e build ] || ln -s store result",
    )
    stub(commands, "xcodebuild", "true")
    stub(commands, "cosign", 'touch "$4"')
    store = tmp_path / "store"
    variants = ["torch-stable-abi210-cpu-x86_64-linux", "torch-stable-abi210-cu130-x86_64-linux"]
    for variant in variants:
        (store / variant).mkdir(parents=True)
        (store / variant / "metadata.json").write_text("{}")
    (store / "CARD.md").write_text("card")
    for name in ("flake.lock", "build.toml"):
        shutil.copy(ROOT / name, checkout)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "-q"], ["add", "flake.lock"], ["commit", "-qm", "x"]):
        process.run(*git, *arguments, cwd=checkout)

    calls = tmp_path / "calls"
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "BACKEND": "cuda",
        "TAG": "v1",
        "CALLS": calls,
        "STORE": store,
    }
    for step in WORKFLOWS["publish.yml"]["jobs"]["publish"]["steps"]:
        if "run" in step:
            command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
            process.run(*command, cwd=checkout, **environment)
    assert calls.read_text().splitlines() == [
        "xcodebuild -downloadComponent MetalToolchain",
        "nix build --print-build-logs .#backendBundle.cuda",
        *(
            f"cosign sign-blob build/{variant}/metadata.json"
            f" --bundle build/{variant}/metadata.json.sigstore --yes"
            for variant in variants
        ),
        "nix run --inputs-from . --print-build-logs kernel-builder#kernel-builder -- upload",
    ]
    for variant in variants:
        names = {path.name for path in (checkout / "build" / variant).iterdir()}
        assert names == {"metadata.json", "metadata.json.sigstore"}


def test_publish_stops_without_a_lock(tmp_path):
    step = WORKFLOWS["publish.yml"]["jobs"]["publish"]["steps"][1]
    process.run("git", "init", "-q", cwd=tmp_path)
    process.run(*step["run"].split(), cwd=tmp_path, fails=True)


@pytest.mark.parametrize(("tag", "passes"), [("v1", True), ("v2", False), ("v11", False)])
def test_publish_refuses_a_tag_that_is_not_the_version(tag, passes):
    steps = WORKFLOWS["publish.yml"]["jobs"]["publish"]["steps"]
    (step,) = [step for step in steps if "TAG" in step.get("env", {})]
    process.run("bash", "-e", "-c", step["run"], fails=not passes, TAG=tag)


def test_publish_builds_every_backend_of_every_system():
    """What build.toml names and kernel-builder has for a system; its full build takes up to 20 hours."""
    job = WORKFLOWS["publish.yml"]["jobs"]["publish"]
    built = {(row["system"], row["backend"]) for row in job["strategy"]["matrix"]["include"]}
    linux = {(f"{arch}-linux", b) for arch in ("x86_64", "aarch64") for b in ("cpu", "cuda")}
    assert built == linux | {("aarch64-darwin", backend) for backend in ("cpu", "metal")}
    assert {b for _, b in built} == set(
        tomllib.loads((ROOT / "build.toml").read_text())["general"]["backends"]
    )
    assert job["timeout-minutes"] == 1200


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


def test_fresh_machine_leaves_nothing_if_there_is_no_root(tmp_path):
    """It ends as debootstrap does, having said what that said, and takes its folder and log with it."""
    commands, folder = tmp_path / "bin", tmp_path / "tmp"
    commands.mkdir()
    folder.mkdir()
    (commands / "debootstrap").write_text("#!/bin/sh\necho no such release\nexit 3\n")
    (commands / "debootstrap").chmod(0o755)
    variables = {"PATH": f"{commands}:{os.environ['PATH']}", "TMPDIR": folder}
    variables["FRESH_MACHINE"] = 1  # in no namespace of its own
    result = process.run(ROOT / "tools" / "fresh_machine.sh", "trixie", fails=True, **variables)
    assert result.returncode == 1 and "no such release" in result.stderr, result.stderr
    assert not list(folder.iterdir())
