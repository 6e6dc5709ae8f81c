"""Normalizing flows: transforms with log|det J| from the same pass, inverses, and what flows are built of."""

from mpkernels.flows.actnorm import actnorm, actnorm_statistics
from mpkernels.flows.invertible_conv1x1 import PLU, invertible_conv1x1, plu_decompose
from mpkernels.flows.slog_det_triangular import slog_det_triangular

__all__ = [
    "PLU",
    "actnorm",
    "actnorm_statistics",
    "invertible_conv1x1",
    "plu_decompose",
    "slog_det_triangular",
]
