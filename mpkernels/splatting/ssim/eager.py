"""SSIM as a user writes it in plain torch: five grouped convolutions with the two-dimensional window."""

from __future__ import annotations

import torch
from torch import Tensor


def ssim(
    image: Tensor,
    target: Tensor,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    padding: str = "same",
    reduction: str = "mean",
) -> Tensor:
    """The op, for images of at least one pixel."""
    if image.dim() == 3:
        found = ssim(image[None], target[None], window_size, sigma, data_range, padding, reduction)
        return found if reduction == "mean" else found[0]
    channels = image.shape[1]
    at = torch.arange(window_size, device=image.device, dtype=image.dtype) - window_size // 2
    line = torch.exp(-at.square() / (2 * sigma**2))
    window = torch.outer(line, line) / line.sum().square()
    window = window.expand(channels, 1, window_size, window_size).contiguous()

    def blur(x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, window, padding=padding, groups=channels)

    mu_x, mu_y = blur(image), blur(target)
    sigma_x = blur(image.square()) - mu_x.square()
    sigma_y = blur(target.square()) - mu_y.square()
    sigma_xy = blur(image * target) - mu_x * mu_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    found = (2 * mu_x * mu_y + c1) * (2 * sigma_xy + c2)
    found = found / ((mu_x.square() + mu_y.square() + c1) * (sigma_x + sigma_y + c2))
    return found.mean() if reduction == "mean" else found
