"""gsplat.strategy.mcmc."""

from mpkernels.splatting.strategies import MCMCStrategy

__all__ = ["MCMCStrategy"]
