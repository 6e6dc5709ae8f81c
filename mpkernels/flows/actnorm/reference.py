"""ActNorm, slowly: the formulas of schema.py."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels.flows.actnorm import schema


def actnorm(x: Tensor, bias: Tensor, log_scale: Tensor, shift_first: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    """(y, log_abs_det) for x (B, C, S); bias and log_scale in the dtype that is computed in."""
    batch, _, positions = x.shape
    value = x.to(schema.wide(x))
    shift, scale = bias[:, None], torch.exp(-log_scale if inverse else log_scale)[:, None]
    if inverse:
        y = value * scale - shift if shift_first else (value - shift) * scale
    else:
        y = (value + shift) * scale if shift_first else value * scale + shift
    log_abs_det = log_scale.sum() * (-positions if inverse else positions)
    return y.to(x.dtype).contiguous(), log_abs_det.expand(batch)
