"""One process of tests/models/test_distributed.py, started by torchrun: trains a step in some way of sharing it.

Rank 0 compares with the step taken alone and says so; a difference is an error.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from helpers import swapping, tiny_models
from helpers.bounds import assert_shared


def samples(name, ranks):
    """A batch for each rank, of different pixels and labels."""
    result = []
    for rank in range(ranks):
        batch = tiny_models.prompt(name)
        batch["pixel_values"] = (batch["pixel_values"] + 0.1 * rank).clamp(max=1)
        labels = batch["input_ids"].masked_fill(batch["mm_token_type_ids"] != 0, -100)
        result.append({**batch, "labels": torch.where(labels == -100, labels, labels + rank)})
    return result


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check(model, losses, alone, expected_losses):
    """Every gradient of the shared step against the mean of the steps taken alone."""
    torch.testing.assert_close(losses, expected_losses)
    expected = dict(alone.named_parameters())
    compared = 0
    for path, parameter in model.named_parameters():
        theirs = expected[path.removeprefix("module.")]
        if theirs.grad is None:
            assert parameter.grad is None, path
            continue
        assert_shared(whole(parameter.grad), theirs.grad, path)
        compared += 1
    assert compared > 20
    tables = [
        p
        for n, p in model.named_parameters()
        if n.endswith(("position_embedding_table", "pos_embedding"))
    ]
    assert all(whole(table.grad).count_nonzero() > 0 for table in tables) and tables


def train(args, wrap):
    """A step of the model that `wrap` makes of ours, and the same alone."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batches = samples(args.name, ranks)
    alone = tiny_models.build(args.name).train()
    expected = [alone(**batch).loss for batch in batches]
    (sum(expected) / ranks).backward()
    model = wrap(swapping.swap(tiny_models.build(args.name).train(), args.variant))
    loss = model(**batches[rank]).loss
    loss.backward()
    check(model, loss.detach(), alone, expected[rank].detach())


def ddp(args):
    train(args, lambda model: DistributedDataParallel(model, find_unused_parameters=True))


def fsdp(args, offload=None):
    def wrap(model):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        options = {"mesh": mesh, "offload_policy": offload or OffloadPolicy()}
        for module in model.modules():
            if isinstance(module, swapping.LAYERS):
                fully_shard(module, **options)
        return fully_shard(model, mp_policy=MixedPrecisionPolicy(), **options)

    train(args, wrap)


def fsdp_offload(args):
    fsdp(args, CPUOffloadPolicy(pin_memory=False))


def check_zero3(model, alone, batches):
    """A step by DeepSpeed's ZeRO-3: parameters are gathered for the forward and backward of their module."""
    import deepspeed  # not at the top: it changes what other libraries do
    from deepspeed.utils import safe_get_full_grad

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    (sum(alone(**batch).loss for batch in batches) / len(batches)).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "not partitioned"
    engine.backward(engine(**batches[dist.get_rank()]).loss)
    compared = 0
    for (path, parameter), theirs in zip(model.named_parameters(), alone.parameters()):
        if theirs.grad is not None:
            assert_shared(safe_get_full_grad(parameter), theirs.grad, path)
            compared += 1
    assert compared > 20


def zero3(args):
    model = swapping.swap(tiny_models.build(args.name).train(), args.variant)
    alone = tiny_models.build(args.name).train()
    check_zero3(model, alone, samples(args.name, dist.get_world_size()))


def sequence(args):
    """The tokens split over the ranks: the op works token by token, so shards equal the whole."""
    kernel = swapping.load(args.variant)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batch = tiny_models.prompt("e2b")
    ids = batch["image_position_ids"]
    padding = (ids == -1).all(-1)
    torch.manual_seed(1)
    table = torch.randn(2, 128, 64, requires_grad=True)
    residual = torch.randn(*ids.shape[:2], 64, requires_grad=True)
    grad = torch.randn_like(residual)
    out = kernel.fused_embedding_lookup(ids, table, padding=padding, residual=residual)
    expected = torch.autograd.grad(out, (table, residual), grad)
    part = [tensor.chunk(ranks, dim=1)[rank] for tensor in (ids, padding, residual, grad)]
    shard = kernel.fused_embedding_lookup(part[0], table, padding=part[1], residual=part[2])
    assert torch.equal(shard, out.chunk(ranks, dim=1)[rank])
    grad_table, grad_residual = torch.autograd.grad(shard, (table, part[2]), part[3])
    assert torch.equal(grad_residual, part[3])
    dist.all_reduce(grad_table)
    torch.testing.assert_close(grad_table, expected[0])

    # Exactly, where no row is read on two ranks: the reduction adds zeros.
    ids = torch.randperm(630, generator=torch.Generator().manual_seed(0))[:, None]
    table = torch.randn(1, 630, 64, requires_grad=True)
    alone = kernel.fused_embedding_lookup(ids, table)
    (expected_table,) = torch.autograd.grad(alone, table, grad[0])
    shard = kernel.fused_embedding_lookup(ids.chunk(ranks)[rank], table)
    (grad_table,) = torch.autograd.grad(shard, table, grad[0].chunk(ranks)[rank])
    dist.all_reduce(grad_table)
    assert torch.equal(grad_table, expected_table)


def dtensor(args):
    """DTensor splits the tokens, or the columns, without gathering what it need not."""
    kernel = swapping.load(args.variant)
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(1)
    ids, weights = torch.randint(-1, 9, (4, 6, 2)), torch.rand(4, 6, 2)
    residual, grad = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    for shared, weighted in ((False, False), (True, True)):
        table = torch.randn(9, 8) if shared else torch.randn(2, 9, 8)
        splits = {
            "none": (Replicate(), Replicate(), Replicate(), Replicate(), Replicate()),
            "batch": (Shard(0), Replicate(), Shard(0), Shard(0), Partial()),
            "tokens": (Shard(1), Replicate(), Shard(1), Shard(1), Partial()),
            "columns": (Replicate(), Shard(table.dim() - 1), Replicate(), Shard(2), None),
        }
        tensors = (ids, table, weights if weighted else None, residual)

        def lookup(ids, table, weights, residual, grad):
            leaves = [leaf.detach().requires_grad_() for leaf in (table, residual)]
            out = kernel.fused_embedding_lookup(ids, leaves[0], weights=weights, residual=leaves[1])
            return out, torch.autograd.grad(out, leaves, grad)

        expected, expected_grads = lookup(*tensors, grad)
        for name, (*ways, by_grad) in splits.items():
            placed = [
                tensor if tensor is None else distribute_tensor(tensor, mesh, [way])
                for tensor, way in zip((*tensors, grad), (*ways, ways[-1]))
            ]
            out, grads = lookup(*placed)
            assert out.placements == (ways[-1],), (name, out.placements)
            assert grads[0].placements == (by_grad or ways[1],), (name, grads[0].placements)
            assert torch.equal(whole(out), expected), name
            for actual, theirs in zip(grads, expected_grads):
                torch.testing.assert_close(whole(actual), theirs, msg=name)
            with torch.inference_mode():
                assert kernel.fused_embedding_lookup(*placed[:2]).placements == (ways[-1],), name

    for way in (Replicate(), Shard(0), Shard(2)):  # the scaling of pixels goes by their elements
        pixels = residual.clone().requires_grad_()
        placed = distribute_tensor(pixels, mesh, [way])
        out = kernel.scale_pixels(placed, torch.bfloat16)
        assert out.placements == (way,)
        assert torch.equal(whole(out), kernel.scale_pixels(pixels, torch.bfloat16))
        (actual,) = torch.autograd.grad(out.sum(), placed)
        assert torch.equal(whole(actual), torch.full_like(pixels, 2))

    grid = torch.tensor([[1, 4, 6], [2, 2, 2]])  # the second op's ids and weights are for all ranks
    expected = kernel.vision_interpolation_indices_and_weights(grid, 8, num_patches=32)
    placed = distribute_tensor(grid, mesh, [Replicate()])
    actual = kernel.vision_interpolation_indices_and_weights(placed, 8, num_patches=32)
    for ours, theirs in zip(actual, expected):
        assert ours.placements == (Replicate(),) and torch.equal(whole(ours), theirs)


def tensor_parallel(args):
    """transformers' tp_plan="auto": the language model's layers are split, what sees the image isn't.

    Of the image's features only: the whole Gemma 4 fails under tp_plan in transformers 5.22.2, with or
    without our layers, where it looks for the image tokens (aten.where of a tensor and a DTensor).
    """
    model_class = type(tiny_models.build(args.name))
    alone = model_class.from_pretrained(args.checkpoint).eval()
    model = model_class.from_pretrained(args.checkpoint, tp_plan="auto").eval()
    parameters = zip(model.parameters(), alone.parameters())
    assert any(isinstance(p, DTensor) or p.shape != q.shape for p, q in parameters), "not split"
    model = swapping.swap(model, args.variant)
    batch = tiny_models.prompt(args.name)
    arguments = batch["pixel_values"], batch["image_position_ids"]
    with torch.no_grad():
        actual = model.model.get_image_features(*arguments).pooler_output
        expected = alone.model.get_image_features(*arguments).pooler_output
    torch.testing.assert_close(whole(actual), expected)


WAYS = {f.__name__: f for f in (ddp, fsdp, fsdp_offload, zero3, sequence, dtensor, tensor_parallel)}


def main(ways):
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=ways)
    parser.add_argument("name")
    parser.add_argument("variant", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ways[args.way](args)
    dist.barrier()
    if dist.get_rank() == 0:
        print("the shared step is the step taken alone")
    dist.destroy_process_group()
    sys.stdout.flush()


if __name__ == "__main__":
    main(WAYS)
