"""Which attention weights dropout keeps: counter-based random numbers in torch operations.

Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a counter of four words and a
key of two into four random words, so that every kernel finds the same word of a weight by itself. The words are held in
int64: a product of two of them wraps around there, with the same bits as the unsigned product.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words for every counter; counters and keys are int64 tensors that broadcast, with values below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _WORD) ^ c1 ^ k0,
            second & _WORD,
            ((first >> 32) & _WORD) ^ c3 ^ k1,
            first & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


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
    words = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
    every = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)  # (B, H, L, S rounded up to 4)
    return every[..., :keys] >= round(dropout_p * 2**32)
