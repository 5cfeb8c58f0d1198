"""Training shared by two processes on this machine, over gloo: see distributed_worker.py."""

import os
import subprocess
import sys

import pytest
import torch

import tiny_models
from conftest import ROOT

pytestmark = pytest.mark.variant("cpu")


def share(way, name, variant_dir, *arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "distributed_worker.py", way, name, variant_dir]
    result = subprocess.run(
        [*command, *arguments],
        cwd=ROOT / "tests",
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert "the shared step is the step taken alone" in result.stdout


@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp_offload", "zero3"])
@pytest.mark.parametrize("name", ["e2b", "unified-12b"])
def test_training_step(variant_dir, way, name):
    share(way, name, variant_dir)


@pytest.mark.parametrize("processes", [2, 3])
def test_sequence_split_over_ranks(variant_dir, processes):
    share("sequence", "e2b", variant_dir, processes=processes)


@pytest.mark.parametrize("name", ["e2b", "unified-12b"])
def test_tensor_parallel(variant_dir, name, tmp_path):
    tiny_models.build(name).save_pretrained(tmp_path)
    share("tensor_parallel", name, variant_dir, "--checkpoint", tmp_path)
    assert not torch.distributed.is_initialized()
