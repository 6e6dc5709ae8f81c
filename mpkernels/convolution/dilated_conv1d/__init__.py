"""The dilated convolution over time: the op `dilated_conv1d`."""

from mpkernels.convolution.dilated_conv1d.api import dilated_conv1d

__all__ = ["dilated_conv1d"]
