"""What only a GPU can show: streams, graphs, launches, memory. The op itself is in test_op.py."""

import pytest
import torch

from helpers import ROOT, process, reference
from helpers.problems import grid, problem
from helpers.profiled import on_the_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.variant("cuda")]


def gemma4(batch=4):
    """Gemma 4's arguments, and a gradient."""
    dtype = torch.bfloat16
    ids = grid(batch, 2520, 60, 40)
    arguments = problem(ids, 10240, 768, dtype, padding=True, residual=dtype)
    arguments["table"].requires_grad_()
    return *arguments.values(), torch.randn_like(arguments["residual"])


def step(kernel, ids, table, padding, residual, grad):
    """The output and the table's gradient."""
    out = kernel.fused_embedding_lookup(ids, table, padding=padding, residual=residual)
    return out, torch.autograd.grad(out, table, grad)[0]


@pytest.fixture
def others(kernel, variant_dir, monkeypatch):
    """Calls of the other two ops and of a tower's layer, by name, and the tensors that they take."""
    from helpers import vision_towers  # transformers' models, which take seconds

    vision_towers.undo(monkeypatch.setattr)
    tower = vision_towers.swap(vision_towers.build("qwen3_vl"), variant_dir)
    grid = torch.tensor([[1, 32, 48], [2, 10, 14]])
    pixels = torch.rand(4, 2520, 768)
    hidden_states = torch.randn(1816, 32)

    def indices_and_weights():
        return kernel.vision_interpolation_indices_and_weights(grid, 48, num_patches=1816)

    def layer():
        with torch.no_grad():
            return (tower.add_pos_embed(hidden_states, tower.pos_embed, grid),)

    calls = {
        "indices and weights": indices_and_weights,
        "pixels": lambda: (kernel.scale_pixels(pixels, torch.bfloat16),),
        "layer": layer,
    }
    return calls, (grid, pixels, hidden_states)


OTHERS = {"indices and weights": 1, "pixels": 1, "layer": 2}  # launches


@pytest.mark.parametrize("batch", [1, 40])
def test_launches(kernel, batch):
    """One forward; five backward, of which two sort: 20,481 numbers of rows have two digits."""
    ids, table, padding, residual, grad = gemma4(batch)

    def forward():
        return kernel.fused_embedding_lookup(ids, table, padding=padding, residual=residual)

    assert len(on_the_gpu(forward)) == 1
    out = forward()
    names = on_the_gpu(lambda: torch.autograd.grad(out, table, grad, retain_graph=True))
    assert len(names) == 5, names


@pytest.mark.parametrize("name", OTHERS)
def test_launches_of_the_others(others, name):
    calls, _ = others
    names = on_the_gpu(calls[name])
    assert len(names) == OTHERS[name], names


def test_backward_is_deterministic(kernel):
    """50 runs, bit for bit, of sums in one run, in several runs and of single tokens."""
    ids, table, padding, residual, grad = gemma4(8)
    for these in (ids, torch.randint_like(ids, 10240), torch.randint_like(ids, 3)):
        expected = step(kernel, these, table, padding, residual, grad)[1]
        for _ in range(50):
            actual = step(kernel, these, table, padding, residual, grad)[1]
            assert torch.equal(actual, expected)


def test_cpu_and_gpu_agree(kernel):
    """The GPU's outputs are the CPU variant's of the same arguments, to the bit."""
    ids, table, padding, residual, grad = gemma4(2)
    out, _ = step(kernel, ids, table, padding, residual, grad)
    expected = reference.eager(
        ids.cpu(), table.cpu(), padding=padding.cpu(), residual=residual.cpu()
    )
    assert torch.equal(out.cpu(), expected)


def test_side_stream(kernel):
    """The work is queued on the current stream: after what is there, before what comes."""
    ids, table, padding, residual, grad = gemma4(8)
    expected = step(kernel, ids, table, padding, residual, grad)
    late = torch.empty_like(residual)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the residual arrives long after the launch
        late.copy_(residual)
        actual = step(kernel, ids, table, padding, late, grad)
        done = stream.record_event()
    torch.cuda.current_stream().wait_event(done)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def assert_no_synchronisation(call):
    """PyTorch would raise at a synchronising call of its own, and the host is done before the GPU."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(500_000_000)
        busy = torch.cuda.current_stream().record_event()
        call()
        assert not busy.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_synchronisation(kernel):
    arguments = gemma4()
    assert_no_synchronisation(lambda: step(kernel, *arguments))


@pytest.mark.parametrize("name", OTHERS)
def test_no_synchronisation_of_the_others(others, name):
    calls, _ = others
    assert_no_synchronisation(calls[name])


def test_transformers_synchronises(variant):
    """So that the tests above can fail."""
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    grid = torch.tensor([[1, 32, 48]])
    with pytest.raises(RuntimeError, match="synchroniz"):
        assert_no_synchronisation(lambda: get_vision_interpolation_indices_and_weights(grid, 48))


def test_graph(kernel):
    """Captured once, replayed with other ids and values."""
    ids, table, padding, residual, grad = gemma4()
    step(kernel, ids, table, padding, residual, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(kernel, ids, table, padding, residual, grad)
    for high in (10240, 50, 1):
        ids.random_(0, high)
        residual.normal_()
        grad.normal_()
        graph.replay()
        expected = step(kernel, ids, table, padding, residual, grad)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected))


@pytest.mark.parametrize("name", OTHERS)
def test_graph_of_the_others(others, name):
    """Captured once, replayed with other values and with grids of as many patches."""
    calls, (grid, pixels, hidden_states) = others
    calls[name]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calls[name]()
    for grids in ([[2, 10, 14], [1, 32, 48]], [[1, 4, 454], [0, 2, 2]]):
        grid.copy_(torch.tensor(grids))
        pixels.uniform_()
        hidden_states.normal_()
        graph.replay()
        for replayed, expected in zip(captured, calls[name](), strict=True):
            assert torch.equal(replayed, expected)


def test_first_call_in_a_capture(kernel):
    """In a process of its own, in which nothing of ours has been loaded."""
    process.python(ROOT / "benchmarks" / "gpu.py", "first-capture")


@pytest.mark.parametrize("argument", ["table", "padding", "residual"])
def test_two_devices_are_refused(kernel, argument):
    arguments = problem((2, 5, 3), 4, 8, padding=0.1, residual=torch.float32)
    arguments[argument] = arguments[argument].cpu()
    with pytest.raises(ValueError, match=f"{argument} must be on the device of position_ids"):
        kernel.fused_embedding_lookup(**arguments)


def test_a_grid_on_another_device_is_refused(kernel, variant_dir, monkeypatch):
    from helpers import vision_towers

    vision_towers.undo(monkeypatch.setattr)
    tower = vision_towers.swap(vision_towers.build("qwen3_vl"), variant_dir)
    with pytest.raises(ValueError, match="on the device of hidden_states, cuda:0, got cpu"):
        tower.add_pos_embed(
            torch.randn(4, 32), tower.pos_embed, torch.tensor([[1, 2, 2]], device="cpu")
        )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current(kernel):
    ids, table, padding, residual, grad = gemma4()
    expected = step(kernel, ids, table, padding, residual, grad)
    moved = [tensor.detach().to("cuda:1") for tensor in (ids, table, padding, residual, grad)]
    moved[1].requires_grad_()
    actual = step(kernel, *moved)
    assert all(torch.equal(a.cuda(0), b) for a, b in zip(actual, expected))


def test_peak_memory(kernel):
    """A forward and backward hold the result, the table's gradient and 25 MB at most."""
    arguments = gemma4(40)
    _, table, _, residual, _ = arguments
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(kernel, *arguments)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= residual.nbytes + table.nbytes + 25e6


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_out_of_memory(kernel, direction):
    """PyTorch's own exception, which a training loop that halves its batch catches; then it goes on."""
    ids, columns = torch.zeros(1, 1, dtype=torch.int64), 2**20
    rows = 2 * torch.cuda.get_device_properties(0).total_memory // (4 * columns)
    table = torch.zeros(1, 1, columns, requires_grad=direction == "backward")
    with pytest.raises(torch.OutOfMemoryError, match=" out of memory. ") as info:
        if direction == "forward":
            kernel.fused_embedding_lookup(ids.expand(rows, 1), table)
        else:
            table = table.expand(1, rows, columns)  # it is its gradient that takes memory
            out = kernel.fused_embedding_lookup(ids, table)
            torch.autograd.grad(out, table, torch.ones_like(out))
    kernel.fused_embedding_lookup(ids, torch.ones(1, 1, 8))
    memory = pytest.importorskip(
        "accelerate.utils.memory", reason="needs accelerate: pip install -r requirements-test.txt"
    )
    assert memory.should_reduce_batch_size(info.value)
