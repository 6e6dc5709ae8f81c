"""gsplat.relocation."""

from mpkernels.splatting.strategies.relocation import compute_relocation

__all__ = ["compute_relocation"]
