"""Convolutions that do only the work that their dilation, their mask and the past leave."""

from mpkernels.convolution.masked_conv2d import horizontal_stack, masked_conv2d, pixelcnn_mask, vertical_stack

__all__ = ["horizontal_stack", "masked_conv2d", "pixelcnn_mask", "vertical_stack"]
