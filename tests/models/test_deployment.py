"""A model with our layers in it, on its way elsewhere: exported, compiled ahead, copied, pickled, sent."""

import copy
import io

import kernels
import onnx
import pytest
import torch
from kernels import Mode

from helpers import REPO_ID, process, swapping, tiny_models
from helpers.variants import SIMT_BUILDS, why_not

pytestmark = pytest.mark.variant("cpu", "cuda")


def embedder_and_batch(name):
    """A model's embedder, and what it is called with."""
    batch = tiny_models.prompt(name)
    arguments = [batch["pixel_values"], batch["image_position_ids"]]
    model = tiny_models.build(name).model
    if name == "unified-12b":
        return model.embed_vision, arguments
    return model.vision_tower.patch_embedder, [*arguments, (arguments[1] == -1).all(-1)]


def first(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@pytest.mark.parametrize("name", ["e2b", "unified-12b"])
def test_export(swap_in, name):
    """torch.export with a dynamic batch, saved and loaded."""
    original, arguments = embedder_and_batch(name)
    ours = swap_in(torch.nn.Sequential(original))[0]
    batch = torch.export.Dim("batch", max=64)
    shapes = [{0: batch}] * len(arguments) + ([None] if name == "unified-12b" else [])
    doubled = tuple(a.repeat(2, *[1] * (a.dim() - 1)) for a in arguments)
    extra = (True,) if name == "unified-12b" else ()
    exported = torch.export.export(ours, doubled + extra, dynamic_shapes=tuple(shapes))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (doubled, tuple(arguments)):
        assert torch.equal(first(loaded(*batch, *extra)), first(original(*batch)))


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("name", ["e2b", "unified-12b"])
def test_onnx_export_gives_the_originals_graph(swap_in, tmp_path, name, dynamo):
    original, arguments = embedder_and_batch(name)
    graphs = []
    for module in (original, swap_in(torch.nn.Sequential(original))[0]):
        file = tmp_path / "module.onnx"
        torch.onnx.export(module, tuple(arguments), file, dynamo=dynamo)
        nodes = onnx.load(file).graph.node
        graphs.append([(node.op_type, node.input, node.output, node.attribute) for node in nodes])
    assert graphs[0] == graphs[1]
    assert "Gather" in {node[0] for node in graphs[0]} or "GatherND" in {n[0] for n in graphs[0]}


@pytest.mark.parametrize("loaded", ["none", "another", "its own"])
def test_an_exported_program_needs_the_build_that_it_was_saved_with(kernel, tmp_path, loaded):
    """Its graph names the op, and the op's name the build: kernels-community allows no other name.

    Another build of the same version has other ops. Loading says in one sentence which build is needed.
    """
    if loaded == "another" and why_not("cuda-simt"):
        pytest.skip(why_not("cuda-simt"))

    class Lookup(torch.nn.Module):
        def forward(self, ids, table):
            return kernel.fused_embedding_lookup(ids, table)

    arguments = torch.tensor([[1, 0]]), torch.randn(2, 3, 4)
    path = tmp_path / "lookup.pt2"
    torch.export.save(torch.export.export(Lookup(), arguments), path)
    own = kernel.__name__.split("_")[4]
    get = {
        "none": "",
        "another": f"kernels.get_local_kernel(Path({str(SIMT_BUILDS / 'cuda')!r}), backend='cpu')",
        "its own": f"kernels.get_kernel({REPO_ID!r}, version=1, backend={own!r})",
    }
    code = f"import kernels, torch; from pathlib import Path; {get[loaded]}\n"
    code += f"torch.export.load({str(path)!r}).module()"
    result = process.script(code, fails=loaded != "its own")
    sentence = f"We failed to resolve torch.ops.{kernel.__name__}.forward.default to an operator."
    assert (sentence in result.stderr) == (loaded != "its own"), result.stderr


@pytest.mark.check("what is compiled for minutes")
def test_vision_tower_exported_and_compiled_ahead(swap_in, tmp_path):
    """The whole tower, as a graph that calls the op, and as AOTInductor's package."""
    original = tiny_models.build("e2b").model.vision_tower
    ours = swap_in(original)
    batch = tiny_models.prompt("e2b")
    arguments = batch["pixel_values"], batch["image_position_ids"]
    with torch.no_grad():
        expected = original(*arguments).last_hidden_state
        exported = torch.export.export(ours, arguments, strict=False)
        assert torch.equal(exported.module()(*arguments).last_hidden_state, expected)
        targets = {str(node.target) for node in exported.graph.nodes}
        assert any("fused_embedding_lookup" in target for target in targets)
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "tower.pt2")
        )
        package = torch._inductor.aoti_load_package(path)
        # The compiler's own fusions round elsewhere, with or without our layer.
        torch.testing.assert_close(
            package(*arguments).last_hidden_state, expected, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("name", ["e2b", "unified-12b"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(swap_in, name, how):
    """A copy computes with its own weights, not with the original's."""
    original, arguments = embedder_and_batch(name)
    ours = swap_in(torch.nn.Sequential(original))[0]
    if how == "deepcopy":
        copied = copy.deepcopy(ours)
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
        assert torch.equal(first(copied(*arguments)), first(original(*arguments)))


@pytest.mark.parametrize("name", ["e2b", "unified-12b"])
def test_kernelize_again_and_in_another_mode(swap_in, variant_dir, name):
    original = tiny_models.build(name)
    ours = swap_in(original, Mode.INFERENCE)
    batch = tiny_models.prompt(name)
    expected = original(**batch).logits
    for mode in (Mode.INFERENCE, Mode.TRAINING, Mode.TRAINING | Mode.TORCH_COMPILE):
        swapping.swap(ours, variant_dir, mode)
        assert torch.equal(ours(**batch).logits, expected)


@pytest.mark.parametrize("name", ["e2b", "unified-12b"])
def test_without_a_mapping_the_original_comes_back(swap_in, name):
    """kernelize with nothing for a layer restores its own forward."""
    ours = swap_in(tiny_models.build(name))
    (embedder,) = [m for m in ours.modules() if isinstance(m, swapping.LAYERS)]
    assert swapping.is_ours(embedder)
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        kernels.kernelize(ours, mode=Mode.INFERENCE, device=ours.device.type)
    assert not swapping.is_ours(embedder)


class Embedded(torch.utils.data.Dataset):
    """Items that the op computes, in the data loader's own processes."""

    def __init__(self, variant_dir):
        self.variant_dir = variant_dir

    def __len__(self):
        return 4

    def __getitem__(self, index):
        table = torch.arange(24.0).view(2, 4, 3)
        ids = torch.tensor([[index, 3 - index]])
        return swapping.load(self.variant_dir).fused_embedding_lookup(ids, table)


@pytest.mark.variant("cpu")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_processes(variant_dir, start):
    dataset = Embedded(variant_dir)
    expected = torch.stack([dataset[i] for i in range(4)])  # used before the fork, too
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, num_workers=2, multiprocessing_context=start
    )
    assert torch.equal(torch.cat(list(loader)), expected)
