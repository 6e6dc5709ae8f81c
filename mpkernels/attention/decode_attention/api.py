"""The public function of attention with a cache of keys and values: it checks its input and chooses a backend."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from mpkernels import backends, checks, masks
from mpkernels.attention.decode_attention import reference, schema

MOST_QUERIES = 16
MOST_WIDTH = 256


@overload
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Tensor | int | None = None,
    mask: masks.Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Tensor | int | None = None,
    mask: masks.Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Tensor | int | None = None,
    mask: masks.Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Tensor | int | None = None,
    mask: masks.Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one or few new queries to a long cache of keys and values, as generation needs it.

    out_i = sum_j softmax_j(scale q_i . k_j + bias_ij) v_j (Vaswani et al. 2017, "Attention is all you need", eq. 1)
    over the keys that query i sees. The queries are the last L of the sequence that the cache holds, and causal: query
    i sees the keys j <= length - L + i. The query heads of one key head are computed together, so that the cache is
    read once; long caches are split over keys. The same bits in every run and for any number of threads, and for a
    sequence alone or in a batch. There are no gradients: to train, use
    :func:`mpkernels.attention.attention`.

    Args:
        query: (B, H, L, E), L <= 16, E <= 256. float32, float64, bfloat16 or float16 (computed in float32).
        key: (B, G, S, E), H a multiple of G: query head h reads key head h // (H // G). It may be the transposed view
            of a (B, S, G, E) tensor: nothing is copied unless the last dimension is strided.
        value: (B, G, S, F), F <= 256, in either layout too.
        lengths: how many keys of each sequence are in use, the new ones included: (B,) integers, or one for all, in
            [0, S]. Default: S. Keys behind may hold anything. Where a length is below L, the first queries see no key.
            Lengths on a GPU are not read to check them; they count as limited to [0, S].
        mask: a further mask of :mod:`mpkernels.masks` over (L, S), or a bool tensor that broadcasts to (B, H, L, S),
            True where a query sees a key. It counts queries and keys from the start of the tensors, and knows nothing
            of ``lengths``.
        bias: added to the scores; broadcasts to (B, H, L, S), the dtype of query. -1e30 and less hide a key.
        scale: factor of the scores; default 1 / sqrt(E).
        softcap: scores become softcap tanh(score / softcap), before the bias. Default (and 0): they do not.
        return_lse: whether to return the logarithm of the sum of the exponentials too.
        backend: "reference", "cpu" or "cuda"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        out (B, H, L, F) in the dtype of query, in the memory order of query; with ``return_lse`` a pair (out, lse),
        lse (B, H, L) in float32 (float64 for float64). A query that sees no key gets out 0 and lse -inf; a NaN in a
        hidden key or its value goes nowhere.

    Raises:
        TypeError: an argument is no tensor, or has an integer or a different dtype.
        ValueError: shapes or devices do not match, a length is not in [0, S], there are more than 16 queries, or a
            gradient is asked for.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.attention import decode_attention
        >>> query = torch.randn(2, 8, 1, 64)
        >>> key, value = torch.randn(2, 2, 100, 64), torch.randn(2, 2, 100, 64)
        >>> decode_attention(query, key, value, lengths=torch.tensor([100, 37])).shape
        torch.Size([2, 8, 1, 64])
    """
    _check_shapes(query, key, value)
    for name, x in (("query", query), ("key", key), ("value", value), ("bias", bias)):
        if x is not None and torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor that needs no gradient, got one with requires_grad: decode_attention has "
                "none; use mpkernels.attention.attention, or torch.no_grad()"
            )
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else _number("scale", scale)
    softcap = 0.0 if softcap is None else _number("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap: expected a number above 0, or 0 or None for none, got {softcap}")
    batch, heads, rows, _ = query.shape
    shape = (batch, heads, rows, key.shape[2])
    if bias is not None:
        checks.same_kind("bias", bias, "query", query)
        bias = _four_dimensions("bias", bias, shape)
    first, last, dense = _visible(query, shape, lengths, mask)

    chosen = backends.choose(schema.FORWARD, query.device.type, backend)
    if chosen == "reference":
        found = reference.decode_attention(query, key, value, first, last, dense, bias, scale, softcap)
    else:
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        heads_last = rows > 1 and heads > 1 and query.stride(1) < query.stride(2)
        found = backends.call(chosen, schema.FORWARD)(
            query, key, value, first, last, dense, bias, scale, softcap, heads_last
        )
    return found if return_lse else found[0]


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    checks.floating("query", query)
    if query.dim() != 4:
        raise ValueError(f"query: expected shape (B, H, L, E), got {tuple(query.shape)}")
    batch, heads, rows, width = query.shape
    if rows > MOST_QUERIES:
        raise ValueError(
            f"query: expected at most {MOST_QUERIES} queries, got shape {tuple(query.shape)}; "
            "for more, use mpkernels.attention.attention"
        )
    if not 1 <= width <= MOST_WIDTH:
        raise ValueError(f"query: expected a head size from 1 to {MOST_WIDTH}, got shape {tuple(query.shape)}")
    checks.same_kind("key", key, "query", query)
    if key.dim() != 4 or key.shape[0] != batch or key.shape[-1] != width:
        raise ValueError(f"key: expected shape {(batch, 'G', 'S', width)}, that of query, got {tuple(key.shape)}")
    groups = key.shape[1]
    if heads % groups if groups else heads:
        raise ValueError(f"key: expected a number of heads that divides the {heads} of query, got {tuple(key.shape)}")
    checks.same_kind("value", value, "query", query)
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value: expected shape {(*key.shape[:3], 'F')}, that of key, got {tuple(value.shape)}")
    if not 1 <= value.shape[-1] <= MOST_WIDTH:
        raise ValueError(f"value: expected a head size from 1 to {MOST_WIDTH}, got shape {tuple(value.shape)}")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def _four_dimensions(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``x`` with leading dimensions of 1, checked to broadcast to ``shape``."""
    padded = (1,) * (4 - x.dim()) + tuple(x.shape)
    if len(padded) != 4 or any(size not in (1, full) for size, full in zip(padded, shape, strict=True)):
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape}, (B, H, L, S), got {tuple(x.shape)}")
    return x.reshape(padded)


def _visible(
    query: Tensor, shape: tuple[int, ...], lengths: Tensor | int | None, mask: masks.Mask | Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(first, last, dense mask): the lengths, that queries are causal, and the mask, together."""
    batch, _, rows, keys = shape
    first, last, dense = (None, None, None) if mask is None else masks.resolve(mask, shape, query.device)
    if lengths is not None or rows > 1:
        ends = _ends(query, batch, keys, lengths)  # (B or 1,), or a number
        seen = torch.arange(1 - rows, 1, device=query.device) + ends  # (B or 1, L) or (L,)
        limit = seen.clamp(0, keys).to(torch.int32).reshape(-1, 1, rows)
        first = torch.zeros_like(limit) if first is None else first
        last = limit if last is None else torch.minimum(last, limit)
        first, last = (x.contiguous() for x in torch.broadcast_tensors(first, last))
    return first, last, None if dense is None else _four_dimensions("mask", dense, shape)


def _ends(query: Tensor, batch: int, keys: int, lengths: Tensor | int | None) -> Tensor | int:
    """The lengths as int64 (B, 1), or the one length of all; checked where that needs no wait for a GPU."""
    if lengths is None:
        return keys
    if isinstance(lengths, int) and not isinstance(lengths, bool):
        if not 0 <= lengths <= keys:
            raise ValueError(f"lengths: expected numbers in [0, {keys}], the keys of the cache, got {lengths}")
        return lengths
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths: expected a torch.Tensor of integers or an int, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths: expected int32 or int64, got {lengths.dtype}")
    if lengths.device != query.device:
        raise ValueError(f"lengths: expected the device of query, {query.device}, got {lengths.device}")
    checks.shape("lengths", lengths, (batch,), "one for each sequence")
    if lengths.device.type == "cpu" and batch > 0 and not torch.compiler.is_compiling():
        low, high = (int(x) for x in lengths.aminmax())
        if low < 0 or high > keys:
            raise ValueError(f"lengths: expected numbers in [0, {keys}], the keys of the cache, got {lengths.tolist()}")
    return lengths.to(torch.int64).clamp(0, keys)[:, None]
