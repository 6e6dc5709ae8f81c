"""Convolutions that do only the work that their dilation, their mask and the past leave."""

from mpkernels.convolution.depthwise_conv1d import depthwise_conv1d, depthwise_conv1d_update

__all__ = ["depthwise_conv1d", "depthwise_conv1d_update"]
