"""Covariances as one writes them in vectorised torch: what the kernels are timed against, and a second opinion."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def quat_scale_to_covar(quats: Tensor, scales: Tensor, inverse: bool = False, triu: bool = False) -> tuple[Tensor]:
    """The arguments of the public function; R by turning the unit vectors, e + 2 w (v x e) + 2 v x (v x e)."""
    w, v = functional.normalize(quats, dim=-1).split([1, 3], -1)
    eye = torch.eye(3, dtype=quats.dtype, device=quats.device).expand(*v.shape[:-1], 3, 3)
    v = v[..., None, :].expand_as(eye)
    along = torch.linalg.cross(v, eye)
    turned = eye + 2 * (w[..., None] * along + torch.linalg.cross(v, along))  # columns of R, as rows
    squares = scales**-2 if inverse else scales**2
    covars = torch.einsum("...ki,...k,...kj->...ij", turned, squares, turned)
    if triu:
        covars = torch.stack([covars[..., i, j] for i in range(3) for j in range(i, 3)], -1)
    return (covars,)
