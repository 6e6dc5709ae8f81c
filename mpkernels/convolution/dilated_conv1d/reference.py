"""The dilated convolution, slowly: the formula, a tap after another, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def dilated_conv1d(
    x: Tensor,  # (B, C, T)
    weight: Tensor,  # (D, C / groups, K)
    bias: Tensor | None,  # (D,)
    state: Tensor | None,  # (B, C, left)
    dilation: int,
    groups: int,
    left: int,
) -> Tensor:
    """out[b, o, t] = bias[o] + sum_{k, c} weight[o, c, k] xs[b, c, t + k dilation - left], (B, D, T) in x's dtype.

    xs is x, continued to the left by the state. Positions outside of it add nothing: they are not multiplied, so that
    the gradient of a tap that meets no position is exactly 0, and a NaN in it reaches nothing.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, channels, length = x.shape
    outputs, _, taps = weight.shape
    xs = (x if state is None else torch.cat([state, x], dim=2)).to(wide)
    start = length - xs.shape[2]  # the position of xs[..., 0]
    by_group = xs.reshape(batch, groups, channels // groups, xs.shape[2])
    kernel = weight.to(wide).reshape(groups, outputs // groups, channels // groups, taps)

    out = torch.zeros(batch, outputs, length, dtype=wide, device=x.device)
    for k in range(taps):
        shift = k * dilation - left
        begin, end = max(0, start - shift), min(length, length - shift)  # outputs whose input at this tap exists
        if begin >= end:
            continue
        seen = by_group[..., begin + shift - start : end + shift - start]  # (B, groups, C / groups, end - begin)
        products = torch.einsum("goc,bgct->bgot", kernel[..., k], seen).reshape(batch, outputs, end - begin)
        out = out + torch.nn.functional.pad(products, (begin, length - end))
    if bias is not None:
        out = out + bias.to(wide)[:, None]
    return out.to(x.dtype)
