"""Convolutions that do only the work that their dilation, their mask and the past leave."""

from mpkernels.convolution.masked_linear import masked_linear
from mpkernels.convolution.nade import nade_log_prob, nade_sample

__all__ = ["masked_linear", "nade_log_prob", "nade_sample"]
