"""ActNorm: an affine map a channel, with its log-determinant."""

from mpkernels.flows.actnorm.api import actnorm, actnorm_statistics

__all__ = ["actnorm", "actnorm_statistics"]
