"""How DTensor splits the op: tokens over ranks, or columns."""

from __future__ import annotations

import functools
import sys

from ._ops import ops


def ensure_registered(arguments) -> None:
    """Teach DTensor the op, before its first call with one; importing DTensor takes most of a second."""
    # While another thread imports the module, it is there and has no DTensor yet.
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if dtensor is not None and any(isinstance(x, dtensor) for x in arguments):
        _register()


@functools.cache
def _register() -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def tokens(position_ids):
        """The placements that split a dimension of the tokens, and the one that splits none."""
        return [Replicate(), *(Shard(dim) for dim in range(len(position_ids.shape) - 1))]

    def on(placement, *arguments):
        """`placement` for each that is given. What has no tensor has no placement either."""
        return [None if argument is None else placement for argument in arguments]

    @register_sharding(ops.forward.default)
    def forward(position_ids, table, weights, padding, residual, padding_id, embedding_dtype):
        ways = []
        for split in tokens(position_ids):
            given = on(split, weights, padding, residual)
            ways.append(([split], [split, Replicate(), *given, None, None]))
        columns = len(position_ids.shape) - 1
        given = [*on(Replicate(), weights, padding), *on(Shard(columns), residual)]
        inputs = [Replicate(), Shard(len(table.shape) - 1), *given, None, None]
        return [*ways, ([Shard(columns)], inputs)]

    @register_sharding(ops.backward.default)
    def backward(grad, position_ids, weights, padding, padding_id, num_rows, shared, dtype):
        ways = []
        for split in tokens(position_ids):
            inputs = [split, split, *on(split, weights, padding), None, None, None, None]
            ways.append(([Replicate() if split.is_replicate() else Partial()], inputs))
        given = on(Replicate(), position_ids, weights, padding)
        inputs = [Shard(len(grad.shape) - 1), *given, None, None, None, None]
        return [*ways, ([Shard(1 if shared else 2)], inputs)]

    @register_sharding(ops.interpolation.default)
    def interpolation(grid_thw, *options):  # which images a rank's patches are of, no rank knows
        return [([Replicate()] * 2, [Replicate(), *[None] * len(options)])]

    @register_sharding(ops.scaling.default)
    def scaling(pixel_values, dtype):
        splits = [Replicate(), *(Shard(dim) for dim in range(len(pixel_values.shape)))]
        return [([split], [split, None]) for split in splits]
