"""One process of test_vision_models.py's shared steps, started by torchrun: as distributed_worker.py does it."""

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from helpers.distributed_worker import whole
from helpers.vision_towers import build_model, prompt, swap


def samples(name, ranks):
    """A batch for each rank, of different pixels."""
    batches = [prompt(name, "images") for _ in range(ranks)]
    for rank, batch in enumerate(batches):
        batch["pixel_values"] = batch["pixel_values"] + rank
        batch["labels"] = batch["input_ids"].masked_fill(batch["mm_token_type_ids"] != 0, -100)
    return batches


def alone(args, batches):
    """The mean of the steps, by transformers' own model in one process."""
    model = build_model(args.name).train()
    losses = [model(**batch).loss for batch in batches]
    (sum(losses) / len(losses)).backward()
    return model


def check(path, gradient, theirs):
    torch.testing.assert_close(gradient, theirs, rtol=2e-4, atol=2e-6, msg=path)


def fsdp(args, batches):
    """FSDP2: the table is a group of its own, gathered when its module is called, or one with the tower's."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected = alone(args, batches)
    for own_group in (True, False):
        model = swap(build_model(args.name).train(), args.variant)
        if own_group:
            fully_shard(model.model.visual.pos_embed, mesh=mesh)
        fully_shard(model.model.visual, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(**batches[dist.get_rank()]).loss.backward()
        for (path, parameter), theirs in zip(model.named_parameters(), expected.parameters()):
            if theirs.grad is not None:
                check(path, whole(parameter.grad), theirs.grad)
        assert whole(model.model.visual.pos_embed.weight.grad).count_nonzero() > 0


def zero3(args, batches):
    """DeepSpeed's ZeRO-3: the table is gathered by hooks when its module is called."""
    import deepspeed  # not at the top: it changes what other libraries do
    from deepspeed.utils import safe_get_full_grad

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    expected = alone(args, batches)
    model = swap(build_model(args.name).train(), args.variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    assert model.model.visual.pos_embed.weight.numel() == 0, "not partitioned"
    engine.backward(engine(**batches[dist.get_rank()]).loss)
    for (path, parameter), theirs in zip(model.named_parameters(), expected.parameters()):
        if theirs.grad is not None:
            check(path, safe_get_full_grad(parameter), theirs.grad)


WAYS = {"fsdp": fsdp, "zero3": zero3}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("name")
    parser.add_argument("variant", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    WAYS[args.way](args, samples(args.name, dist.get_world_size()))
    dist.barrier()
    if dist.get_rank() == 0:
        print("the shared step is the step taken alone")
    dist.destroy_process_group()
    sys.stdout.flush()
