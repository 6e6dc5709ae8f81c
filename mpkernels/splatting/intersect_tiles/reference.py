"""The tiles of Gaussians, slowly: every tile asked by itself, then one sort of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels.splatting.constants import ALPHA_MIN

SLACK = 1e-4
SLACK_OF_CANCELLATION = 2.0**-21  # 8 roundings of float32, times ac/det
THINNEST_ELLIPSE = 2.0**18  # ac/det from which the bounding box counts
CHUNK = 1 << 20  # elements of (Gaussians, tiles) at a time


def intersect_tiles(
    means2d: Tensor,
    radii: Tensor,
    depths: Tensor,
    conics: Tensor | None,
    opacities: Tensor | None,
    image_ids: Tensor,
    images: int,
    width: int,
    height: int,
    tile_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of schema.py (image_ids always given), in any floating dtype; computed in float64."""
    columns, rows = -(-width // tile_size), -(-height // tile_size)
    tiles = rows * columns
    present = (radii > 0).all(-1) & means2d.isfinite().all(-1) & (image_ids >= 0) & (image_ids < images)

    gaussian_ids, tile_ids = [], []
    for chunk in torch.arange(means2d.shape[0], device=means2d.device).split(max(CHUNK // max(tiles, 1), 1)):
        meets = meets_box(means2d[chunk].double(), radii[chunk], width, height, tile_size)
        if conics is not None and opacities is not None:
            o = opacities[chunk].double()
            a, b, c = conics[chunk].double().unbind(-1)
            det = a * c - b * b
            drawn = (a > 0) & (c > 0) & (o >= ALPHA_MIN) & (a + b + c + o).isfinite()
            thin = ~(det * THINNEST_ELLIPSE > a * c)
            slack = SLACK + SLACK_OF_CANCELLATION * (a * c / det)
            level = torch.log(255 * o) * (1 + slack) + slack
            least = least_over_tiles(means2d[chunk].double(), a, b, c, width, height, tile_size)
            meets = torch.where(thin[:, None, None], meets, least <= level[:, None, None]) & drawn[:, None, None]
        found = (meets & present[chunk, None, None]).flatten(1).nonzero()
        gaussian_ids.append(chunk[found[:, 0]])
        tile_ids.append(found[:, 1])
    gaussian = torch.cat(gaussian_ids) if gaussian_ids else image_ids.new_empty(0)
    tile = torch.cat(tile_ids) if tile_ids else image_ids.new_empty(0)

    image = image_ids[gaussian]
    depth = depths.float().view(torch.int32).long()[gaussian] & 0xFFFFFFFF
    keys = (image << (32 + tiles.bit_length())) | (tile << 32) | depth
    keys, order = keys.sort(stable=True)  # gaussian is in rising order: so are equal keys
    counts = torch.bincount((image * tiles + tile), minlength=images * tiles)
    offsets = (counts.cumsum(0) - counts).reshape(images, rows, columns)
    per_gaussian = torch.bincount(gaussian, minlength=means2d.shape[0])
    return per_gaussian.int(), keys, gaussian[order].int(), offsets


def meets_box(means2d: Tensor, radii: Tensor, width: int, height: int, tile_size: int) -> Tensor:
    """(N, rows, columns): tiles floor((x - rx) / size) to ceil((x + rx) / size), and so for y."""

    def along(axis: int, pixels: int) -> Tensor:  # (N, tiles)
        tile = torch.arange(-(-pixels // tile_size), device=means2d.device)
        first = ((means2d[:, axis] - radii[:, axis]) / tile_size).floor()
        end = ((means2d[:, axis] + radii[:, axis]) / tile_size).ceil()
        return (first[:, None] <= tile) & (tile < end[:, None])

    return along(1, height)[:, :, None] & along(0, width)[:, None, :]


def least_over_tiles(
    means2d: Tensor, a: Tensor, b: Tensor, c: Tensor, width: int, height: int, tile_size: int
) -> Tensor:
    """(N, rows, columns): the least (a dx^2 + c dy^2) / 2 + b dx dy over the rectangle of a tile's pixel centres.

    It is 0 if the mean lies in the rectangle, and else taken on one of the four edges.
    """

    def edges(axis: int, pixels: int) -> tuple[Tensor, Tensor]:
        first = torch.arange(0, pixels, tile_size, device=means2d.device)
        last = (first + tile_size).clamp(max=pixels) - 1
        mean = means2d[:, axis, None]
        return first + 0.5 - mean, last + 0.5 - mean

    left, right = (x[:, None, :] for x in edges(0, width))  # (N, 1, columns)
    top, bottom = (y[:, :, None] for y in edges(1, height))  # (N, rows, 1)
    a, b, c = (x[:, None, None] for x in (a, b, c))

    def quadratic(dx: Tensor, dy: Tensor) -> Tensor:
        return (a * dx * dx + c * dy * dy) / 2 + b * dx * dy

    least = torch.full(torch.broadcast_shapes(left.shape, top.shape), torch.inf, dtype=a.dtype, device=a.device)
    for dx in (left, right):
        least = least.minimum(quadratic(dx, torch.clamp(-b / c * dx, top, bottom)))
    for dy in (top, bottom):
        least = least.minimum(quadratic(torch.clamp(-b / a * dy, left, right), dy))
    inside = (left <= 0) & (right >= 0) & (top <= 0) & (bottom >= 0)
    return torch.where(inside, 0.0, least)
