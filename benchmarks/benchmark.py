"""The op for `kernels benchmark`: its time, checked against transformers' formula.

    kernels benchmark .

Each case becomes a `benchmark_...` and a `verify_...` of its class, which is how `kernels benchmark` finds
them. benchmarks/compare.py measures the peers, interleaved; this is the ecosystem's own view. It loads
this file alone, so nothing here comes from the files beside it.
"""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class Lookup(Benchmark):
    seed = 0

    def setup(
        self, batch=1, patches=2520, hidden=768, dtype=torch.bfloat16, ids="grid", rows=10240
    ):
        unit = int((patches * 20 / 21 / 6) ** 0.5)  # 3 : 2, and the rest of the patches is padding
        x, y = torch.meshgrid(torch.arange(3 * unit), torch.arange(2 * unit), indexing="xy")
        position_ids = torch.full((batch, patches, 2), -1)
        position_ids[:, : x.numel()] = torch.stack([x, y], dim=-1).reshape(-1, 2)
        self.padding = (position_ids == -1).all(-1).to(self.device)
        if ids == "random":
            position_ids.random_(0, rows)
        elif ids == "single":
            position_ids.zero_()
        self.position_ids = position_ids.to(self.device)
        self.table = torch.randn(2, rows, hidden, device=self.device, dtype=dtype)
        self.residual = torch.randn(batch, patches, hidden, device=self.device, dtype=dtype)

    def ours(self):
        return self.kernel.fused_embedding_lookup(
            self.position_ids, self.table, padding=self.padding, residual=self.residual
        )

    def eager(self):
        x, y = self.position_ids.clamp(min=0).unbind(-1)
        embedding = F.embedding(x, self.table[0]) + F.embedding(y, self.table[1])
        return self.residual + torch.where(self.padding.unsqueeze(-1), 0.0, embedding)


class Inference(Lookup):
    """One image, of 70 to 1120 soft tokens of 9 patches; Gemma 4's widths; dtypes; kinds of ids."""


class Training(Lookup):
    """Forward and backward of the same for one image."""

    def setup(self, **case):
        super().setup(**case)
        self.table.requires_grad_()
        # Whole numbers, of which all sums are exact: eager rounds at every addition, we once.
        self.grad = torch.randint_like(self.residual, -1, 2)

    def ours(self):
        return torch.autograd.grad(super().ours(), self.table, self.grad)[0]

    def eager(self):
        return torch.autograd.grad(super().eager(), self.table, self.grad)[0]


def add_case(benchmark, name, **case):
    def run(self):
        self.out = self.ours()

    def verify(self):
        return self.eager()

    setattr(benchmark, f"setup_{name}", lambda self: self.setup(**case))
    setattr(benchmark, f"benchmark_{name}", run)
    setattr(benchmark, f"verify_{name}", verify)


for soft_tokens in (70, 140, 280, 560, 1120):
    add_case(Inference, f"{soft_tokens}_soft_tokens", patches=9 * soft_tokens)
add_case(Training, "280_soft_tokens")
for benchmark in (Inference, Training):
    add_case(benchmark, "hidden_1152", hidden=1152)
    add_case(benchmark, "hidden_3840", hidden=3840, patches=1120, rows=1120)  # Gemma 4 Unified's
    add_case(benchmark, "float32", dtype=torch.float32)
    add_case(benchmark, "float16", dtype=torch.float16)
    add_case(benchmark, "random_ids", ids="random")
    add_case(benchmark, "single_id", ids="single")

# Every name of a class with this base is one to run.
del Lookup, benchmark
