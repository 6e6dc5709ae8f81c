"""Schema and fake function of attention of few queries to many keys. Imports torch (and the namespaces) alone.

Shapes, with B batches, H query heads, G key heads (H a multiple of G: query head h reads key head h // (H // G)),
L <= 16 queries, S keys, head sizes E and F:

=================  ==========================  ========================================================================
argument           shape                       meaning
=================  ==========================  ========================================================================
query              (B, H, L, E)
key                (B, G, S, E)
value              (B, G, S, F)
first, last        (B or 1, H or 1, L) int32   query i sees the keys j with first <= j < last; both given or neither
mask               (1 or full in each) bool    broadcasts to (B, H, L, S): False hides; with first and last, both hold
bias               (1 or full in each)         broadcasts to (B, H, L, S): added to the scores; dtype of query. -1e30
                                               and less (-inf, the lowest float32) hide the pair, as a mask does
scale              number                      factor of the scores
softcap            number                      scores become softcap tanh(score / softcap), before the bias; 0 for none
heads_last         bool                        memory order of what is returned: (B, L, H, F) instead of (B, H, L, F)
=================  ==========================  ========================================================================

query, key and value have any strides but a contiguous last dimension; mask and bias any at all; first and last are
contiguous, and lie in [0, S]; first may exceed last: the row is empty.

Returned: out (B, H, L, F) in the dtype of query and lse (B, H, L), the natural logarithm of the sum of the
exponentials, in float32 (float64 for float64). Where a query sees no key, out is 0 and lse is -inf. A score of -inf
hides its key too; what a hidden key and its value hold never matters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import library

FORWARD = "decode_attention"


def _fake(query, key, value, first, last, mask, bias, scale, softcap, heads_last) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty((batch, heads, rows), dtype=wide)
    if heads_last:
        return query.new_empty((batch, rows, heads, value.shape[-1])).transpose(1, 2), lse
    return query.new_empty((batch, heads, rows, value.shape[-1])), lse


library.define(
    f"{FORWARD}(Tensor query, Tensor key, Tensor value, Tensor? first, Tensor? last, Tensor? mask, Tensor? bias, "
    "float scale, float softcap, bool heads_last) -> (Tensor, Tensor)",
    _fake,
)
