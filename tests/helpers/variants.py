"""The builds of the kernel that tests run on, loaded as users load it: through `kernels.get_kernel`."""

import ctypes
import functools
import os
from pathlib import Path
from typing import NamedTuple

from helpers import REPO_ID, ROOT

# Before anything imports `kernels` or `transformers`. kernel-builder's test shell sets LOCAL_KERNELS
# itself. Nothing here may reach for the network.
os.environ.setdefault("LOCAL_KERNELS", f"{REPO_ID}={ROOT}")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import kernels
import pytest
import torch

from helpers.reference import FLOATS

LOCAL = Path(os.environ["LOCAL_KERNELS"].partition("=")[2])
SIMT_BUILDS = ROOT / ".build" / "simt"

# Why a test is skipped: "needs WHAT", and after a colon the command that brings it.
NEEDS_GPU = "needs a GPU"
NEEDS_CLANG = "needs clang 19 and GCC's Objective-C runtime: apt-get install clang-19 gobjc++"
NEEDS_ALL_OF_CUDA = "needs the CUDA variant for all architectures: make cuda"

# Tests that take minutes where there is no GPU.
ON_THE_ENGINE = pytest.mark.check("the GPUs' sources, run by tests/simt")


class Variant(NamedTuple):
    """A build of the kernel, and what there is to know about it in a test."""

    name: str
    device: torch.device  # of the tensors it takes
    sources: str  # the folder of csrc/ that it is made of
    floats: tuple  # the dtypes it takes

    @property
    def is_emulated(self):
        """Run by tests/simt, which takes long."""
        return self.name.endswith("-simt")

    def load(self):
        """The kernel's module."""
        if self.is_emulated:
            return kernels.get_local_kernel(SIMT_BUILDS / self.sources, backend="cpu")
        return kernels.get_kernel(REPO_ID, version=1, backend=self.name)

    def sum_eps(self, table_dtype):
        """The precision in which a gradient of a table of `table_dtype` is summed."""
        if self.sources == "cpu" and table_dtype.itemsize > 2:
            return 2.0**-52
        return 2.0**-23


VARIANTS = {
    "cpu": Variant("cpu", torch.device("cpu"), "cpu", FLOATS),
    # The GPUs' sources, run by tests/simt.
    "cuda-simt": Variant("cuda-simt", torch.device("cpu"), "cuda", FLOATS[:3]),
    "metal-simt": Variant("metal-simt", torch.device("cpu"), "metal", FLOATS[:3]),
    "cuda": Variant("cuda", torch.device("cuda"), "cuda", FLOATS[:3]),
}


def builds(platform):
    """The folders of the variants for a platform, as in their names: cpu, cu130, cu*."""
    return [p for place in (LOCAL, LOCAL / "build") for p in place.glob(f"torch*-{platform}-*")]


@functools.cache
def why_not(name):
    """What is missing to test a variant here, or None."""
    if name.endswith("-simt"):
        sources = VARIANTS[name].sources
        if (SIMT_BUILDS / sources).exists():
            return None
        return NEEDS_CLANG if sources == "metal" else f"needs the {name} variant: make simt"
    if name == "cuda" and not torch.cuda.is_available():
        return NEEDS_GPU
    platform = "cpu" if name == "cpu" else f"cu{torch.version.cuda.partition('.')[0]}*"
    return None if builds(platform) else f"needs the {name} variant: make build"


# LayerRepository takes the variant for torch's own backend.
needs_torch_for_cpu = pytest.mark.skipif(
    torch.version.cuda is not None and why_not("cuda") is not None,
    reason="needs a GPU, or the build of torch for CPUs: make clean && "
    "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make build",
)


def extension(variant_dir):
    """The shared library in a variant's folder."""
    (path,) = variant_dir.glob("*.abi3.so")
    return path


def load_library(variant_dir):
    """The same as ctypes has it, for what the engine offers the tests."""
    library = ctypes.CDLL(extension(variant_dir))
    if hasattr(library, "metal_synchronize"):
        library.metal_synchronize.restype = ctypes.c_char_p
    return library
