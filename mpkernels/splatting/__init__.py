"""Gaussian splatting (Kerbl et al. 2023): projection, spherical harmonics, tiles, rasterization, training."""

from mpkernels.splatting.intersect_tiles import TileIntersections, intersect_tiles
from mpkernels.splatting.ply import load_ply, save_ply
from mpkernels.splatting.project_gaussians import PackedGaussians, ProjectedGaussians, project_gaussians
from mpkernels.splatting.quat_scale_to_covar import quat_scale_to_covar
from mpkernels.splatting.rasterization import rasterization
from mpkernels.splatting.rasterize import RasterizedImage, rasterize
from mpkernels.splatting.spherical_harmonics import spherical_harmonics
from mpkernels.splatting.ssim import ssim
from mpkernels.splatting.strategies import DefaultStrategy, MCMCStrategy

__all__ = [
    "DefaultStrategy",
    "MCMCStrategy",
    "PackedGaussians",
    "ProjectedGaussians",
    "RasterizedImage",
    "TileIntersections",
    "intersect_tiles",
    "load_ply",
    "project_gaussians",
    "quat_scale_to_covar",
    "rasterization",
    "rasterize",
    "save_ply",
    "spherical_harmonics",
    "ssim",
]
