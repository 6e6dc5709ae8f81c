"""The affine coupling, slowly: the formula, with its mask written out, in plain torch.

    y = kept ? x : x e^l + t,   log_abs_det[b] = sum of l over the transformed elements

and the other three forms (schema.py). What is kept is selected away in front of the formula, so that nothing of its
parameters is ever added, to values or to gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mpkernels.flows.affine_coupling import schema


def affine_coupling(
    x: Tensor,  # (B, C, H, W)
    raw: Tensor | None,  # (B, P, H, W), or (B, 2 P, H, W)
    shift: Tensor | None,  # (B, P, H, W)
    mask: Tensor | None,  # (B, C, H, W)
    scale: int,
    clamp: float,
    epsilon: float,
    layout: int,
    pattern: int,
    parity: int,
    shift_first: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Returns (y (B, C, H, W), log_abs_det (B,)); half types are computed in float32."""
    wide = schema.wide(x)
    if layout != schema.SEPARATE:
        assert raw is not None
        raw, shift = _parts(raw, layout)
    assert shift is not None
    kept = kept_elements(x, mask, pattern, parity)
    if pattern == schema.CHANNEL:
        raw, shift = (None if p is None else _on_all_channels(p, x.shape[1], parity) for p in (raw, shift))
        assert shift is not None
    v = torch.where(kept, 0.0, x.to(wide))
    t = torch.where(kept, 0.0, shift.to(wide))
    if raw is None:
        log_scale, factor = torch.zeros_like(v), torch.ones_like(v)
    else:
        log_scale, factor = _scales(torch.where(kept, 0.0, raw.to(wide)), scale, clamp, epsilon, inverse)
    if inverse:
        transformed = v * factor - t if shift_first else (v - t) * factor
    else:
        transformed = (v + t) * factor if shift_first else v * factor + t
    y = torch.where(kept, x, transformed.to(x.dtype))
    log_abs_det = torch.where(kept, 0.0, log_scale).sum((1, 2, 3))
    return y, -log_abs_det if inverse else log_abs_det


def kept_elements(x: Tensor, mask: Tensor | None, pattern: int, parity: int) -> Tensor:
    """Where elements are kept, (B, C, H, W) or (1, C, H, W)."""
    _, channels, height, width = x.shape
    c, h, w = (torch.arange(n, device=x.device) for n in (channels, height, width))
    if pattern == schema.TENSOR:
        assert mask is not None
        return mask
    if pattern == schema.CHECKERBOARD:
        kept = ((h[:, None] + w) % 2 != parity).expand(channels, height, width)
    elif pattern == schema.ALTERNATING:
        kept = (c % 2 != parity)[:, None, None].expand(channels, height, width)
    elif pattern == schema.CHANNEL:
        first = c < (channels + 1) // 2
        kept = (first if parity == 0 else ~first)[:, None, None].expand(channels, height, width)
    else:
        kept = torch.zeros((channels, height, width), dtype=torch.bool, device=x.device)
    return kept[None]


def _on_all_channels(p: Tensor, channels: int, parity: int) -> Tensor:
    """Parameters of the transformed channels, with zeros where the kept ones are."""
    kept = p.new_zeros((p.shape[0], channels - p.shape[1], *p.shape[2:]))
    return torch.cat([kept, p] if parity == 0 else [p, kept], 1)


def _parts(h: Tensor, layout: int) -> tuple[Tensor, Tensor]:
    """(raw, shift) of both in one tensor."""
    half = h.shape[1] // 2
    if layout == schema.SHIFT_SCALE:
        return h[:, half:], h[:, :half]
    if layout == schema.SCALE_SHIFT:
        return h[:, :half], h[:, half:]
    if layout == schema.SHIFT_SCALE_INTERLEAVED:
        return h[:, 1::2], h[:, ::2]
    return h[:, ::2], h[:, 1::2]


def _limited(x: Tensor) -> Tensor:
    """Limited so that e^x is neither 0 nor infinite; a NaN stays."""
    limit = 708.0 if x.dtype == torch.float64 else 87.0
    return torch.where(x > limit, limit, torch.where(x < -limit, -limit, x))


def _scales(raw: Tensor, scale: int, clamp: float, epsilon: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """(the log-scale, the factor e^l, or e^-l for the inverse)."""
    if scale == schema.SIGMOID:
        e = torch.exp(-_limited(raw + 2))
        if epsilon == 0:
            return functional.logsigmoid(raw + 2), 1 + e if inverse else 1 / (1 + e)
        s = 1 / (1 + e) + epsilon
        return torch.log(s), 1 / s if inverse else s
    if scale == schema.EXP:
        log_scale = raw
    elif scale == schema.TANH:
        log_scale = clamp * torch.tanh(raw)
    elif scale == schema.SOFTCLAMP:
        log_scale = clamp * 0.636 * torch.atan(raw)
    else:
        log_scale = torch.zeros_like(raw)
    return log_scale, torch.exp(_limited(-log_scale if inverse else log_scale))
