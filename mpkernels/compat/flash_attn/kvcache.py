"""flash_attn_with_kvcache: attention to a cache that the new keys and values are written into first."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import checks
from mpkernels.compat.flash_attn import core

_NAMES = {**core.NAMES, "key": "k_cache", "value": "v_cache"}


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries to a cache of keys and values, as flash_attn.flash_attn_with_kvcache. No gradients.

    New keys and values, where given, are written into the cache in place behind its first ``cache_seqlens`` keys, and
    count from then on. Up to 16 queries go to mpkernels' decode_attention, which reads the cache once for all query
    heads of a key head.

    Args:
        q: (B, L, H, D).
        k_cache: (B or more, S, G, D); with ``block_table`` (blocks, block size, G, D).
        v_cache: (B or more, S, G, F); with ``block_table`` (blocks, block size, G, F).
        k: (B, N, G, D), new keys, or None. Needs ``v`` and ``cache_seqlens``.
        v: (B, N, G, F), new values.
        rotary_cos: (M, R / 2), R <= D: the first R numbers of q and k are turned by the angles of their positions
            (rotary embedding) first. Needs ``k``. k at the positions from ``cache_seqlens`` on, q too where ``causal``
            or a window is set, else all of q at ``cache_seqlens``.
        rotary_sin: (M, R / 2).
        cache_seqlens: how many keys of the cache are in use, without the new ones: (B,) int32 or int64, or one for all.
            Default: S. Keys behind may hold anything.
        cache_batch_idx: (B,) integers, the rows of the cache to use. Default 0, 1, ... Those rows are copied to be
            read. Not together with ``block_table``.
        cache_leftpad: (B,) integers, the first key in use of each row. Default 0.
        block_table: (B, blocks a sequence) integers, the blocks of the cache that hold each sequence, in order. They
            are copied to be read.
        causal: query i sees the keys j <= i + S' - L, S' the length with the new keys.
        softmax_scale, window_size, softcap, alibi_slopes: as in :func:`flash_attn_func`, for that length.
        rotary_interleaved: whether numbers 0 and 1, 2 and 3, ... are turned together, or 0 and R / 2, 1 and R / 2 + 1.
        num_splits: accepted; how a cache is split over threads never changes a bit of the result here.
        return_softmax_lse: whether to return (out, softmax_lse), softmax_lse (B, H, L).

    Returns:
        out (B, L, H, F).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape, or new keys do not fit in (that
            is checked where it needs no wait for a GPU); the message names the argument.

    Example:
        >>> import torch
        >>> from mpkernels.compat.flash_attn import flash_attn_with_kvcache
        >>> k_cache, v_cache = torch.zeros(2, 256, 2, 64), torch.zeros(2, 256, 2, 64)
        >>> q, k, v = torch.randn(2, 1, 8, 64), torch.randn(2, 1, 2, 64), torch.randn(2, 1, 2, 64)
        >>> lengths = torch.tensor([10, 200], dtype=torch.int32)
        >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True).shape
        torch.Size([2, 1, 8, 64])
        >>> torch.equal(k_cache[1, 200], k[1, 0])
        True
    """
    core.check("q", q, "(B, L, H, D)", (None, None, None, None))
    batch, rows, heads, width = q.shape
    form = "(blocks, block size, G, D)" if block_table is not None else "(B or more, S, G, D)"
    core.check("k_cache", k_cache, form, (None, None, None, width))
    core.check("v_cache", v_cache, form.replace("D", "F"), (*k_cache.shape[:3], None))
    checks.same_kind("k_cache", k_cache, "q", q)
    checks.same_kind("v_cache", v_cache, "q", q)
    core.check_slopes(alibi_slopes, batch, heads, q.device)
    window = core.window_of(window_size, causal)
    softcap_ = core.softcap_of(softcap)
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ValueError("cache_batch_idx: expected None together with block_table, got both")
        core.check_integers("block_table", block_table, q.device, (batch, None), f"({batch}, blocks a sequence)")
        keys = block_table.shape[1] * k_cache.shape[1]
    else:
        keys = k_cache.shape[1]
    if cache_batch_idx is not None:
        core.check_integers("cache_batch_idx", cache_batch_idx, q.device, (batch,), f"({batch},)")
    elif block_table is None and k_cache.shape[0] < batch:
        raise ValueError(
            f"k_cache: expected at least the {batch} rows of q (or cache_batch_idx), got {tuple(k_cache.shape)}"
        )
    if cache_leftpad is not None:
        core.check_integers("cache_leftpad", cache_leftpad, q.device, (batch,), f"({batch},)")
    fresh = _check_new(q, k, v, k_cache, v_cache, cache_seqlens, rotary_cos, rotary_sin)
    lengths = _lengths(cache_seqlens, batch, keys, fresh, q.device)

    if rotary_cos is not None and rotary_sin is not None:
        assert k is not None
        assert lengths is not None
        start = lengths[:, None]  # (B, 1)
        turned = start + torch.arange(rows, device=q.device) if window != (None, None) else start.expand(-1, rows)
        q = _rotate(q, rotary_cos, rotary_sin, turned, rotary_interleaved)
        k = _rotate(k, rotary_cos, rotary_sin, start + torch.arange(fresh, device=q.device), rotary_interleaved)
    if k is not None and v is not None:
        assert lengths is not None
        place = lengths[:, None] + torch.arange(fresh, device=q.device)  # (B, N)
        if block_table is not None:
            size = k_cache.shape[1]
            row, place = block_table.to(torch.int64).gather(1, place // size), place % size
        elif cache_batch_idx is not None:
            row = cache_batch_idx.to(torch.int64)[:, None]
        else:
            row = torch.arange(batch, device=q.device)[:, None]
        k_cache.index_put_((row, place), k)
        v_cache.index_put_((row, place), v)
        lengths = lengths + fresh

    if block_table is not None:
        table = block_table.to(torch.int64)
        if core.readable(lengths) and batch:
            assert lengths is not None
            table = table[:, : -(-int(lengths.max()) // k_cache.shape[1])]  # not the blocks behind the longest
        table = table.clamp(0, max(k_cache.shape[0] - 1, 0))  # entries that nothing uses may hold anything
        k_cache, v_cache = k_cache[table].flatten(1, 2), v_cache[table].flatten(1, 2)
    elif cache_batch_idx is not None:
        k_cache, v_cache = k_cache[cache_batch_idx], v_cache[cache_batch_idx]
    else:
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    out, lse = core.attend(
        q,
        k_cache,
        v_cache,
        window=window,
        shift=None if lengths is None else lengths - rows,
        starts=cache_leftpad,
        ends=lengths,
        alibi_slopes=alibi_slopes,
        softmax_scale=softmax_scale,
        softcap=softcap_,
        names=_NAMES,
    )
    return (out, lse) if return_softmax_lse else out


def _check_new(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: object,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
) -> int:
    """Checks the new keys and values and their rotary embedding; returns how many keys are new."""
    if (k is None) != (v is None):
        raise ValueError("v: expected values where k gives keys, and None where it is None, got only one of them")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_sin: expected a tensor where rotary_cos is one, and None where not, got only one")
    if k is None or v is None:
        if rotary_cos is not None:
            raise ValueError("rotary_cos: expected None without new keys k, got a tensor")
        return 0
    if cache_seqlens is None:
        raise ValueError("cache_seqlens: expected the length of the cache together with new keys k, got None")
    core.check("k", k, "(B, N, G, D)", (q.shape[0], None, k_cache.shape[2], q.shape[3]))
    core.check("v", v, "(B, N, G, F)", (*k.shape[:3], v_cache.shape[3]))
    checks.same_kind("k", k, "q", q)
    checks.same_kind("v", v, "q", q)
    if rotary_cos is not None and rotary_sin is not None:
        for name, x in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
            core.check(name, x, "(M, R / 2)", (None, None))
            if x.device != q.device:
                raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
        checks.shape("rotary_sin", rotary_sin, rotary_cos.shape, "that of rotary_cos")
        if 2 * rotary_cos.shape[1] > q.shape[3]:
            raise ValueError(f"rotary_cos: expected at most {q.shape[3] // 2} angles, got {tuple(rotary_cos.shape)}")
    return k.shape[1]


def _lengths(cache_seqlens: object, batch: int, keys: int, fresh: int, device: torch.device) -> Tensor | None:
    """The keys in use before the new ones as int64 (B,); None where all are and there are no new ones."""
    if cache_seqlens is None:
        return None
    room = f"in [0, {keys - fresh}] (a cache of {keys} keys, {fresh} of them new)"
    if isinstance(cache_seqlens, int) and not isinstance(cache_seqlens, bool):
        if not 0 <= cache_seqlens <= keys - fresh:
            raise ValueError(f"cache_seqlens: expected a number {room}, got {cache_seqlens}")
        return torch.full((batch,), cache_seqlens, dtype=torch.int64, device=device)
    core.check_integers("cache_seqlens", cache_seqlens, device, (batch,), f"({batch},)")
    assert isinstance(cache_seqlens, Tensor)
    if core.readable(cache_seqlens) and batch:
        least, most = (int(x) for x in cache_seqlens.aminmax())
        if least < 0 or most > keys - fresh:
            raise ValueError(f"cache_seqlens: expected numbers {room}, got {cache_seqlens.tolist()}")
    return cache_seqlens.to(torch.int64)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding (Su et al. 2021, "RoFormer", eq. 34) of x (B, L, H, D) at positions (B, L)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if core.readable(position) and position.numel() and int(position.max()) >= cos.shape[0]:
        raise ValueError(
            f"rotary_cos: expected angles of all positions up to {int(position.max())}, got {tuple(cos.shape)}"
        )
    cos, sin = (angles[position].to(wide)[:, :, None] for angles in (cos, sin))  # (B, L, 1, R / 2)
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned.to(x.dtype), rest], -1)
