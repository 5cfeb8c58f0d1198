"""From the Hub to the model, with the real clients, against a Hub on this machine (loopback_hub.py)."""

import json
import shutil
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers import REPO_ID, ROOT, process
from helpers.loopback_hub import LoopbackHub, publish
from helpers.variants import needs_torch_for_cpu

pytestmark = [pytest.mark.variant("cpu"), pytest.mark.xdist_group("hub")]  # which is filled once

LAYER = "Gemma4VisionPatchEmbedder"

# What every script starts with. They run in processes of their own, because huggingface_hub reads
# its endpoint and its cache's place when it is imported.
PRELUDE = f"""
import torch
import kernels
from helpers import reference
from helpers.problems import grid, problem
from kernels import LayerRepository, LockedLayerRepository, Mode

REPO, LAYER = "{REPO_ID}", "{LAYER}"
torch.manual_seed(0)
ids = grid(2, 63, 9, 6)
pixels = torch.rand(2, 63, 768)

def check_function(kernel):
    arguments = problem(ids, 32, 48, padding=True, residual=torch.float32)
    out = kernel.fused_embedding_lookup(**arguments)
    assert torch.equal(out, reference.eager(**arguments))

def is_ours(module):
    return module.forward.__func__.__module__.startswith("_fused_embedding_lookup_")
"""

SMALL_MODEL = """
from transformers import Gemma4VisionConfig, Gemma4VisionModel
from transformers.models.gemma4 import modeling_gemma4

model = Gemma4VisionModel(Gemma4VisionConfig(**reference.SMALL_VISION_CONFIG)).eval()
torch.nn.init.normal_(model.patch_embedder.position_embedding_table)
"""


def run_script(hub, home, script, fails=False, **environment):
    """Run a script against the hub. Returns its output; with `fails`, what it died of."""
    variables = {"LOCAL_KERNELS": None} | hub.environment(home) | environment
    result = process.script(PRELUDE + textwrap.dedent(script), fails=fails, **variables)
    return result.stdout + result.stderr if fails else result.stdout


@pytest.fixture
def hub(published):
    """The same content in a hub of the test's own, to add to and to break."""
    with LoopbackHub() as hub:
        for (repo_type, repo_id), repository in published.repositories.items():
            for branch, commit_id in repository.branches.items():
                hub.add_files(repo_id, repository.commits[commit_id], repo_type, branch)
        yield hub


GET_KERNEL = """
kernel = kernels.get_kernel(REPO, version=1, backend="cpu")
check_function(kernel)
print(kernel.__file__)
"""


# ----- publishing ---------------------------------------------------------------------------------


def files(hub, branch, repo_id=REPO_ID):
    repository = hub.repositories["kernel", repo_id]
    return repository.commits[repository.branches[branch]]


def test_publish(published, variant_dir):
    """README.md on main; the build and the benchmarks, byte for byte, on v1."""
    readme = files(published, "main")["README.md"].decode()
    assert list(files(published, "main")) == ["README.md"]
    assert f'get_kernel("{REPO_ID}", version=1)' in readme
    assert "- `fused_embedding_lookup`" in readme and f"- `{LAYER}`\n" in readme
    assert "Layout" not in readme
    assert "{%" not in readme and "{{" not in readme
    v1 = files(published, "v1")
    # What is published is this checkout's build, whichever the other tests look at.
    for path in (ROOT / "build" / variant_dir.name).iterdir():
        if path.is_file():
            assert v1[f"build/{variant_dir.name}/{path.name}"] == path.read_bytes()
    # As kernel-builder has it, and not what they measured.
    benchmarks = {path.name for path in (ROOT / "benchmarks").glob("benchmark*.py")}
    assert {path for path in v1 if not path.startswith("build/")} == {
        f"benchmarks/{name}" for name in benchmarks
    }
    assert not [path for path in v1 if "__pycache__" in path]
    assert "0 stale ones removed" in published.publish_output


def test_publish_removes_only_what_is_stale_in_its_own_variants(hub, tmp_path, variant_dir):
    others = {
        "build/torch211-metal-aarch64-darwin/op.py": b"somebody else's",
        "build/torch211-metal-aarch64-darwin/metadata.json.sigstore": b"signed",
        "benchmarks/benchmark_of_a_friend.py": b"",
        "flake.lock": b"",
    }
    before = files(hub, "v1").keys() | others.keys()
    stale = {f"build/{variant_dir.name}/old.abi3.so": b"", f"build/{variant_dir.name}/a/b.py": b""}
    hub.add_files(REPO_ID, stale | others, branch="v1")
    assert "2 stale ones removed" in publish(hub, tmp_path)
    assert files(hub, "v1").keys() == before


def checkout(folder, variant_dir, variant, extension=b"built"):
    """What tools/publish.py needs of a checkout, with one variant built. Returns the folder."""
    for name in ("build.toml", "CARD.md", "tools", "torch-ext", "benchmarks"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        folder.mkdir(exist_ok=True)
        copy(ROOT / name, folder / name)
    built = folder / "build" / variant
    built.mkdir(parents=True)
    shutil.copy(variant_dir / "metadata.json", built)
    (built / f"{folder.name}.abi3.so").write_bytes(extension)
    return folder


@pytest.mark.parametrize("names", [("abi210-cpu", "abi210-cu130"), ("abi210-cpu", "abi210-cpu")])
def test_two_uploads_at_once(hub, tmp_path, variant_dir, names):
    """The one that comes second is refused, and does it all again on what the first one left."""
    names = [f"torch-stable-{name}-riscv64-linux" for name in names]
    before = files(hub, "v1").keys()
    checkouts = [
        checkout(tmp_path / f"upload{i}", variant_dir, name, b"%d" % i)
        for i, name in enumerate(names)
    ]
    hub.barrier = threading.Barrier(2)
    with ThreadPoolExecutor() as pool:
        outputs = list(pool.map(lambda root: publish(hub, root / "home", root), checkouts))
    assert sum("v1 has moved" in output for output in outputs) == 1  # main may have, as well
    new = files(hub, "v1").keys() - before
    uploads = [
        {f"build/{name}/metadata.json", f"build/{name}/upload{i}.abi3.so"}
        for i, name in enumerate(names)
    ]
    if names[0] == names[1]:  # one of them, whole, and nothing of the other
        assert new in uploads
    else:
        assert new == uploads[0] | uploads[1]


def test_an_upload_that_is_always_overtaken_gives_up(hub, tmp_path, variant_dir):
    before = dict(hub.repositories["kernel", REPO_ID].branches)
    root = checkout(tmp_path / "upload", variant_dir, "torch-stable-abi210-cpu-riscv64-linux")
    hub.fail("/commit/v1", 412)
    output = publish(hub, tmp_path / "home", root, fails=True)
    assert "error: " in output and "v1 has moved during each of 5 uploads" in output
    assert output.count("v1 has moved, once more") == 5
    assert hub.repositories["kernel", REPO_ID].branches == before


@pytest.mark.parametrize("where", ["/preupload/v1", "/lfs/", "/commit/v1"])
def test_upload_that_is_cut_short_changes_no_branch(hub, tmp_path, variant_dir, where):
    """Neither the version's branch nor the card on main."""
    hub.add_files(REPO_ID, {"README.md": b"before"}, branch="main")
    before = dict(hub.repositories["kernel", REPO_ID].branches)
    root = checkout(tmp_path / "upload", variant_dir, "torch-stable-abi210-cpu-riscv64-linux")
    hub.fail(where, 403)
    publish(hub, tmp_path / "home", root, fails=True)
    assert hub.repositories["kernel", REPO_ID].branches == before


def test_publish_without_a_build(tmp_path):
    """Says what to do, and sends nothing."""
    for name in ("build.toml", "tools/publish.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    with LoopbackHub() as hub:
        assert "run `make build` first" in publish(hub, tmp_path, root=tmp_path, fails=True)
    assert not hub.requests


# ----- the ways in --------------------------------------------------------------------------------


def test_get_kernel(published, tmp_path):
    assert str(tmp_path) in run_script(published, tmp_path, GET_KERNEL)


@needs_torch_for_cpu
def test_kernelize(published, tmp_path):
    """replace_kernel_forward_from_hub, LayerRepository, kernelize."""
    script = """
    expected = model(pixels, ids).last_hidden_state
    kernels.replace_kernel_forward_from_hub(modeling_gemma4.Gemma4VisionPatchEmbedder, LAYER)
    layer = LayerRepository(REPO, layer_name=LAYER, version=1)
    with kernels.use_kernel_mapping({LAYER: {"cpu": layer}}):
        kernels.kernelize(model, mode=Mode.INFERENCE, device="cpu")
    assert is_ours(model.patch_embedder)
    assert torch.equal(model(pixels, ids).last_hidden_state, expected)
    """
    run_script(published, tmp_path, SMALL_MODEL + textwrap.dedent(script))


@needs_torch_for_cpu
def test_from_pretrained_with_kernel_config(published, tmp_path):
    """A checkpoint of the original loads unchanged into our Layout, whose forward is then ours.

    KernelConfig knows no "cpu", so the script adds it to the list of devices, and there alone.
    """
    script = """
    from transformers import KernelConfig
    from transformers.utils import kernel_config

    kernel_config.KERNELS_SUPPORTED_DEVICE_TYPES.append("cpu")
    expected = model(pixels, ids).last_hidden_state
    model.save_pretrained(CHECKPOINT)
    config = KernelConfig({LAYER: f"{REPO}:{LAYER}"})
    loaded, info = Gemma4VisionModel.from_pretrained(
        CHECKPOINT, use_kernels=True, kernel_config=config, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert type(loaded.patch_embedder).__qualname__ == LAYER + "Layout"
    assert is_ours(loaded.patch_embedder)
    assert type(loaded.patch_embedder).__name__ in loaded._no_split_modules
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters()):
        assert torch.equal(ours, theirs), name
    assert torch.equal(loaded.eval()(pixels, ids).last_hidden_state, expected)
    """
    checkpoint = f"CHECKPOINT = {str(tmp_path / 'checkpoint')!r}\n"
    run_script(published, tmp_path, SMALL_MODEL + checkpoint + textwrap.dedent(script))


@needs_torch_for_cpu
def test_from_pretrained_with_kernel_config_unified(published, tmp_path):
    """The same for Gemma 4 Unified, a whole model."""
    script = """
    from helpers import tiny_models
    from transformers import KernelConfig
    from transformers.utils import kernel_config

    kernel_config.KERNELS_SUPPORTED_DEVICE_TYPES.append("cpu")
    layer = "Gemma4UnifiedVisionEmbedder"
    model = tiny_models.build("unified-12b")
    model.save_pretrained(CHECKPOINT)
    loaded, info = type(model).from_pretrained(
        CHECKPOINT,
        use_kernels=True,
        kernel_config=KernelConfig({layer: f"{REPO}:{layer}"}),
        output_loading_info=True,
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert type(loaded.model.embed_vision).__qualname__ == layer + "Layout"
    assert is_ours(loaded.model.embed_vision)
    batch = tiny_models.prompt("unified-12b")
    assert torch.equal(loaded.eval()(**batch).logits, model(**batch).logits)
    """
    checkpoint = f"CHECKPOINT = {str(tmp_path / 'checkpoint')!r}\n"
    run_script(published, tmp_path, checkpoint + textwrap.dedent(script))


@needs_torch_for_cpu
@pytest.mark.parametrize(
    "name, layer, table, mean, std",
    [
        ("e2b", LAYER, "vision_tower.patch_embedder.position_embedding_table", 1, 0),
        ("unified-12b", "Gemma4UnifiedVisionEmbedder", "embed_vision.pos_embedding", 0, 0.02),
    ],
)
def test_a_table_that_the_checkpoint_lacks_starts_as_the_originals(
    published, tmp_path, name, layer, table, mean, std
):
    """Gemma 4's as ones, Unified's as noise, and not as what was in memory."""
    script = f"""
    from helpers import tiny_models
    from safetensors.torch import load_file, save_file
    from transformers import KernelConfig
    from transformers.utils import kernel_config

    kernel_config.KERNELS_SUPPORTED_DEVICE_TYPES.append("cpu")
    model = tiny_models.build({name!r})
    model.save_pretrained(CHECKPOINT)
    file = CHECKPOINT + "/model.safetensors"
    tensors = load_file(file)
    (key,) = [key for key in tensors if key.endswith({table.rpartition(".")[2]!r})]
    del tensors[key]
    save_file(tensors, file, {{"format": "pt"}})
    torch.use_deterministic_algorithms(True)  # what nobody fills is NaN
    loaded, info = type(model).from_pretrained(
        CHECKPOINT,
        use_kernels=True,
        kernel_config=KernelConfig({{{layer!r}: f"{{REPO}}:{layer}"}}),
        output_loading_info=True,
    )
    assert set(info["missing_keys"]) == {{"model.{table}"}}, info
    values = loaded.model.get_parameter({table!r})
    assert abs(values.mean().item() - {mean}) <= 0.1 * {std}, values
    assert abs(values.std().item() - {std}) <= 0.1 * {std}, values
    """
    checkpoint = f"CHECKPOINT = {str(tmp_path / 'checkpoint')!r}\n"
    run_script(published, tmp_path, checkpoint + textwrap.dedent(script))


MODELING = f"""
import torch
from kernels import get_kernel
from transformers import PretrainedConfig, PreTrainedModel


class PatchConfig(PretrainedConfig):
    model_type = "patches"


class PatchModel(PreTrainedModel):
    config_class = PatchConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Parameter(torch.empty(2, 32, 48))
        self.kernel = get_kernel("{REPO_ID}", version=1, backend="cpu")
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, ids, residual):
        return self.kernel.fused_embedding_lookup(ids, self.table, residual=residual)
"""


def test_model_repository_whose_code_downloads_the_kernel(hub, tmp_path):
    """trust_remote_code: the repository's own modeling code calls get_kernel."""
    table = torch.randn(2, 32, 48)
    save_file({"table": table}, tmp_path / "model.safetensors", {"format": "pt"})
    auto_map = {"AutoConfig": "modeling.PatchConfig", "AutoModel": "modeling.PatchModel"}
    config = {"model_type": "patches", "architectures": ["PatchModel"], "auto_map": auto_map}
    model_files = {
        "config.json": json.dumps(config).encode(),
        "modeling.py": MODELING.encode(),
        "model.safetensors": (tmp_path / "model.safetensors").read_bytes(),
    }
    hub.add_files("someone/patches", model_files, "model")
    script = """
    from transformers import AutoModel

    model = AutoModel.from_pretrained("someone/patches", trust_remote_code=True)
    residual = torch.randn(2, 63, 48)
    assert torch.equal(model(ids, residual), reference.eager(ids, model.table, residual=residual))
    assert model.kernel.__name__.startswith("_fused_embedding_lookup_cpu_")
    """
    run_script(hub, tmp_path, script)


# ----- locking and offline ------------------------------------------------------------------------


def download_whole(hub, home, revision):
    """`hf download`: all variants and the benchmarks, not only what this system needs."""
    hf = [Path(sys.executable).parent / "hf", "download", REPO_ID, "--repo-type", "kernel"]
    process.run(*hf, "--revision", revision, **hub.environment(home))


@needs_torch_for_cpu
def test_lock(hub, tmp_path):
    """`kernels lock` pins the commit: what is published later is not picked up. Offline too."""
    project = tmp_path / "project"
    project.mkdir()
    dependencies = f'[tool.kernels.dependencies]\n"{REPO_ID}" = 1\n'
    (project / "pyproject.toml").write_text(dependencies)
    kernels = Path(sys.executable).parent / "kernels"
    process.run(kernels, "lock", project, **hub.environment(tmp_path))
    commit = hub.repositories["kernel", REPO_ID].branches["v1"]
    assert commit in (project / "kernels.lock").read_text()

    hub.add_files(REPO_ID, {"build/new": b""}, branch="v1")
    script = f"""
    from pathlib import Path

    lockfile = Path({str(project / "kernels.lock")!r})
    layer = LockedLayerRepository(REPO, lockfile=lockfile, layer_name=LAYER)
    assert layer.load().__name__ == LAYER
    kernel = kernels.get_locked_kernel(REPO, lockfile=lockfile)
    assert {commit!r} in kernel.__file__
    check_function(kernel)
    """
    run_script(hub, tmp_path, script)
    download_whole(hub, tmp_path, commit)
    run_script(hub, tmp_path, script, HF_HUB_OFFLINE="1")


def test_offline(published, tmp_path):
    """Offline takes a whole download of the version's branch, and then makes no request."""
    message = run_script(published, tmp_path, GET_KERNEL, fails=True, HF_HUB_OFFLINE="1")
    assert "not available in the local cache" in message
    download_whole(published, tmp_path, "v1")
    before = len(published.requests)
    run_script(published, tmp_path, GET_KERNEL, HF_HUB_OFFLINE="1")
    assert len(published.requests) == before


def test_offline_with_what_get_kernel_left_in_the_cache(published, tmp_path):
    """Not enough, by two faults upstream: fails as long as kernels 0.17.2 has them.

    get_kernel resolves version 1 to a commit and caches no "v1" to find it by; and by commit,
    huggingface_hub 2.4.0 refuses a snapshot that lacks the files of the other variants.
    """
    path = run_script(published, tmp_path, GET_KERNEL).strip()
    message = run_script(published, tmp_path, GET_KERNEL, fails=True, HF_HUB_OFFLINE="1")
    assert "not available in the local cache" in message
    by_commit = f'revision="{Path(path).parts[-4]}"'
    script = GET_KERNEL.replace("version=1", by_commit)
    message = run_script(published, tmp_path, script, fails=True, HF_HUB_OFFLINE="1")
    assert "IncompleteSnapshotError" in message
    # What does work: naming the folder.
    local = {"LOCAL_KERNELS": f"{REPO_ID}={Path(path).parents[2]}"}
    run_script(published, tmp_path, GET_KERNEL, HF_HUB_OFFLINE="1", **local)


# ----- faults -------------------------------------------------------------------------------------


def test_untrusted_publisher(hub, tmp_path):
    hub.trusted.clear()
    message = run_script(hub, tmp_path, GET_KERNEL, fails=True)
    assert "is not from a trusted publisher" in message and "trust_remote_code=True" in message
    assert not [request for request in hub.requests if "resolve" in request]  # nothing was fetched
    run_script(hub, tmp_path, GET_KERNEL.replace("version=1", "version=1, trust_remote_code=True"))


def replace_variant(hub, name):
    """Publish the CPU variant under another variant's name, and no other."""
    moved = {
        path.replace(path.split("/")[1], name) if path.startswith("build/") else path: content
        for path, content in files(hub, "v1").items()
        if not path.startswith("build/") or "-cpu-" in path
    }
    hub.repositories["kernel", REPO_ID].commit("v1", moved)


@pytest.mark.parametrize(
    "only, reason",
    [
        ("torch-stable-abi299-cpu-x86_64-linux", "too new for environment Torch"),
        ("torch-stable-abi210-rocm70-x86_64-linux", "does not match"),
        ("torch210-metal-aarch64-darwin", "does not match system"),
    ],
)
def test_no_variant_for_this_system(hub, tmp_path, only, reason):
    """The reasons are listed; `kernelize` with KernelizeFallback.ALL keeps the original forward."""
    replace_variant(hub, only)
    message = run_script(hub, tmp_path, GET_KERNEL, fails=True)
    assert "Cannot find a build variant for this system" in message and reason in message
    script = """
    from kernels import KernelizeFallback

    kernels.replace_kernel_forward_from_hub(modeling_gemma4.Gemma4VisionPatchEmbedder, LAYER)
    layer = LayerRepository(REPO, layer_name=LAYER, version=1)
    with kernels.use_kernel_mapping({LAYER: {"cpu": layer}}):
        kernels.kernelize(
            model, mode=Mode.INFERENCE, device="cpu", use_fallback=KernelizeFallback.ALL
        )
    assert not is_ours(model.patch_embedder)
    model(pixels, ids)
    """
    run_script(hub, tmp_path, SMALL_MODEL + textwrap.dedent(script))


def test_wrong_version(published, tmp_path):
    message = run_script(
        published, tmp_path, GET_KERNEL.replace("version=1", "version=2"), fails=True
    )
    assert "Version 2 not found, available versions: 1" in message


@pytest.mark.parametrize("kind", [404, 500, "cut", "truncate"])
def test_download_that_fails_then_a_retry(hub, tmp_path, kind):
    """Nothing half-loaded stays behind: the next attempt, with the fault gone, works."""
    hub.fail(".abi3.so", kind)
    message = run_script(hub, tmp_path, GET_KERNEL, fails=True, HF_HUB_DOWNLOAD_TIMEOUT="5")
    assert "Error" in message
    assert not list(tmp_path.rglob("*.abi3.so"))
    hub.faults.clear()
    run_script(hub, tmp_path, GET_KERNEL)


def test_tampered_extension(hub, tmp_path, variant_dir):
    """Who notices: `kernels` does not when it loads; the digest in metadata.json, if asked, does."""
    (name,) = [p for p in files(hub, "v1") if p.endswith(".abi3.so") and "-cpu-" in p]
    hub.add_files(REPO_ID, {name: files(hub, "v1")[name] + b"\0"}, branch="v1")
    path = run_script(hub, tmp_path, GET_KERNEL).strip()
    script = f"""
    from pathlib import Path
    from kernels._rust import Digest, DigestAlgorithm, DigestValidationError, Metadata

    variant = Path({path!r}).parent
    digest = Metadata.read_from_file(variant / "metadata.json").digest
    try:
        digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    except DigestValidationError as error:
        print(error)
    else:
        raise SystemExit("not noticed")
    """
    assert ".abi3.so" in run_script(hub, tmp_path, script)


def test_read_only_cache(published, tmp_path):
    """A cache filled by somebody else, which this process may not write, is enough."""
    download_whole(published, tmp_path, "v1")
    snapshot = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for path in [tmp_path, *tmp_path.rglob("*")]:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o222)
    try:
        # As root, permissions stop nobody: then this shows only that nothing tries to write.
        run_script(published, tmp_path, GET_KERNEL, PYTHONDONTWRITEBYTECODE="1", HF_HUB_OFFLINE="1")
    finally:
        for path in [tmp_path, *tmp_path.rglob("*")]:
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | 0o200)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == snapshot


def test_two_processes_download_at_once(published, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: run_script(published, tmp_path, GET_KERNEL), range(2)))


@pytest.mark.check("what is compiled for minutes")
def test_two_builds_in_one_process(hub, tmp_path, variant_dir):
    """Another build of the kernel, from this folder, next to the Hub's: two namespaces, no clash."""
    script = f"""
    import shutil
    from pathlib import Path

    hub_kernel = kernels.get_kernel(REPO, version=1, backend="cpu")
    other = kernels.get_local_kernel(Path({str(tmp_path / "other")!r}), backend="cpu")
    assert other.__name__ != hub_kernel.__name__
    for kernel in (hub_kernel, other):
        check_function(kernel)
        assert hasattr(torch.ops, kernel.__name__)
    """
    build_another(variant_dir, tmp_path / "other" / variant_dir.name)
    run_script(hub, tmp_path, script)


def build_another(variant_dir, destination):
    """Build this kernel as a checkout of another commit would: with another op namespace."""
    source = destination.parent / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".git", ".venv", ".build", "build", ".hypothesis"),
    )
    (source / "csrc" / "embedding_lookup.h").open("a").write("\n// another revision\n")
    process.python(source / "tools" / "build.py", "--output", destination.parent)
    shutil.rmtree(source)


def test_time_to_first_call(published, tmp_path):
    """From `get_kernel` on a warm cache to the first result, torch's own import aside: under 1 s."""
    run_script(published, tmp_path, GET_KERNEL)
    script = """
    import time

    start = time.perf_counter()
    kernel = kernels.get_kernel(REPO, version=1, backend="cpu")
    loaded = time.perf_counter()
    kernel.fused_embedding_lookup(ids, torch.randn(2, 32, 48))
    print(loaded - start, time.perf_counter() - loaded)
    """
    load, call = (float(word) for word in run_script(published, tmp_path, script).split())
    print(f"get_kernel {load:.3f} s, first call {call:.3f} s")
    assert load + call < 1
