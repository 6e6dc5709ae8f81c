"""PixelCNN's masked convolution, and the two stacks of the gated PixelCNN."""

from mpkernels.convolution.masked_conv2d.api import horizontal_stack, masked_conv2d, vertical_stack
from mpkernels.convolution.masked_conv2d.mask import pixelcnn_mask

__all__ = ["horizontal_stack", "masked_conv2d", "pixelcnn_mask", "vertical_stack"]
