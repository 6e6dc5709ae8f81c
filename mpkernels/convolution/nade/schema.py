"""Schemas and fake functions of NADE. Imports torch (and the namespaces) alone.

Shapes of the three ops, with N samples of D dimensions, and H hidden units; everything is contiguous and of one dtype,
but for what is said to be wide: float32 for bfloat16 and float16, the dtype itself otherwise.

============  ======  ================================================================================================
argument      shape   meaning
============  ======  ================================================================================================
x             (N, D)  zeros and ones, or numbers between
in_weight     (H, D)  W: what a dimension adds to the hidden units of those behind it
in_bias       (H,)    c
out_weight    (D, H)  V
out_bias      (D,)    b
log_prob      (N,)    wide: log-likelihoods in nats
logits        (N, D)  wide: of x_d given those before it; kept for the backward
seed          int     of the random numbers
temperature   number  above 0; divides the logits of samples
============  ======  ================================================================================================

    a_0 = c,  a_{d+1} = a_d + W[:, d] x_d,  h_d = sigmoid(a_d),  logit_d = b_d + V_d . h_d
    log_prob = sum_d x_d logit_d - log(1 + exp(logit_d))

Where x_d is 0, W[:, d] is not read for that sample; the last column of W is read for none and has gradient 0.

Backward takes the gradient of log_prob (wide) and the logits of forward, and returns the gradients of x (shape (0,)
unless ``needs_x``), in_weight, in_bias, out_weight and out_bias.

Samples: the random word of (d, n) is the first of Philox-4x32-10 with the counter (d, n, 0, 0) and the seed as the key
(low word, high word), and x[n, d] = 1 where ((word >> 8) + 1/2) 2^-24 < sigmoid(logit_d / temperature), which is
compared without rounding; log_prob is that of the distribution which was drawn from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import library

FORWARD = "nade_log_prob"
BACKWARD = "nade_log_prob_backward"
SAMPLE = "nade_sample"


def _wide(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _fake_forward(x, in_weight, in_bias, out_weight, out_bias) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0],), dtype=_wide(x)), x.new_empty(x.shape, dtype=_wide(x))


def _fake_backward(
    grad, logits, x, in_weight, in_bias, out_weight, needs_x
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        x.new_empty(in_weight.shape),
        x.new_empty(in_bias.shape),
        x.new_empty(out_weight.shape),
        x.new_empty((x.shape[1],)),
    )


def _fake_sample(n, in_weight, in_bias, out_weight, out_bias, seed, temperature) -> tuple[Tensor, Tensor]:
    return in_weight.new_empty((n, in_weight.shape[1])), in_weight.new_empty((n,), dtype=_wide(in_weight))


library.define(
    f"{FORWARD}(Tensor x, Tensor in_weight, Tensor in_bias, Tensor out_weight, Tensor out_bias) -> (Tensor, Tensor)",
    _fake_forward,
)
library.define(
    f"{BACKWARD}(Tensor grad, Tensor logits, Tensor x, Tensor in_weight, Tensor in_bias, Tensor out_weight, "
    "bool needs_x) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
library.define(
    f"{SAMPLE}(SymInt n, Tensor in_weight, Tensor in_bias, Tensor out_weight, Tensor out_bias, int seed, "
    "float temperature) -> (Tensor, Tensor)",
    _fake_sample,
)
