"""The projection of Gaussians, slowly: plain torch, differentiable by autograd, right in float64.

Every Gaussian is projected by every camera. What is culled is found first, without a gradient; it is then replaced by a
point in front of the camera, so that nothing it holds reaches a result or a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mpkernels.splatting import constants
from mpkernels.splatting.quat_scale_to_covar.reference import rotation


class Settings(NamedTuple):
    """Everything but the tensors."""

    width: int
    height: int
    near_plane: float
    far_plane: float
    radius_clip: float
    eps2d: float
    ortho: bool
    antialiased: bool


def project_gaussians(
    means: Tensor,  # (B, N, 3)
    quats: Tensor | None,  # (B, N, 4)
    scales: Tensor | None,  # (B, N, 3)
    covars: Tensor | None,  # (B, N, 6)
    opacities: Tensor | None,  # (B, N)
    viewmats: Tensor,  # (B, C, 4, 4)
    Ks: Tensor,  # (B, C, 3, 3)
    *settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Radii (B, C, N, 2) int32, means2d (.., 2), depths, conics (.., 3), compensations (B, C, N)."""
    s = Settings(*settings)
    with torch.no_grad():
        sigma = _covariance(quats, scales, covars)[:, None]
        m = _to_camera(means[:, None], viewmats)
        means2d, cov0, cov, det = _project(m, sigma, viewmats, Ks, s)
        radii, drawn = _extent(m, means2d, cov0, cov, det, Ks, opacities, s)
        somewhere, used = drawn.any(1)[..., None], drawn.any(2)[..., None, None]
        identity = means.new_tensor([1.0, 0, 0, 0])
        ahead = means.new_tensor([0.0, 0, 1])
        eye = torch.eye(4, dtype=means.dtype, device=means.device)

    each = drawn[..., None]
    viewmats, Ks = torch.where(used, viewmats, eye), torch.where(used, Ks, eye[:3, :3])
    if quats is not None and scales is not None:
        quats, scales = torch.where(somewhere, quats, identity), torch.where(somewhere, scales, 1)
    sigma = _covariance(quats, scales, covars if covars is None else torch.where(somewhere, covars, 0))[:, None]
    sigma = torch.where(each[..., None], sigma, eye[:3, :3])
    m = torch.where(each, _to_camera(torch.where(each, means[:, None], 0), viewmats), ahead)
    means2d, cov0, cov, det = _project(m, sigma, viewmats, Ks, s)
    det = torch.where(drawn, det, 1)
    conics = torch.stack([cov[..., 1, 1], -cov[..., 0, 1], cov[..., 0, 0]], -1) / det[..., None]
    compensations = _compensation(cov0, det)
    return (
        torch.where(each, radii, 0).to(torch.int32),
        torch.where(each, means2d, 0),
        torch.where(drawn, m[..., 2], 0),
        torch.where(each, conics, 0),
        torch.where(drawn, compensations, 0),
    )


def _covariance(quats: Tensor | None, scales: Tensor | None, covars: Tensor | None) -> Tensor:
    """(B, N, 3, 3)."""
    if quats is None or scales is None:
        assert covars is not None
        return covars[..., (0, 1, 2, 1, 3, 4, 2, 4, 5)].unflatten(-1, (3, 3))
    stretched = rotation(quats) * scales[..., None, :]
    return stretched @ stretched.mT


def _to_camera(means: Tensor, viewmats: Tensor) -> Tensor:
    """(B, C, N, 3), from (B, 1 or C, N, 3)."""
    return means @ viewmats[..., :3, :3].mT + viewmats[..., None, :3, 3]


def _project(m: Tensor, sigma: Tensor, viewmats: Tensor, Ks: Tensor, s: Settings) -> tuple[Tensor, ...]:
    """means2d (B, C, N, 2), the covariance on the image before and after the blur (B, C, N, 2, 2), and its det."""
    world = viewmats[..., None, :3, :3]
    sigma = world @ sigma @ world.mT
    f = torch.stack([Ks[..., 0, 0], Ks[..., 1, 1]], -1)[..., None, :]  # (B, C, 1, 2)
    center = Ks[..., None, :2, 2]
    xy, z = m[..., :2], m[..., 2:]
    if s.ortho:
        jacobian = torch.diag_embed(f.expand_as(xy))
        jacobian = torch.cat([jacobian, torch.zeros_like(jacobian[..., :1])], -1)
        means2d = f * xy + center
    else:
        size = m.new_tensor([s.width, s.height])
        tan_fov = size / 2 / f
        low = -(center / f + constants.CLAMP_MARGIN * tan_fov)
        high = (size - center) / f + constants.CLAMP_MARGIN * tan_fov
        ratio = xy / z
        clamped = torch.where(ratio < low, low, ratio)
        clamped = torch.where(clamped > high, high, clamped)
        along = -f * (z * clamped) / z**2
        jacobian = torch.cat([torch.diag_embed(f / z), along[..., None]], -1)  # (B, C, N, 2, 3)
        means2d = f * xy / z + center
    cov0 = jacobian @ sigma @ jacobian.mT
    cov = cov0 + s.eps2d * torch.eye(2, dtype=m.dtype, device=m.device)
    return means2d, cov0, cov, _determinant(cov)


def _determinant(cov: Tensor) -> Tensor:
    return cov[..., 0, 0] * cov[..., 1, 1] - cov[..., 0, 1] * cov[..., 0, 1]


def _compensation(cov0: Tensor, det: Tensor) -> Tensor:
    det0 = _determinant(cov0)
    positive = det0 > 0
    return torch.where(positive, torch.where(positive, det0 / det, 1).sqrt(), 0)


def _extent(m, means2d, cov0, cov, det, Ks, opacities, s: Settings) -> tuple[Tensor, Tensor]:
    """Radii (B, C, N, 2), as real numbers, and what is drawn (B, C, N)."""
    depth = m[..., 2]
    drawn = (depth >= s.near_plane) & (depth <= s.far_plane) & depth.isfinite() & (det > 0)
    drawn &= ((Ks[..., 0, 0] != 0) & (Ks[..., 1, 1] != 0))[..., None]
    conics = torch.stack([cov[..., 1, 1], cov[..., 0, 1], cov[..., 0, 0]], -1) / det[..., None]
    for x in (means2d, cov.flatten(-2), conics):
        drawn &= x.isfinite().all(-1)
    k = torch.full_like(depth, constants.EXTENT)
    if opacities is not None:
        o = opacities[:, None].expand_as(depth)
        if s.antialiased:
            o = o * _compensation(cov0, det)
        drawn &= (o >= constants.ALPHA_MIN) & o.isfinite()
        k = torch.minimum(k, (2 * (255 * o).clamp(min=1).log()).sqrt())
    half = (cov[..., 0, 0] + cov[..., 1, 1]) / 2
    largest = half + (half * half - det).clamp(min=0.01).sqrt()
    diagonal = cov.diagonal(dim1=-2, dim2=-1)  # (B, C, N, 2)
    radii = torch.minimum(k[..., None] * diagonal.sqrt(), (k * largest.sqrt())[..., None]).ceil()
    drawn &= (radii > s.radius_clip).any(-1)
    drawn &= ((means2d + radii > 0) & (means2d - radii < m.new_tensor([s.width, s.height]))).all(-1)
    return radii.clamp(max=1e9), drawn
