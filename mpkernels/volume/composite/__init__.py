"""Volume compositing: the op `composite` and its variant for given opacities."""

from mpkernels.volume.composite.api import CompositeOutput, composite, composite_from_alphas

__all__ = ["CompositeOutput", "composite", "composite_from_alphas"]
