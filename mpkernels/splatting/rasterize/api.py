"""The public function of rasterization: it checks its input and chooses a backend."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.splatting.rasterize import autograd, reference, schema


class RasterizedImage(NamedTuple):
    """What :func:`rasterize` returns, for images of shape (...)."""

    colors: Tensor  # (..., H, W, D) background included
    alphas: Tensor  # (..., H, W, 1) one minus the transmittance behind the last Gaussian


def rasterize(
    means2d: Tensor,
    conics: Tensor,
    colors: Tensor,
    opacities: Tensor,
    width: int,
    height: int,
    isect_offsets: Tensor,
    flatten_ids: Tensor,
    *,
    tile_size: int = 16,
    backgrounds: Tensor | None = None,
    masks: Tensor | None = None,
    absgrad: bool = False,
    backend: str | None = None,
) -> RasterizedImage:
    """Draws projected Gaussians front to back, tile by tile, with exact and deterministic gradients.

    On the pixel with centre (x + 0.5, y + 0.5), with d = mean - centre, each Gaussian of its tile's list covers
    alpha = min(0.999, o exp(-(a dx^2 + c dy^2) / 2 - b dx dy)), is left out where o exp(...) < 1/255, and the pixel
    ends in front of the first one that would leave a transmittance of 1e-4 or less;
    color = sum_i T_i alpha_i c_i + T background, T_i = prod_{j<i} (1 - alpha_j)
    (Kerbl et al. 2023, "3D Gaussian Splatting for Real-Time Radiance Field Rendering", eq. 3; thresholds of gsplat).

    Gradients go to means2d, conics, colors, opacities and backgrounds, once (not twice). They are those of the forward
    that ran: none where alpha was cut to 0.999, none behind the end of a pixel. Two runs give the same bits, with any
    number of threads.

    Args:
        means2d: centres in pixels, (..., N, 2) for images of shape (...), or packed (nnz, 2). float32 or float64. May
            ``retain_grad()``.
        conics: inverse covariances (a, b, c), (..., N, 3) or (nnz, 3).
        colors: any number D >= 1 of channels, (..., N, D) or (nnz, D).
        opacities: (..., N) or (nnz,).
        width: of the images, in pixels.
        height: of the images, in pixels.
        isect_offsets: where each tile's list starts in flatten_ids, (..., th, tw) integers; from
            :func:`intersect_tiles`.
        flatten_ids: the Gaussians of every tile front to back, (n,) int32, as indices into the flattened Gaussians.
        tile_size: side of a tile in pixels.
        backgrounds: (..., D); default zeros.
        masks: (..., th, tw) bool; a tile with False is not drawn: background, alpha 0.
        absgrad: whether the backward also leaves the sum over pixels of the absolute gradient in ``means2d.absgrad``
            (AbsGS, Ye et al. 2024).
        backend: "reference", "cpu" or "cuda"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        RasterizedImage (colors (..., H, W, D), alphas (..., H, W, 1)).

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype.
        ValueError: shapes or devices do not match.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels import splatting
        >>> means2d, conics = torch.tensor([[8.0, 8.0]]), torch.tensor([[0.1, 0.0, 0.1]])
        >>> offsets, ids = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
        >>> image = splatting.rasterize(means2d, conics, torch.ones(1, 3), torch.ones(1), 16, 16, offsets, ids)
        >>> image.colors.shape, image.alphas.shape
        (torch.Size([16, 16, 3]), torch.Size([16, 16, 1]))
    """
    checks.single_or_double("means2d", means2d)
    if means2d.dim() < 2 or means2d.shape[-1] != 2:
        raise ValueError(f"means2d: expected shape (..., N, 2) or (nnz, 2), got {tuple(means2d.shape)}")
    lead = means2d.shape[:-1]
    for name, x, last in (("conics", conics, (3,)), ("opacities", opacities, ())):
        checks.same_kind(name, x, "means2d", means2d)
        checks.shape(name, x, (*lead, *last), "the Gaussians of means2d")
    checks.same_kind("colors", colors, "means2d", means2d)
    if colors.shape[:-1] != lead or colors.dim() == 0 or colors.shape[-1] < 1:
        raise ValueError(
            f"colors: expected shape {(*lead, 'D')} with D >= 1 (the Gaussians of means2d), got {tuple(colors.shape)}"
        )
    for name, x in (("width", width), ("height", height), ("tile_size", tile_size)):
        if not isinstance(x, int):
            raise TypeError(f"{name}: expected an integer >= 1, got {type(x).__name__}")
        if x < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {x}")
    if absgrad and means2d.requires_grad is False and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise ValueError("absgrad: expected means2d to require a gradient, got one that does not")
    images = _check_tiles(isect_offsets, flatten_ids, means2d, lead, width, height, tile_size)
    if math.prod(lead) > 2**31 - 1:
        raise ValueError(f"means2d: expected at most 2^31 - 1 Gaussians (flatten_ids are int32), got {math.prod(lead)}")
    if backgrounds is not None:
        checks.same_kind("backgrounds", backgrounds, "means2d", means2d)
        checks.shape("backgrounds", backgrounds, (*images, colors.shape[-1]), "the images, and the channels of colors")
    if masks is not None:
        checks.tensor("masks", masks)
        if masks.dtype != torch.bool or masks.device != means2d.device:
            raise TypeError(f"masks: expected torch.bool on {means2d.device}, got {masks.dtype} on {masks.device}")
        checks.shape("masks", masks, isect_offsets.shape, "that of isect_offsets")

    tiles, channels = isect_offsets.shape[-2:], colors.shape[-1]
    count, gaussians = math.prod(images), math.prod(lead)
    arguments = (
        None if backgrounds is None else backgrounds.reshape(count, channels),
        None if masks is None else masks.reshape(count, *tiles),
        isect_offsets.reshape(count, *tiles).long(),
        flatten_ids.to(torch.int32),
        int(width),
        int(height),
        int(tile_size),
    )
    chosen = backends.choose(schema.FORWARD, means2d.device.type, backend)
    if chosen == "reference":
        found = reference.rasterize(
            means2d.reshape(gaussians, 2),
            conics.reshape(gaussians, 3),
            colors.reshape(gaussians, channels),
            opacities.reshape(gaussians),
            *arguments,
        )
    else:
        found = autograd.run(means2d, conics, colors, opacities, *arguments, absgrad=absgrad, backend=chosen)
    return RasterizedImage(
        found[0].reshape(*images, height, width, channels), found[1].reshape(*images, height, width).unsqueeze(-1)
    )


def _check_tiles(isect_offsets, flatten_ids, means2d, lead, width, height, tile_size) -> tuple[int, ...]:
    """Checks the lists of the tiles; returns the shape of the images."""
    for name, x in (("isect_offsets", isect_offsets), ("flatten_ids", flatten_ids)):
        checks.tensor(name, x)
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected int32 or int64, got {x.dtype}")
        if x.device != means2d.device:
            raise ValueError(f"{name}: expected the device of means2d, {means2d.device}, got {x.device}")
    tiles = (-(-height // tile_size), -(-width // tile_size))
    if isect_offsets.dim() < 2 or tuple(isect_offsets.shape[-2:]) != tiles:
        raise ValueError(
            f"isect_offsets: expected shape (..., {tiles[0]}, {tiles[1]}) (tiles of {tile_size} pixels in "
            f"{width} x {height}), got {tuple(isect_offsets.shape)}"
        )
    images = tuple(isect_offsets.shape[:-2])
    if len(lead) > 1 and images != tuple(lead[:-1]):
        raise ValueError(
            f"isect_offsets: expected the images of means2d, {tuple(lead[:-1])}, got {images} "
            "(packed Gaussians have one dimension, and may lie in any number of images)"
        )
    if flatten_ids.dim() != 1:
        raise ValueError(f"flatten_ids: expected shape (n,), got {tuple(flatten_ids.shape)}")
    return images
