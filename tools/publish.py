"""Publish the built variants to the Hub, as `kernel-builder upload` does, through huggingface_hub.

    python tools/publish.py                  # needs `hf auth login` or HF_TOKEN

build/ and benchmarks/benchmark*.py go to the branch of the kernel's version, then the filled-in card becomes
README.md on branch main. What an earlier upload left in a variant and this one lacks is removed; variants that
aren't in build/ are left alone. To publish for real use `kernel-builder build-and-upload`: it builds every
variant, to manylinux_2_28. This is what the tests publish with, to a Hub on this machine.
"""

import ast
import sys
from http import HTTPStatus
from pathlib import Path

import jinja2
import tomllib
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from kernels._rust import Build, Metadata

ROOT = Path(__file__).resolve().parent.parent
ATTEMPTS = 5


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
    built = [path for variant in variants for path in variant.rglob("*") if path.is_file()]
    benchmarks = (ROOT / "benchmarks").glob("benchmark*.py")
    additions = [
        CommitOperationAdd(str(path.relative_to(ROOT)), path)
        for path in sorted([*built, *benchmarks])
        if "__pycache__" not in path.parts
    ]
    upload(api, repo_id, branch, additions, [f"build/{variant.name}/" for variant in variants])
    # Last: the card is of what is there.
    upload(api, repo_id, "main", [CommitOperationAdd("README.md", card(general).encode())], [])


def upload(api, repo_id, branch, additions, pruned):
    """One commit, on the head that it was made for: `additions`, and nothing else left in `pruned`.

    If somebody else's commit comes first, the Hub refuses this one, and it is made anew.
    """
    wanted = {addition.path_in_repo for addition in additions}
    for _ in range(ATTEMPTS):
        head = api.repo_info(repo_id, revision=branch, repo_type="kernel").sha
        there = api.list_repo_files(repo_id, revision=head, repo_type="kernel")
        stale = [path for path in there if path.startswith(tuple(pruned)) and path not in wanted]
        print(f"{repo_id}: {len(additions)} files to {branch}, {len(stale)} stale ones removed")
        try:
            info = api.create_commit(
                repo_id,
                [*additions, *map(CommitOperationDelete, stale)],
                commit_message="Uploaded using tools/publish.py",
                revision=branch,
                repo_type="kernel",
                parent_commit=head,
            )
        except HfHubHTTPError as error:
            if error.response.status_code != HTTPStatus.PRECONDITION_FAILED:
                raise
            print(f"{repo_id}: {branch} has moved, once more")
        else:
            print(f"{repo_id}: {branch} is {info.oid}")
            return
    sys.exit(
        f"error: {repo_id}: {branch} has moved during each of {ATTEMPTS} uploads; nothing is changed there, "
        "try again when nobody else uploads"
    )


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
