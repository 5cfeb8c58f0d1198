"""Training shared by two processes on this machine, over gloo: see the workers."""

import os

import ninja
import pytest
import torch

from helpers import ROOT, process, tiny_models

pytestmark = [pytest.mark.variant("cpu"), pytest.mark.check("training shared by processes")]


def share(way, name, variant_dir, *arguments, processes=2, worker="distributed_worker.py"):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    worker = [ROOT / "tests" / "helpers" / worker, way, name, variant_dir, *arguments]
    # DeepSpeed compiles, with a ninja that it looks for on the PATH.
    path = os.pathsep.join([ninja.BIN_DIR, os.environ["PATH"]])
    environment = {"OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu", "PATH": path}
    result = process.python(*torchrun, *worker, **environment)
    assert "the shared step is the step taken alone" in result.stdout


@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp_offload", "zero3"])
@pytest.mark.parametrize("name", ["e2b", "unified-12b"])
def test_training_step(variant_dir, way, name):
    share(way, name, variant_dir)


@pytest.mark.parametrize("way", ["fsdp", "zero3"])
def test_training_step_of_qwen3_vl(variant_dir, way):
    share(way, "qwen3_vl", variant_dir, worker="vision_worker.py")


@pytest.mark.parametrize("processes", [2, 3])
def test_sequence_split_over_ranks(variant_dir, processes):
    share("sequence", "e2b", variant_dir, processes=processes)


def test_dtensor(variant_dir):
    share("dtensor", "e2b", variant_dir)


@pytest.mark.parametrize("name", ["e2b", "unified-12b"])
def test_tensor_parallel(variant_dir, name, tmp_path):
    tiny_models.build(name).save_pretrained(tmp_path)
    share("tensor_parallel", name, variant_dir, "--checkpoint", tmp_path)
    assert not torch.distributed.is_initialized()
