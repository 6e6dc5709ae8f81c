"""flash_attn.bert_padding: between padded rows and the packed sequences of flash_attn_varlen_func."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import checks


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows ``indices``, (n,), of (N, ...): (n, ...), differentiable."""
    return input[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...) that holds ``values``, (n, ...), in the rows ``indices``, (n,), and 0 elsewhere."""
    out = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return out.index_put((indices,), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the tokens of padded rows one after another.

    Args:
        hidden_states: (B, S, ...).
        attention_mask: (B, S), bool or integers, 1 for a token to keep.
        unused_mask: (B, S), 1 for tokens that are kept but not used, or None.

    Returns:
        (packed (T, ...), indices (T,) int64 of the kept tokens in the B S rows, cu_seqlens (B + 1,) int32, the longest
        row, used (B,) int32: how many tokens each row uses).

    Raises:
        ValueError: ``attention_mask`` or ``unused_mask`` is not (B, S).

    Example:
        >>> import torch
        >>> from mpkernels.compat.flash_attn.bert_padding import pad_input, unpad_input
        >>> x = torch.arange(6.0).reshape(2, 3, 1)
        >>> packed, indices, cu_seqlens, longest, _ = unpad_input(x, torch.tensor([[1, 1, 0], [1, 0, 0]]))
        >>> packed.flatten().tolist(), cu_seqlens.tolist(), longest
        ([0.0, 1.0, 3.0], [0, 2, 3], 2)
        >>> pad_input(packed, indices, 2, 3).flatten().tolist()
        [0.0, 1.0, 0.0, 3.0, 0.0, 0.0]
    """
    checks.tensor("hidden_states", hidden_states)
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None:
            checks.tensor(name, mask)
            checks.shape(name, mask, hidden_states.shape[:2], "that of hidden_states")
    used = attention_mask.sum(-1, dtype=torch.int32)
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens, longest, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """What :func:`unpad_input` packed, in its rows again: (T, ...) to (batch, seqlen, ...), 0 where nothing was."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
