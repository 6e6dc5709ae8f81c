"""Covariances of Gaussians from quaternions and scales."""

from mpkernels.splatting.quat_scale_to_covar.api import quat_scale_to_covar

__all__ = ["quat_scale_to_covar"]
