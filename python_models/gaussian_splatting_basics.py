"""What every way of fitting Gaussians needs: first Gaussians, a rendered view, the loss, the figures, pictures."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mpkernels import splatting

SH_BAND0 = 0.28209479177387814  # 1 / (2 sqrt(pi)): the constant spherical harmonic
SSIM_SHARE = 0.2
SSIM_BORDER = 5  # pixels at which SSIM's window of 11 reaches over the edge


def psnr(picture: Tensor, target: Tensor, mask: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB, -10 log10(mean squared error), over the pixels where `mask` is True."""
    error = (picture.clamp(0, 1) - target).square()
    return -10 * math.log10(max((error if mask is None else error[mask]).mean().item(), 1e-12))


def ssim(picture: Tensor, target: Tensor, mask: Tensor | None = None, backend: str | None = None) -> float:
    """Structural similarity of two (height, width, 3) pictures, the mean where `mask` is True.

    Pixels that are masked out are the same in both; those whose window leaves the picture do not count.
    """
    picture = picture.clamp(0, 1)
    if mask is not None:
        picture = torch.where(mask[..., None], picture, target)
    planes = [x.permute(2, 0, 1)[None] for x in (picture, target)]
    padding = "valid" if min(picture.shape[:2]) > 2 * SSIM_BORDER else "same"
    similarity = splatting.ssim(planes[0], planes[1], padding=padding, reduction="none", backend=backend)
    if mask is None:
        return similarity.mean().item()
    inner = mask if padding == "same" else mask[SSIM_BORDER:-SSIM_BORDER, SSIM_BORDER:-SSIM_BORDER]
    return similarity[..., inner].mean().item()


def photometric_loss(picture: Tensor, target: Tensor, mask: Tensor | None, backend: str | None = None) -> Tensor:
    """0.8 |error| + 0.2 (1 - SSIM), means over the pixels; those masked out are taken as right."""
    if mask is not None:
        picture = torch.where(mask[..., None], picture, target)
    planes = [x.permute(2, 0, 1)[None] for x in (picture, target)]
    similarity = splatting.ssim(planes[0], planes[1], backend=backend)
    return (1 - SSIM_SHARE) * (picture - target).abs().mean() + SSIM_SHARE * (1 - similarity)


def initial_gaussians(
    points: Tensor, colours: Tensor, *, sh_degree: int, largest: float, opacity: float = 0.1
) -> torch.nn.ParameterDict:
    """Round Gaussians at points (N, 3) of colours (N, 3), as large as their three nearest neighbours are away.

    Sizes are at most `largest`. Parameters are those of 3DGS: means, scales (logarithms), quats (w, x, y, z), opacities
    (logits), sh0 (N, 1, 3) and shN (N, (sh_degree + 1)^2 - 1, 3).
    """
    from scipy.spatial import KDTree

    count = len(points)
    distance = np.full((count, 1), largest)
    if count > 1:
        distance = KDTree(points.numpy()).query(points.numpy(), k=min(count, 4))[0][:, 1:]  # the first is itself
    size = torch.from_numpy(np.sqrt(np.square(distance).mean(axis=-1))).float().clamp(1e-7, largest)
    made = {
        "means": points.clone(),
        "scales": size.log()[:, None].repeat(1, 3),
        "quats": torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(count, 1),
        "opacities": torch.logit(torch.full((count,), opacity)),
        "sh0": ((colours - 0.5) / SH_BAND0)[:, None, :],
        "shN": torch.zeros(count, (sh_degree + 1) ** 2 - 1, 3),
    }
    return torch.nn.ParameterDict({name: torch.nn.Parameter(value) for name, value in made.items()})


def render(
    gaussians: torch.nn.ParameterDict,
    viewmat: Tensor,
    K: Tensor,
    width: int,
    height: int,
    *,
    sh_degree: int,
    background: Tensor | None = None,
    backend: str | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """One view: colours (height, width, 3), alphas (height, width, 1) and rasterization's third output."""
    coefficients = torch.cat([gaussians["sh0"], gaussians["shN"][:, : (sh_degree + 1) ** 2 - 1]], dim=1)
    colours, alphas, info = splatting.rasterization(
        gaussians["means"],
        gaussians["quats"],
        gaussians["scales"].exp(),
        torch.sigmoid(gaussians["opacities"]),
        coefficients,
        viewmat[None],
        K[None],
        width,
        height,
        sh_degree=sh_degree,
        packed=False,
        backgrounds=None if background is None else background[None],
        backend=backend,
        **settings,
    )
    return colours[0], alphas[0], info


def save_picture(path: pathlib.Path, *parts: Tensor) -> None:
    """Writes pictures (height, width, 3) in [0, 1] beside each other."""
    pixels = torch.cat([part.detach().cpu().clamp(0, 1) for part in parts], dim=1)
    Image.fromarray((pixels * 255).round().byte().numpy()).save(path)
