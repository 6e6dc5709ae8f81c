"""Normalizing flows: transforms with log|det J| from the same pass, inverses, and what flows are built of."""

from mpkernels.flows.affine_coupling import affine_coupling
from mpkernels.flows.affine_injector import affine_injector
from mpkernels.flows.layouts import split_parameters
from mpkernels.flows.reshaping import split, squeeze, unsqueeze

__all__ = [
    "affine_coupling",
    "affine_injector",
    "split",
    "split_parameters",
    "squeeze",
    "unsqueeze",
]
