"""Tile intersection as a user writes it in vectorised torch: bench's baseline, and a check written apart."""

from __future__ import annotations

import torch
from torch import Tensor


def intersect_tiles(
    means2d: Tensor,
    radii: Tensor,
    depths: Tensor,
    width: int,
    height: int,
    *,
    tile_size: int = 16,
    conics: Tensor | None = None,
    opacities: Tensor | None = None,
    image_ids: Tensor | None = None,
    n_images: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Expands each Gaussian's bounding box into (Gaussian, tile) pairs, drops those the ellipse misses, sorts keys."""
    lead, device = means2d.shape[:-1], means2d.device
    columns, rows = -(-width // tile_size), -(-height // tile_size)
    shape = (n_images or 0,) if image_ids is not None else tuple(lead[:-1])
    images = torch.Size(shape).numel()
    means2d, radii, depths = means2d.reshape(-1, 2), radii.reshape(-1, 2), depths.reshape(-1)
    if image_ids is None:
        image_ids = torch.arange(means2d.shape[0], device=device) // max(lead[-1], 1)
    grid = torch.tensor([columns, rows], device=device)
    reach = radii.to(means2d.dtype)
    kept = (radii > 0).all(-1) & means2d.isfinite().all(-1)
    ellipses = None
    if conics is not None and opacities is not None:
        a, b, c = conics.reshape(-1, 3).unbind(-1)
        o = opacities.reshape(-1)
        det = a * c - b * b
        slack = 1e-4 + 2.0**-21 * (a * c / det)
        level = 2 * (torch.log(255 * o) * (1 + slack) + slack)
        ellipses = torch.stack([a, b, c, det, level], dim=-1)
        reach = torch.stack([c, a], dim=-1).mul((level / det)[:, None]).sqrt() + 1
        kept &= o >= 1 / 255
    first = ((means2d - reach) / tile_size).floor().nan_to_num().clamp(min=0).minimum(grid).long()
    end = ((means2d + reach) / tile_size).ceil().nan_to_num().clamp(min=0).minimum(grid).long()
    extent = (end - first).clamp(min=0) * kept[:, None]
    counts = extent.prod(-1)
    ids = torch.repeat_interleave(torch.arange(counts.shape[0], device=device), counts)
    place = torch.arange(ids.shape[0], device=device) - (counts.cumsum(0) - counts)[ids]
    column, row = first[ids, 0] + place % extent[ids, 0], first[ids, 1] + place // extent[ids, 0]

    if ellipses is not None:
        a, b, c, det, level = ellipses[ids].unbind(-1)
        x, y = means2d[ids].unbind(-1)
        top = row * tile_size + 0.5 - y
        bottom = (row * tile_size + tile_size).clamp(max=height) - 0.5 - y
        left = column * tile_size + 0.5 - x
        right = (column * tile_size + tile_size).clamp(max=width) - 0.5 - x
        highest = (level * a / det).sqrt()
        meets = (top <= highest) & (bottom >= -highest)
        dy = (-b * (level / (c * det)).sqrt()).maximum(top).minimum(bottom)
        furthest = -b / a * dy + ((level - det / a * dy * dy).clamp(min=0) / a).sqrt()
        dy = (b * (level / (c * det)).sqrt()).maximum(top).minimum(bottom)
        nearest = -b / a * dy - ((level - det / a * dy * dy).clamp(min=0) / a).sqrt()
        meets &= (left <= furthest) & (right >= nearest)
        ids, row, column = ids[meets], row[meets], column[meets]

    tile = row * columns + column
    depth = depths.float().view(torch.int32).long()[ids] & 0xFFFFFFFF
    keys, order = ((image_ids[ids] << (32 + (rows * columns).bit_length())) | (tile << 32) | depth).sort(stable=True)
    per_tile = torch.bincount(image_ids[ids] * rows * columns + tile, minlength=images * rows * columns)
    return (
        torch.bincount(ids, minlength=means2d.shape[0]).int().reshape(lead),
        keys,
        ids[order].int(),
        (per_tile.cumsum(0) - per_tile).reshape(*shape, rows, columns),
    )
