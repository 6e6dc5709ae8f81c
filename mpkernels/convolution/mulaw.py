"""Mu-law companding of audio, as WaveNet quantizes it.

    f(x) = sign(x) ln(1 + mu |x|) / ln(1 + mu)        -1 <= x <= 1

(ITU-T Recommendation G.711 in its continuous form; van den Oord et al. 2016, "WaveNet", section 2.2.) f(x) is rounded
to the nearest of mu + 1 values, evenly spaced from -1 to 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpkernels import checks


def _mu(classes: int) -> int:
    if isinstance(classes, bool) or not isinstance(classes, int):
        raise TypeError(f"classes: expected an integer, got {type(classes).__name__}")
    if classes < 2:
        raise ValueError(f"classes: expected at least 2, got {classes}")
    return classes - 1


def mulaw_encode(x: Tensor, classes: int = 256) -> Tensor:
    """Classes of an audio signal, by mu-law with mu = classes - 1.

    Args:
        x: any shape, floating point, in [-1, 1]; what is outside counts as -1 or 1. NaN has no class: the result is any.
        classes: at least 2.

    Returns:
        int64 in [0, classes), in the shape of ``x``. Silence, 0.0, is ``classes // 2``.

    Raises:
        TypeError: ``x`` is no floating-point tensor, or ``classes`` no integer.
        ValueError: ``classes`` is below 2.

    Example:
        >>> import torch
        >>> from mpkernels.convolution import mulaw_decode, mulaw_encode
        >>> mulaw_encode(torch.tensor([-1.0, 0.0, 0.01, 1.0]))
        tensor([  0, 128, 157, 255])
        >>> bool((mulaw_encode(mulaw_decode(torch.arange(256))) == torch.arange(256)).all())
        True
    """
    checks.floating("x", x)
    mu = _mu(classes)
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide.clamp(-1, 1)
    companded = torch.sign(wide) * torch.log1p(mu * wide.abs()) / math.log1p(mu)
    return torch.floor((companded + 1) / 2 * mu + 0.5).long().clamp(0, mu)


def mulaw_decode(index: Tensor, classes: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    """The signal in the middle of each mu-law class: the inverse of f at 2 index / mu - 1.

    Args:
        index: any shape, integers in [0, classes).
        classes: at least 2.
        dtype: of the result.

    Returns:
        values in [-1, 1], in the shape of ``index``.

    Raises:
        TypeError: ``index`` holds no integers, or ``classes`` is none.
        ValueError: ``classes`` is below 2.

    Example:
        >>> import torch
        >>> from mpkernels.convolution import mulaw_decode
        >>> mulaw_decode(torch.tensor([0, 255]))
        tensor([-1.,  1.])
    """
    checks.tensor("index", index)
    if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
        raise TypeError(f"index: expected integers, got {index.dtype}")
    mu = _mu(classes)
    companded = 2 * index.double() / mu - 1
    return (torch.sign(companded) * torch.expm1(companded.abs() * math.log1p(mu)) / mu).to(dtype)
