"""The depthwise convolution over time, and its step of generation."""

from mpkernels.convolution.depthwise_conv1d.api import depthwise_conv1d, depthwise_conv1d_update

__all__ = ["depthwise_conv1d", "depthwise_conv1d_update"]
