"""The public function of the projection: checks its input, chooses a backend, packs what is asked to be packed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.splatting.project_gaussians import autograd, reference, schema

_TRIANGLE = ((0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2))  # rows and columns of xx, xy, xz, yy, yz, zz


class ProjectedGaussians(NamedTuple):
    """What :func:`project_gaussians` returns for C cameras and N Gaussians; all 0 where a Gaussian is culled."""

    radii: Tensor  # (..., C, N, 2) int32, pixels: half the extent in x and y
    means2d: Tensor  # (..., C, N, 2) pixels
    depths: Tensor  # (..., C, N) z in the camera
    conics: Tensor  # (..., C, N, 3) inverse covariance on the image: xx, xy, yy
    compensations: Tensor  # (..., C, N) sqrt(det before the blur / det after it)


class PackedGaussians(NamedTuple):
    """What ``packed=True`` returns: those that are drawn, by batch, camera and Gaussian."""

    batch_ids: Tensor  # (nnz,) int64, into the batch dimensions taken as one
    camera_ids: Tensor  # (nnz,) int64
    gaussian_ids: Tensor  # (nnz,) int64
    radii: Tensor  # (nnz, 2) int32
    means2d: Tensor  # (nnz, 2)
    depths: Tensor  # (nnz,)
    conics: Tensor  # (nnz, 3)
    compensations: Tensor  # (nnz,)


def project_gaussians(
    means: Tensor,
    quats: Tensor | None,
    scales: Tensor | None,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    covars: Tensor | None = None,
    opacities: Tensor | None = None,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    camera_model: str = "pinhole",
    antialiased: bool = False,
    packed: bool = False,
    backend: str | None = None,
) -> ProjectedGaussians | PackedGaussians:
    """Projects 3D Gaussians onto the images of cameras, by a local affine approximation (EWA splatting).

    m = R mean + t in each camera; J the Jacobian of the projection at m, with x/z and y/z limited to the image and a
    margin of 0.3 tan(half the view); cov = J R Sigma R^T J^T + eps2d I; conic = cov^-1 (Zwicker et al. 2001, "EWA
    splatting"; Kerbl et al. 2023, "3D Gaussian splatting"; culling, clamp and extents as in gsplat 1.5.3). A Gaussian
    reaches ceil(k sqrt(cov_xx)) pixels to each side, with k = 3.33, or where its opacity falls to 1/255, if nearer.

    Culled, so that all outputs and gradients are 0: what is not between the planes, or not on the image, no larger than
    ``radius_clip``, of an opacity below 1/255, or not finite (a NaN leaks nowhere), and everything of a camera with a
    focal length of 0. Exact gradients to means, quats, scales, covars, viewmats and Ks (focal lengths and centre, also
    through the clamp), once differentiable, and the same bits in every run.

    Args:
        means: centres, (..., N, 3); float32 or float64.
        quats: rotations wxyz, (..., N, 4), of any length; zero counts as the identity. None with ``covars``.
        scales: standard deviations along the rotated axes, (..., N, 3). None with ``covars``.
        viewmats: world to camera, (..., C, 4, 4).
        Ks: intrinsics in pixels, (..., C, 3, 3); only fx, fy, cx and cy are read.
        width: of the images, in pixels.
        height: of the images, in pixels.
        covars: covariances in place of quats and scales: (..., N, 6) xx, xy, xz, yy, yz, zz, or (..., N, 3, 3), of
            which the upper triangle is read.
        opacities: (..., N), to shorten the extent of faint Gaussians; without gradient. Default: extent 3.33.
        near_plane: least depth that is drawn.
        far_plane: largest depth that is drawn.
        radius_clip: in pixels; Gaussians with both radii no larger are culled.
        eps2d: blur, in square pixels, added to the covariance on the image.
        camera_model: "pinhole" or "ortho" (u = fx x + cx).
        antialiased: opacities will be multiplied by the compensations, so choose extents accordingly.
        packed: return only what is drawn, as :class:`PackedGaussians` (its size depends on values: it waits for a GPU).
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        ProjectedGaussians (radii (..., C, N, 2) int32, means2d (..., C, N, 2), depths (..., C, N), conics
        (..., C, N, 3), compensations (..., C, N)), or PackedGaussians.

    Raises:
        TypeError: an argument is no tensor, is neither float32 nor float64, or differs in dtype.
        ValueError: shapes or devices do not match, a number is out of range, an unknown camera model.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.splatting.project_gaussians import project_gaussians
        >>> K = torch.tensor([[100.0, 0, 32], [0, 100, 24], [0, 0, 1]])
        >>> means = torch.tensor([[0.0, 0, 2], [0, 0, -2]])
        >>> quats, scales = torch.tensor([[1.0, 0, 0, 0]]).expand(2, 4), torch.full((2, 3), 0.1)
        >>> out = project_gaussians(means, quats, scales, torch.eye(4)[None], K[None], 64, 48)
        >>> out.means2d, out.radii
        (tensor([[[32., 24.],
                 [ 0.,  0.]]]), tensor([[[17, 17],
                 [ 0,  0]]], dtype=torch.int32))
    """
    lead, n, cameras = _check_tensors(means, quats, scales, covars, opacities, viewmats, Ks)
    settings = _check_settings(width, height, near_plane, far_plane, radius_clip, eps2d, camera_model, antialiased)
    chosen = backends.choose(schema.FORWARD, means.device.type, backend)
    if covars is not None and covars.shape[-2:] == (3, 3) and covars.dim() == means.dim() + 1:
        covars = covars[..., _TRIANGLE[0], _TRIANGLE[1]]
    batches = math.prod(lead)
    flat = (
        means.reshape(batches, n, 3),
        None if quats is None else quats.reshape(batches, n, 4),
        None if scales is None else scales.reshape(batches, n, 3),
        None if covars is None else covars.reshape(batches, n, 6),
        None if opacities is None else opacities.reshape(batches, n),
        viewmats.reshape(batches, cameras, 4, 4),
        Ks.reshape(batches, cameras, 3, 3),
    )
    if chosen == "reference":
        out = ProjectedGaussians(*reference.project_gaussians(*flat, *settings))
    else:
        out = ProjectedGaussians(*autograd.run(*flat, *settings, backend=chosen))
    if packed:
        return _pack(out)
    return ProjectedGaussians(*(x.reshape(*lead, *x.shape[1:]) for x in out))


def _pack(out: ProjectedGaussians) -> PackedGaussians:
    """The drawn ones of (B, C, N) alone."""
    cameras, count = out.depths.shape[1:]
    index = (out.radii > 0).any(-1).flatten().nonzero()[:, 0]
    image_ids = index // max(count, 1)
    return PackedGaussians(
        image_ids // max(cameras, 1),
        image_ids % max(cameras, 1),
        index % max(count, 1),
        *(x.flatten(0, 2).index_select(0, index) for x in out),
    )


def _check_tensors(means, quats, scales, covars, opacities, viewmats, Ks) -> tuple[torch.Size, int, int]:
    """Returns the batch dimensions, N and C."""
    checks.single_or_double("means", means)
    if means.dim() < 2 or means.shape[-1] != 3:
        raise ValueError(f"means: expected shape (..., N, 3), got {tuple(means.shape)}")
    lead, n = means.shape[:-2], means.shape[-2]
    if covars is None:
        if quats is None or scales is None:
            missing = "quats" if quats is None else "scales"
            raise ValueError(
                f"{missing}: expected a tensor, got None without covars (give quats and scales, or covars)"
            )
        for name, x, size in (("quats", quats, 4), ("scales", scales, 3)):
            checks.same_kind(name, x, "means", means)
            checks.shape(name, x, (*lead, n, size), "means give (..., N)")
    else:
        for name, x in (("quats", quats), ("scales", scales)):
            if x is not None:
                raise ValueError(f"{name}: expected None where covars are given, got a {type(x).__name__}")
        checks.same_kind("covars", covars, "means", means)
        if covars.shape not in ((*lead, n, 6), (*lead, n, 3, 3)):
            raise ValueError(
                f"covars: expected shape {(*lead, n, 6)} or {(*lead, n, 3, 3)} (means give (..., N)), "
                f"got {tuple(covars.shape)}"
            )
    if opacities is not None:
        checks.same_kind("opacities", opacities, "means", means)
        checks.shape("opacities", opacities, (*lead, n), "means give (..., N)")
    checks.same_kind("viewmats", viewmats, "means", means)
    if viewmats.dim() != len(lead) + 3 or viewmats.shape[:-3] != lead or viewmats.shape[-2:] != (4, 4):
        raise ValueError(
            f"viewmats: expected shape {(*lead, 'C', 4, 4)} (batch dimensions of means), got {tuple(viewmats.shape)}"
        )
    cameras = viewmats.shape[-3]
    checks.same_kind("Ks", Ks, "means", means)
    checks.shape("Ks", Ks, (*lead, cameras, 3, 3), "viewmats give (..., C)")
    return lead, n, cameras


def _check_settings(width, height, near_plane, far_plane, radius_clip, eps2d, camera_model, antialiased) -> tuple:
    """Returns the settings of the ops, in order."""
    for name, x in (("width", width), ("height", height)):
        if not isinstance(x, int) or isinstance(x, bool):
            raise TypeError(f"{name}: expected an integer, got {type(x).__name__}")
        if not 0 < x < 2**31:
            raise ValueError(f"{name}: expected a number of pixels in [1, 2^31), got {x}")
    numbers = {"near_plane": near_plane, "far_plane": far_plane, "radius_clip": radius_clip, "eps2d": eps2d}
    for name, x in numbers.items():
        if not isinstance(x, (int, float)):
            raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    if camera_model not in ("pinhole", "ortho"):
        known = "fisheye and ftheta are not supported yet; " if camera_model in ("fisheye", "ftheta") else ""
        raise ValueError(f"camera_model: {known}expected 'pinhole' or 'ortho', got {camera_model!r}")
    if not near_plane < far_plane or (camera_model == "pinhole" and near_plane < 0):
        least = "0 <= near_plane" if camera_model == "pinhole" else "near_plane"
        raise ValueError(f"near_plane: expected {least} < far_plane, got {near_plane} and {far_plane}")
    for name in ("radius_clip", "eps2d"):
        if not (numbers[name] >= 0 and math.isfinite(numbers[name])):
            raise ValueError(f"{name}: expected a finite number >= 0, got {numbers[name]}")
    return (
        width,
        height,
        float(near_plane),
        float(far_plane),
        float(radius_clip),
        float(eps2d),
        camera_model == "ortho",
        bool(antialiased),
    )
