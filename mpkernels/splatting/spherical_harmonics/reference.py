"""Spherical harmonics, slowly: associated Legendre functions by their recurrences, one term at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def basis(degree: int, x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    """The (degree + 1)^2 real harmonics of unit directions, in the order l = 0, 1, ... and m = -l, ..., l.

    Y_l^m = sqrt(2) K_l^m cos(m phi) P_l^m(cos theta) for m > 0, the same with |m| and sin for m < 0, K_l^0 P_l^0 for
    m = 0; K_l^m = sqrt((2 l + 1) / (4 pi) (l - m)! / (l + m)!); P with the factor (-1)^m of Condon and Shortley
    (Sloan 2013, "Efficient spherical harmonic evaluation", section 2; 3DGS uses its signs).
    """
    # sin^m(theta) cos(m phi) and sin^m(theta) sin(m phi): powers of x + i y, smooth at the poles
    cosines, sines = [torch.ones_like(x)], [torch.zeros_like(x)]
    for _ in range(degree):
        cosines.append(x * cosines[-1] - y * sines[-1])
        sines.append(y * cosines[-2] + x * sines[-1])

    found: dict[tuple[int, int], Tensor] = {}
    for m in range(degree + 1):
        # P_l^m / sin^m(theta)
        legendre = {m: (-1.0) ** m * math.prod(range(1, 2 * m, 2)) + 0 * z}
        if m < degree:
            legendre[m + 1] = (2 * m + 1) * z * legendre[m]
        for l in range(m + 2, degree + 1):  # noqa: E741
            legendre[l] = ((2 * l - 1) * z * legendre[l - 1] - (l + m - 1) * legendre[l - 2]) / (l - m)
        for l, p in legendre.items():  # noqa: E741
            k = math.sqrt((2 * l + 1) / (4 * math.pi) * math.factorial(l - m) / math.factorial(l + m))
            if m == 0:
                found[l, 0] = k * p
            else:
                found[l, m] = math.sqrt(2) * k * cosines[m] * p
                found[l, -m] = math.sqrt(2) * k * sines[m] * p
    return [found[l, m] for l in range(degree + 1) for m in range(-l, l + 1)]  # noqa: E741


def spherical_harmonics(degree: int, dirs: Tensor, coeffs: Tensor, masks: Tensor | None) -> Tensor:
    """sum_k Y_k(dirs / |dirs|) coeffs_k, with coeffs (..., K, 3) broadcast over the leading dimensions of dirs."""
    if masks is not None:
        dirs = torch.where(masks[..., None], dirs, 0)
        coeffs = torch.where(masks[..., None, None], coeffs, 0)
    # a direction without a direction: only the constant term
    usable = (torch.isfinite(dirs).all(-1) & (dirs != 0).any(-1))[..., None]
    dirs = torch.where(usable, dirs, 1)
    scaled = dirs / dirs.detach().abs().amax(-1, keepdim=True)  # no square overflows or vanishes
    x, y, z = (scaled / scaled.square().sum(-1, keepdim=True).sqrt()).unbind(-1)

    constant, *others = basis(degree, x, y, z)
    colors = constant[..., None] * coeffs[..., 0, :]
    for k, value in enumerate(others, start=1):
        colors = colors + torch.where(usable, value[..., None] * coeffs[..., k, :], 0)
    return colors
