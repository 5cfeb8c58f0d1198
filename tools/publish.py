"""Publish the built variants to the Hub, as `kernel-builder upload` does, through huggingface_hub.

    python tools/publish.py                  # needs `hf auth login` or HF_TOKEN

The filled-in card becomes README.md on branch main; build/ and benchmarks/ go to the branch of the
kernel's version, and what an earlier upload left there and this one lacks is removed. To publish for
real use `kernel-builder build-and-upload`: it builds every variant, to manylinux_2_28. This is what the
tests publish with, to a Hub on this machine.
"""

import ast
import sys
from pathlib import Path

import jinja2
import tomllib
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from kernels._rust import Build, Metadata

ROOT = Path(__file__).resolve().parent.parent


def main():
    Build.open(ROOT)  # raises if build.toml is not what kernel-builder takes
    general = tomllib.loads((ROOT / "build.toml").read_text())["general"]
    repo_id, branch = general["hub"]["repo-id"], f"v{general['version']}"
    variants = sorted(path.parent for path in ROOT.glob("build/*/metadata.json"))
    if not variants:
        sys.exit("error: build/ holds no variants; run `make build` first")
    for variant in variants:
        print(f"{variant.name}: {Metadata.read_from_file(variant / 'metadata.json').id}")

    api = HfApi()
    api.create_repo(repo_id, repo_type="kernel", exist_ok=True)
    api.create_branch(repo_id, branch=branch, repo_type="kernel", exist_ok=True)

    print(f"{repo_id}: README.md to main")
    readme = CommitOperationAdd("README.md", card(general).encode())
    commit(api, repo_id, "main", [readme])

    folders = [*variants, ROOT / "benchmarks"]
    files = sorted(
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )
    additions = [CommitOperationAdd(str(path.relative_to(ROOT)), path) for path in files]
    wanted = {addition.path_in_repo for addition in additions}
    stale = [
        CommitOperationDelete(path)
        for path in api.list_repo_files(repo_id, revision=branch, repo_type="kernel")
        if path.startswith(("build/", "benchmarks/")) and path not in wanted
    ]
    print(f"{repo_id}: {len(additions)} files to {branch}, {len(stale)} stale ones removed")
    commit(api, repo_id, branch, [*additions, *stale])


def commit(api, repo_id, branch, operations):
    message = "Uploaded using tools/publish.py"
    info = api.create_commit(
        repo_id, operations, commit_message=message, revision=branch, repo_type="kernel"
    )
    print(f"{repo_id}: {branch} is {info.oid}")


def card(general):
    """CARD.md, filled in with what kernel-builder fills it in with."""
    package = ROOT / "torch-ext" / general["name"].replace("-", "_")
    exported = next(
        ast.literal_eval(node.value)
        for node in ast.parse((package / "__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    layers = ast.parse((package / "layers.py").read_text()).body
    template = jinja2.Environment(trim_blocks=True).from_string((ROOT / "CARD.md").read_text())
    return template.render(
        repo_id=general["hub"]["repo-id"],
        version=general["version"],
        license=general["license"].lower(),
        has_benchmark=(ROOT / "benchmarks" / "benchmark.py").exists(),
        source=general.get("source"),
        functions=[name for name in exported if name != "layers"],
        layers=[node.name for node in layers if isinstance(node, ast.ClassDef)],
    )


if __name__ == "__main__":
    main()
