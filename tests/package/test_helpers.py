"""What the tests share: that it can fail, and that they share nothing else."""

import ast

import pytest
import torch

from helpers import ROOT, bounds, process
from helpers.broken import Broken
from helpers.reference import FLOATS

TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_a_test_file_shares_through_helpers_alone(path):
    """It imports no other, and starts no process of its own."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]
        else:
            continue
        for module in modules:
            assert not module.startswith(("test_", "conftest", "subprocess")), module


# ----- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_sum_that_lacks_a_term_is_noticed(dtype):
    terms = torch.randn(200, 500, dtype=torch.float64)
    terms[0] += terms[0].sign()  # none so small that rounding could be it
    exact, magnitude = terms.sum(0), terms.abs().sum(0)
    eps = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    bounds.assert_sum(exact.to(dtype), exact, magnitude, 200, eps)
    with pytest.raises(AssertionError, match="the sum differs, by .* times what it may"):
        bounds.assert_sum(terms[1:].sum(0).to(dtype), exact, magnitude, 200, eps)


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_a_sum_that_is_rounded_twice_is_noticed(dtype):
    """As one would be that is added up in two parts, each of the result's dtype."""
    terms = torch.randn(2, 5000, dtype=torch.float64)
    exact, magnitude = terms.sum(0), terms.abs().sum(0)
    parts = terms.to(dtype)
    with pytest.raises(AssertionError, match="differs"):
        bounds.assert_sum(parts[0] + parts[1], exact, magnitude, 2, 2.0**-60)


def test_ulp_is_the_distance_to_the_next_number():
    for dtype in FLOATS:
        values = torch.cat([torch.randn(1000), torch.tensor([1.0, 0.5, 6e-5])]).to(dtype).abs()
        following = torch.nextafter(values, torch.full_like(values, torch.inf))
        distance = following.double() - values.double()
        assert torch.equal(bounds.ulp(values.double(), dtype), distance)


def models():
    """Two that have a table and something else, with gradients."""
    result = []
    for _ in range(2):
        model = torch.nn.ModuleDict(
            {"pos_embed": torch.nn.Embedding(3, 4), "other": torch.nn.Linear(4, 4)}
        )
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1 / 3)
        result.append(model)
    return result


@pytest.mark.parametrize(
    ("path", "change", "noticed"),
    [
        ("pos_embed.weight", 1e-7, False),
        ("pos_embed.weight", 1e-5, True),
        ("other.weight", 1e-7, True),
        ("other.bias", None, True),
    ],
)
def test_other_gradients_are_noticed(path, change, noticed):
    """A table's by more than a rounding, all others' by anything."""
    ours, original = models()
    assert bounds.assert_same_gradients(ours, original) == 1
    parameter = ours.get_parameter(path)
    parameter.grad = None if change is None else parameter.grad + change
    if noticed:
        with pytest.raises((AssertionError, TypeError)):
            bounds.assert_same_gradients(ours, original)
    else:
        bounds.assert_same_gradients(ours, original)


# ----- broken versions ------------------------------------------------------------------------------

SOURCE = """\
void f(int *a) {
  barrier();
  for (int i = 0;
       i < n; ++i) {
    a[ i ] += 1;  barrier( );
  }
}
"""


@pytest.mark.parametrize(
    ("place", "becomes", "line"),
    [
        ("for (int i=0; i<«n»; ++i)", "n + 1", "i <  n + 1 ; ++i) {"),
        ("a[i] += 1; «barrier();»", "", "a[ i ] += 1;     \n"),
        ("{ «» barrier(); for", "return;", "void f(int *a) { return; \n"),
    ],
)
def test_a_broken_version_is_found_however_lines_break(tmp_path, place, becomes, line):
    (tmp_path / "source.cpp").write_text(SOURCE)
    broken = Broken("source.cpp", place, becomes, "").apply("a name", tmp_path)
    tokens = broken.split()
    assert tokens != SOURCE.split()
    assert " ".join(line.split()) in " ".join(tokens)


@pytest.mark.parametrize(("place", "count"), [("«barrier();»", 2), ("«n2»", 0), ("«arrier»", 0)])
def test_a_broken_version_that_is_not_found_once_is_named(tmp_path, place, count):
    (tmp_path / "source.cpp").write_text(SOURCE)
    with pytest.raises(AssertionError, match=f"a name: {count} places in source.cpp"):
        Broken("source.cpp", place, "", "").apply("a name", tmp_path)


# ----- processes ------------------------------------------------------------------------------------


def test_how_a_process_ends_is_looked_at():
    fails = "import sys; print('this'); sys.exit('that')"
    with pytest.raises(AssertionError, match="(?s)status 1 of .*this.*that"):
        process.script(fails)
    assert process.script(fails, fails=True).stderr == "that\n"
    assert process.script(fails, fails=None).returncode == 1
    with pytest.raises(AssertionError, match="status 0"):
        process.script("", fails=True)


def test_a_process_finds_the_helpers_and_its_variables():
    code = """
    import os, helpers
    print(helpers.REPO_ID, os.environ.get("GIVEN"), os.environ.get("HOME"))
    """
    printed = process.script(code, GIVEN=3, HOME=None).stdout
    assert printed == "kernels-community/fused-embedding-lookup 3 None\n"
