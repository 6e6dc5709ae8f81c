"""Schemas and fake functions of covariances from quaternions and scales. Imports torch (and the namespaces) alone.

quats (N, 4) wxyz, scales (N, 3); covars, and grad of them, (N, 6) with ``triu``, else (N, 3, 3). All contiguous.
"""

from __future__ import annotations

from mpkernels import library

FORWARD = "quat_scale_to_covar"
BACKWARD = "quat_scale_to_covar_backward"


def _fake_forward(quats, scales, inverse, triu):
    return quats.new_empty((quats.shape[0], 6) if triu else (quats.shape[0], 3, 3))


def _fake_backward(grad, quats, scales, inverse, triu):
    return quats.new_empty(quats.shape), scales.new_empty(scales.shape)


library.define(f"{FORWARD}(Tensor quats, Tensor scales, bool inverse, bool triu) -> Tensor", _fake_forward)
library.define(
    f"{BACKWARD}(Tensor grad, Tensor quats, Tensor scales, bool inverse, bool triu) -> (Tensor, Tensor)",
    _fake_backward,
)
