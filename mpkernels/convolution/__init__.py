"""Convolutions that do only the work that their dilation, their mask and the past leave."""

from mpkernels.convolution.depthwise_conv1d import depthwise_conv1d, depthwise_conv1d_update
from mpkernels.convolution.dilated_conv1d import dilated_conv1d
from mpkernels.convolution.gated_residual_layer import GatedResidualLayer, gated_residual_layer
from mpkernels.convolution.masked_linear import masked_linear
from mpkernels.convolution.nade import nade_log_prob, nade_sample

__all__ = [
    "GatedResidualLayer",
    "depthwise_conv1d",
    "depthwise_conv1d_update",
    "dilated_conv1d",
    "gated_residual_layer",
    "masked_linear",
    "nade_log_prob",
    "nade_sample",
]
