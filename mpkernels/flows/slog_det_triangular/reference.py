"""Sign and log-determinant of triangular matrices, slowly."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels.flows.slog_det_triangular import schema


def slog_det_triangular(diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """(sign, log_abs_det) of the diagonals (N, n)."""
    value = diagonal.to(schema.wide(diagonal))
    log_abs_det = torch.where(value < 0, -value, value).log().sum(-1)  # (abs has the gradient 0 at 0)
    sign = diagonal.detach().sign().prod(-1)  # (torch gives NaN the sign 0)
    unknown = torch.full_like(sign, torch.nan)
    return torch.where(diagonal.detach().isnan().any(-1), unknown, sign), log_abs_det
