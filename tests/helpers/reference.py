"""What the op must equal: its eager code, from the package itself, and the sums in float64."""

import importlib.util
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from helpers import ROOT

# Of a build, of which the tests have one wherever they run; by its path, for any variant's will do. Scripts
# that get the kernel from a Hub have no LOCAL_KERNELS.
_BUILDS = Path(os.environ.get("LOCAL_KERNELS", f"={ROOT}").partition("=")[2])
_SOURCE = next(p for place in ("", "build/") for p in _BUILDS.glob(f"{place}torch*/reference.py"))
_SPEC = importlib.util.spec_from_file_location("fused_embedding_lookup_reference", _SOURCE)
_eager = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_eager)

eager = _eager.fused_embedding_lookup
interpolated = _eager.interpolated

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Gemma4VisionConfig's arguments for a tower of the real architecture, small enough for a test.
SMALL_VISION_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "position_embedding_size": 128,
}


def one_hot(position_ids, table, padding, residual):
    """The code of transformers up to 5.9: a one-hot of the ids times the table."""
    encoded = F.one_hot(position_ids.clamp(min=0), num_classes=table.shape[1])
    encoded = encoded.permute(0, 2, 1, 3).to(table)
    embedding = (encoded @ table).sum(dim=1)
    embedding = torch.where(padding.unsqueeze(-1), 0.0, embedding)
    return residual + embedding


def grad_table(
    grad, position_ids, num_rows, padding=None, padding_id=None, weights=None, shared=False
):
    """The table's gradient, and the sum of the magnitudes of its terms, in float64."""
    hidden, entries = grad.shape[-1], position_ids.shape[-1]
    flat = grad.reshape(-1, hidden).double()
    keep = ~padding if padding is not None else torch.ones_like(position_ids[..., 0]) == 1
    sums = torch.zeros(2, 1 if shared else entries, num_rows, hidden).to(flat)
    for k in range(entries):
        ids = position_ids[..., k]
        used = keep if padding_id is None else keep & (ids != padding_id)
        used = used.reshape(-1)
        rows = ids.clamp(min=0).reshape(-1)[used].long()
        terms = flat[used]
        if weights is not None:
            terms = terms * weights[..., k].reshape(-1)[used, None].double()
        for total, values in zip(sums, (terms, terms.abs())):
            total[0 if shared else k].index_add_(0, rows, values)
    return tuple(total[0] if shared else total for total in sums)
