"""Covariances of Gaussians from quaternions and scales, slowly; right in float64, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

TRIANGLE = ((0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2))  # rows and columns of xx, xy, xz, yy, yz, zz


def rotation(quats: Tensor) -> Tensor:
    """(..., 4) quaternions wxyz of any length to (..., 3, 3) rotations; a zero quaternion gives the identity."""
    zero = (quats == 0).all(-1, keepdim=True)
    safe = torch.where(zero, torch.ones_like(quats), quats)
    # divided by the largest component first: squares neither overflow nor vanish
    safe = safe / safe.detach().abs().amax(-1, keepdim=True)
    w, x, y, z = (safe / safe.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
    ]
    identity = torch.eye(3, dtype=quats.dtype, device=quats.device)
    return torch.where(zero[..., None], identity, torch.stack(rows, -2))


def quat_scale_to_covar(quats: Tensor, scales: Tensor, inverse: bool, triu: bool) -> Tensor:
    """R S S^T R^T, or R S^-1 S^-T R^T, (..., 3, 3), or its upper triangle (..., 6)."""
    stretched = rotation(quats) * (1 / scales if inverse else scales)[..., None, :]  # columns times scales
    covars = stretched @ stretched.mT
    return covars[..., TRIANGLE[0], TRIANGLE[1]] if triu else covars
