"""SSIM, the structural similarity of two images."""

from mpkernels.splatting.ssim.api import ssim

__all__ = ["ssim"]
