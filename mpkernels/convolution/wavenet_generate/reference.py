"""WaveNet's sample loop, slowly: for every new sample the whole network over everything since the loop began.

Formulas and shapes: schema.py. Nothing is kept from one sample to the next but the samples themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpkernels.philox import WORD, key_of, philox


def network(
    x: Tensor,  # (B, R, T), the inputs of layer 0
    weights: Sequence[Tensor],  # each (2 G, R, K)
    offsets: Tensor,  # (L, B or 1, 2 G)
    projections: Sequence[tuple[Tensor, Tensor]],  # each ((R + S or S, G), its bias)
    condition_weights: Sequence[Tensor | None],  # each (2 G, A)
    outputs: Sequence[tuple[Tensor, Tensor]],  # ((H, S), (H,)) and ((O, H), (O,))
    dilations: Sequence[int],
    residual_scale: float,
    skip_scale: float,
    condition: Tensor | None,  # (B, A, T)
    past: Sequence[Tensor],  # each (B, R, (K - 1) dilation), newest last
) -> tuple[Tensor, list[Tensor]]:
    """Returns (logits (B, O, T), the inputs of every layer with their past in front)."""
    length = x.shape[2]
    skip, inputs = None, []
    for i, dilation in enumerate(dilations):
        xs = torch.cat([past[i], x], 2)
        inputs.append(xs)
        taps = weights[i].shape[2]
        z = sum(weights[i][:, :, k] @ xs[:, :, k * dilation : k * dilation + length] for k in range(taps))
        condition_weight = condition_weights[i]
        if condition is not None and condition_weight is not None:
            z = z + condition_weight @ condition
        z = z + offsets[i][:, :, None]
        filters, gates = z.chunk(2, 1)
        h = torch.tanh(filters) * torch.sigmoid(gates)
        projection, bias = projections[i]
        y = projection @ h + bias[:, None]
        rows = 0 if i == len(dilations) - 1 else x.shape[1]
        skip = y[:, rows:] if skip is None else skip + y[:, rows:]
        if rows > 0:
            x = residual_scale * (x + y[:, :rows])
    assert skip is not None
    y = skip * skip_scale
    for weight, bias in outputs:
        y = weight @ torch.relu(y) + bias[:, None]
    return y, inputs


def uniform(seed: Tensor, step: int, sequences: Tensor, draw: int) -> Tensor:
    """Numbers in (0, 1), float64, one for each of the (B,) sequences."""
    zero = torch.zeros_like(sequences)
    counter = (zero + (step & WORD), sequences, zero + draw, zero + (step >> 32))
    return ((philox(counter, key_of(seed))[0] >> 8).double() + 0.5) * 2.0**-24


def sample(logits: Tensor, seed: Tensor, step: int, first_sequence: int, temperature: float, mixture: bool) -> Tensor:
    """Samples (B,) from logits (B, O)."""
    sequences = torch.arange(logits.shape[0], device=logits.device) + first_sequence
    if not mixture:
        return _categorical(logits, uniform(seed, step, sequences, 0), temperature)
    weight, mean, log_scale = logits.chunk(3, 1)
    component = _categorical(weight, uniform(seed, step, sequences, 0), temperature)[:, None]
    mean, log_scale = mean.gather(1, component)[:, 0], log_scale.gather(1, component)[:, 0]
    if temperature > 0:
        u = uniform(seed, step, sequences, 1)
        mean = mean + temperature * torch.exp(log_scale) * (torch.log(u) - torch.log1p(-u)).to(mean.dtype)
    return mean.clamp(-1, 1)


def _categorical(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return logits.argmax(1)
    e = torch.exp((logits - logits.max(1, keepdim=True).values) / temperature)
    sums = e.cumsum(1).double()
    below = sums <= u[:, None] * sums[:, -1:]
    return below.sum(1).clamp(max=logits.shape[1] - 1)


def generate(
    embedding: Tensor,  # (classes, R), or (2, R) of a mixture
    weights: Sequence[Tensor],
    offsets: Tensor,
    projections: Sequence[tuple[Tensor, Tensor]],
    condition_weights: Sequence[Tensor | None],
    outputs: Sequence[tuple[Tensor, Tensor]],
    dilations: Sequence[int],
    residual_scale: float,
    skip_scale: float,
    mixture: bool,
    forced: Tensor | None,  # (B, T0)
    condition: Tensor | None,  # (B, A, T)
    last: Tensor,  # (B,)
    rings: Tensor,  # (B, rows, R)
    seed: Tensor,
    start: int,
    first_sequence: int,
    steps: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (samples (B, T), logits (B, T, O), the new rings); what is computed in is the dtype of the arguments."""
    given = 0 if forced is None else forced.shape[1]
    length = given + steps
    past, first = [], 0
    for weight, dilation in zip(weights, dilations, strict=True):
        left = (weight.shape[2] - 1) * dilation
        past.append(rings[:, first : first + left].roll(-(start % left) if left else 0, 1).transpose(1, 2))
        first += left

    def run(samples: Tensor):
        before = torch.cat([last[:, None], samples], 1)[:, : samples.shape[1]]
        x = embedding[0] * before[..., None] + embedding[1] if mixture else embedding[before]
        now = None if condition is None else condition[:, :, : samples.shape[1]]
        return network(
            x.transpose(1, 2),
            weights,
            offsets,
            projections,
            condition_weights,
            outputs,
            dilations,
            residual_scale,
            skip_scale,
            now,
            past,
        )

    samples = last.new_zeros((last.shape[0], 0)) if forced is None else forced
    for t in range(given, length):
        logits, _ = run(torch.cat([samples, last[:, None]], 1))  # the last one is not read
        new = sample(logits[:, :, t], seed, start + t, first_sequence, temperature, mixture)
        samples = torch.cat([samples, new[:, None]], 1)
    logits, inputs = run(samples)
    new_rings = [
        xs[:, :, length:].transpose(1, 2).roll((start + length) % (xs.shape[2] - length), 1)
        for xs in inputs
        if xs.shape[2] > length
    ]
    return samples, logits.transpose(1, 2), torch.cat(new_rings, 1) if new_rings else rings.clone()
