"""Attention of packed sequences: rows of different lengths one after another, without padding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from mpkernels import checks, masks
from mpkernels.attention.attention import attention

_ALIGNMENTS = ("upper_left", "lower_right")


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` within each of N sequences that are packed one after another.

    The queries of sequence n are the rows cu_seqlens_q[n] to cu_seqlens_q[n + 1], and see the keys
    cu_seqlens_k[n] to cu_seqlens_k[n + 1] alone. That is one interval of keys a row, for one call of the kernels.

    Args:
        query: (T, H, E), the T queries of all sequences. dtypes as in :func:`attention`.
        key: (U, G, E); G = H, or with ``enable_gqa`` a divisor of H.
        value: (U, G, F).
        cu_seqlens_q: (N + 1,) int32 or int64: 0, then the lengths' running sum up to T.
        cu_seqlens_k: (N + 1,), the same for the keys, up to U. A query of a sequence without keys gets 0.
        causal: "upper_left": query i of a sequence sees its keys j <= i. "lower_right": j <= i + S - L in a sequence
            of L queries and S keys, so that the last query sees them all. None: all keys of the sequence.
        window: (left, right): query i sees i - left <= j <= i + right, -1 or None for no limit; the place of i is
            that of ``causal``, and i + S - L ("lower_right") without it.
        bias: added to the scores; broadcasts to (H, T, U). Differentiable.
        scale, enable_gqa, dropout_p, softcap, return_lse, seed, backend: as in :func:`attention`.

    Returns:
        out (T, H, F); with ``return_lse`` (out, lse), lse (T, H).

    Raises:
        TypeError, ValueError, mpkernels.BackendError: as :func:`attention`; ``cu_seqlens_q`` or ``cu_seqlens_k`` is
            no int32 or int64 tensor of one dimension, does not start at 0, end at T or U, or decreases. (Their values
            are read once per tensor, and not under torch.compile, torch.func or CUDA graph capture.)

    Example:
        >>> import torch
        >>> from mpkernels.attention import attention_varlen
        >>> x = torch.randn(10, 2, 16)
        >>> lengths = torch.tensor([0, 3, 10])  # 3 rows, then 7
        >>> out = attention_varlen(x, x, x, lengths, lengths, causal="upper_left")
        >>> torch.equal(out[0], x[0]), torch.equal(out[3], x[3])
        (True, True)
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.floating(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name}: expected shape (tokens, heads, head size), got {tuple(x.shape)}")
    _check_bounds("cu_seqlens_q", cu_seqlens_q, "query", query)
    _check_bounds("cu_seqlens_k", cu_seqlens_k, "key", key)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k: expected the shape of cu_seqlens_q, {tuple(cu_seqlens_q.shape)}, got "
            f"{tuple(cu_seqlens_k.shape)}"
        )
    if causal is not None and causal not in _ALIGNMENTS:
        raise ValueError(f"causal: expected None, 'upper_left' or 'lower_right', got {causal!r}")
    left, right = _check_window(window)
    if causal is not None:
        right = 0 if right is None else min(right, 0)
    first, last = _intervals(query.shape[0], cu_seqlens_q, cu_seqlens_k, left, right, causal or "lower_right")
    mask = masks.intervals(first, last)
    if bias is not None and isinstance(bias, Tensor) and bias.dim() > 3:
        raise ValueError(f"bias: expected a shape that broadcasts to (H, T, U), got {tuple(bias.shape)}")
    found = attention(
        *(x.transpose(0, 1)[None] for x in (query, key, value)),  # (1, H, T, E), heads last in memory
        mask=mask,
        bias=bias,
        scale=scale,
        enable_gqa=enable_gqa,
        dropout_p=dropout_p,
        softcap=softcap,
        return_lse=True,
        seed=seed,
        backend=backend,
    )
    out, lse = found[0][0].transpose(0, 1), found[1][0].transpose(0, 1)
    return (out, lse) if return_lse else out


def _intervals(
    rows: int, queries: Tensor, keys: Tensor, left: int | None, right: int | None, align: str
) -> tuple[Tensor, Tensor]:
    """(first, last), (T,) each, of packed sequences that start at ``queries`` and ``keys``."""
    queries, keys = queries.to(torch.int64), keys.to(torch.int64)
    row = torch.arange(rows, device=queries.device)
    # the last sequence that starts at or before the row: empty ones in front of it start there too
    sequence = torch.searchsorted(queries[1:].contiguous(), row, right=True).clamp(max=max(queries.shape[0] - 2, 0))
    start, end = keys[sequence], keys[sequence + 1]
    place = row - queries[sequence] + start  # the key that stands at the query's own place
    if align == "lower_right":
        place = place + (end - start) - (queries[sequence + 1] - queries[sequence])
    first = start if left is None else torch.maximum(start, place - left)
    last = end if right is None else torch.minimum(end, place + right + 1)
    return first, torch.maximum(last, torch.zeros_like(last))


def _check_window(window) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window: expected (left, right), got {window!r}")
    for x in window:
        if x is not None and (isinstance(x, bool) or not isinstance(x, int)):
            raise TypeError(f"window: expected integers or None, got {window!r}")
        if x is not None and x < -1:
            raise ValueError(f"window: expected at least 0, or -1 or None for no limit, got {window!r}")
    left, right = (None if x == -1 else x for x in window)
    return left, right


def _check_bounds(name: str, bounds: object, like_name: str, like: Tensor) -> None:
    """Raises unless ``bounds`` are 0, then sums of lengths up to the length of ``like``."""
    checks.tensor(name, bounds)
    assert isinstance(bounds, Tensor)
    if bounds.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {bounds.dtype}")
    if bounds.dim() != 1 or bounds.shape[0] < 2:
        raise ValueError(f"{name}: expected shape (N + 1,) for N >= 1 sequences, got {tuple(bounds.shape)}")
    if bounds.device != like.device:
        raise ValueError(f"{name}: expected the device of {like_name}, {like.device}, got {bounds.device}")
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or isinstance(bounds, FakeTensor)
        or bounds.is_meta
        or (bounds.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return
    total = like.shape[0]
    version = None if bounds.is_inference() else (bounds._version, total)
    if version is not None and getattr(bounds, "_mpkernels_sequences", None) == version:
        return
    # one transfer answers all questions
    begin, end, least = torch.stack([bounds[0], bounds[-1], bounds.diff().min()]).tolist()
    if begin != 0 or end != total:
        raise ValueError(
            f"{name}: expected to start at 0 and end at {total} (the length of {like_name}), got {begin} and {end}"
        )
    if least < 0:
        at = int((bounds.diff() < 0).nonzero()[0])
        raise ValueError(f"{name}: expected not to decrease, got {bounds[at : at + 2].tolist()} at {at}")
    bounds._mpkernels_sequences = version  # pyright: ignore[reportAttributeAccessIssue]
