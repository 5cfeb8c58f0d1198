"""The op for `kernels benchmark`: its time, checked against its eager code.

    kernels benchmark .

Each case becomes a `benchmark_...` and a `verify_...` of its class, which is how `kernels benchmark` finds
them. compare.py measures the peers, interleaved; this is the ecosystem's own view. It loads this file alone.
"""

import importlib

import torch
from kernels.benchmark import Benchmark


class Inference(Benchmark):
    """One image, of 70 to 1120 soft tokens of 9 patches; Gemma 4's widths; dtypes; kinds of ids."""

    seed = 0

    def prepare(self, patches=2520, hidden=768, rows=10240, dtype=torch.bfloat16, high=None):
        unit = int((patches * 20 / 21 / 6) ** 0.5)  # 3 : 2, and the rest of the patches is padding
        x, y = torch.meshgrid(torch.arange(3 * unit), torch.arange(2 * unit), indexing="xy")
        ids = torch.full((1, patches, 2), -1)
        ids[:, : x.numel()] = torch.stack([x, y], dim=-1).reshape(-1, 2)
        padding = ids[..., 0] < 0
        if high:
            ids.random_(0, high)
        on_device = {"device": self.device, "dtype": dtype}
        self.arguments = {
            "position_ids": ids.to(self.device),
            "table": torch.randn(2, rows, hidden, **on_device, requires_grad=True),
            "padding": padding.to(self.device),
            "residual": torch.randn(1, patches, hidden, **on_device),
        }
        # Whole numbers, of which all sums are exact: eager rounds at every addition, we once.
        self.grad = torch.randint_like(self.arguments["residual"], -1, 2)
        self.eager = importlib.import_module(f"{self.kernel.__name__}.reference")

    @torch.no_grad()
    def run(self, module):
        return module.fused_embedding_lookup(**self.arguments)


class Training(Inference):
    """Forward and backward of the same for one image."""

    def run(self, module):
        out = module.fused_embedding_lookup(**self.arguments)
        return torch.autograd.grad(out, self.arguments["table"], self.grad)[0]


def add_case(name, **case):
    def benchmark(self):
        self.out = self.run(self.kernel)

    for benchmarks in (Inference, Training):
        setattr(benchmarks, f"setup_{name}", lambda self: self.prepare(**case))
        setattr(benchmarks, f"benchmark_{name}", benchmark)
        setattr(benchmarks, f"verify_{name}", lambda self: self.run(self.eager))


for soft_tokens in (70, 140, 280, 560, 1120):
    add_case(f"{soft_tokens}_soft_tokens", patches=9 * soft_tokens)
add_case("hidden_1152", hidden=1152)
add_case("hidden_3840", hidden=3840, patches=1120, rows=1120)  # Gemma 4 Unified's
add_case("float32", dtype=torch.float32)
add_case("float16", dtype=torch.float16)
add_case("random_ids", high=10240)
add_case("single_id", high=1)
