"""The kernel for `kernels benchmark`: time of our op, checked against transformers' formula.

    kernels benchmark .

benchmarks/compare.py measures the peers, interleaved; this is the ecosystem's own view.
"""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class Gemma4(Benchmark):
    """Gemma 4 E2B: one image of 280 soft tokens in bfloat16, and a training batch of 8 in float32."""

    seed = 0

    def setup(self, batch=1, dtype=torch.bfloat16, patches=2520, rows=10240, hidden=768):
        x, y = torch.meshgrid(torch.arange(60), torch.arange(40), indexing="xy")
        position_ids = torch.full((batch, patches, 2), -1)
        position_ids[:, : x.numel()] = torch.stack([x, y], dim=-1).reshape(-1, 2)
        self.position_ids = position_ids.to(self.device)
        self.padding = (self.position_ids == -1).all(-1)
        self.table = torch.randn(2, rows, hidden, device=self.device, dtype=dtype)
        self.residual = torch.randn(batch, patches, hidden, device=self.device, dtype=dtype)

    def setup_training(self):
        self.setup(batch=8, dtype=torch.float32)
        self.table.requires_grad_()

    def ours(self):
        return self.kernel.fused_embedding_lookup(
            self.position_ids, self.table, padding=self.padding, residual=self.residual
        )

    def eager(self):
        x, y = self.position_ids.clamp(min=0).unbind(-1)
        embedding = F.embedding(x, self.table[0]) + F.embedding(y, self.table[1])
        return self.residual + torch.where(self.padding.unsqueeze(-1), 0.0, embedding)

    def benchmark_inference(self):
        self.out = self.ours()

    def verify_inference(self):
        return self.eager()

    def benchmark_training(self):
        self.out = torch.autograd.grad(self.ours(), self.table, self.residual)[0]

    def verify_training(self):
        return torch.autograd.grad(self.eager(), self.table, self.residual)[0]
