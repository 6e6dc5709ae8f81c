"""Schemas and fake functions of rasterization. Imports torch (and the namespaces) alone.

With M projected Gaussians in all images together, D channels, I images of H x W pixels in tiles of ``tile_size``
squared, (th, tw) tiles an image, and n intersections of a Gaussian with a tile:

==================  ====================  ================================================================
argument            shape                 meaning
==================  ====================  ================================================================
means2d             (M, 2)                projected centres, in pixels
conics              (M, 3)                inverse covariance (a, b, c): a dx^2 + 2 b dx dy + c dy^2
colors              (M, D)                what is composited
opacities           (M,)
backgrounds         (I, D) or None        seen behind the last Gaussian
masks               (I, th, tw) or None   bool: False leaves a tile out (its pixels are background)
isect_offsets       (I, th, tw) int64     where each tile's list starts in flatten_ids; it ends where the next starts
flatten_ids         (n,) int32            the Gaussians of every tile, front to back
==================  ====================  ================================================================

The forward gives colors (I, H, W, D), alphas (I, H, W), the transmittance behind the last Gaussian drawn (I, H, W), and
``last`` (I, H, W) int32: a place in its tile's list from which on nothing is drawn on the pixel. The backward gives
gradients of means2d, conics, colors, opacities, backgrounds, and the sum over pixels of the absolute gradient of
means2d (``absgrad``); what was not asked for comes back without elements. All tensors are contiguous.
"""

from __future__ import annotations

import torch

from mpkernels import library

FORWARD = "rasterize"
BACKWARD = "rasterize_backward"

_ARGUMENTS = (
    "Tensor means2d, Tensor conics, Tensor colors, Tensor opacities, Tensor? backgrounds, Tensor? masks, "
    "Tensor isect_offsets, Tensor flatten_ids"
)
_SIZES = "int width, int height, int tile_size"


def _fake_forward(
    means2d, conics, colors, opacities, backgrounds, masks, isect_offsets, flatten_ids, width, height, tile_size
):
    pixels = (isect_offsets.shape[0], height, width)
    return (
        colors.new_empty((*pixels, colors.shape[-1])),
        colors.new_empty(pixels),
        colors.new_empty(pixels),
        colors.new_empty(pixels, dtype=torch.int32),
    )


def _fake_backward(
    grad_colors,
    grad_alphas,
    means2d,
    conics,
    colors,
    opacities,
    backgrounds,
    masks,
    isect_offsets,
    flatten_ids,
    render_colors,
    transmittances,
    last,
    width,
    height,
    tile_size,
    absgrad,
    needs_backgrounds,
):
    return (
        means2d.new_empty(means2d.shape),
        conics.new_empty(conics.shape),
        colors.new_empty(colors.shape),
        opacities.new_empty(opacities.shape),
        backgrounds.new_empty(backgrounds.shape) if needs_backgrounds else colors.new_empty((0,)),
        means2d.new_empty(means2d.shape) if absgrad else means2d.new_empty((0,)),
    )


library.define(f"{FORWARD}({_ARGUMENTS}, {_SIZES}) -> (Tensor, Tensor, Tensor, Tensor)", _fake_forward)
library.define(
    f"{BACKWARD}(Tensor? grad_colors, Tensor? grad_alphas, {_ARGUMENTS}, Tensor render_colors, Tensor transmittances, "
    f"Tensor last, {_SIZES}, bool absgrad, bool needs_backgrounds) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
