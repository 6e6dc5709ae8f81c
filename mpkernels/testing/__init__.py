"""Checks of kernels against references: ours, and yours.

>>> from mpkernels import spec, testing
>>> composite = spec.find("composite")
>>> all(c.ok for c in testing.check_case(composite, composite.case("typical"), backend="reference"))
True
"""

from mpkernels.testing.checking import Comparison, check_case, compare, gradients, upcast
from mpkernels.testing.poison import poisoned_memory

__all__ = ["Comparison", "check_case", "compare", "gradients", "poisoned_memory", "upcast"]
