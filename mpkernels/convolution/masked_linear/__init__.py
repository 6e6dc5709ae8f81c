"""MADE's layer: a linear map in which a weight counts where the degrees of its two units allow it."""

from mpkernels.convolution.masked_linear.api import masked_linear

__all__ = ["masked_linear"]
