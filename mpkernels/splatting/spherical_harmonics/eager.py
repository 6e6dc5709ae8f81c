"""Spherical harmonics as a user writes them in plain torch: closed forms, and one einsum."""

from __future__ import annotations

import torch
from torch import Tensor


def basis(degree: int, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The closed forms (..., K) of Sloan 2013, appendix A2, for unit directions."""
    found = [0.28209479177387814 + 0 * x]
    if degree >= 1:
        found += [-0.48860251190291992 * y, 0.48860251190291992 * z, -0.48860251190291992 * x]
    if degree >= 2:
        found += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (2 * z * z - x * x - y * y),
            -1.0925484305920792 * x * z,
            0.54627421529603959 * (x * x - y * y),
        ]
    if degree >= 3:
        found += [
            -0.59004358992664352 * y * (3 * x * x - y * y),
            2.8906114426405538 * x * y * z,
            -0.45704579946446577 * y * (4 * z * z - x * x - y * y),
            0.37317633259011546 * z * (2 * z * z - 3 * x * x - 3 * y * y),
            -0.45704579946446577 * x * (4 * z * z - x * x - y * y),
            1.4453057213202769 * z * (x * x - y * y),
            -0.59004358992664352 * x * (x * x - 3 * y * y),
        ]
    if degree >= 4:
        found += [
            2.5033429417967046 * x * y * (x * x - y * y),
            -1.7701307697799304 * y * z * (3 * x * x - y * y),
            0.94617469575756008 * x * y * (7 * z * z - 1),
            -0.66904654355728921 * y * z * (7 * z * z - 3),
            0.10578554691520431 * (z * z * (35 * z * z - 30) + 3),
            -0.66904654355728921 * x * z * (7 * z * z - 3),
            0.47308734787878004 * (x * x - y * y) * (7 * z * z - 1),
            -1.7701307697799304 * x * z * (x * x - 3 * y * y),
            0.62583573544917614 * (x * x * (x * x - 3 * y * y) - y * y * (3 * x * x - y * y)),
        ]
    return torch.stack(found, -1)


def spherical_harmonics(degree: int, dirs: Tensor, coeffs: Tensor, masks: Tensor | None = None) -> Tensor:
    """The op, for directions that are finite and not zero."""
    found = basis(degree, *torch.nn.functional.normalize(dirs, dim=-1).unbind(-1))
    colors = torch.einsum("...k,...kc->...c", found, coeffs[..., : found.shape[-1], :])
    return colors if masks is None else torch.where(masks[..., None], colors, 0)
