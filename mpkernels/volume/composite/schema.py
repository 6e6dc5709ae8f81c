"""Schemas and fake functions of volume compositing. Imports torch (and the namespaces) alone.

Shapes of the two ops, with R rays, S samples a ray, N samples in all and C channels:

=================  ===================  ===================  =======================================
argument           dense                packed               meaning
=================  ===================  ===================  =======================================
densities          (R, S)               (N,)                 sigma, or alpha where t_ends is None
values             (R, S, C)            (N, C)               what is composited
t_starts           (R, S)               (N,)                 interval starts, or sample positions
t_ends             (R, S) or None       (N,) or None         interval ends; None: densities are alphas
packed_info        None                 (R, 2) int64         [start, count] of every ray
background         (R, C) or None       (R, C) or None       seen behind the ray
=================  ===================  ===================  =======================================

Rows of samples may have any stride between rays (0 for expanded tensors); inside a ray they are contiguous.
``gaps`` says that some of the N samples may belong to no ray: their weights and gradients are then 0.
Gradients that are not needed come back as tensors without elements.
"""

from __future__ import annotations

from torch import Tensor

from mpkernels import library

FORWARD = "composite"
BACKWARD = "composite_backward"

_ARGUMENTS = (
    "Tensor densities, Tensor values, Tensor t_starts, Tensor? t_ends, Tensor? packed_info, Tensor? background, "
    "float early_stop_eps, bool gaps"
)
_TRITON = "mpkernels.volume.composite.triton"


def _fake_forward(densities, values, t_starts, t_ends, packed_info, background, early_stop_eps, gaps):
    rays = (packed_info if packed_info is not None else densities).shape[0]
    return (
        values.new_empty((rays, values.shape[-1])),
        densities.new_empty((rays,)),
        densities.new_empty((rays,)),
        densities.new_empty(densities.shape),
    )


def _fake_backward(
    grad_values,
    grad_opacity,
    grad_depth,
    grad_weights,
    densities,
    values,
    t_starts,
    t_ends,
    packed_info,
    background,
    early_stop_eps,
    gaps,
    needs_values,
    needs_ts,
    needs_background,
):
    def gradient(like: Tensor | None, needed: bool) -> Tensor:
        return like.new_empty(like.shape) if needed and like is not None else densities.new_empty((0,))

    return (
        densities.new_empty(densities.shape),
        gradient(values, needs_values),
        gradient(t_starts, needs_ts),
        gradient(t_ends, needs_ts),
        gradient(background, needs_background),
    )


library.define(f"{FORWARD}({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)", _fake_forward)
library.define(
    f"{BACKWARD}(Tensor? grad_values, Tensor? grad_opacity, Tensor? grad_depth, Tensor? grad_weights, {_ARGUMENTS}, "
    "bool needs_values, bool needs_ts, bool needs_background) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
library.implement_triton(FORWARD, _TRITON, "forward")
library.implement_triton(BACKWARD, _TRITON, "backward")
