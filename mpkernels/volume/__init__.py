"""Volume rendering along rays."""

from mpkernels.volume.composite import CompositeOutput, composite, composite_from_alphas

__all__ = ["CompositeOutput", "composite", "composite_from_alphas"]
