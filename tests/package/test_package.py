"""The package: what kernel-builder reads, and the layout in which the local build leaves it."""

import ast
import json
import re
import runpy
import shutil
import sys
import warnings

import pytest
import tomllib
from kernels import get_loaded_kernels
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

from helpers import REPO_ID, ROOT, process
from helpers.symbols import SYSTEM, undefined_symbols
from helpers.variants import extension

CONFIG = tomllib.loads((ROOT / "build.toml").read_text())
# Not tests/simt's.
PUBLISHED = pytest.mark.variant("cpu", "cuda")
SECTIONS = [CONFIG["torch"], *CONFIG["kernel"].values()]


def test_build_toml_is_what_kernel_builder_takes():
    build = Build.open(ROOT)
    assert [str(backend) for backend in build.general.backends] == CONFIG["general"]["backends"]
    assert CONFIG["general"]["hub"]["repo-id"] == REPO_ID
    # Each backend has a kernel section, and a stable ABI version but for Metal: that of torch has no
    # way to the MPS stream.
    backends = set(CONFIG["general"]["backends"])
    assert {kernel["backend"] for kernel in CONFIG["kernel"].values()} == backends
    assert set(CONFIG["torch"]["stable-abi"]) == backends - {"metal"}


def test_a_build_for_all_architectures_stays_one(tmp_path):
    """`make build`, which every target begins with, compiles what `make cuda` left, not this GPU's alone."""
    build = runpy.run_path(ROOT / "tools" / "build.py")
    assert not build["is_for_all_archs"](tmp_path)
    for archs, expected in ((["9.0"], False), (sorted(build["CUDA_ARCHS"]), True)):
        backend = {"type": "cuda", "archs": archs}
        (tmp_path / "metadata.json").write_text(json.dumps({"backend": backend}))
        assert build["is_for_all_archs"](tmp_path) == expected


def test_build_toml_lists_every_source_once_and_none_that_is_missing():
    on_disk = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "torch-ext")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in {".h", ".cpp", ".cu", ".cuh", ".mm", ".metal"}
    }
    listed = [source for section in SECTIONS for source in section["src"]]
    assert set(listed) == on_disk
    compiled = [source for source in listed if not source.endswith((".h", ".cuh"))]
    assert len(compiled) == len(set(compiled))


@pytest.mark.check("flake.nix")
def test_flake_lock_locks_every_input():
    """Without a lock Nix writes one, and what is published says that it is from a dirty tree."""
    nix = shutil.which("nix-instantiate")
    if nix is None:
        pytest.skip("needs nix-instantiate: apt-get install nix-bin")
    expression = f"(import {ROOT / 'flake.nix'}).inputs"
    result = process.run(nix, "--eval", "--strict", "--json", "--expr", expression)
    urls = {name: value["url"] for name, value in json.loads(result.stdout).items()}
    lock = json.loads((ROOT / "flake.lock").read_text())
    nodes = dict(lock["nodes"])
    inputs = nodes.pop(lock["root"])["inputs"]
    originals = {name: nodes[node]["original"] for name, node in inputs.items()}
    assert urls == {
        name: "{type}:{owner}/{repo}".format(**original) for name, original in originals.items()
    }
    for name, node in nodes.items():
        assert re.fullmatch("[0-9a-f]{40}", node["locked"]["rev"]), name
        assert node["locked"]["narHash"].startswith("sha256-"), name
        direct = [i for i in node.get("inputs", {}).values() if isinstance(i, str)]
        assert set(direct) <= set(nodes), name  # the others follow one of these


@PUBLISHED
def test_variant_layout(kernel, variant_dir):
    """kernel-builder's: the package's files, flat, with the extension, _ops.py and metadata.json."""
    package = {path.name for path in (ROOT / "torch-ext" / "fused_embedding_lookup").glob("*.py")}
    files = {path.name for path in variant_dir.iterdir() if path.name != "__pycache__"}
    assert files == package | {"_ops.py", "metadata.json", f"{kernel.__name__}.abi3.so"}
    assert not (variant_dir / "fused_embedding_lookup").exists()


@PUBLISHED
def test_metadata(kernel, variant_dir, device):
    metadata = Metadata.read_from_file(variant_dir / "metadata.json")
    assert metadata.id == kernel.__name__
    assert (str(metadata.name), metadata.version) == ("fused-embedding-lookup", 1)
    assert metadata.license == "Apache-2.0"
    assert str(metadata.backend.backend_type) == device.type
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant_dir))
    kernel_source = metadata.provenance.kernel
    revision = str(kernel_source.commit)[:7] + ("_dirty" if kernel_source.dirty else "")
    assert metadata.id.endswith(f"_{revision}")
    keys = set(json.loads((variant_dir / "metadata.json").read_text()))
    depends = {"python-depends", "kernel-depends"}
    described = {"name", "id", "version", "license", "source", "backend"}
    assert keys == described | depends | {"digest", "provenance"}


@PUBLISHED
def test_loaded_through_kernels(kernel):
    """What the tests test is what `kernels` loaded, under a name of its own."""
    assert kernel in [loaded.module for loaded in get_loaded_kernels()]
    assert re.fullmatch(r"_fused_embedding_lookup_[a-z]+_[0-9a-f]{7}(_dirty)?", kernel.__name__)
    assert kernel.op.add_op_namespace_prefix("forward") == f"{kernel.__name__}::forward"
    assert sorted(kernel.__all__) == [
        "fused_embedding_lookup",
        "layers",
        "scale_pixels",
        "vision_interpolation_indices_and_weights",
    ]


PYTHON_FILES = sorted((ROOT / "torch-ext").rglob("*.py"))


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.name)
def test_python_is_for_3_9_and_imports_only_torch_and_itself(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
        else:
            continue
        for module in modules:
            top = module.split(".")[0]
            assert top == "torch" or top in sys.stdlib_module_names, module


def test_ops_are_registered_only_through_the_namespace_prefix():
    for path in PYTHON_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr.startswith("register_") or node.func.attr == "custom_op":
                name = node.args[0]
                assert isinstance(name, ast.Call) and name.func.id == "add_op_namespace_prefix"


def test_layers_have_no_constructor():
    """The published rule: a layer is a forward, and what it is swapped into has the rest."""
    tree = ast.parse((ROOT / "torch-ext" / "fused_embedding_lookup" / "layers.py").read_text())
    for layer in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
        functions = [node.name for node in layer.body if isinstance(node, ast.FunctionDef)]
        assert functions == ["forward"], layer.name


def test_what_is_of_the_standard_library():
    """With a version and without; the second is what g++ 14 adds. Torch's C++ is not."""
    for name in ("_ZNSt6localeD1Ev", "_ZSt21ios_base_library_initv", "_ZNKSt5ctypeIcE8do_widenEc"):
        assert SYSTEM.match(name)
    for name in ("_ZN3c105ErrorC1E", "_ZNK2at6Tensor4sizeEv", "_Z5StateS"):
        assert not SYSTEM.match(name)


@PUBLISHED
def test_extension_needs_only_the_stable_abis(variant_dir):
    """Of torch its C shims, of Python the limited API, of C++ the standard library."""
    undefined, defined = undefined_symbols(extension(variant_dir))
    python = [name for name in undefined if name.startswith(("Py", "_Py"))]
    assert python == ["PyModule_Create2"]
    torch_symbols = [n for n in undefined if n.startswith(("torch_", "aoti_torch_"))]
    assert torch_symbols
    rest = set(undefined) - set(python) - set(torch_symbols)
    assert not [name for name in rest if not SYSTEM.match(name)]
    assert not [name for kind, name in defined if kind == "u"]  # GNU unique


NEWEST_OF_MANYLINUX_2_28 = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}


@PUBLISHED
def test_what_manylinux_2_28_would_reject_is_reported(variant_dir):
    """A local build takes what the machine's libraries have; kernel-builder holds to the limits."""
    rejected = []
    for name in undefined_symbols(extension(variant_dir))[0]:
        match = re.fullmatch(r"(.*)@(GLIBC|GLIBCXX|CXXABI)_([0-9.]+)", name)
        if match and tuple(map(int, match[3].split("."))) > NEWEST_OF_MANYLINUX_2_28[match[2]]:
            rejected.append(name)
    if rejected:
        warnings.warn(f"manylinux_2_28 would reject: {', '.join(rejected)}", stacklevel=1)
