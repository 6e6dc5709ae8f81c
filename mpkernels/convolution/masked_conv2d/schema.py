"""Schemas and fake functions of the masked convolution. Imports torch (and the namespaces) alone.

One pair of ops serves PixelCNN's masked convolution and both stacks of the gated PixelCNN. With B pictures of H x W
pixels, C input and D output channels, kh x kw taps (both odd, the middle one reads the pixel itself):

=============  =================  =====================================================================================
argument       shape              meaning
=============  =================  =====================================================================================
x              (B, C, H, W)       the pictures, or maps of features
weight         (D, C, kh, kw)
bias           (D,) or None
taps           int                the first ``taps`` taps in raster order, t = i kw + j, see every channel
colors         int                where above 1, one more tap, number ``taps``, is seen by the order of the colours:
                                  channels are ``colors`` equal blocks, a channel's colour is c // (C / colors), and
                                  output channel o (colour o // (D / colors)) sees those of earlier colours,
inclusive      bool               and, where True, those of its own
stride_y, _x   int >= 1           pixels between outputs
dilation_y, _x int >= 1           pixels between taps
=============  =================  =====================================================================================

    out[b, o, y, x] = bias[o] + sum over seen (t, c) of weight[o, c, i, j] x[b, c, y stride_y + dy, x stride_x + dx],
    dy = (i - kh // 2) dilation_y,  dx = (j - kw // 2) dilation_x,

with zeros outside of the picture; out is (B, D, ceil(H / stride_y), ceil(W / stride_x)). Every tap, or part of a tap,
that is not seen is neither read nor multiplied, and has a gradient of exactly 0. All tensors are contiguous.

Sums run in float32 (float64 for float64); the bias is added last.

Backward takes the gradient of out and returns those of x, weight and bias; one that is not needed has shape (0,).
"""

from __future__ import annotations

from torch import Tensor

from mpkernels import library

FORWARD = "masked_conv2d"
BACKWARD = "masked_conv2d_backward"

_TRITON = "mpkernels.convolution.masked_conv2d.triton"


def _fake_forward(x, weight, bias, taps, colors, inclusive, stride_y, stride_x, dilation_y, dilation_x) -> Tensor:
    rows, columns = -(-x.shape[2] // stride_y), -(-x.shape[3] // stride_x)
    return x.new_empty((x.shape[0], weight.shape[0], rows, columns))


def _fake_backward(
    grad_out,
    x,
    weight,
    taps,
    colors,
    inclusive,
    stride_y,
    stride_x,
    dilation_y,
    dilation_x,
    needs_x,
    needs_weight,
    needs_bias,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        x.new_empty(weight.shape if needs_weight else (0,)),
        x.new_empty((weight.shape[0],) if needs_bias else (0,)),
    )


_SETTINGS = "int taps, int colors, bool inclusive, int stride_y, int stride_x, int dilation_y, int dilation_x"

library.define(f"{FORWARD}(Tensor x, Tensor weight, Tensor? bias, {_SETTINGS}) -> Tensor", _fake_forward)
library.define(
    f"{BACKWARD}(Tensor grad_out, Tensor x, Tensor weight, {_SETTINGS}, bool needs_x, bool needs_weight, "
    "bool needs_bias) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
library.implement_triton(FORWARD, _TRITON, "forward")
library.implement_triton(BACKWARD, _TRITON, "backward")
