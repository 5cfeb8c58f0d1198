"""The pages: their code runs, or says why not; their links lead somewhere; the first one is short."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers import ROOT, process
from helpers.variants import needs_torch_for_cpu

# CARD.md is a template of kernel-builder's, which test_package.py fills.
PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
]
PAGES += sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("upstream/*.md")])


class Block(NamedTuple):
    where: str  # page and line
    note: str  # of the comment before it: "not run: WHY", "run by: FILE", or empty
    language: str
    code: str


def blocks():
    pattern = r"(?:<!-- ((?:not run|run by): [^>]*?) -->\n)?^```(\w*)\n(.*?)^```$"
    for page in PAGES:
        text = page.read_text()
        for found in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
            line = text[: found.start(2)].count("\n") + 1
            yield Block(f"{page.relative_to(ROOT)}:{line}", found[1] or "", found[2], found[3])


BLOCKS = list(blocks())
RUN_HERE = [block for block in BLOCKS if block.language == "python" and not block.note]


def test_every_block_is_run_or_says_why_not():
    assert RUN_HERE
    for block in BLOCKS:
        kind, _, what = block.note.partition(": ")
        if kind == "run by":
            assert (ROOT / what).exists(), block.where
        elif kind != "not run":
            assert block.language in ("python", "text"), (
                f"{block.where} isn't run, and says nothing"
            )


@needs_torch_for_cpu
@pytest.mark.xdist_group("hub")
@pytest.mark.parametrize("block", RUN_HERE, ids=lambda block: block.where)
def test_code_runs_as_it_is(published, tmp_path, block):
    """From the Hub, as a reader would have it."""
    variables = {"LOCAL_KERNELS": None, "PYTHONPATH": None} | published.environment(tmp_path)
    process.script(block.code, cwd=tmp_path, **variables)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target in targets:
        if not target.startswith(("https://", "#")):
            path, _, section = target.partition("#")
            assert (page.parent / path).exists(), target
            if section:
                headings = re.findall(r"^#+ (.*)$", (page.parent / path).read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
                assert section in slugs, target


def test_files_that_pages_name_exist():
    """In backticks, from the repository's root."""
    folders = "|".join(p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith("."))
    for page in PAGES:
        for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text()):
            assert (ROOT / name).exists() or name.startswith("build/"), f"{page.name}: {name}"


def test_readme_takes_a_minute():
    assert len(Path(ROOT / "README.md").read_text().splitlines()) <= 150
