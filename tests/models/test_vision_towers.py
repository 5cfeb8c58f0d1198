"""Vision towers with interpolated position embeddings: theirs, and ours in them."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers import profiled
from helpers.bounds import assert_near, assert_same_gradients
from helpers.vision_towers import GRID, SMALL, build, inputs, patched, swap, undo

pytestmark = pytest.mark.variant("cpu", "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = {
    "an image": [[1, 6, 8]],
    "several images": [[1, 6, 8], [1, 4, 2], [1, 12, 10]],
    "a video": [[3, 4, 6]],
    "images and a video": GRID,
}


@pytest.fixture
def swap_in(variant_dir, monkeypatch):
    """Returns a copy of a model that is patched and has our layers."""
    undo(monkeypatch.setattr)
    return lambda model, *args: swap(model, variant_dir, *args)


def flat(output):
    """All tensors of a model's output."""
    tensors = []
    for value in output.values():
        tensors.extend(value if isinstance(value, (list, tuple)) else [value])
    return tensors


def assert_same_step(original, ours, arguments, rounding=8):
    """The same outputs and gradients, but for the rounding of the table's gradient. Returns how many those are.

    `rounding` is in units in the last place of that gradient's largest element.
    """
    expected, actual = flat(original(**arguments)), flat(ours(**arguments))
    assert len(actual) == len(expected) and expected
    for theirs, mine in zip(expected, actual, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    for outputs in expected, actual:
        sum(tensor.float().sin().sum() for tensor in outputs).backward()
    return assert_same_gradients(ours, original, rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", patched.TOWERS)
def test_patched_towers(swap_in, name, dtype):
    """Every class that the upstream patch changes: patched alone, and with our layer."""
    arguments = inputs(name, GRID, dtype)
    for change, rounding in ((patched.patch_model, 0), (swap_in, 8)):
        original = build(name, dtype)
        assert assert_same_step(original, change(original), arguments, rounding) == 1


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["qwen3_vl", "paddleocr_vl", "muse_glimmer", "muse_spark"])
def test_media(swap_in, name, grid):
    original = build(name)
    assert assert_same_step(original, swap_in(original), inputs(name, GRIDS[grid])) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in SMALL if name != "kimi_k25"])
def test_towers_with_modules_of_their_own(swap_in, name, dtype):
    """Swapped into transformers as it is."""
    original = build(name, dtype)
    arguments = inputs(name, GRID, dtype)
    assert assert_same_step(original, swap_in(original), arguments) == 1


@pytest.mark.parametrize("version", ["5.23.1", "5.24.0", "5.25.0.dev0", "6.0.0"])
def test_muse_glimmer_of_each_version(swap_in, monkeypatch, version):
    """From 5.24 on it looks its position embeddings up as if height and width were exchanged."""
    original = build("muse_glimmer").patch_embedder
    ours = swap_in(nn.Sequential(original))[0]
    arguments = inputs("muse_glimmer", GRID)
    grid = arguments.pop("grid_thw")
    looked_up = grid if version < "5.24" else grid[:, [0, 2, 1]]
    expected = original(**arguments, grid_thw=looked_up)
    monkeypatch.setattr("transformers.__version__", version)
    assert torch.equal(ours(**arguments, grid_thw=grid), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_kimi(swap_in, grid, dtype):
    """Its sum over 16 taps is taken in another order: a rounding of the result apart, at most."""
    original = build("kimi_k25", dtype)
    layer = next(m for m in original.modules() if type(m).__name__ == SMALL["kimi_k25"][0])
    ours = swap_in(nn.Sequential(layer))[0]
    grid = torch.tensor(GRIDS[grid])
    hidden_states = torch.randn(int(grid.prod(1).sum()), 32).to(dtype)
    expected, actual = layer(hidden_states, grid), ours(hidden_states, grid)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=2 * eps, atol=4 * eps)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    actual.backward(grad)
    theirs, mine = layer.position_embeddings.grad, ours.position_embeddings.grad
    # In 16 bits embedding_bag rounds its gradient after every addition, ours once.
    assert_near(mine, theirs, 4 if dtype == torch.float32 else 32)


@pytest.mark.parametrize("name", ["qwen3_vl", "paddleocr_vl", "muse_spark"])
def test_autocast(swap_in, name):
    """Projected in bfloat16, a table in float32."""
    original = build(name)
    ours = swap_in(original)
    with torch.autocast(next(ours.parameters()).device.type, torch.bfloat16):
        assert assert_same_step(original, ours, inputs(name, GRID)) == 1


def interpolated(tower):
    """The layer's arguments in a tower of patched Qwen3-VL."""
    grid = torch.tensor(GRID)
    return torch.randn(int(grid.prod(1).sum()), 32), tower.pos_embed, grid


@pytest.mark.parametrize("kind", ["ours", "patched"])
def test_fake_tensors(swap_in, kind):
    """The result's size needs no value of a tensor. (What our launchers do is in test_launches.py.)"""
    original = build("qwen3_vl")
    tower = swap_in(original) if kind == "ours" else patched.patch_model(original)
    hidden_states, pos_embed, grid = interpolated(tower)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        out = tower.add_pos_embed(
            mode.from_tensor(hidden_states), pos_embed, mode.from_tensor(grid)
        )
    assert out.shape == hidden_states.shape


def test_precomputed(swap_in):
    """As exporters pass them: taken as they are, and not passed on."""
    original = build("qwen3_vl")
    tower = swap_in(original)
    arguments = inputs("qwen3_vl", GRID)
    given = {
        "interp_indices": torch.randint(64, (len(arguments["hidden_states"]), 4)),
        "interp_weights": torch.rand(len(arguments["hidden_states"]), 4),
    }
    actual = tower(**arguments, **given)
    calls = [name for name, _ in profiled.ops(lambda: tower(**arguments, **given))]
    assert not any("interpolation" in name for name in calls)
    assert any(name.startswith("_fused_embedding_lookup_") for name in calls)
    for theirs, mine in zip(flat(original(**arguments, **given)), flat(actual), strict=True):
        assert torch.equal(mine, theirs)


def padding_idx(tower):
    """The row is read, and gets no gradient."""
    tower.pos_embed.padding_idx = 9
    return tower


def forward_hook(tower):
    tower.pos_embed.register_forward_hook(lambda module, args, out: out * 3)
    return tower


def parametrization(tower):
    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    nn.utils.parametrize.register_parametrization(tower.pos_embed, "weight", Doubled())
    return tower


def lora(tower):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["pos_embed", "qkv"], init_lora_weights=False)
    return get_peft_model(tower, config)


def modules_to_save(tower):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["pos_embed"])
    tower = get_peft_model(tower, config)
    with torch.no_grad():
        tower.base_model.model.pos_embed.modules_to_save["default"].weight += 1
    return tower


def quantised(tower):
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, quantize_

    config = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_(tower, config, lambda module, path: path == "pos_embed")
    return tower


def offloaded(tower):
    from accelerate import cpu_offload

    tower.requires_grad_(False)
    tower = cpu_offload(tower, execution_device=next(tower.parameters()).device)
    assert tower.pos_embed.weight.device.type == "meta"
    return tower


@pytest.mark.parametrize(
    "change",
    [padding_idx, forward_hook, parametrization, lora, modules_to_save, quantised, offloaded],
    ids=lambda change: change.__name__,
)
def test_the_table_keeps_its_meaning(swap_in, change):
    """What is done to the embedding counts, though our layer never looks ids up in it."""
    before = build("qwen3_vl")
    models = []
    for tower in (copy.deepcopy(before), swap_in(before)):
        torch.manual_seed(3)
        models.append(change(tower.train()))
    arguments = inputs("qwen3_vl", GRID)
    if change in (quantised, offloaded):
        with torch.no_grad():
            expected, actual = (flat(model(**arguments)) for model in models)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    else:
        gradients = {lora: 2}.get(change, 1)  # of the table, or of its two adapters
        assert assert_same_step(*models, arguments) == gradients
    if change is padding_idx:
        rows = [model.pos_embed.weight.grad.abs().sum(1) for model in models]
        assert all(row[9] == 0 and row[10] > 0 for row in rows)
    elif change is not offloaded:  # the change shows
        with torch.no_grad():
            untouched = flat(before(**arguments))
        assert not torch.equal(untouched[0], flat(models[1](**arguments))[0])


@pytest.mark.parametrize("option", ["scale_grad_by_freq", "max_norm", "sparse"])
def test_a_table_for_which_the_ids_count(swap_in, option):
    """The same bits, in the gradient and in the table too: rows that no patch reads are not touched."""
    original = build("qwen3_vl").train()
    arguments = inputs("qwen3_vl", [[1, 2, 2], [1, 2, 2]])  # corners, each of them twice
    plain = copy.deepcopy(original)
    setattr(original.pos_embed, option, True)
    models = [original, swap_in(original)]
    outputs = []
    for model in (*models, plain):
        outputs.append(flat(model(**arguments)))
        sum(output.sin().sum() for output in outputs[-1]).backward()
    assert all(torch.equal(a, b) for a, b in zip(*outputs[:2], strict=True))
    weights = [model.pos_embed.weight for model in models]
    assert torch.equal(*weights)
    assert all(weight.grad.is_sparse == (option == "sparse") for weight in weights)
    gradients = [weight.grad.to_dense() for weight in weights]
    assert torch.equal(*gradients)
    if option == "scale_grad_by_freq":
        assert not torch.equal(gradients[1], plain.pos_embed.weight.grad)
    elif option == "max_norm":  # 1
        norms = weights[1].detach().norm(dim=1)
        assert norms[0] <= 1 < norms[27]
    else:
        rows = weights[1].grad.coalesce().indices()[0]
        assert 4 <= len(rows) < 64


def test_a_hook_on_all_modules(swap_in):
    original = build("qwen3_vl")
    ours = swap_in(original)

    def triple(module, args, output):
        return output * 3 if isinstance(module, nn.Embedding) else None

    untouched = flat(ours(**inputs("qwen3_vl", GRID)))
    with nn.modules.module.register_module_forward_hook(triple):
        assert assert_same_step(original, ours, inputs("qwen3_vl", GRID)) == 1
        assert not torch.equal(flat(ours(**inputs("qwen3_vl", GRID)))[0], untouched[0])


def test_a_split_tower(swap_in, tmp_path):
    """On accelerate's map, as transformers makes it, with the table elsewhere than our module."""
    from accelerate import dispatch_model

    before = build("qwen3_vl")
    fresh = patched.modeling("qwen3_vl").Qwen3VLVisionModel._from_config(before.config)
    fresh.load_state_dict(before.state_dict())
    tower = swap_in(fresh.eval()).requires_grad_(False)
    device = str(tower.pos_embed.weight.device)
    places = {name: device for name, _ in tower.named_children()} | {"pos_embed": "disk"}
    assert "add_pos_embed" in places
    dispatch_model(
        tower,
        places,
        main_device=device,
        offload_dir=tmp_path,
        skip_keys=tower._skip_keys_device_placement,
    )
    assert tower.pos_embed.weight.device.type == "meta"
    arguments = inputs("qwen3_vl", GRIDS["an image"])
    for theirs, mine in zip(flat(before(**arguments)), flat(tower(**arguments)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(swap_in, backend):
    """One graph, without a break, for all numbers of patches; forward and backward."""
    tower = swap_in(build("qwen3_vl"))
    torch._dynamo.reset()
    layer = torch.compile(tower.add_pos_embed, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        # Not 1, nor 3: sizes that are equal when it is compiled are taken to be equal.
        for grid in ("an image", "images and a video", "several images"):
            grid = torch.tensor(GRIDS[grid] * 2)
            hidden_states = torch.randn(int(grid.prod(1).sum()), 32, requires_grad=True)
            outs = [f(hidden_states, tower.pos_embed, grid) for f in (layer, tower.add_pos_embed)]
            assert torch.equal(*outs)
            grads = [
                torch.autograd.grad(out.sin().sum(), (hidden_states, tower.pos_embed.weight))
                for out in outs
            ]
            assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_export(swap_in):
    """With any number of patches and images."""

    class Step(nn.Module):
        def __init__(self, tower):
            super().__init__()
            self.pos_embed, self.add_pos_embed = tower.pos_embed, tower.add_pos_embed

        def forward(self, hidden_states, grid_thw):
            return self.add_pos_embed(hidden_states, self.pos_embed, grid_thw)

    step = Step(swap_in(build("qwen3_vl")))
    hidden_states, _, grid = interpolated(step)
    dynamic = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        step,
        (hidden_states, grid),
        dynamic_shapes={"hidden_states": dynamic, "grid_thw": dynamic},
    )
    other = torch.tensor(GRIDS["an image"] * 4)
    hidden_states = torch.randn(int(other.prod(1).sum()), 32)
    assert torch.equal(program.module()(hidden_states, other), step(hidden_states, other))


GRIDS_AT_THE_EDGE = {
    "not a multiple of the merge size": torch.tensor([[1, 3, 5]]),
    "int32": torch.tensor(GRID, dtype=torch.int32),
    "transposed in memory": torch.tensor(GRID).t().contiguous().t(),
    "no frame, no row": torch.tensor([[0, 4, 4], [1, 2, 2], [1, 0, 4]]),
    "no patch at all": torch.tensor([[1, 0, 4]]),
    "lower than a block": torch.tensor([[1, 1, 4]]),
    "larger than the table": torch.tensor([[1, 20, 30]]),
}


@pytest.mark.parametrize("grid", GRIDS_AT_THE_EDGE)
def test_grids_at_the_edge(swap_in, device, grid):
    """What transformers' code takes: the same values."""
    original = patched.patch_model(build("qwen3_vl"))
    ours = swap_in(original)
    grid = GRIDS_AT_THE_EDGE[grid].to(device)
    hidden_states = torch.randn(int(grid.prod(1).sum()), 32)
    expected, actual = (
        tower.add_pos_embed(hidden_states, tower.pos_embed, grid) for tower in (original, ours)
    )
    assert torch.equal(actual, expected)


def test_no_images(swap_in):
    """transformers fails on it. Here it is an empty result, as of any op on an empty tensor."""
    tower = swap_in(build("qwen3_vl"))
    grid = torch.empty(0, 3, dtype=torch.int64)
    assert tower.add_pos_embed(torch.empty(0, 32), tower.pos_embed, grid).shape == (0, 32)


FAULTS = {
    "a grid of other images": (
        lambda h, e, g: (h, e, g[:1]),
        "num_patches must be the number of patches",
    ),
    "a grid narrower than a block": (
        lambda h, e, g: (h[:4], e, torch.tensor([[1, 4, 1]])),
        "grid_thw must not be narrower than spatial_merge_size, 2",
    ),
    "a grid on another device": (
        lambda h, e, g: (h, e, g.to("meta")),
        "grid_thw must be on the device of hidden_states, cpu, got meta",
    ),
    "no grid": (
        lambda h, e, g: (h, e, None),
        "grid_thw must be a tensor, got NoneType",
    ),
    "a table smaller than the grid": (
        lambda h, e, g: (h, nn.Embedding(63, 32), g),
        "position_ids must be less than the 63 rows",
    ),
    "weights in bfloat16": (
        lambda h, e, g: (h, e, g),
        "weights must be float32, got BFloat16",
    ),
}


@pytest.mark.variant("cpu")  # on a GPU some end the process: test_cuda.py
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(swap_in, fault):
    tower = swap_in(build("qwen3_vl"))
    change, message = FAULTS[fault]
    arguments = change(*interpolated(tower))
    given = {}
    if fault == "weights in bfloat16":
        patches = len(arguments[0])
        given["interp_indices"] = torch.zeros(patches, 4, dtype=torch.int64)
        given["interp_weights"] = torch.zeros(patches, 4, dtype=torch.bfloat16)
    with pytest.raises((ValueError, IndexError, TypeError), match=message):
        tower.add_pos_embed(*arguments, **given)
