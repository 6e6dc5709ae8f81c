"""The product with a matrix at every position, slowly."""

from __future__ import annotations

import torch
from torch import Tensor


def channel_mix(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Gives weight x + bias for x (B, C, S), computed in the dtype of weight."""
    y = torch.matmul(weight, x.to(weight.dtype))
    return (y if bias is None else y + bias[:, None]).to(x.dtype).contiguous()
