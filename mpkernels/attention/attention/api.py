"""The public function of attention: checks its input and chooses a backend."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.attention.attention import autograd, reference, schema

LARGEST_HEAD = 256
_MOST = 2**31 - 1


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask=None,
    bias: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention: every query's average of the values, weighted by how well their keys match.

    s_ij = scale q_i . k_j + bias_ij, out_i = sum_j softmax_j(s_ij) v_j over the keys j that ``mask`` lets query i see
    (Vaswani et al. 2017, "Attention is all you need", eq. 1). Scores are never stored. Keys outside of the mask are
    skipped in blocks, forward and backward.

    A query that sees no key gets out = 0, lse = -inf and gradients 0. What a query does not see cannot touch it: a NaN
    in a hidden key or value reaches neither its output nor its gradient. All gradients are exact, of any order, and
    the same bits in every run.

    Args:
        query: (..., H, L, E), or (L, E) for one head. float32, float64, bfloat16 or float16 (accumulated in float32).
            Dimensions in front of the heads broadcast between query, key and value.
        key: (..., G, S, E). G = H, or with ``enable_gqa`` a divisor of H. Head sizes E and F from 1 to 256.
        value: (..., G, S, F).
        mask: which keys a query sees: an object of :mod:`mpkernels.masks`, or a bool tensor that broadcasts to
            (..., H, L, S), True where it sees.
        bias: added to the scores; broadcasts to (..., H, L, S), dtype of ``query``. Differentiable. Where it is
            -1e30 or less (-inf, the lowest float32) the pair has no weight; a row of nothing else sees no key. (Keys
            that may hold NaN need a mask: a bias hides them too late.)
        scale: factor of the scores. Default 1 / sqrt(E).
        enable_gqa: grouped queries: query head h reads key head h // (H / G).
        dropout_p: the share of the weights that is dropped, in [0, 1]. The others are divided by 1 - dropout_p.
        softcap: scores become softcap tanh(score / softcap), before the bias is added. Positive.
        return_lse: whether to return the logarithm of the sum of the exponentials too.
        seed: of the dropout: an int, or an int64 tensor of no dimensions. All backends drop the same weights for it.
            Default: drawn from torch's generator of the CPU, which torch.manual_seed rules.
        backend: "reference", "cpu" or "triton"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        out (..., H, L, F) in the dtype of ``query``, in the memory order of ``query`` where that is a transposed view
        of (B, L, H, E); with ``return_lse`` (out, lse), lse (..., H, L) the natural logarithm, in float32 (float64
        for float64), differentiable.

    Raises:
        TypeError: an argument is no tensor, has an integer or a different dtype, is no number.
        ValueError: shapes or devices do not match, or a number is outside of its range.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.attention import attention
        >>> query, key, value = torch.randn(3, 2, 8, 100, 64).unbind()
        >>> attention(query, key, value).shape
        torch.Size([2, 8, 100, 64])
        >>> visible = torch.ones(100, 100, dtype=torch.bool).tril()
        >>> out, lse = attention(query, key, value, mask=visible, return_lse=True)
        >>> lse.shape
        torch.Size([2, 8, 100])
    """
    lead, heads = _check_shapes(query, key, value, enable_gqa)
    rows, keys = query.shape[-2], key.shape[-2]
    plain = query.dim() == key.dim() == value.dim() == 2  # one head, without a dimension for it
    scores = (*lead, heads, rows, keys)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else _number("scale", scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if softcap is not None and not 0 < (softcap := _number("softcap", softcap)) < math.inf:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    if not 0 <= (dropout_p := _number("dropout_p", dropout_p)) <= 1:
        raise ValueError(f"dropout_p: expected a number in [0, 1], got {dropout_p}")
    batch = math.prod(lead)
    if dropout_p > 0 and batch * heads > _MOST:
        raise ValueError(f"query: expected at most {_MOST} heads in all with dropout, got {batch * heads}")
    drawn = _seed(seed, query.device) if dropout_p > 0 or seed is not None else None

    first, last, visible = _mask(mask, scores, query.device)
    of_rows = None
    if bias is not None:
        _check_bias(bias, query, scores)
        if bias.dim() == 0 or (bias.shape[-1] == 1 and keys != 1):
            bias, of_rows = None, bias

    heads_last = query.dim() == 4 and heads > 1 and rows > 1 and query.stride(1) < query.stride(2)
    chosen = backends.choose(schema.FORWARD, query.device.type, backend)
    arguments = (
        _heads(query, lead),
        _heads(key, lead),
        _heads(value, lead),
        _flat(first, lead, 2),
        _flat(last, lead, 2),
        _flat(visible, lead, 3),
        _flat(bias, lead, 3),
        drawn if dropout_p > 0 else None,
        scale,
        softcap or 0.0,
        dropout_p,
    )
    if chosen == "reference":
        out, lse = reference.attention(*arguments)
    else:
        out, lse = autograd.run(*arguments, heads_last, backend=chosen)

    if plain:
        out, lse = out[0, 0], lse[0, 0]
    elif len(lead) != 1:
        out, lse = out.reshape(*lead, *out.shape[1:]), lse.reshape(*lead, *lse.shape[1:])
    if of_rows is not None:
        out, lse = _add_to_rows(out, lse, of_rows)
    return (out, lse) if return_lse else out


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[tuple[int, ...], int]:
    """Raises unless the three belong together; returns the dimensions in front of the heads, and H."""
    checks.floating("query", query)
    checks.same_kind("key", key, "query", query)
    checks.same_kind("value", value, "query", query)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2:
            raise ValueError(f"{name}: expected shape (..., length, head size), got {tuple(x.shape)}")
        if not 1 <= x.shape[-1] <= LARGEST_HEAD:
            raise ValueError(f"{name}: expected a head size from 1 to {LARGEST_HEAD}, got {tuple(x.shape)}")
        if x.shape[-2] > _MOST:
            raise ValueError(f"{name}: expected a length below 2^31, got {tuple(x.shape)}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key: expected the head size of query, {query.shape[-1]}, got {key.shape[-1]} (shape {tuple(key.shape)})"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"value: expected the length of key, {key.shape[-2]}, got {value.shape[-2]} (shape {tuple(value.shape)})"
        )
    heads, key_heads, value_heads = (x.shape[-3] if x.dim() > 2 else 1 for x in (query, key, value))
    if value_heads != key_heads:
        raise ValueError(f"value: expected the heads of key, {key_heads}, got {value_heads}")
    if heads < 1 or key_heads < 1:
        raise ValueError(f"query: expected one head or more in query and key, got {heads} and {key_heads}")
    if heads != key_heads and (not enable_gqa or heads % key_heads):
        remedy = "a multiple of the heads of key" if enable_gqa else "the heads of key (or enable_gqa=True)"
        raise ValueError(f"query: expected {remedy}, {key_heads}, got {heads} heads")
    leads = [x.shape[:-3] for x in (query, key, value)]
    if leads[0] == leads[1] == leads[2]:
        return tuple(leads[0]), heads
    try:
        return tuple(torch.broadcast_shapes(*leads)), heads
    except RuntimeError:
        raise ValueError(
            "query: expected dimensions in front of the heads that broadcast with those of key and value, got "
            f"{tuple(leads[0])}, {tuple(leads[1])} and {tuple(leads[2])}"
        ) from None


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def _seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64).to(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim():
            raise TypeError(
                f"seed: expected an int or an int64 tensor of shape (), got {seed.dtype} {tuple(seed.shape)}"
            )
        return seed.to(device)
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed: expected an int or an int64 tensor of shape (), got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a number of 64 bits, got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=device)


def _check_broadcast(name: str, x: Tensor, scores: Sequence[int]) -> None:
    """Raises unless ``x`` broadcasts to the scores' shape."""
    missing = len(scores) - x.dim()
    if missing < 0 or any(size not in (1, full) for size, full in zip(x.shape, scores[missing:], strict=True)):
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {tuple(scores)} (..., H, L, S), got {tuple(x.shape)}"
        )


def _check_bias(bias: Tensor, query: Tensor, scores: Sequence[int]) -> None:
    checks.same_kind("bias", bias, "query", query)
    _check_broadcast("bias", bias, scores)


def _mask(mask, scores: Sequence[int], device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(first, last, visible) of a mask: the interval of keys of every row, and what no interval can say."""
    if mask is None:
        return None, None, None
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, True where a query sees a key, got {mask.dtype}")
        if mask.device != device:
            raise ValueError(f"mask: expected the device of query, {device}, got {mask.device}")
        _check_broadcast("mask", mask, scores)
        return None, None, mask
    from mpkernels import masks

    return masks.resolve(mask, scores, device)


def _heads(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    """(..., H, L, E) as (B, H, L, E)."""
    if x.dim() == 2:
        x = x[None]
    if len(lead) == 1 and x.dim() == 4 and x.shape[0] == lead[0]:
        return x
    return x.expand(*lead, *x.shape[-3:]).reshape(math.prod(lead), *x.shape[-3:])


def _flat(x: Tensor | None, lead: tuple[int, ...], trailing: int) -> Tensor | None:
    """What broadcasts to (..., H, L) or (..., H, L, S) with one dimension for the batch, 1 or B."""
    if x is None:
        return None
    missing = len(lead) + trailing - x.dim()
    if missing > 0:
        x = x[(None,) * missing]
    front = x.shape[: len(lead)]
    if len(lead) == 1:
        return x
    if all(size == 1 for size in front):
        return x.reshape(1, *x.shape[len(lead) :])
    return x.expand(*lead, *x.shape[len(lead) :]).reshape(math.prod(lead), *x.shape[len(lead) :])


def _add_to_rows(out: Tensor, lse: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A bias that is the same for all keys of a row, (..., 1): it moves lse alone, unless it hides the row."""
    bias = (bias[..., 0] if bias.dim() else bias).to(lse.dtype)
    if bias.dim() > lse.dim():  # a single head without a dimension for it: (1, L)
        bias = bias.reshape(bias.shape[-1:])
    hidden = (bias <= schema.HIDES).expand(lse.shape)
    # 0, or NaN for what is neither finite nor hides; a function of the bias, so that out has its gradient: zeros
    nothing = torch.where(hidden | bias.isfinite(), 0.0, bias - bias)
    replaced = hidden | ~bias.isfinite()
    out = torch.where(replaced[..., None], nothing[..., None].to(out.dtype), out)
    return out, torch.where(hidden | (lse == -torch.inf), -torch.inf, lse + bias)
