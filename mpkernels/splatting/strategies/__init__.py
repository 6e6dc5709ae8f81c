"""How the set of Gaussians changes while it is trained: what grows, splits, moves and goes."""

from mpkernels.splatting.strategies.base import Strategy
from mpkernels.splatting.strategies.default import DefaultStrategy
from mpkernels.splatting.strategies.mcmc import MCMCStrategy
from mpkernels.splatting.strategies.relocation import compute_relocation

__all__ = ["DefaultStrategy", "MCMCStrategy", "Strategy", "compute_relocation"]
