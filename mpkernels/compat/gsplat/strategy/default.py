"""gsplat.strategy.default."""

from mpkernels.splatting.strategies import DefaultStrategy

__all__ = ["DefaultStrategy"]
