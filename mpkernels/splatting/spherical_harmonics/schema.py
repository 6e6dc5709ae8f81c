"""Schemas and fake functions of spherical harmonics. Imports torch (and the namespaces) alone.

B batches of C cameras that see the same N Gaussians; all tensors are contiguous:

========  ================  ==================================================================
dirs      (B, C, N, 3)      directions of any length
coeffs    (B, N, K, 3)      K >= (degree + 1)^2 coefficients of three channels
masks     (B, C, N) bool    whether a colour is wanted, or None: all are
colors    (B, C, N, 3)      what the op returns
========  ================  ==================================================================

Gradients that are not needed come back as tensors without elements.
"""

from __future__ import annotations

from mpkernels import library

FORWARD = "spherical_harmonics"
BACKWARD = "spherical_harmonics_backward"

_ARGUMENTS = "int degree, Tensor dirs, Tensor coeffs, Tensor? masks"
_TRITON = "mpkernels.splatting.spherical_harmonics.triton"


def _fake_backward(grad, degree, dirs, coeffs, masks, needs_dirs, needs_coeffs):
    return (
        dirs.new_empty(dirs.shape if needs_dirs else (0,)),
        coeffs.new_empty(coeffs.shape if needs_coeffs else (0,)),
    )


library.define(f"{FORWARD}({_ARGUMENTS}) -> Tensor", lambda degree, dirs, coeffs, masks: dirs.new_empty(dirs.shape))
library.define(
    f"{BACKWARD}(Tensor grad, {_ARGUMENTS}, bool needs_dirs, bool needs_coeffs) -> (Tensor, Tensor)", _fake_backward
)
library.implement_triton(FORWARD, _TRITON, "forward")
library.implement_triton(BACKWARD, _TRITON, "backward")
