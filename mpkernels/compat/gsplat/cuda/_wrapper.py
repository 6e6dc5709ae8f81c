"""gsplat.cuda._wrapper: the pieces of the rasterizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from mpkernels import checks
from mpkernels.compat.gsplat.unsupported import check_camera_model, check_unused, unsupported
from mpkernels.splatting.constants import CLAMP_MARGIN

fully_fused_projection_2dgs = unsupported("fully_fused_projection_2dgs", "projection of 2D Gaussians")
fully_fused_projection_with_ut = unsupported("fully_fused_projection_with_ut", "the unscented transform (3DGUT)")
rasterize_to_indices_in_range = unsupported("rasterize_to_indices_in_range", "rasterization to indices")
rasterize_to_indices_in_range_2dgs = unsupported("rasterize_to_indices_in_range_2dgs", "rasterization to indices")
rasterize_to_pixels_2dgs = unsupported("rasterize_to_pixels_2dgs", "rendering of 2D Gaussians")
rasterize_to_pixels_eval3d = unsupported("rasterize_to_pixels_eval3d", "evaluation in 3D (3DGUT)")


class RollingShutterType(Enum):
    """How a camera reads its sensor; only GLOBAL is supported."""

    ROLLING_TOP_TO_BOTTOM = 0
    ROLLING_LEFT_TO_RIGHT = 1
    ROLLING_BOTTOM_TO_TOP = 2
    ROLLING_RIGHT_TO_LEFT = 3
    GLOBAL = 4


class FThetaPolynomialType(Enum):
    """Part of a lens distortion, which is not supported."""

    PIXELDIST_TO_ANGLE = 0
    ANGLE_TO_PIXELDIST = 1


@dataclass
class FThetaCameraDistortionParameters:
    """A lens distortion, which is not supported."""

    reference_poly: FThetaPolynomialType
    pixeldist_to_angle_poly: tuple[float, float, float, float, float, float]
    angle_to_pixeldist_poly: tuple[float, float, float, float, float, float]
    max_angle: float
    linear_cde: tuple[float, float, float]


@dataclass
class UnscentedTransformParameters:
    """Settings of the unscented transform, which is not supported."""

    alpha: float = 0.1
    beta: float = 2.0
    kappa: float = 0.0
    in_image_margin_factor: float = 0.1
    require_all_sigma_points_valid: bool = True


def world_to_cam(means: Tensor, covars: Tensor, viewmats: Tensor) -> tuple[Tensor, Tensor]:
    """Gaussians in the axes of cameras: R m + t and R C R^T.

    Args:
        means: (..., N, 3).
        covars: (..., N, 3, 3).
        viewmats: world to camera, (..., C, 4, 4).

    Returns:
        Means (..., C, N, 3) and covariances (..., C, N, 3, 3).
    """
    checks.floating("means", means)
    batch, n = means.shape[:-2], means.shape[-2]
    checks.shape("means", means, (*batch, n, 3), "(..., N, 3)")
    checks.shape("covars", covars, (*batch, n, 3, 3), "a matrix for each mean")
    checks.shape("viewmats", viewmats, (*batch, viewmats.shape[-3], 4, 4), "(..., C, 4, 4)")
    rotation, translation = viewmats[..., None, :3, :3], viewmats[..., None, :3, 3]
    of_means = (rotation @ means[..., None, :, :, None])[..., 0] + translation
    return of_means, rotation @ covars[..., None, :, :, :] @ rotation.mT


def proj(
    means: Tensor,
    covars: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    camera_model: Literal["pinhole", "ortho", "fisheye", "ftheta"] = "pinhole",
) -> tuple[Tensor, Tensor]:
    """Gaussians in the axes of cameras, on their images: the covariance becomes J C J^T (Zwicker et al. 2002, EWA).

    J is the Jacobian of the projection at the mean; for a pinhole, at a mean that is cut to 0.3 tan(half the view)
    outside of the image.

    Args:
        means: (..., C, N, 3).
        covars: (..., C, N, 3, 3).
        Ks: (..., C, 3, 3).
        width: of the image, in pixels.
        height: of the image, in pixels.
        camera_model: "pinhole" or "ortho".

    Returns:
        Means (..., C, N, 2) and covariances (..., C, N, 2, 2).
    """
    check_camera_model(camera_model)
    checks.floating("means", means)
    cameras = means.shape[:-2]
    checks.shape("means", means, (*cameras, means.shape[-2], 3), "(..., C, N, 3)")
    checks.shape("covars", covars, (*means.shape[:-1], 3, 3), "a matrix for each mean")
    checks.shape("Ks", Ks, (*cameras, 3, 3), "a matrix for each camera")
    focal = torch.stack([Ks[..., 0, 0], Ks[..., 1, 1]], -1)[..., None, :]  # (..., C, 1, 2)
    centre = Ks[..., None, :2, 2]  # (..., C, 1, 2)
    if camera_model == "ortho":
        jacobian = torch.nn.functional.pad(torch.diag_embed(focal), (0, 1))  # (..., C, 1, 2, 3)
        return means[..., :2] * focal + centre, jacobian @ covars @ jacobian.mT
    z = means[..., 2:]
    size = torch.tensor([width, height], dtype=means.dtype, device=means.device)
    margin = CLAMP_MARGIN * size / (2 * focal)
    slopes = torch.minimum(
        torch.maximum(means[..., :2] / z, -centre / focal - margin), (size - centre) / focal + margin
    )
    diagonal = torch.diag_embed((focal / z).expand(slopes.shape))
    jacobian = torch.cat([diagonal, (-focal * slopes / z)[..., None]], dim=-1)  # (..., C, N, 2, 3)
    return focal * means[..., :2] / z + centre, jacobian @ covars @ jacobian.mT


def persp_proj(means: Tensor, covars: Tensor, Ks: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """:func:`proj` of a pinhole camera."""
    return proj(means, covars, Ks, width, height)


@torch.no_grad()
def adam(
    param: Tensor,
    param_grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    valid: Tensor | None,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
) -> None:
    """A step of Adam in place, without bias correction, in the rows (N,) that are ``valid`` (None: all)."""
    rows = slice(None)
    if valid is not None:
        if valid.shape != param.shape[:1]:
            raise ValueError(
                f"valid: expected shape {tuple(param.shape[:1])} (the rows of param), got {tuple(valid.shape)}"
            )
        rows = valid.to(param.device).nonzero()[:, 0]
    gradient = param_grad[rows]
    first = exp_avg[rows].lerp(gradient, 1 - b1)
    second = b2 * exp_avg_sq[rows] + (1 - b2) * gradient * gradient
    param[rows] -= lr * first / (second.sqrt() + eps)
    exp_avg[rows] = first
    exp_avg_sq[rows] = second


def spherical_harmonics(degrees_to_use: int, dirs: Tensor, coeffs: Tensor, masks: Tensor | None = None) -> Tensor:
    """Colours (..., 3) of coefficients (..., K, 3) along directions (..., 3), and 0 outside of ``masks`` (...) bool."""
    from mpkernels import splatting

    return splatting.spherical_harmonics(degrees_to_use, dirs, coeffs, masks=masks)


def quat_scale_to_covar_preci(
    quats: Tensor,
    scales: Tensor,
    compute_covar: bool = True,
    compute_preci: bool = True,
    triu: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Covariances and their inverses, (..., 3, 3) or (..., 6), of quats (..., 4) wxyz and scales (..., 3)."""
    from mpkernels import splatting

    covars = splatting.quat_scale_to_covar(quats, scales, triu=triu) if compute_covar else None
    precis = splatting.quat_scale_to_covar(quats, scales, inverse=True, triu=triu) if compute_preci else None
    return covars, precis


def fully_fused_projection(
    means: Tensor,
    covars: Tensor | None,
    quats: Tensor | None,
    scales: Tensor | None,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    eps2d: float = 0.3,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    packed: bool = False,
    sparse_grad: bool = False,
    calc_compensations: bool = False,
    camera_model: Literal["pinhole", "ortho", "fisheye", "ftheta"] = "pinhole",
    opacities: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Projects Gaussians: :func:`mpkernels.splatting.project_gaussians`.

    Returns:
        radii, means2d, depths, conics, compensations, each (..., C, N, ...); with ``packed``, behind batch_ids,
        camera_ids and gaussian_ids, each (nnz, ...). Without ``calc_compensations`` they are None.

    Raises:
        NotImplementedError: ``sparse_grad``, or a camera model that is not supported.
        TypeError, ValueError: as :func:`mpkernels.splatting.project_gaussians`.
    """
    from mpkernels import splatting

    check_camera_model(camera_model)
    check_unused("a sparse gradient", sparse_grad=sparse_grad)
    if covars is not None:
        quats = scales = None  # gsplat takes covars where both are given
    *outputs, compensations = splatting.project_gaussians(
        means,
        quats,
        scales,
        viewmats,
        Ks,
        width,
        height,
        covars=covars,
        opacities=opacities,
        near_plane=near_plane,
        far_plane=far_plane,
        radius_clip=radius_clip,
        eps2d=eps2d,
        camera_model=camera_model,
        antialiased=calc_compensations,
        packed=packed,
    )
    return (*outputs, compensations if calc_compensations else None)


@torch.no_grad()
def isect_tiles(
    means2d: Tensor,
    radii: Tensor,
    depths: Tensor,
    tile_size: int,
    tile_width: int,
    tile_height: int,
    sort: bool = True,
    segmented: bool = False,
    packed: bool = False,
    n_images: int | None = None,
    image_ids: Tensor | None = None,
    gaussian_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tiles that Gaussians' boxes meet: :func:`mpkernels.splatting.intersect_tiles`.

    Returns:
        Tiles of each Gaussian (..., N) or (nnz,) int32; keys (n,) int64, image | tile | depth; and (n,) int32, the
        Gaussian of each, of all I * N or nnz. By key, or with ``sort=False`` Gaussian by Gaussian.

    Raises:
        ValueError: ``packed`` without image_ids or n_images, or as :func:`mpkernels.splatting.intersect_tiles`.
    """
    from mpkernels import splatting

    if packed and (image_ids is None or n_images is None):
        raise ValueError("image_ids, n_images: both are needed with packed=True")
    images = {"image_ids": image_ids, "n_images": n_images} if packed else {}
    found = splatting.intersect_tiles(
        means2d, radii, depths, tile_width * tile_size, tile_height * tile_size, tile_size=tile_size, **images
    )
    tiles_per_gauss, isect_ids, flatten_ids = found[:3]
    if not sort:
        order = torch.argsort(flatten_ids, stable=True)
        isect_ids, flatten_ids = isect_ids[order], flatten_ids[order]
    return tiles_per_gauss, isect_ids, flatten_ids


@torch.no_grad()
def isect_offset_encode(isect_ids: Tensor, n_images: int, tile_width: int, tile_height: int) -> Tensor:
    """Where each tile's part of sorted keys (n,) begins: (n_images, tile_height, tile_width) int64."""
    checks.tensor("isect_ids", isect_ids)
    if isect_ids.dtype != torch.int64 or isect_ids.dim() != 1:
        raise TypeError(f"isect_ids: expected (n,) int64, got {tuple(isect_ids.shape)} {isect_ids.dtype}")
    tiles = tile_width * tile_height
    bits = tiles.bit_length()  # of the tile in a key
    keys = isect_ids >> 32
    place = (keys >> bits) * tiles + (keys & ((1 << bits) - 1))
    starts = torch.searchsorted(place, torch.arange(n_images * tiles, device=place.device))
    return starts.reshape(n_images, tile_height, tile_width)


def rasterize_to_pixels(
    means2d: Tensor,
    conics: Tensor,
    colors: Tensor,
    opacities: Tensor,
    image_width: int,
    image_height: int,
    tile_size: int,
    isect_offsets: Tensor,
    flatten_ids: Tensor,
    backgrounds: Tensor | None = None,
    masks: Tensor | None = None,
    packed: bool = False,
    absgrad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Composites Gaussians to pixels: :func:`mpkernels.splatting.rasterize`.

    Returns:
        Colours (..., image_height, image_width, D) and opacities (..., image_height, image_width, 1).

    Raises:
        ValueError: ``packed`` with tensors that are not, or as :func:`mpkernels.splatting.rasterize`.
    """
    from mpkernels import splatting

    if packed and means2d.dim() != 2:
        raise ValueError(f"means2d: expected shape (nnz, 2) with packed=True, got {tuple(means2d.shape)}")
    tile_height, tile_width = isect_offsets.shape[-2:]
    needed = (math.ceil(image_height / tile_size), math.ceil(image_width / tile_size))
    if tile_height < needed[0] or tile_width < needed[1]:
        raise ValueError(
            f"isect_offsets: expected at least {needed} tiles of {tile_size} pixels for an image of "
            f"{image_width} x {image_height}, got {(tile_height, tile_width)}"
        )
    colors, alphas = splatting.rasterize(
        means2d,
        conics,
        colors,
        opacities,
        image_width,
        image_height,
        isect_offsets.to(torch.int64),
        flatten_ids,
        tile_size=tile_size,
        backgrounds=backgrounds,
        masks=masks,
        absgrad=absgrad,
    )
    return colors, alphas
