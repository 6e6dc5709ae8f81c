"""The affine coupling."""

from mpkernels.flows.affine_coupling.api import affine_coupling

__all__ = ["affine_coupling"]
