"""gsplat.strategy: densification."""

from mpkernels.splatting.strategies import DefaultStrategy, MCMCStrategy, Strategy

__all__ = ["DefaultStrategy", "MCMCStrategy", "Strategy"]
