"""Rasterization in plain torch: every pixel of a tile against every Gaussian of the tile's list, in order.

Kerbl et al. 2023, "3D Gaussian Splatting", eq. 3, with the thresholds of gsplat 1.5.3 (constants.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels.splatting.constants import ALPHA_MAX, ALPHA_MIN, TRANSMITTANCE_MIN


def alphas_at(pixels: Tensor, means2d: Tensor, conics: Tensor, opacities: Tensor) -> Tensor:
    """What each of n Gaussians covers of each of P pixels: (P, n).

    alpha = min(0.999, o exp(-sigma)), sigma = (a dx^2 + c dy^2) / 2 + b dx dy; 0 where o exp(-sigma) is below 1/255 and
    where sigma is negative. A Gaussian with a number that is not finite covers nothing.

    Args:
        pixels: (P, 2) centres.
        means2d: (n, 2).
        conics: (n, 3) as (a, b, c).
        opacities: (n,).
    """
    finite = torch.cat([means2d, conics, opacities[:, None]], -1).isfinite().all(-1)
    means2d, conics = (torch.where(finite[:, None], x, 0) for x in (means2d, conics))
    opacities = torch.where(finite, opacities, 0)
    dx, dy = (means2d[None, :] - pixels[:, None]).unbind(-1)  # (P, n)
    a, b, c = conics.unbind(-1)
    sigma = (a * dx * dx + c * dy * dy) / 2 + b * dx * dy
    drawn = (sigma >= 0) & (opacities * torch.exp(-sigma) >= ALPHA_MIN)
    alpha = opacities * torch.exp(-torch.where(drawn, sigma, 0))
    return torch.where(drawn, alpha.clamp(max=ALPHA_MAX), 0)


def over(alphas: Tensor, colors: Tensor) -> tuple[Tensor, Tensor]:
    """Composites n Gaussians front to back on each of P pixels: colors (P, D), and the transmittance behind (P,).

    A pixel ends in front of the first Gaussian that would leave it a transmittance of 1e-4 or less.

    Args:
        alphas: (P, n).
        colors: (n, D).
    """
    behind = torch.cumprod(1 - alphas, dim=1)  # (P, n) transmittance behind each Gaussian
    alphas = torch.where(behind > TRANSMITTANCE_MIN, alphas, 0)
    behind = torch.cumprod(1 - alphas, dim=1)
    in_front = torch.cat([torch.ones_like(behind[:, :1]), behind[:, :-1]], dim=1)
    weights = in_front * alphas
    drawn = (alphas > 0)[..., None]
    seen = torch.where(drawn, weights[..., None] * torch.where(drawn, colors, 0), 0)  # what is not drawn may be NaN
    behind_all = behind[:, -1] if alphas.shape[1] else alphas.new_ones(len(alphas))
    return seen.sum(1), behind_all


def rasterize(
    means2d: Tensor,  # (M, 2)
    conics: Tensor,  # (M, 3)
    colors: Tensor,  # (M, D)
    opacities: Tensor,  # (M,)
    backgrounds: Tensor | None,  # (I, D)
    masks: Tensor | None,  # (I, th, tw)
    isect_offsets: Tensor,  # (I, th, tw)
    flatten_ids: Tensor,  # (n,)
    width: int,
    height: int,
    tile_size: int,
) -> tuple[Tensor, Tensor]:
    """Colors (I, H, W, D) and alphas (I, H, W), as in schema.py."""
    images, tiles_high, tiles_wide = isect_offsets.shape
    device = means2d.device
    starts = [*isect_offsets.flatten().tolist(), len(flatten_ids)]  # a tile's list ends where the next starts
    rows = []
    for i in range(images):
        for y in range(tiles_high):
            row = []
            ys = torch.arange(y * tile_size, min((y + 1) * tile_size, height), device=device)
            for x in range(tiles_wide):
                xs = torch.arange(x * tile_size, min((x + 1) * tile_size, width), device=device)
                first, end = starts[(i * tiles_high + y) * tiles_wide + x :][:2]
                if masks is not None and not masks[i, y, x]:
                    end = first
                ids = flatten_ids[first:end].long()
                grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).reshape(-1, 2)
                pixels = grid.to(means2d.dtype) + 0.5
                color, behind = over(alphas_at(pixels, means2d[ids], conics[ids], opacities[ids]), colors[ids])
                if backgrounds is not None:
                    color = color + behind[:, None] * backgrounds[i]
                row.append(torch.cat([color, 1 - behind[:, None]], -1).reshape(len(ys), len(xs), -1))
            rows.append(torch.cat(row, dim=1))
    channels = colors.shape[1] + 1
    if not rows:
        image = means2d.new_zeros((images, height, width, channels))
    else:
        image = torch.cat(rows, dim=0).reshape(images, height, width, channels)
    return image[..., :-1], image[..., -1]
