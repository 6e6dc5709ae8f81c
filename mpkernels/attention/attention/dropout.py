"""Which attention weights dropout keeps (the counters of schema.py, in torch operations)."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels.philox import key_of, philox


def kept(seed: Tensor, dropout_p: float, batch: int, heads: int, rows: int, keys: int) -> Tensor:
    """(B, H, L, S) bool: True where the weight stays (see schema.py)."""

    def count(size: int) -> Tensor:
        return torch.arange(size, device=seed.device)

    counter = (
        count((keys + 3) // 4),
        count(rows)[:, None],
        count(batch * heads).view(batch, heads, 1, 1),
        torch.zeros((), dtype=torch.int64, device=seed.device),
    )
    words = philox(counter, key_of(seed))
    every = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)  # (B, H, L, S rounded up to 4)
    return every[..., :keys] >= round(dropout_p * 2**32)
