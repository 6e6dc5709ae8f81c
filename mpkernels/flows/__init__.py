"""Normalizing flows: transforms with log|det J| from the same pass, inverses, and what flows are built of."""

from mpkernels.flows.spline_coupling import pack_spline_parameters, spline_coupling

__all__ = ["pack_spline_parameters", "spline_coupling"]
