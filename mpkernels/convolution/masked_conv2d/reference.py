"""The masked convolution, slowly: a sum over the taps that are seen, each a product of a matrix with a shifted picture.

Every seen tap (i, j) adds weight[:, :, i, j] times the picture moved by ((i - kh // 2), (j - kw // 2)) dilations; the
tap that colours share adds, colour by colour, the product with the channels that this colour sees. What is not seen is
never looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_conv2d(
    x: Tensor,  # (B, C, H, W)
    weight: Tensor,  # (D, C, kh, kw)
    bias: Tensor | None,  # (D,)
    taps: int,
    colors: int,
    inclusive: bool,
    stride_y: int,
    stride_x: int,
    dilation_y: int,
    dilation_x: int,
) -> Tensor:
    """The output (B, D, ceil(H / stride_y), ceil(W / stride_x)), by the formula of schema.py."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, channels, height, width = x.shape
    filters, _, kh, kw = weight.shape
    bottom, right = kh // 2 * dilation_y, kw // 2 * dilation_x
    padded = torch.nn.functional.pad(x.to(wide), (right, right, bottom, bottom))
    w = weight.to(wide)

    def shifted(tap: int) -> Tensor:  # (B, C, rows, columns)
        i, j = divmod(tap, kw)
        moved = padded[:, :, i * dilation_y : i * dilation_y + height, j * dilation_x : j * dilation_x + width]
        return moved[:, :, ::stride_y, ::stride_x]

    def product(matrix: Tensor, picture: Tensor) -> Tensor:
        return torch.einsum("oc,bcyx->boyx", matrix, picture)

    out = torch.zeros((batch, filters, -(-height // stride_y), -(-width // stride_x)), dtype=wide, device=x.device)
    for tap in range(taps):
        out = out + product(w[:, :, tap // kw, tap % kw], shifted(tap))
    if colors > 1:
        picture, matrix = shifted(taps), w[:, :, taps // kw, taps % kw]
        parts = []
        for color, rows in enumerate(matrix.split(max(filters // colors, 1))):
            seen = (color + inclusive) * (channels // colors)
            parts.append(product(rows[:, :seen], picture[:, :seen]))
        if parts:
            out = out + torch.cat(parts, dim=1)
    if bias is not None:
        out = out + bias.to(wide)[:, None, None]
    return out.to(x.dtype)
