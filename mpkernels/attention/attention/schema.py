"""Schemas and fake functions of attention. Imports torch (and the namespaces) alone.

Shapes of the two ops, with B batches, H query heads, G key heads (H a multiple of G: query head h reads key head
h // (H // G)), L queries, S keys, head sizes E and F:

=================  ==========================  ========================================================================
argument           shape                       meaning
=================  ==========================  ========================================================================
query              (B, H, L, E)
key                (B, G, S, E)
value              (B, G, S, F)
first, last        (B or 1, H or 1, L) int32   query i sees the keys j with first <= j < last; both given or neither
mask               (1 or full in each) bool    broadcasts to (B, H, L, S): False hides; with first and last, both hold
bias               (1 or full in each)         broadcasts to (B, H, L, S): added to the scores; dtype of query; -1e30
                                               and less (-inf, the lowest float32) hide the pair, as a mask does
seed               () int64                    of the dropout; None without
scale              number                      factor of the scores
softcap            number                      scores become softcap tanh(score / softcap), before the bias; 0 for none
dropout_p          number in [0, 1]            the share of the weights that is dropped
heads_last         bool                        memory order of what is returned: (B, L, H, .) instead of (B, H, L, .)
=================  ==========================  ========================================================================

query, key, value and their gradients have any strides but a contiguous last dimension; mask and bias any at all
(0 where they are expanded); first and last are contiguous, and lie in [0, S]; first may exceed last: the row is empty.

Forward returns out (B, H, L, F) in the dtype of query and lse (B, H, L), the natural logarithm of the sum of the
exponentials, in float32 (float64 for float64). Where a query sees no key, out is 0 and lse is -inf.

Backward takes gradients of both (either may be missing) and returns those of query, key, value and bias; that of bias
has its shape, and no elements unless ``needs_bias``. Its last dimension is S (the api answers for a bias of (..., 1)).

``heads_last`` is a matter of memory alone: the shape is always (B, H, L, .), and where it is set, tensors of that shape
(out, and the gradients of query, key and value) are views of (B, L, H, .) tensors.

Dropout of the weight (b, h, i, j): word j % 4 of Philox-4x32-10 with the counter (j // 4, i, b H + h, 0) and the key
(low word of seed, high word of seed); it is dropped where that word < round(dropout_p 2^32), and multiplied with
1 / (1 - dropout_p) where it is not. lse knows nothing of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import library

FORWARD = "attention"
BACKWARD = "attention_backward"
HIDES = -1e30  # a bias of this or less hides its pair

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? first, Tensor? last, Tensor? mask, Tensor? bias, Tensor? seed, "
    "float scale, float softcap, float dropout_p, bool heads_last"
)
_TRITON = "mpkernels.attention.attention.triton"


def new_heads(like: Tensor, batch: int, heads: int, rows: int, width: int, heads_last: bool) -> Tensor:
    """An empty (B, H, L, width) tensor in the memory order that ``heads_last`` asks for."""
    if heads_last:
        return like.new_empty((batch, rows, heads, width)).transpose(1, 2)
    return like.new_empty((batch, heads, rows, width))


def _fake_forward(
    query, key, value, first, last, mask, bias, seed, scale, softcap, dropout_p, heads_last
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = new_heads(query, batch, heads, rows, value.shape[-1], heads_last)
    return out, query.new_empty((batch, heads, rows), dtype=wide)


def _fake_backward(
    grad_out,
    grad_lse,
    query,
    key,
    value,
    out,
    lse,
    first,
    last,
    mask,
    bias,
    seed,
    scale,
    softcap,
    dropout_p,
    heads_last,
    needs_bias,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor) -> Tensor:
        return new_heads(x, x.shape[0], x.shape[1], x.shape[2], x.shape[3], heads_last)

    of_bias = bias.new_empty(bias.shape) if needs_bias else query.new_empty((0,))
    return like(query), like(key), like(value), of_bias


library.define(f"{FORWARD}({_ARGUMENTS}) -> (Tensor, Tensor)", _fake_forward)
library.define(
    f"{BACKWARD}(Tensor? grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"{_ARGUMENTS.split('Tensor value, ')[1]}, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
library.implement_triton(FORWARD, _TRITON, "forward")
library.implement_triton(BACKWARD, _TRITON, "backward")
