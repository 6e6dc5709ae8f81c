"""Rasterization of projected Gaussians: the op `rasterize`."""

from mpkernels.splatting.rasterize.api import RasterizedImage, rasterize

__all__ = ["RasterizedImage", "rasterize"]
