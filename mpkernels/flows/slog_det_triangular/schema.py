"""Schema and fake function of the log-determinant of triangular matrices. Imports torch (and the namespaces) alone.

    sign[m] = product of the signs of diagonal[m], log_abs_det[m] = sum of log |diagonal[m]|

with diagonal (N, n) of any strides: the diagonals of N matrices in place, so that nothing else of them is read. sign
(N,) has its dtype; log_abs_det (N,) is float32 (float64 for float64), computed in float64. Where an element is NaN both
results are; a zero gives 0 and -inf (NaN beside an infinity). n = 0 gives 1 and 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import library

FORWARD = "slog_det_triangular"


def wide(x: Tensor) -> torch.dtype:
    """The dtype of log-determinants."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_forward(diagonal) -> tuple[Tensor, Tensor]:
    rows = diagonal.shape[:1]
    return diagonal.new_empty(rows), diagonal.new_empty(rows, dtype=wide(diagonal))


library.define(f"{FORWARD}(Tensor diagonal) -> (Tensor, Tensor)", _fake_forward)
