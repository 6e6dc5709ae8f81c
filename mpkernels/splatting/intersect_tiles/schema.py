"""Schema and fake function of intersect_tiles. Imports torch (and the namespaces) alone.

M Gaussians of all images, I images, tiles of ``tile_size`` pixels in ``rows`` and ``columns``, n intersections:

=================  =============  ==========  =====================================================================
argument           shape          dtype       meaning
=================  =============  ==========  =====================================================================
means2d            (M, 2)         floating    pixels
radii              (M, 2)         int32       pixels; a Gaussian with one of them 0 or less has no tiles
depths             (M,)           floating    the order in a tile
conics             (M, 3) / None  floating    (a, b, c) of (a dx^2 + c dy^2) / 2 + b dx dy; None: the boxes of radii
opacities          (M,) / None    floating    with conics
image_ids          (M,) / None    int64       None: M / I Gaussians an image, one image after another
=================  =============  ==========  =====================================================================

Returns tiles_per_gauss (M,) int32, isect_ids (n,) int64, flatten_ids (n,) int32 and isect_offsets
(I, rows, columns) int64. All tensors are contiguous.
"""

from __future__ import annotations

import torch

from mpkernels import library

FORWARD = "intersect_tiles"


def _fake(means2d, radii, depths, conics, opacities, image_ids, images, width, height, tile_size):
    count = torch.library.get_ctx().new_dynamic_size()
    rows, columns = -(-height // tile_size), -(-width // tile_size)
    return (
        radii.new_empty((means2d.shape[0],)),
        radii.new_empty((count,), dtype=torch.int64),
        radii.new_empty((count,)),
        radii.new_empty((images, rows, columns), dtype=torch.int64),
    )


library.define(
    f"{FORWARD}(Tensor means2d, Tensor radii, Tensor depths, Tensor? conics, Tensor? opacities, Tensor? image_ids, "
    "int images, int width, int height, int tile_size) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
