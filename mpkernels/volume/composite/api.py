"""The public functions of volume compositing: they check their input and choose a backend."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from mpkernels import backends, checks
from mpkernels.volume import packing
from mpkernels.volume.composite import autograd, reference, schema


class CompositeOutput(NamedTuple):
    """What :func:`composite` returns, for rays of shape (...) with S samples and C channels."""

    values: Tensor  # (..., C) composited values, background included
    opacity: Tensor  # (...) sum of the weights: 1 - transmittance behind the last sample
    depth: Tensor  # (...) sum of weight times interval midpoint, in the units of t
    weights: Tensor  # (..., S), packed: (N,)


def composite(
    sigmas: Tensor,
    values: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    *,
    packed_info: Tensor | None = None,
    background: Tensor | None = None,
    early_stop_eps: float = 0.0,
    backend: str | None = None,
) -> CompositeOutput:
    """Composites density samples along rays: emission-absorption volume rendering.

    alpha_i = 1 - exp(-sigma_i (t_end_i - t_start_i)), T_i = prod_{j<i} (1 - alpha_j), w_i = T_i alpha_i;
    values = sum_i w_i c_i + (1 - sum_i w_i) background, depth = sum_i w_i (t_start_i + t_end_i) / 2
    (Max 1995, "Optical models for direct volume rendering"; NeRF, Mildenhall et al. 2020, eq. 3).

    All four outputs have exact gradients to sigmas, values, t_starts, t_ends and background, of any order, right at
    alpha = 1 and at sigma = 0 (no division), and the same bits in every run. An infinite sigma counts as the
    largest finite number of the type it is computed in.

    Args:
        sigmas: densities, 1 / unit of t. Dense rays: (..., S), samples from near to far. Packed rays: (N,).
            float32, float64, bfloat16 or float16 (accumulated in float32).
        values: colours or features, (..., S, C) or packed (N, C), C >= 1.
        t_starts: where each interval starts along the ray, the shape of ``sigmas``. May be expanded over rays.
        t_ends: where it ends, the shape of ``sigmas``.
        packed_info: (R, 2) int64, [start, count] of each ray's samples in the packed tensors. Rays may be empty and
            in any order, must not overlap; samples in no ray get weight 0. Values are checked once per tensor.
        background: seen behind the rays: (C,) or (..., C), packed (R, C). Default: nothing (zeros).
        early_stop_eps: a ray stops in front of the first sample whose transmittance T_i is below this; samples behind
            get weight 0 and gradient 0, whatever they hold. In [0, 1); 0 never stops.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        CompositeOutput (values (..., C), opacity (...), depth (...), weights (..., S)); packed: (R, C), (R,), (R,),
        (N,). The dtype is that of the input.

    Raises:
        TypeError: an argument is no tensor, has an integer or a different dtype.
        ValueError: shapes or devices do not match, ``packed_info`` runs past the end or overlaps.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch, mpkernels
        >>> t = torch.linspace(0, 1, 65).expand(100, 65)
        >>> out = mpkernels.composite(torch.rand(100, 64), torch.rand(100, 64, 3), t[:, :-1], t[:, 1:])
        >>> out.values.shape, out.weights.shape
        (torch.Size([100, 3]), torch.Size([100, 64]))
    """
    checks.floating("sigmas", sigmas)
    checks.same_kind("t_ends", t_ends, "sigmas", sigmas)
    checks.shape("t_ends", t_ends, sigmas.shape, "that of sigmas")
    return _composite(
        "sigmas", sigmas, values, "t_starts", t_starts, t_ends, packed_info, background, early_stop_eps, backend
    )


def composite_from_alphas(
    alphas: Tensor,
    values: Tensor,
    ts: Tensor,
    *,
    packed_info: Tensor | None = None,
    background: Tensor | None = None,
    early_stop_eps: float = 0.0,
    backend: str | None = None,
) -> CompositeOutput:
    """Composites samples of given opacity along rays: "over", front to back (Porter and Duff 1984).

    As :func:`composite`, for models that give alpha_i instead of a density: T_i = prod_{j<i} (1 - alpha_j),
    w_i = T_i alpha_i, values = sum_i w_i c_i + (1 - sum_i w_i) background, depth = sum_i w_i t_i. The gradient to
    alphas is exact at alpha = 0 and alpha = 1.

    Args:
        alphas: opacities, usually in [0, 1] (not checked): (..., S), or packed (N,).
        values: (..., S, C), or packed (N, C).
        ts: where each sample lies along the ray, the shape of ``alphas``.
        packed_info: as in :func:`composite`.
        background: as in :func:`composite`.
        early_stop_eps: as in :func:`composite`.
        backend: as in :func:`composite`.

    Returns:
        CompositeOutput, as :func:`composite`.

    Raises:
        TypeError, ValueError, mpkernels.BackendError: as :func:`composite`.

    Example:
        >>> import torch, mpkernels
        >>> out = mpkernels.composite_from_alphas(torch.full((2, 3), 0.5), torch.ones(2, 3, 1), torch.ones(2, 3))
        >>> out.weights[0]
        tensor([0.5000, 0.2500, 0.1250])
    """
    checks.floating("alphas", alphas)
    return _composite("alphas", alphas, values, "ts", ts, None, packed_info, background, early_stop_eps, backend)


def _composite(name, densities, values, t_name, t_starts, t_ends, packed_info, background, early_stop_eps, backend):
    """Checks what both functions share, then runs on (R, S) dense or (N,) packed rays."""
    lead = densities.shape[:-1]
    if densities.dim() == 0 or (packed_info is not None and densities.dim() != 1):
        expected = "(N,) with packed_info" if packed_info is not None else "(..., S)"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(densities.shape)}")
    checks.same_kind("values", values, name, densities)
    if values.dim() != densities.dim() + 1 or values.shape[:-1] != densities.shape or values.shape[-1] < 1:
        raise ValueError(
            f"values: expected shape {(*densities.shape, 'C')} with C >= 1 (that of {name}, and the channels), "
            f"got {tuple(values.shape)} for {name} of shape {tuple(densities.shape)}"
        )
    checks.same_kind(t_name, t_starts, name, densities)
    checks.shape(t_name, t_starts, densities.shape, f"that of {name}")
    if not isinstance(early_stop_eps, (int, float)):
        raise TypeError(f"early_stop_eps: expected a number in [0, 1), got {type(early_stop_eps).__name__}")
    if not 0 <= early_stop_eps < 1:
        raise ValueError(f"early_stop_eps: expected a number in [0, 1), got {early_stop_eps}")
    gaps = False
    if packed_info is not None:
        gaps = packing.check_packed_info("packed_info", packed_info, densities)
        lead = packed_info.shape[:1]
    channels = values.shape[-1]
    if background is not None:
        checks.same_kind("background", background, name, densities)
        if background.shape != (channels,) and background.shape != (*lead, channels):
            raise ValueError(
                f"background: expected shape {(channels,)} or {(*lead, channels)} (the channels of values), "
                f"got {tuple(background.shape)}"
            )
        background = background.expand(*lead, channels)

    chosen = backends.choose(schema.FORWARD, densities.device.type, backend)
    early_stop_eps = float(early_stop_eps)
    if chosen == "reference":
        return CompositeOutput(
            *reference.composite(densities, values, t_starts, t_ends, packed_info, background, early_stop_eps)
        )

    flat = packed_info is not None or len(lead) == 1
    rays, samples = math.prod(lead), densities.shape[-1]
    if not flat:
        densities, t_starts = densities.reshape(rays, samples), t_starts.reshape(rays, samples)
        t_ends = None if t_ends is None else t_ends.reshape(rays, samples)
        values = values.reshape(rays, samples, channels)
        background = None if background is None else background.reshape(rays, channels)

    out = CompositeOutput(
        *autograd.run(
            densities, values, t_starts, t_ends, packed_info, background, early_stop_eps, gaps, backend=chosen
        )
    )
    if flat:
        return out
    return CompositeOutput(
        out.values.reshape(*lead, channels),
        out.opacity.reshape(lead),
        out.depth.reshape(lead),
        out.weights.reshape(*lead, samples),
    )
