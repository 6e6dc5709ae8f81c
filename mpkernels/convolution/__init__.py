"""Convolutions that do only the work that their dilation, their mask and the past leave."""

from mpkernels.convolution.masked_linear import masked_linear

__all__ = ["masked_linear"]
