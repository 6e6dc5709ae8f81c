"""gsplat.utils: small functions."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mpkernels import checks
from mpkernels.splatting import ply

_SH_0 = 0.28209479177387814  # 1 / (2 sqrt(pi)), the spherical harmonic of degree 0


def save_ply(splats: Mapping[str, Tensor], dir: str | os.PathLike[str], colors: Tensor | None = None) -> None:
    """Writes a PLY file to ``dir``; with ``colors`` (N, 3) in the place of spherical harmonics."""
    names = ("means", "scales", "quats", "opacities")
    shape = (
        {name: splats[name] for name in ("sh0", "shN")} if colors is None else {"sh0": (colors[:, None] - 0.5) / _SH_0}
    )
    ply.save_ply(dir, **{name: splats[name] for name in names}, **shape)


def normalized_quat_to_rotmat(quat: Tensor) -> Tensor:
    """Rotations (..., 3, 3) of quaternions (..., 4) of length 1, wxyz."""
    checks.floating("quat", quat)
    if quat.shape[-1:] != (4,):
        raise ValueError(f"quat: expected shape (..., 4), got {tuple(quat.shape)}")
    axis = quat[..., 1:]
    # v -> v + 2 w (axis x v) + 2 axis x (axis x v), of the three unit vectors
    unit = torch.eye(3, dtype=quat.dtype, device=quat.device).expand(*quat.shape[:-1], 3, 3)
    cross = torch.linalg.cross(axis[..., None, :].expand_as(unit), unit)
    twice = torch.linalg.cross(axis[..., None, :].expand_as(unit), cross)
    return (unit + 2 * (quat[..., :1, None] * cross + twice)).mT


def log_transform(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|)."""
    return torch.sign(x) * torch.log1p(x.abs())


def inverse_log_transform(y: Tensor) -> Tensor:
    """The inverse of :func:`log_transform`."""
    return torch.sign(y) * torch.expm1(y.abs())


def depth_to_points(depths: Tensor, camtoworlds: Tensor, Ks: Tensor, z_depth: bool = True) -> Tensor:
    """Points in the world of depth maps.

    Args:
        depths: (..., H, W, 1), along the camera's z axis, or along rays.
        camtoworlds: (..., 4, 4).
        Ks: (..., 3, 3).
        z_depth: which of both depths are.

    Returns:
        (..., H, W, 3).
    """
    checks.floating("depths", depths)
    if depths.dim() < 3 or depths.shape[-1] != 1:
        raise ValueError(f"depths: expected shape (..., H, W, 1), got {tuple(depths.shape)}")
    maps, (height, width) = depths.shape[:-3], depths.shape[-3:-1]
    checks.shape("camtoworlds", camtoworlds, (*maps, 4, 4), "a matrix for each depth map")
    checks.shape("Ks", Ks, (*maps, 3, 3), "a matrix for each depth map")
    x = (torch.arange(width, dtype=depths.dtype, device=depths.device) + 0.5 - Ks[..., 0, 2, None]) / Ks[
        ..., 0, 0, None
    ]
    y = (torch.arange(height, dtype=depths.dtype, device=depths.device) + 0.5 - Ks[..., 1, 2, None]) / Ks[
        ..., 1, 1, None
    ]
    x, y = x[..., None, :].expand(depths.shape[:-1]), y[..., :, None].expand(depths.shape[:-1])
    rays = torch.stack([x, y, torch.ones_like(x)], dim=-1) @ camtoworlds[..., None, :3, :3].mT
    if not z_depth:
        rays = F.normalize(rays, dim=-1)
    return camtoworlds[..., None, None, :3, 3] + depths * rays


def depth_to_normal(depths: Tensor, camtoworlds: Tensor, Ks: Tensor, z_depth: bool = True) -> Tensor:
    """Normals (..., H, W, 3) of depth maps, in the world, by central differences; 0 on the border.

    Arguments as of :func:`depth_to_points`.
    """
    points = depth_to_points(depths, camtoworlds, Ks, z_depth)
    down = points[..., 2:, 1:-1, :] - points[..., :-2, 1:-1, :]
    right = points[..., 1:-1, 2:, :] - points[..., 1:-1, :-2, :]
    return F.pad(F.normalize(torch.linalg.cross(down, right), dim=-1), (0, 0, 1, 1, 1, 1))


def get_projection_matrix(
    znear: float, zfar: float, fovX: float, fovY: float, device: torch.device | str = "cuda"
) -> Tensor:
    """The (4, 4) projection of a view of fovX by fovY (radians) to x, y in [-1, 1] and z in [0, 1]."""
    depth = zfar / (zfar - znear)
    rows = [
        [1 / math.tan(fovX / 2), 0, 0, 0],
        [0, 1 / math.tan(fovY / 2), 0, 0],
        [0, 0, depth, -znear * depth],
        [0, 0, 1, 0],
    ]
    return torch.tensor(rows, dtype=torch.float32, device=device)
