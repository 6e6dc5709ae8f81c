"""Opacity and scale of a Gaussian that takes the place of several: eq. 9 of "3D Gaussian Splatting as MCMC"."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpkernels import checks

MAX_RATIO = 51


def binomials(size: int = MAX_RATIO) -> Tensor:
    """The table of binomial coefficients, [n, k] -> n over k: (size, size) float64."""
    return torch.tensor([[math.comb(n, k) for k in range(size)] for n in range(size)], dtype=torch.float64)


@torch.no_grad()
def compute_relocation(opacities: Tensor, scales: Tensor, ratios: Tensor, binoms: Tensor) -> tuple[Tensor, Tensor]:
    """Opacities and scales with which n Gaussians at one place look like the one that was there.

    new = 1 - (1 - opacity)^(1/n); new_scale = scale * opacity / d, with
    d = sum_{i=1..n} sum_{k=0..i-1} (i-1 over k) (-1)^k new^(k+1) / sqrt(k+1)
    (Kheradmand et al. 2024, "3D Gaussian Splatting as Markov Chain Monte Carlo", eq. 9). The sum over i is taken
    first, and the terms, which cancel, are added in float64.

    Args:
        opacities: (N,) in [0, 1]; float32 or float64.
        scales: (N, 3) standard deviations, not logarithms.
        ratios: (N,) integers, how many Gaussians there will be; cut to [1, n_max], and left as it is.
        binoms: (n_max, n_max), [n, k] -> n over k (the "binoms" of :meth:`MCMCStrategy.initialize_state`).

    Returns:
        The new opacities (N,) and scales (N, 3). An opacity of 0 stays, with its scale; one of 1 counts as the
        largest number of float64 below.

    Raises:
        TypeError, ValueError: a wrong dtype or shape.

    Example:
        >>> import torch
        >>> from mpkernels.splatting.strategies.relocation import binomials, compute_relocation
        >>> opacities, scales = compute_relocation(
        ...     torch.tensor([0.75]), torch.ones(1, 3), torch.tensor([2]), binomials())
        >>> opacities
        tensor([0.5000])
    """
    checks.floating("opacities", opacities)
    if opacities.dim() != 1:
        raise ValueError(f"opacities: expected shape (N,), got {tuple(opacities.shape)}")
    checks.same_kind("scales", scales, "opacities", opacities)
    checks.shape("scales", scales, (len(opacities), 3), "the rows of opacities, and three axes")
    checks.tensor("ratios", ratios)
    checks.shape("ratios", ratios, opacities.shape, "that of opacities")
    checks.tensor("binoms", binoms)
    if binoms.dim() != 2 or binoms.shape[0] != binoms.shape[1] or len(binoms) == 0:
        raise ValueError(f"binoms: expected shape (n_max, n_max), got {tuple(binoms.shape)}")

    n_max = len(binoms)
    n = ratios.to(torch.int64).clamp(1, n_max)
    old = opacities.double().clamp(max=1 - torch.finfo(torch.float64).eps)  # at 1 the sum would cancel to nothing
    new = -torch.expm1(torch.log1p(-old) / n)
    k = torch.arange(n_max, dtype=torch.float64, device=opacities.device)
    signs = 1 - 2 * (k % 2)
    # the sum over i of (i-1 over k), for each n
    weights = binoms.to(opacities.device, torch.float64).cumsum(0) * signs / (k + 1).sqrt()  # (n_max, n_max)
    denominator = torch.zeros_like(new)
    for column in weights.T.flip(0):  # Horner's scheme, the highest power first
        denominator = (denominator + column[n - 1]) * new
    factor = torch.where(old > 0, old / denominator, 1.0)
    return new.to(opacities.dtype), (scales * factor[:, None]).to(scales.dtype)
