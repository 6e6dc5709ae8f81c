"""The states behind packed sequences, as causal_conv1d has them."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import checks


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last inputs of each of several sequences that lie one behind another; no gradients.

    Args:
        x: (total_tokens, dim).
        cu_seqlens: (batch + 1,) integers: where the sequences start, and the end of the last.
        state_len: how many inputs to keep of each.

    Returns:
        (batch, dim, state_len), newest last; 0 where a sequence is shorter.

    Raises:
        TypeError: an argument is no tensor of the right kind.
        ValueError: a shape is wrong.

    Example:
        >>> import torch
        >>> from mpkernels.compat.causal_conv1d import causal_conv1d_varlen_states
        >>> x = torch.arange(1.0, 6.0)[:, None]
        >>> causal_conv1d_varlen_states(x, torch.tensor([0, 1, 5]), 3)[:, 0]
        tensor([[0., 0., 1.],
                [3., 4., 5.]])
    """
    checks.tensor("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (total_tokens, dim), got {tuple(x.shape)}")
    checks.tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape (batch + 1,), got {tuple(cu_seqlens.shape)}")
    if state_len < 0:
        raise ValueError(f"state_len: expected at least 0, got {state_len}")
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    position = ends - state_len + torch.arange(state_len, device=x.device)  # (batch, state_len)
    inside = position >= starts
    if x.shape[0] == 0:
        return x.new_zeros((ends.shape[0], state_len, x.shape[1])).transpose(1, 2)
    with torch.no_grad():
        found = x[torch.where(inside, position, 0)]  # (batch, state_len, dim)
        return torch.where(inside[..., None], found, torch.zeros_like(found)).transpose(1, 2)
