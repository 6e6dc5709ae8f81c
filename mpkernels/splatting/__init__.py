"""Gaussian splatting (Kerbl et al. 2023): projection, spherical harmonics, tiles, rasterization, training."""

from mpkernels.splatting.intersect_tiles import TileIntersections, intersect_tiles
from mpkernels.splatting.rasterize import RasterizedImage, rasterize

__all__ = ["RasterizedImage", "TileIntersections", "intersect_tiles", "rasterize"]
