"""The masks of PixelCNN as tensors: for users who check a model. No backend builds one."""

from __future__ import annotations

import torch
from torch import Tensor


def pixelcnn_mask(kh: int, kw: int, out_channels: int, in_channels: int, mask_type: str, colors: int = 1) -> Tensor:
    """Which weights of :func:`masked_conv2d` are seen (van den Oord et al. 2016, "Pixel Recurrent Neural Networks").

    Args:
        kh, kw: size of the kernel, both odd.
        out_channels, in_channels: D and C, both divisible by ``colors``.
        mask_type: "A" (the pixel itself and later colours are hidden) or "B" (the own colour is seen).
        colors: blocks of channels in the order in which they are generated: 3 for red, green, blue.

    Returns:
        (D, C, kh, kw) bool, True where a weight is seen.

    Raises:
        ValueError: an even size, a number of channels that ``colors`` does not divide, another ``mask_type``.

    Example:
        >>> from mpkernels.convolution import pixelcnn_mask
        >>> pixelcnn_mask(3, 3, 1, 1, "A")[0, 0].int()
        tensor([[1, 1, 1],
                [1, 0, 0],
                [0, 0, 0]], dtype=torch.int32)
        >>> pixelcnn_mask(1, 1, 3, 3, "B", colors=3)[:, :, 0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    if mask_type not in ("A", "B"):
        raise ValueError(f"mask_type: expected 'A' or 'B', got {mask_type!r}")
    for name, size in (("kh", kh), ("kw", kw)):
        if size < 1 or size % 2 == 0:
            raise ValueError(f"{name}: expected an odd size, got {size}")
    for name, channels in (("out_channels", out_channels), ("in_channels", in_channels)):
        if colors < 1 or channels % colors:
            raise ValueError(f"{name}: expected a multiple of colors = {colors}, got {channels}")
    position = torch.arange(kh * kw).reshape(kh, kw)
    centre = kh // 2 * kw + kw // 2
    of_out = torch.arange(out_channels) * colors // max(out_channels, 1)
    of_in = torch.arange(in_channels) * colors // max(in_channels, 1)
    earlier = of_in < of_out[:, None] if mask_type == "A" else of_in <= of_out[:, None]  # (D, C)
    return (position < centre) | ((position == centre) & earlier[:, :, None, None])
