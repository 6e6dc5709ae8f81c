"""From Gaussians and cameras to images: gsplat's `rasterization`, on every backend."""

from mpkernels.splatting.rasterization.api import rasterization

__all__ = ["rasterization"]
