"""Schemas and fake functions of the projection of Gaussians. Imports torch (and the namespaces) alone.

Shapes of the two ops, with B batches, C cameras and N Gaussians; all tensors are contiguous:

==============================  ======================  ===========================================================
argument                        shape                   meaning
==============================  ======================  ===========================================================
means                           (B, N, 3)               centres in the world
quats, scales                   (B, N, 4), (B, N, 3)    rotation (wxyz) and standard deviations, both or none
covars                          (B, N, 6)               else the covariance: xx, xy, xz, yy, yz, zz
opacities                       (B, N) or None          they choose the extent, and have no gradient
viewmats                        (B, C, 4, 4)            world to camera
Ks                              (B, C, 3, 3)            intrinsics
radii                           (B, C, N, 2) int32      0 where the Gaussian is culled, as all other outputs are
means2d, depths                 (B, C, N, 2), (B, C, N)
conics, compensations           (B, C, N, 3), (B, C, N)
==============================  ======================  ===========================================================

The backward takes the radii of the forward: they say what was culled. Gradients that are not needed come back as
tensors without elements (``needs_gaussians``: means, quats, scales and covars; ``needs_cameras``: viewmats and Ks).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import library

FORWARD = "project_gaussians"
BACKWARD = "project_gaussians_backward"

_SETTINGS = (
    "int width, int height, float near_plane, float far_plane, float radius_clip, float eps2d, bool ortho, "
    "bool antialiased"
)
_TRITON = "mpkernels.splatting.project_gaussians.triton"


def _fake_forward(means, quats, scales, covars, opacities, viewmats, Ks, *settings):
    shape = (means.shape[0], viewmats.shape[1], means.shape[1])
    return (
        means.new_empty((*shape, 2), dtype=torch.int32),
        means.new_empty((*shape, 2)),
        means.new_empty(shape),
        means.new_empty((*shape, 3)),
        means.new_empty(shape),
    )


def _fake_backward(
    grad_means2d,
    grad_depths,
    grad_conics,
    grad_compensations,
    radii,
    means,
    quats,
    scales,
    covars,
    viewmats,
    Ks,
    width,
    height,
    eps2d,
    ortho,
    needs_gaussians,
    needs_cameras,
):
    def gradient(like: Tensor | None, needed: bool) -> Tensor:
        return like.new_empty(like.shape) if needed and like is not None else means.new_empty((0,))

    return (
        *(gradient(x, needs_gaussians) for x in (means, quats, scales, covars)),
        *(gradient(x, needs_cameras) for x in (viewmats, Ks)),
    )


library.define(
    f"{FORWARD}(Tensor means, Tensor? quats, Tensor? scales, Tensor? covars, Tensor? opacities, Tensor viewmats, "
    f"Tensor Ks, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
)
library.define(
    f"{BACKWARD}(Tensor? grad_means2d, Tensor? grad_depths, Tensor? grad_conics, Tensor? grad_compensations, "
    "Tensor radii, Tensor means, Tensor? quats, Tensor? scales, Tensor? covars, Tensor viewmats, Tensor Ks, int width, "
    "int height, float eps2d, bool ortho, bool needs_gaussians, bool needs_cameras) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
library.implement_triton(FORWARD, _TRITON, "forward")
library.implement_triton(BACKWARD, _TRITON, "backward")
