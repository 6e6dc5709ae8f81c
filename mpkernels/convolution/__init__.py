"""Convolutions that do only the work that their dilation, their mask and the past leave."""

from mpkernels.convolution.dilated_conv1d import dilated_conv1d

__all__ = ["dilated_conv1d"]
