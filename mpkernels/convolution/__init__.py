"""Convolutions that do only the work that their dilation, their mask and the past leave."""

from mpkernels.convolution.depthwise_conv1d import depthwise_conv1d, depthwise_conv1d_update
from mpkernels.convolution.dilated_conv1d import dilated_conv1d
from mpkernels.convolution.gated_residual_layer import GatedResidualLayer, gated_residual_layer

__all__ = [
    "GatedResidualLayer",
    "depthwise_conv1d",
    "depthwise_conv1d_update",
    "dilated_conv1d",
    "gated_residual_layer",
]
