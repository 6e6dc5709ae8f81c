"""The public function of tile intersection: it checks its input and chooses a backend."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.splatting.intersect_tiles import reference, schema


class TileIntersections(NamedTuple):
    """What :func:`intersect_tiles` returns, for images of shape (...) with n intersections in all."""

    tiles_per_gauss: Tensor  # (..., N) or (nnz,) int32: in how many tiles each Gaussian is listed
    isect_ids: Tensor  # (n,) int64, sorted: image << (32 + bits) | tile << 32 | depth
    flatten_ids: Tensor  # (n,) int32: the Gaussian of each, as an index into the flattened Gaussians
    isect_offsets: Tensor  # (..., rows, columns) int64: where each tile's list starts; it ends where the next starts


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
    backend: str | None = None,
) -> TileIntersections:
    """Lists, for every tile of every image, the projected Gaussians that can be seen in it, front to back.

    With conics and opacities a Gaussian is listed where it can reach alpha = 1/255: where some point of the rectangle
    of the tile's pixel centres has (a dx^2 + c dy^2) / 2 + b dx dy <= ln(255 o) (1 + slack) + slack, with
    slack = 1e-4 + 2^-21 ac/det, so that no rounding of a float32 rasterizer reaches another tile
    (Speedy-Splat, Hanson et al. 2025, "AccuTile"). Ellipses too thin for float32 (ac/det >= 2^18, or det <= 0) count
    as their bounding box. Without, a Gaussian is listed in all tiles of its bounding box, mean -+ radii, as in gsplat:
    two to three times as many.

    A list is in order of the depths as float32, equal depths in the order of the Gaussians. Not listed are Gaussians
    with a radius of 0 or less, with a mean (conic, opacity) that is NaN or infinite, with a or c <= 0, with an opacity
    below 1/255, and with an image id out of range. There are no gradients: all outputs are integers.

    Args:
        means2d: centres in pixels, (..., N, 2) for images of shape (...), or packed (nnz, 2). float32 or float64.
        radii: half sides of the bounding boxes in pixels, int32, the shape of ``means2d``.
        depths: positive, (..., N) or (nnz,).
        width: of the images, in pixels.
        height: of the images, in pixels.
        tile_size: side of a tile in pixels.
        conics: inverse covariances (a, b, c), (..., N, 3) or (nnz, 3).
        opacities: (..., N) or (nnz,), with ``conics``. May be above 1.
        image_ids: packed: the image of each Gaussian, (nnz,) int64, in any order.
        n_images: packed: the number of images.
        backend: "reference", "cpu" or "cuda"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        TileIntersections (tiles_per_gauss (..., N), isect_ids (n,), flatten_ids (n,), isect_offsets
        (..., rows, columns)). In isect_ids ``bits`` is the bit length of rows x columns, as in gsplat. Packed:
        tiles_per_gauss (nnz,), isect_offsets (n_images, rows, columns).

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype.
        ValueError: shapes or devices do not match; images and tiles do not fit into 31 bits.
        RuntimeError: the intersections need more memory than the machine has; the message says how many they are.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels import splatting
        >>> means2d, radii = torch.tensor([[8.0, 8.0], [16.0, 8.0]]), torch.full((2, 2), 4, dtype=torch.int32)
        >>> lists = splatting.intersect_tiles(means2d, radii, torch.tensor([2.0, 1.0]), 32, 16)
        >>> lists.flatten_ids, lists.isect_offsets
        (tensor([1, 0, 1], dtype=torch.int32), tensor([[0, 2]]))
    """
    checks.single_or_double("means2d", means2d)
    if means2d.dim() < 2 or means2d.shape[-1] != 2:
        raise ValueError(f"means2d: expected shape (..., N, 2) or (nnz, 2), got {tuple(means2d.shape)}")
    lead = means2d.shape[:-1]
    _check_integers("radii", radii, torch.int32, means2d)
    checks.shape("radii", radii, means2d.shape, "that of means2d")
    if (conics is None) != (opacities is None):
        missing, given = ("opacities", "conics") if opacities is None else ("conics", "opacities")
        raise ValueError(f"{missing}: expected a tensor, because {given} are given, got None")
    checks.tensor("depths", depths)
    for name, x, last in (("depths", depths, ()), ("conics", conics, (3,)), ("opacities", opacities, ())):
        if x is not None:
            checks.same_kind(name, x, "means2d", means2d)
            checks.shape(name, x, (*lead, *last), "the Gaussians of means2d")
    for name, x, least in (
        ("width", width, 1),
        ("height", height, 1),
        ("tile_size", tile_size, 1),
        ("n_images", n_images, 0),
    ):
        if name == "n_images" and image_ids is None and x is None:
            continue
        if isinstance(x, bool) or not isinstance(x, int):
            raise TypeError(f"{name}: expected an integer >= {least}, got {type(x).__name__}")
        if x < least:
            raise ValueError(f"{name}: expected an integer >= {least}, got {x}")
    if image_ids is not None:
        if len(lead) != 1:
            raise ValueError(f"means2d: expected packed (nnz, 2) with image_ids, got {tuple(means2d.shape)}")
        _check_integers("image_ids", image_ids, torch.int64, means2d)
        checks.shape("image_ids", image_ids, lead, "the Gaussians of means2d")
        image_shape: tuple[int, ...] = (n_images or 0,)
    elif n_images is not None:
        raise ValueError("image_ids: expected a tensor, because n_images is given, got None")
    else:
        image_shape = tuple(lead[:-1])

    images, gaussians = math.prod(image_shape), math.prod(lead)
    rows, columns = -(-height // tile_size), -(-width // tile_size)
    bits = max(images - 1, 0).bit_length() + (rows * columns).bit_length()
    if bits > 31:
        raise ValueError(
            f"tile_size: expected images and tiles in 31 bits of a key, got {bits} bits for {images} images of "
            f"{rows} x {columns} tiles: choose larger tiles, or fewer images a call"
        )
    if gaussians > 2**31 - 1:
        raise ValueError(f"means2d: expected at most 2^31 - 1 Gaussians (flatten_ids are int32), got {gaussians}")

    chosen = backends.choose(schema.FORWARD, means2d.device.type, backend)
    arguments = (
        means2d.detach().reshape(gaussians, 2).contiguous(),
        radii.reshape(gaussians, 2).contiguous(),
        depths.detach().reshape(gaussians).contiguous(),
        None if conics is None else conics.detach().reshape(gaussians, 3).contiguous(),
        None if opacities is None else opacities.detach().reshape(gaussians).contiguous(),
    )
    if chosen == "reference":
        if image_ids is None:
            each = lead[-1]
            image_ids = torch.arange(gaussians, device=means2d.device) // max(each, 1)
        found = reference.intersect_tiles(*arguments, image_ids, images, width, height, tile_size)
    else:
        image_ids = None if image_ids is None else image_ids.contiguous()
        found = backends.call(chosen, schema.FORWARD)(*arguments, image_ids, images, width, height, tile_size)
    return TileIntersections(found[0].reshape(lead), found[1], found[2], found[3].reshape(*image_shape, rows, columns))


def _check_integers(name: str, value: Tensor, dtype: torch.dtype, means2d: Tensor) -> None:
    checks.tensor(name, value)
    if value.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {value.dtype}")
    if value.device != means2d.device:
        raise ValueError(f"{name}: expected the device of means2d, {means2d.device}, got {value.device}")
