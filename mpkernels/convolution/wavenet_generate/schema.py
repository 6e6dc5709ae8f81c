"""Schemas and fake functions of WaveNet's sample loop. Imports torch (and the namespaces) alone.

``sizes`` are K taps, R residual, G gate, S skip, H hidden and O output channels, and A channels of the condition (0
without); L layers with ``dilations``; B sequences; T = T0 + T1 positions, the first T0 of them forced. ``wide`` is
float64 where weights are float64, else float32.

===============  ==================  ==================================================================================
argument         shape               meaning
===============  ==================  ==================================================================================
weights          (.,)                all matrices in the order below; float32, float64 or bfloat16
offsets          (L, B or 1, 2 G)    wide: biases of the dilated convolutions, and what else does not change over time
biases           (.,)                wide: of each layer's projection, of hidden, of output, each padded to 32 outputs
embedding        (classes, R)        wide: the input of a class; or, of a mixture, (2, R): weight and bias of a value
dilations        int[L], all >= 1
sizes            int[7]
residual_scale   float               factor of the residual outputs
skip_scale       float               factor of the sum of the skips
mixture          bool                whether outputs are (weight, mean, log scale) of O / 3 logistics, and samples values
forced           (B, T0) | None      the first samples: int64 in [0, classes), or wide
condition        (B, T, A) | None    wide
last             (B,)                the sample before the first; int64 or wide
rings            (B, rows, R)        wide: the last (K - 1) dilation inputs of each layer, layers one behind the other;
                                     the input at position t lies in row t mod ((K - 1) dilation) of its layer
seed             () int64
start            int >= 0            position of the first sample
first_sequence   int >= 0            number of the first sequence, in the random stream
steps            int >= 0            T1
temperature      float >= 0
keep_logits      bool                whether logits are returned
===============  ==================  ==================================================================================

The network of a position t, from the sample before it (van den Oord et al. 2016, "WaveNet", eq. 2 and figure 4; the
layers are those of gated_residual_layer):

    x_0    = embedding[sample_{t-1}]                 mixture: (0 + embedding[0] sample_{t-1}) + embedding[1]
    z_i    = sum_{k, c} weight_i[., c, k] x_i[c, t + (k - K + 1) dilation_i] + sum_a condition_weight_i[., a] condition[a]
             + offset_i                              x_i before the first position: zeros, or what the rings hold
    h_i    = tanh(z_i[:G]) sigmoid(z_i[G:])
    x_i+1  = residual_scale (x_i + residual_i h_i + residual_bias_i)
    skip   = sum_i (skip_i h_i + skip_bias_i)        in the order of i
    logits = output relu(hidden relu(skip_scale skip) + hidden_bias) + output_bias

Sums run in the wide type and, on the CPU, in the order that the schema of gated_residual_layer names, by fused
multiply-adds where the processor has them, so that the loop has the bits of the layers' own kernels; nothing depends on
the batch, on the number of threads, or on where a run is cut.

Random numbers: draw j of position t of sequence b is word 0 of Philox-4x32-10 of the counter (low word of t, b, j, high
word of t) and the key seed, and u = ((word >> 8) + 1/2) 2^-24, in double precision. Categorical: the first class whose
running sum of e^((logit - max) / temperature), summed in the order of classes in the wide type, exceeds u times the
whole sum. Mixture: draw 0 picks the component in that way, draw 1 gives mean + temperature scale (log u - log(1 - u)),
limited to [-1, 1]. Temperature 0 takes the first largest logit, and the mean.

A matrix (P, D) is packed as its outputs padded with zeros to a multiple of 32, cut into panels of 128 outputs (the last
may be narrower), each of them depth by depth, the outputs of a depth side by side. bfloat16: in each run of 32 outputs,
output i < 16 at place 2 i and output 16 + i at place 2 i + 1, so that a 32-bit word holds both in its two halves. Order
of the matrices: for each layer its last tap (2 G, R), its condition weight (2 G, A), its projection (R + S, G), residual
rows first, or (S, G) in the last layer, whose residual nobody reads; hidden (H, S); output (O, H); then for each layer
its other taps (2 G, (K - 1) R), oldest first.

Returned: samples (B, T), int64 or wide, the forced ones included; logits (B, T, O) wide, or (0,) without; the new rings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import library

GENERATE = "wavenet_generate"
SAMPLE = "wavenet_sample"

BLOCK = 32  # outputs of a matrix are padded to a multiple of it
PANEL = 128  # outputs that lie side by side


def _fake_generate(
    weights,
    offsets,
    biases,
    embedding,
    dilations,
    sizes,
    residual_scale,
    skip_scale,
    mixture,
    forced,
    condition,
    last,
    rings,
    seed,
    start,
    first_sequence,
    steps,
    temperature,
    keep_logits,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = rings.shape[0]
    length = steps + (0 if forced is None else forced.shape[1])
    return (
        last.new_empty((batch, length)),
        rings.new_empty((batch, length, sizes[5]) if keep_logits else (0,)),
        rings.new_empty(rings.shape),
    )


def _fake_sample(logits, seed, step, first_sequence, temperature, mixture) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=logits.dtype if mixture else torch.int64)


library.define(
    f"{GENERATE}(Tensor weights, Tensor offsets, Tensor biases, Tensor embedding, int[] dilations, int[] sizes, "
    "float residual_scale, float skip_scale, bool mixture, Tensor? forced, Tensor? condition, Tensor last, "
    "Tensor rings, Tensor seed, int start, int first_sequence, int steps, float temperature, bool keep_logits) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_generate,
)
# logits (B, O), wide and contiguous; step is the position of the sample
library.define(
    f"{SAMPLE}(Tensor logits, Tensor seed, int step, int first_sequence, float temperature, bool mixture) -> Tensor",
    _fake_sample,
)
