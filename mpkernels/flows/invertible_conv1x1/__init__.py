"""The invertible 1x1 convolution: a product with a matrix at every position, and its log-determinant."""

from mpkernels.flows.invertible_conv1x1.api import invertible_conv1x1
from mpkernels.flows.invertible_conv1x1.matrix import PLU, plu_decompose

__all__ = ["PLU", "invertible_conv1x1", "plu_decompose"]
