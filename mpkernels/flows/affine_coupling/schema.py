"""Schemas and fake functions of the affine coupling. Imports torch (and the namespaces) alone.

Shapes, with B samples of C channels of H x W positions (a (B, D) input is (B, D, 1, 1)):

==============  =======================  =============================================================================
argument        shape                    meaning
==============  =======================  =============================================================================
x               (B, C, H, W)
raw             (B, P, H, W) or None     what the scale is made of; None for ADDITIVE. With a joint layout both
                                         parameters: (B, 2 P, H, W)
shift           (B, P, H, W) or None     None with a joint layout
mask            (B, C, H, W) bool, None  for pattern TENSOR: True keeps the element
scale           int                      the log-scale l: EXP raw, SIGMOID log(1 / (1 + e^-(raw + 2)) + epsilon),
                                         TANH clamp tanh(raw), SOFTCLAMP clamp 0.636 atan(raw), ADDITIVE 0
clamp, epsilon  float                    finite, epsilon >= 0
layout          int                      SEPARATE, or where dimension 1 of raw holds the two: SHIFT_SCALE [t; s],
                                         SCALE_SHIFT [s; t], SHIFT_SCALE_INTERLEAVED t s t s ...,
                                         SCALE_SHIFT_INTERLEAVED s t s t ...
pattern         int                      which elements are transformed, the others are kept: NONE all of them,
                                         CHECKERBOARD those where (h + w) mod 2 is parity, ALTERNATING those where
                                         c mod 2 is parity, CHANNEL the second part of the channels (parity 0) or the
                                         first (parity 1), TENSOR those where mask is False
parity          int                      0 or 1
shift_first     bool                     (x + t) e^l instead of x e^l + t
inverse         bool                     x from y: (x - t) e^-l, or x e^-l - t with shift_first
==============  =======================  =============================================================================

    y = kept ? x : transformed            log_abs_det[b] = +-sum of l over the transformed elements (- for the inverse)

The first part of the channels has (C + 1) // 2 of them (torch.chunk). P is C, or with CHANNEL the number of transformed
channels alone. Parameters of kept elements are never read, so that nothing in them leaks, and their gradient is 0.

All tensors may have any strides (0 too). y and gradients are contiguous; the gradient of raw has its shape, so with a
joint layout it is the gradient of the network's whole output. y has the dtype of x; so have raw and shift.
log_abs_det is float32 (float64 for float64), summed in a fixed order. Elements are computed in float32 (float64).

Backward returns the gradients of x, raw and shift; one that is not needed (or None) has shape (0,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import library

FORWARD = "affine_coupling"
BACKWARD = "affine_coupling_backward"

EXP, SIGMOID, TANH, SOFTCLAMP, ADDITIVE = range(5)  # scale
SEPARATE, SHIFT_SCALE, SCALE_SHIFT, SHIFT_SCALE_INTERLEAVED, SCALE_SHIFT_INTERLEAVED = range(5)  # layout
NONE, CHECKERBOARD, CHANNEL, TENSOR, ALTERNATING = range(5)  # pattern

_TRITON = "mpkernels.flows.affine_coupling.triton"


def wide(x: Tensor) -> torch.dtype:
    """The dtype of log-determinants."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_forward(
    x, raw, shift, mask, scale, clamp, epsilon, layout, pattern, parity, shift_first, inverse
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0],), dtype=wide(x))


def _fake_backward(
    grad_y,
    grad_log_abs_det,
    x,
    raw,
    shift,
    mask,
    scale,
    clamp,
    epsilon,
    layout,
    pattern,
    parity,
    shift_first,
    inverse,
    needs_x,
    needs_raw,
    needs_shift,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        x.new_empty(raw.shape if needs_raw and raw is not None else (0,)),
        x.new_empty(shift.shape if needs_shift and shift is not None else (0,)),
    )


library.define(
    f"{FORWARD}(Tensor x, Tensor? raw, Tensor? shift, Tensor? mask, int scale, float clamp, float epsilon, int layout, "
    "int pattern, int parity, bool shift_first, bool inverse) -> (Tensor, Tensor)",
    _fake_forward,
)
library.define(
    f"{BACKWARD}(Tensor grad_y, Tensor grad_log_abs_det, Tensor x, Tensor? raw, Tensor? shift, Tensor? mask, "
    "int scale, float clamp, float epsilon, int layout, int pattern, int parity, bool shift_first, bool inverse, "
    "bool needs_x, bool needs_raw, bool needs_shift) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
library.implement_triton(FORWARD, _TRITON, "forward")
library.implement_triton(BACKWARD, _TRITON, "backward")
