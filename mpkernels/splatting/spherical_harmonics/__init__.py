"""Spherical harmonics: colours that depend on the direction they are seen from."""

from mpkernels.splatting.spherical_harmonics.api import spherical_harmonics

__all__ = ["spherical_harmonics"]
