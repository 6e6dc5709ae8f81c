"""Normalizing flows: transforms with log|det J| from the same pass, inverses, and what flows are built of."""

from mpkernels.flows.actnorm import actnorm, actnorm_statistics
from mpkernels.flows.affine_coupling import affine_coupling
from mpkernels.flows.affine_injector import affine_injector
from mpkernels.flows.glow_step import glow_step
from mpkernels.flows.invertible_conv1x1 import PLU, invertible_conv1x1, plu_decompose
from mpkernels.flows.layouts import split_parameters
from mpkernels.flows.reshaping import split, squeeze, unsqueeze
from mpkernels.flows.slog_det_triangular import slog_det_triangular
from mpkernels.flows.spline_coupling import pack_spline_parameters, spline_coupling

__all__ = [
    "PLU",
    "actnorm",
    "actnorm_statistics",
    "affine_coupling",
    "affine_injector",
    "glow_step",
    "invertible_conv1x1",
    "pack_spline_parameters",
    "plu_decompose",
    "slog_det_triangular",
    "spline_coupling",
    "split",
    "split_parameters",
    "squeeze",
    "unsqueeze",
]
