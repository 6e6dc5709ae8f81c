"""Convolutions that do only the work that their dilation, their mask and the past leave."""

from mpkernels.convolution.dilated_conv1d import dilated_conv1d
from mpkernels.convolution.gated_residual_layer import GatedResidualLayer, gated_residual_layer

__all__ = ["GatedResidualLayer", "dilated_conv1d", "gated_residual_layer"]
