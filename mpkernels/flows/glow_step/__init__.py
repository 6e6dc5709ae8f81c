"""A step of Glow: ActNorm, invertible 1x1 convolution and affine coupling."""

from mpkernels.flows.glow_step.api import glow_step

__all__ = ["glow_step"]
