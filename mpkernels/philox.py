"""Counter-based random numbers in torch operations, for references.

Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a counter of four words and a
key of two into four random words, so that every kernel finds the same word of a number by itself. The words are held in
int64: a product of two of them wraps around there, with the same bits as the unsigned product.
"""

from __future__ import annotations

from torch import Tensor

WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words for every counter; counters and keys are int64 tensors that broadcast, with values below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & WORD) ^ c1 ^ k0,
            second & WORD,
            ((first >> 32) & WORD) ^ c3 ^ k1,
            first & WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & WORD, (k1 + _WEYL[1]) & WORD
    return c0, c1, c2, c3


def key_of(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The key of a () int64 seed: its low word and its high word."""
    return seed & WORD, (seed >> 32) & WORD
