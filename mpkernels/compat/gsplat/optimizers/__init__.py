"""gsplat.optimizers."""

from mpkernels.compat.gsplat.optimizers.selective_adam import SelectiveAdam

__all__ = ["SelectiveAdam"]
