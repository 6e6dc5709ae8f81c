"""NADE, slowly: all conditionals at once, by the definition (Larochelle & Murray 2011, eqs. 3 and 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels.philox import key_of, philox


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))  # (torch's own is x where x is above 20: an error of 2e-9)


def nade_log_prob(x: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    """Returns sum_d x_d logit_d - log(1 + exp(logit_d)), with an (N, D, H) tensor on the way."""
    x, in_weight, in_bias, out_weight, out_bias = (
        _wide(tensor) for tensor in (x, in_weight, in_bias, out_weight, out_bias)
    )
    before = (x[:, :-1, None] * in_weight.T[:-1]).cumsum(1)  # (N, D - 1, H): sums over e <= d, for dimension d + 1
    start = in_bias.expand(x.shape[0], min(x.shape[1], 1), -1)
    activation = torch.cat([start, before + in_bias], dim=1)  # (N, D, H)
    logits = (torch.sigmoid(activation) * out_weight).sum(-1) + out_bias
    return (x * logits - _softplus(logits)).sum(-1)


def nade_sample(
    n: int,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    seed: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Draws one dimension after another; the random numbers are those of schema.py."""
    dtype, device = in_weight.dtype, in_weight.device
    in_weight, in_bias, out_weight, out_bias = (_wide(x) for x in (in_weight, in_bias, out_weight, out_bias))
    rows, dimensions = (torch.arange(size, device=device) for size in (n, in_weight.shape[1]))
    zero = torch.zeros((), dtype=torch.int64, device=device)
    word = philox((dimensions, rows[:, None], zero, zero), key_of(torch.tensor(seed, device=device)))[0]
    uniform = ((word >> 8).double() + 0.5) * 2.0**-24  # (n, D)
    x = in_bias.new_zeros(n, in_weight.shape[1])
    log_prob = in_bias.new_zeros(n)
    for d in range(in_weight.shape[1]):
        activation = in_bias + x[:, :d] @ in_weight.T[:d]
        logit = (torch.sigmoid(activation) @ out_weight[d] + out_bias[d]) / temperature
        x[:, d] = (uniform[:, d] < torch.sigmoid(logit).double()).to(x.dtype)
        log_prob += x[:, d] * logit - _softplus(logit)
    return x.to(dtype), log_prob
