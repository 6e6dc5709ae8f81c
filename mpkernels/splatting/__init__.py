"""Gaussian splatting (Kerbl et al. 2023): projection, spherical harmonics, tiles, rasterization, training."""

from mpkernels.splatting.rasterize import RasterizedImage, rasterize

__all__ = ["RasterizedImage", "rasterize"]
