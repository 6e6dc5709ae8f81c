"""How (B, C, T) sequences lie in memory, and what a sequence leaves to the next one."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(x: Tensor) -> bool:
    """Whether results should lie as (B, T, C) in memory, because ``x`` does."""
    return x.stride(1) == 1 and x.stride(2) != 1


def readable(x: Tensor) -> Tensor:
    """What the kernels read: positions or channels that are contiguous, any strides between the others."""
    if x.stride(2) == 1 or x.stride(1) == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def next_state(x: Tensor, state: Tensor | None, left: int) -> Tensor:
    """The last ``left`` positions of state (zeros where None) and x, in memory of their own: (B, C, left)."""
    length = x.shape[2]
    if length >= left:
        return x[:, :, length - left :].clone(memory_format=torch.contiguous_format)
    if state is None:
        return torch.nn.functional.pad(x, (left - length, 0))
    return torch.cat([state[:, :, length:], x], dim=2)
