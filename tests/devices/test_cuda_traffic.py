"""How often the CUDA kernels touch what: bytes and 32-byte sectors, as tests/simt counts them.

The README's table, for 2 images of 60 x 40 patches padded to 2520, H = 768 and bfloat16.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from helpers.problems import grid, problem
from simt.traffic import Moved, count_traffic

pytestmark = pytest.mark.variant("cuda-simt")

BATCH, PATCHES, WIDTH, HEIGHT, HIDDEN, ROWS = 2, 2520, 60, 40, 768, 512
TOKENS = BATCH * PATCHES
USED = BATCH * WIDTH * HEIGHT  # tokens that aren't padding
ROW_BYTES = 2 * HIDDEN
ROWS_USED = WIDTH + HEIGHT


@pytest.fixture(scope="module")
def arguments():
    ids, dtype = grid(BATCH, PATCHES, WIDTH, HEIGHT), torch.bfloat16
    return problem(ids, ROWS, HIDDEN, dtype, padding=True, residual=dtype).values()


def test_forward(variant_dir, kernel, arguments):
    ids, table, padding, residual = arguments
    log = []
    with count_traffic(variant_dir, log):
        out = kernel.fused_embedding_lookup(ids, table, padding=padding, residual=residual)
    (launch,) = log
    activations = TOKENS * ROW_BYTES
    assert launch.pop(residual.data_ptr())[::2] == (activations,) * 3
    assert launch.pop(out.data_ptr())[1::2] == (activations,) * 3
    moved = launch.pop(ids.data_ptr())
    assert moved.read_once == moved.read_by_blocks == 16 * TOKENS
    moved = launch.pop(padding.data_ptr())
    assert moved.read == 32 * TOKENS  # a byte that all lanes ask for together
    assert moved.read_once <= TOKENS + 64
    moved = launch.pop(table.data_ptr())
    assert moved.read == 2 * USED * ROW_BYTES  # from the level 2 cache
    assert moved.read_once == ROWS_USED * ROW_BYTES
    assert not launch, "it touches something else"


def test_weighted_forward(variant_dir, kernel):
    """Qwen3-VL's: every row once an entry, whatever its weight; ids and weights once."""
    dtype = torch.bfloat16
    given = problem((200, 4), 300, 1152, dtype, shared=True, weighted=True, residual=dtype)
    log = []
    with count_traffic(variant_dir, log):
        kernel.fused_embedding_lookup(**given)
    (launch,) = log
    assert launch[given["weights"].data_ptr()].read_by_blocks == 200 * 4 * 4
    assert launch[given["position_ids"].data_ptr()].read_by_blocks == 200 * 4 * 8
    assert launch[given["residual"].data_ptr()].read == 200 * 1152 * 2
    assert launch[given["table"].data_ptr()].read == 4 * 200 * 1152 * 2


@pytest.mark.parametrize("entries", [1, 2, 3, 4, 5, 40])
@pytest.mark.parametrize("weighted", [False, True])
def test_forward_reads_each_row_once(variant_dir, kernel, entries, weighted):
    """Of entries that have one, whatever the number that is looked up together."""
    ids = torch.randint(0, ROWS, (60, entries))
    ids[::7] = -1
    table = torch.randn(ROWS, 136).bfloat16()
    weights = torch.randn(60, entries) if weighted else None
    log = []
    with count_traffic(variant_dir, log):
        kernel.fused_embedding_lookup(ids, table, weights=weights, padding_id=-1)
    rows = (ids != -1).sum().item()
    assert log[0][table.data_ptr()].read == rows * 136 * 2


@pytest.mark.parametrize("count", [2**16, 2**16 + 16])
def test_scaling(variant_dir, kernel, count):
    """The pixels, once, but for the last vector again in the last block; the result, once."""
    pixels = torch.rand(count)
    log = []
    with count_traffic(variant_dir, log):
        out = kernel.scale_pixels(pixels, torch.bfloat16)
    (launch,) = log
    moved = launch.pop(pixels.data_ptr())
    assert moved.read_once == moved.read_by_blocks == pixels.nbytes
    assert pixels.nbytes <= moved.read <= pixels.nbytes + 256 * 4 * 16
    assert launch.pop(out.data_ptr())[1::2] == (out.nbytes,) * 3
    assert not launch, "it touches something else"


@pytest.mark.parametrize("kind", ["grid", "random", "one id"])
def test_backward(variant_dir, kernel, arguments, kind):
    ids, _, padding, grad = arguments
    if kind == "random":
        ids = torch.randint_like(ids, ROWS)
    elif kind == "one id":
        ids = torch.zeros_like(ids)
    rows = ids[~padding].unbind(-1)
    rows_used = sum(len(row.unique()) for row in rows)
    log = []
    with count_traffic(variant_dir, log):
        result = kernel.op.ops.backward(grad, ids, None, padding, None, ROWS, False, torch.bfloat16)
    rows, *sorts, sums, finish = log
    assert len(sorts) == 2  # 1025 numbers of rows
    entries = 2 * TOKENS

    # The gradient: in one launch, from memory once; K times from the level 2 cache. A team that meets
    # an entry without a row in its last four has read another token for it.
    moved = sums.pop(grad.data_ptr())
    assert moved.read_once == USED * ROW_BYTES
    slack = 3 * ROW_BYTES
    assert 2 * USED * ROW_BYTES <= moved.read <= 2 * USED * ROW_BYTES + slack
    assert moved.read_by_blocks <= moved.read, "a block reads sectors for less than their bytes"

    # The table's gradient: filled in equal shares, then the rows in use, once.
    filled = [launch.pop(result.data_ptr()) for launch in (rows, *sorts)]
    assert sum(moved.written for moved in filled) == result.nbytes
    assert max(moved.written for moved in filled) <= result.nbytes / 3 + 16
    written = [launch.pop(result.data_ptr(), Moved()) for launch in (sums, finish)]
    assert sum(moved.written for moved in written) == rows_used * ROW_BYTES
    assert all(moved.written == moved.written_once for moved in written)
    assert all(moved.read == 0 for moved in (*filled, *written))

    # The ids, once; a flag an entry. The last entry again for what is missing in the last 2048.
    moved = rows.pop(ids.data_ptr())
    again = -entries % 2048
    assert moved == Moved(16 * TOKENS + 8 * again, 0, *(16 * TOKENS, 0) * 2)
    assert rows.pop(padding.data_ptr()).read == entries + again

    # The workspace: 8 bytes an entry in and out of each sort, once a slab for the sums; the counts of
    # 5 blocks, 1 KiB each, of which 16 numbers a thread are asked for; at most two partials of 3 KiB a tile.
    for launch in log:
        launch.pop(0, None)  # shared memory
    (workspace,) = {address for launch in log for address in launch}
    moved = [launch[workspace] for launch in log]
    counts = 5 * 1024
    tiles, slabs = -(-entries // 512), 12
    assert moved[0].written == 8 * entries + 2 * counts
    for of_sort in moved[1:3]:
        assert of_sort.read == 8 * (entries + again) + 5 * 512 * 16 * 4
        assert of_sort.read_by_blocks == 8 * entries + 5 * counts
    assert moved[3].read_once <= 8 * entries
    assert moved[3].read_by_blocks <= slabs * (8 * entries + 96 * tiles)
    # A thread asks for two entries, the tile's first row and a neighbour's.
    assert moved[3].read <= slabs * tiles * 256 * (2 * 8 + 2 * 4)
    assert moved[3].written <= 2 * 4 * HIDDEN * tiles
    assert moved[4].read <= 6 * 256 * tiles * (4 + 1) * 4 + 2 * 4 * HIDDEN * tiles
    assert moved[4].written == 0


@pytest.mark.parametrize("kind", ["grid", "random"])
def test_workspace(kernel, kind):
    """Linear in the tokens, and no more than 25 MB for 40 images of 2520 patches."""
    sizes = []
    for batch in (4, 8):
        ids = grid(batch, 2520, 60, 40)
        if kind == "random":
            ids = torch.randint_like(ids, 10240)
        grad = torch.randn(1, 1, 1).bfloat16().expand(batch, 2520, 96)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            kernel.op.ops.backward(grad, ids, None, None, None, 10240, False, torch.bfloat16)
        used = [e.self_cpu_memory_usage for e in profiler.events() if e.name == "aten::empty"]
        result, workspace = used
        assert result == 2 * 10240 * 96 * 2
        sizes.append(workspace)
    # For 768 columns, eight times the partials: 2 of 4 bytes a column for each 512 entries.
    wide = sizes[1] + 7 * 2 * 4 * 96 * (2 * 8 * 2520 // 512 + 1)
    assert wide * 5 <= 25e6
    assert sizes[1] <= 2.1 * sizes[0]
