"""The public function of spherical harmonics: checks its input and chooses a backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.splatting.spherical_harmonics import autograd, reference, schema

DEGREE_MAX = 4
_FEW_GAUSSIANS, _MANY_CAMERAS = 256, 256  # kernels work side by side on Gaussians, one after another on cameras


def spherical_harmonics(
    degree: int, dirs: Tensor, coeffs: Tensor, *, masks: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Colours of Gaussians seen from directions: real spherical harmonics with coefficients for three channels.

    color = sum_{l <= degree} sum_{|m| <= l} Y_l^m(dir / |dir|) coeffs_{l^2 + l + m}, with the signs of 3DGS (Kerbl et
    al. 2023) and gsplat: those of Sloan 2013, "Efficient spherical harmonic evaluation" (Y_1 = 0.4886 (-y, z, -x)).
    Nothing is added and nothing is clamped (3DGS shows max(0, color + 0.5)).

    Gradients to ``dirs`` and ``coeffs`` are exact, of first order, and have the same bits in every run. A direction
    that is zero or not finite keeps the term of degree 0 alone, and has gradient 0. Where ``masks`` is False the
    colour and all gradients are 0, whatever the Gaussian holds.

    Args:
        degree: 0 to 4.
        dirs: (..., 3) from the camera to the Gaussian, of any length; float32 or float64.
        coeffs: (..., K, 3) with K >= (degree + 1)^2; later coefficients are not read, and have gradient 0. Its leading
            dimensions broadcast to those of ``dirs``: dirs (C, N, 3) and coeffs (N, K, 3) are C cameras that see the
            same Gaussians, and gradients to the coefficients are summed over the cameras inside the kernel.
        masks: bool, of the shape of ``dirs`` without its last dimension: which colours are wanted. Default: all.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        Colours with the shape and dtype of ``dirs``.

    Raises:
        TypeError: an argument is no tensor, or has another dtype; ``degree`` is no integer.
        ValueError: ``degree`` is not in [0, 4], or shapes or devices do not match.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.splatting.spherical_harmonics import spherical_harmonics
        >>> dirs, coeffs = torch.randn(2, 100, 3), torch.randn(100, 16, 3)
        >>> spherical_harmonics(3, dirs, coeffs).shape
        torch.Size([2, 100, 3])
    """
    if not isinstance(degree, int) or isinstance(degree, bool):
        raise TypeError(f"degree: expected an integer in [0, {DEGREE_MAX}], got {type(degree).__name__}")
    if not 0 <= degree <= DEGREE_MAX:
        raise ValueError(f"degree: expected an integer in [0, {DEGREE_MAX}], got {degree}")
    checks.single_or_double("dirs", dirs)
    if dirs.dim() == 0 or dirs.shape[-1] != 3:
        raise ValueError(f"dirs: expected shape (..., 3), got {tuple(dirs.shape)}")
    checks.same_kind("coeffs", coeffs, "dirs", dirs)
    needed = (degree + 1) ** 2
    if coeffs.dim() < 2 or coeffs.shape[-1] != 3 or coeffs.shape[-2] < needed:
        raise ValueError(
            f"coeffs: expected shape (..., K, 3) with K >= {needed} for degree {degree}, got {tuple(coeffs.shape)}"
        )
    lead = dirs.shape[:-1]
    held = (1,) * (len(lead) - coeffs.dim() + 2) + tuple(coeffs.shape[:-2])
    if len(held) != len(lead) or any(h not in (1, d) for h, d in zip(held, lead, strict=True)):
        raise ValueError(
            f"coeffs: expected leading dimensions that broadcast to {tuple(lead)} (those of dirs), "
            f"got {tuple(coeffs.shape[:-2])}"
        )
    if masks is not None:
        checks.tensor("masks", masks)
        if masks.dtype != torch.bool:
            raise TypeError(f"masks: expected bool, got {masks.dtype}")
        if masks.device != dirs.device:
            raise ValueError(f"masks: expected the device of dirs, {dirs.device}, got {masks.device}")
        checks.shape("masks", masks, lead, "that of dirs without its last dimension")

    chosen = backends.choose(schema.FORWARD, dirs.device.type, backend)
    if chosen == "reference":
        return reference.spherical_harmonics(degree, dirs, coeffs, masks)
    batches, cameras, gaussians = _split(lead, held)
    if batches < 0:
        coeffs = coeffs.expand(*lead, *coeffs.shape[-2:])
        batches, cameras, gaussians = 1, 1, math.prod(lead)
    colors = autograd.run(
        degree,
        dirs.reshape(batches, cameras, gaussians, 3),
        coeffs.reshape(batches, gaussians, *coeffs.shape[-2:]),
        None if masks is None else masks.reshape(batches, cameras, gaussians),
        backend=chosen,
    )
    return colors.reshape(dirs.shape)


def _split(lead: torch.Size, held: tuple[int, ...]) -> tuple[int, int, int]:
    """``lead`` as (batches, cameras, Gaussians), where only cameras share coefficients; -1 where that cannot be."""
    shared = [i for i, (h, d) in enumerate(zip(held, lead, strict=True)) if h != d]
    if not shared:
        return 1, 1, math.prod(lead)
    first, behind = shared[0], shared[-1] + 1
    cameras, gaussians = math.prod(lead[first:behind]), math.prod(lead[behind:])
    together = all(h == 1 for h in held[first:behind])
    if not together or (gaussians < _FEW_GAUSSIANS and cameras > _MANY_CAMERAS):
        return -1, -1, -1
    return math.prod(lead[:first]), cameras, gaussians
