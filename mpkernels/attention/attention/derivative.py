"""The gradient of attention as differentiable torch operations, for derivatives of second and higher order.

The kernels compute first derivatives. To differentiate those again, this module writes the same gradient with torch
operations that autograd knows, scores stored. It is slower than the kernels and is used for nothing else.

With the weights P, the dropped and rescaled weights D = P keep / (1 - p), the gradient g of out and that of lse, r:

    dV = D^T g          dD = g V^T          delta_i = sum_j P_ij dP_ij          dS = P (dP - delta + r)
    dbias = dS          dQ = scale dS' K    dK = scale dS'^T Q,                 dS' = dS (1 - tanh^2) with a softcap

Hidden pairs must not touch each other, whatever they hold. Numbers that are not finite are therefore kept out of the
matrix products (0 times NaN is NaN), and put back into the pairs that see them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels.attention.attention import dropout, schema


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def _marks(x: Tensor) -> Tensor:
    """0 for every row of finite numbers, NaN for the others: (..., N, E) -> (..., N)."""
    return torch.where(x.isfinite().all(-1), 0.0, torch.nan)


def attention_gradient(
    grad_out: Tensor | None,  # (B, H, L, F)
    grad_lse: Tensor | None,  # (B, H, L)
    query: Tensor,  # (B, H, L, E)
    key: Tensor,  # (B, G, S, E)
    value: Tensor,  # (B, G, S, F)
    first: Tensor | None,
    last: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of (query, key, value, bias); that of bias is None where there is no bias. Shapes as in schema.py."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, rows, _ = query.shape
    key_heads, keys = key.shape[1], key.shape[2]

    def by_group(x: Tensor) -> Tensor:  # (B, H, ...) -> (B, G, H / G, ...)
        return x.unflatten(1, (key_heads, heads // key_heads))

    def pairs(x: Tensor) -> Tensor:  # (1 or B, 1 or H, 1 or L, 1 or S) -> (B, G, H / G, L, S)
        return by_group(x.expand(batch, heads, rows, keys))

    visible = torch.ones((), dtype=torch.bool, device=query.device)
    if first is not None and last is not None:
        j = torch.arange(keys, device=query.device)
        visible = pairs((first[..., None] <= j) & (j < last[..., None]))
    if mask is not None:
        visible = visible & pairs(mask)

    if bias is not None:
        visible = visible & ~(pairs(bias) <= schema.HIDES)

    q = by_group(query.to(wide))
    k, v = (x.to(wide)[:, :, None] for x in (key, value))  # (B, G, 1, S, .)
    marked = _marks(q)[..., :, None] + _marks(k)[..., None, :]
    scores = scale * (_finite(q) @ _finite(k).transpose(-1, -2)) + marked
    bent = None
    if softcap > 0:
        bent = torch.tanh(scores / softcap)
        scores = softcap * bent
    if bias is not None:
        scores = scores + pairs(bias).to(wide)
    scores = torch.where(visible, scores, -torch.inf)
    largest = torch.nn.functional.pad(scores.detach(), (0, 1), value=-torch.inf).amax(-1, keepdim=True)
    seen = visible & (largest != -torch.inf)
    exponentials = torch.where(seen, torch.exp(torch.where(seen, scores - largest, 0.0)), 0.0)
    weights = exponentials / torch.where(largest == -torch.inf, 1.0, exponentials.sum(-1, keepdim=True))

    grad_weights = None
    if grad_out is not None:
        g = by_group(grad_out.to(wide))
        grad_weights = _finite(g) @ _finite(v).transpose(-1, -2) + _marks(g)[..., :, None] + _marks(v)[..., None, :]
        kept = weights
        if seed is not None and dropout_p > 0:
            stays = by_group(dropout.kept(seed, dropout_p, batch, heads, rows, keys))
            factor = 1 / max(1 - dropout_p, torch.finfo(wide).tiny)
            kept = torch.where(stays, weights * factor, 0.0)
            grad_weights = torch.where(stays, grad_weights * factor, 0.0)
        reaching = torch.where(visible, _marks(g)[..., :, None], 0.0).sum(-2)  # NaN for keys that a bad row sees
        grad_value = (kept.transpose(-1, -2) @ _finite(g) + reaching[..., None]).sum(2)
        grad_weights = torch.where(seen, grad_weights, 0.0)
    else:
        grad_value = torch.zeros_like(v[:, :, 0])

    grad_scores = torch.zeros_like(weights)
    if grad_weights is not None:
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    if grad_lse is not None:
        grad_scores = grad_scores + weights * by_group(grad_lse.to(wide))[..., None]
    grad_scores = torch.where(seen, grad_scores, 0.0)

    grad_bias = None
    if bias is not None:
        grad_bias = grad_scores.flatten(1, 2).sum_to_size(bias.shape).to(bias.dtype)
    if bent is not None:
        grad_scores = torch.where(seen, grad_scores * (1 - bent * bent), 0.0)
    grad_query = (scale * (grad_scores @ _finite(k))).flatten(1, 2)
    grad_key = (scale * (grad_scores.transpose(-1, -2) @ _finite(q))).sum(2)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), grad_bias
