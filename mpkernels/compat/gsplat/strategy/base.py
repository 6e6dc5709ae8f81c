"""gsplat.strategy.base."""

from mpkernels.splatting.strategies import Strategy

__all__ = ["Strategy"]
