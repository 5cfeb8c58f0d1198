"""One process of models/test_distributed.py's steps of Qwen3-VL: as distributed_worker.py does it."""

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from helpers.bounds import assert_shared
from helpers.distributed_worker import check_zero3, main, whole
from helpers.vision_towers import build_model, prompt, swap


def samples(name, ranks):
    """A batch for each rank, of different pixels."""
    batches = [prompt(name, "images") for _ in range(ranks)]
    for rank, batch in enumerate(batches):
        batch["pixel_values"] = batch["pixel_values"] + rank
        batch["labels"] = batch["input_ids"].masked_fill(batch["mm_token_type_ids"] != 0, -100)
    return batches


def fsdp(args):
    """FSDP2: the table is a group of its own, gathered when its module is called, or one with the tower's."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    batches = samples(args.name, dist.get_world_size())
    alone = build_model(args.name).train()
    (sum(alone(**batch).loss for batch in batches) / len(batches)).backward()
    for own_group in (True, False):
        model = swap(build_model(args.name).train(), args.variant)
        if own_group:
            fully_shard(model.model.visual.pos_embed, mesh=mesh)
        fully_shard(model.model.visual, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(**batches[dist.get_rank()]).loss.backward()
        for (path, parameter), theirs in zip(model.named_parameters(), alone.parameters()):
            if theirs.grad is not None:
                assert_shared(whole(parameter.grad), theirs.grad, path)
        assert whole(model.model.visual.pos_embed.weight.grad).count_nonzero() > 0


def zero3(args):
    """DeepSpeed's ZeRO-3: the table is gathered by hooks when its module is called."""
    model = swap(build_model(args.name).train(), args.variant)
    alone = build_model(args.name).train()
    check_zero3(model, alone, samples(args.name, dist.get_world_size()))


if __name__ == "__main__":
    main({"fsdp": fsdp, "zero3": zero3})
