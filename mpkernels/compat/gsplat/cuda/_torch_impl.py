"""gsplat.cuda._torch_impl: compositing of given pairs of pixels and Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import checks
from mpkernels.splatting.constants import ALPHA_MAX
from mpkernels.volume import composite_from_alphas


def accumulate(
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    colors: Tensor,
    gaussian_ids: Tensor,
    pixel_ids: Tensor,
    image_ids: Tensor,
    image_width: int,
    image_height: int,
) -> tuple[Tensor, Tensor]:
    """Composites given pairs of pixel and Gaussian, by :func:`mpkernels.composite_from_alphas` (gsplat asks nerfacc).

    Args:
        means2d: (..., N, 2).
        conics: (..., N, 3).
        opacities: (..., N).
        colors: (..., N, D).
        gaussian_ids: (M,), below N; the pairs of one pixel from near to far.
        pixel_ids: (M,), row by row.
        image_ids: (M,).
        image_width: in pixels.
        image_height: in pixels.

    Returns:
        Colours (..., image_height, image_width, D) and opacities (..., image_height, image_width, 1).
    """
    checks.floating("means2d", means2d)
    images, n = means2d.shape[:-2], means2d.shape[-2]
    checks.shape("means2d", means2d, (*images, n, 2), "(..., N, 2)")
    checks.shape("conics", conics, (*images, n, 3), "(..., N, 3), N by means2d")
    checks.shape("opacities", opacities, (*images, n), "(..., N), N by means2d")
    checks.shape("colors", colors, (*images, n, colors.shape[-1]), "(..., N, D), N by means2d")
    pixels = images.numel() * image_height * image_width
    ray = image_ids.to(torch.int64) * (image_height * image_width) + pixel_ids
    order = torch.argsort(ray, stable=True)
    pixel, which = pixel_ids[order], (image_ids * n + gaussian_ids)[order]
    at = torch.stack([pixel % image_width, pixel // image_width], dim=-1) + 0.5  # (M, 2)
    x, y = (at - means2d.reshape(-1, 2)[which]).unbind(-1)
    a, b, c = conics.reshape(-1, 3)[which].unbind(-1)
    alphas = opacities.reshape(-1)[which] * torch.exp(-(a * x * x + c * y * y) / 2 - b * x * y)
    alphas = alphas.clamp(max=ALPHA_MAX)
    counts = torch.bincount(ray, minlength=pixels)
    packed_info = torch.stack([counts.cumsum(0) - counts, counts], dim=1)
    values = colors.reshape(-1, colors.shape[-1])[which]
    out = composite_from_alphas(alphas, values, torch.zeros_like(alphas), packed_info=packed_info)
    shape = (*images, image_height, image_width)
    return out.values.reshape(*shape, colors.shape[-1]), out.opacity.reshape(*shape, 1)
