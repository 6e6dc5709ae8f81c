"""The spline coupling."""

from mpkernels.flows.spline_coupling.api import pack_spline_parameters, spline_coupling

__all__ = ["pack_spline_parameters", "spline_coupling"]
