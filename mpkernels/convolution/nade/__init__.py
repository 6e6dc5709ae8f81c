"""The neural autoregressive distribution estimator: the ops `nade_log_prob` and `nade_sample`."""

from mpkernels.convolution.nade.api import nade_log_prob, nade_sample

__all__ = ["nade_log_prob", "nade_sample"]
