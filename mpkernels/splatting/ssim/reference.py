"""SSIM, slowly: the window's weights one after another, along rows and then along columns."""

from __future__ import annotations

import torch
from torch import Tensor


def ssim(
    image: Tensor, target: Tensor, window_size: int, sigma: float, data_range: float, valid: bool, mean: bool
) -> Tensor:
    """The map of two images (B, C, H, W), or its mean (Wang et al. 2004, eq. 13, with Gaussian weights)."""
    radius = window_size // 2
    distance = torch.arange(window_size, dtype=torch.float64) - radius
    weights = torch.exp(-(distance**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).tolist()

    def average(x: Tensor) -> Tensor:
        if not valid:
            x = torch.nn.functional.pad(x, (radius,) * 4)
        for dim in (-1, -2):
            length = x.shape[dim] - 2 * radius
            x = sum((w * x.narrow(dim, i, length) for i, w in enumerate(weights)), start=torch.zeros(()).to(x))
        return x

    mu_x, mu_y = average(image), average(target)
    variance_x = average(image * image) - mu_x * mu_x
    variance_y = average(target * target) - mu_y * mu_y
    covariance = average(image * target) - mu_x * mu_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = ((2 * mu_x * mu_y + c1) * (2 * covariance + c2)) / (
        (mu_x**2 + mu_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return similarity.sum() / max(similarity.numel(), 1) if mean else similarity
