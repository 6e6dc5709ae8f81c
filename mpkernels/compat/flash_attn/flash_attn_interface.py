"""flash_attn.flash_attn_interface: the functions of flash_attn 2.8, in their order of arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpkernels import checks
from mpkernels.attention.attention_varlen import attention_varlen
from mpkernels.compat.flash_attn import core
from mpkernels.compat.flash_attn.kvcache import flash_attn_with_kvcache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Result = Any  # a Tensor, or (out, softmax_lse, None) with return_attn_probs


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of (B, L, H, D) tensors, as flash_attn.flash_attn_func; with gradients of any order.

    Args:
        q: (B, L, H, D), float32, float64, bfloat16 or float16.
        k: (B, S, G, D), H a multiple of G: query head h reads key head h // (H / G).
        v: (B, S, G, F).
        dropout_p: the share of the weights to drop, whether the model trains or not.
        softmax_scale: factor of the scores. Default 1 / sqrt(D).
        causal: query i sees the keys j <= i + S - L: the last query sees all. It sets the right of the window to 0.
        window_size: (left, right): query i sees i + S - L - left <= j <= i + S - L + right; negative for no limit.
        softcap: scores become softcap tanh(score / softcap), before ALiBi. 0 for none.
        alibi_slopes: (H,) or (B, H): -slope |i + S - L - j| is added to the scores. Takes no memory of L x S, unless
            the slopes require a gradient.
        deterministic: everything is, whatever is said here.
        return_attn_probs: whether to return (out, softmax_lse, None).

    Returns:
        out (B, L, H, F); with ``return_attn_probs`` (out, softmax_lse, None), softmax_lse (B, H, L) float32 (float64
        for float64), -inf where a query sees no key (there flash_attn 2 says +inf). What flash_attn gives in third
        place shows which weights were dropped; here it is None.

    Raises:
        TypeError, ValueError: as mpkernels.attention.attention; the message names the argument.

    Example:
        >>> import torch
        >>> from mpkernels.compat.flash_attn import flash_attn_func
        >>> q, k = torch.randn(2, 100, 8, 64), torch.randn(2, 120, 2, 64)
        >>> flash_attn_func(q, k, k, causal=True, window_size=(32, 0)).shape
        torch.Size([2, 100, 8, 64])
    """
    _check_batched("q", "k", "v", q, k, v)
    core.check_slopes(alibi_slopes, q.shape[0], q.shape[2], q.device)
    out, lse = core.attend(
        q,
        k,
        v,
        window=core.window_of(window_size, causal),
        alibi_slopes=alibi_slopes,
        softmax_scale=softmax_scale,
        softcap=core.softcap_of(softcap),
        dropout_p=dropout_p,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of q (B, L, H, D) and kv (B, S, 2, G, D)."""
    core.check("kv", kv, "(B, S, 2, G, D)", (None, None, 2, None, None))
    k, v = kv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of qkv (B, L, 3, H, D)."""
    core.check("qkv", qkv, "(B, L, 3, H, D)", (None, None, 3, None, None))
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention within each of N sequences that are packed one after another, as flash_attn.flash_attn_varlen_func.

    Args:
        q: (T, H, D), the queries of all sequences.
        k: (U, G, D); with ``block_table`` (blocks, block size, G, D).
        v: (U, G, F); with ``block_table`` (blocks, block size, G, F).
        cu_seqlens_q: (N + 1,) int32 or int64: 0, and the running sum of the lengths, up to T.
        cu_seqlens_k: (N + 1,), the same for the keys, up to U.
        max_seqlen_q, max_seqlen_k: the longest lengths; they are read from ``cu_seqlens`` where they are needed.
        block_table: (N, blocks a sequence) int32: the blocks of k and v that hold the keys of each sequence, in order.
            They are gathered into a packed copy first.
        alibi_slopes: (H,) or (N, H). The sequences are then copied into padded rows, (N, longest, H, D).
        dropout_p, softmax_scale, causal, window_size, softcap, deterministic: as in :func:`flash_attn_func`; L and S
            are the lengths of a sequence.
        return_attn_probs: whether to return (out, softmax_lse, None), softmax_lse (H, T).

    Returns:
        out (T, H, F).

    Raises:
        TypeError, ValueError: as mpkernels.attention.attention_varlen; the message names the argument.

    Example:
        >>> import torch
        >>> from mpkernels.compat.flash_attn import flash_attn_varlen_func
        >>> x = torch.randn(10, 4, 32)
        >>> lengths = torch.tensor([0, 3, 10], dtype=torch.int32)  # 3 rows, then 7
        >>> flash_attn_varlen_func(x, x, x, lengths, lengths, 7, 7, causal=True).shape
        torch.Size([10, 4, 32])
    """
    core.check("q", q, "(T, H, D)", (None, None, None))
    window = core.window_of(window_size, causal)
    limit = core.softcap_of(softcap)
    core.check_integers("cu_seqlens_q", cu_seqlens_q, q.device, (None,), "(N + 1,)")
    count = cu_seqlens_q.shape[0] - 1
    if count < 1:
        raise ValueError(f"cu_seqlens_q: expected shape (N + 1,) for N >= 1 sequences, got {tuple(cu_seqlens_q.shape)}")
    core.check_integers("cu_seqlens_k", cu_seqlens_k, q.device, (count + 1,), f"that of cu_seqlens_q, ({count + 1},)")
    if block_table is not None:
        k, v = _gather_blocks(q, k, v, cu_seqlens_k, block_table)
    core.check("k", k, "(U, G, D)", (None, None, q.shape[2]))
    core.check("v", v, "(U, G, F)", (k.shape[0], k.shape[1], None))
    core.check_slopes(alibi_slopes, count, q.shape[1], q.device)
    if alibi_slopes is not None:
        out, lse = _padded(
            q,
            k,
            v,
            cu_seqlens_q.to(torch.int64),
            cu_seqlens_k.to(torch.int64),
            window=window,
            alibi_slopes=alibi_slopes,
            softmax_scale=softmax_scale,
            softcap=limit,
            dropout_p=dropout_p,
        )
    else:
        try:
            out, lse = attention_varlen(
                q,
                k,
                v,
                cu_seqlens_q,
                cu_seqlens_k,
                causal="lower_right" if causal else None,
                window=window,
                scale=softmax_scale,
                enable_gqa=True,
                dropout_p=dropout_p,
                softcap=limit,
                return_lse=True,
            )
        except (TypeError, ValueError) as error:
            raise core.renamed(error, core.NAMES) from None
        lse = lse.transpose(0, 1)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` of q (T, H, D) and kv (U, 2, G, D)."""
    core.check("kv", kv, "(U, 2, G, D)", (None, 2, None, None))
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` of qkv (T, 3, H, D)."""
    core.check("qkv", qkv, "(T, 3, H, D)", (None, 3, None, None))
    core.check_integers("cu_seqlens", cu_seqlens, qkv.device, (None,), "(N + 1,)")
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def _check_batched(q_name: str, k_name: str, v_name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    core.check(q_name, q, "(B, L, H, D)", (None, None, None, None))
    core.check(k_name, k, "(B, S, G, D)", (q.shape[0], None, None, q.shape[3]))
    core.check(v_name, v, "(B, S, G, F)", (q.shape[0], k.shape[1], k.shape[2], None))


def _padded(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The packed sequences as rows of a batch, because ALiBi of one line a head needs one place for all queries."""
    for name, bounds, like in (("cu_seqlens_q", cu_q, q), ("cu_seqlens_k", cu_k, k)):
        ends = torch.stack([bounds[0], bounds[-1], bounds.diff().min()]).tolist()
        if ends[0] != 0 or ends[1] != like.shape[0] or ends[2] < 0:
            raise ValueError(f"{name}: expected sums of lengths from 0 to {like.shape[0]}, got {bounds.tolist()}")

    def place(bounds: Tensor, total: int) -> tuple[Tensor, Tensor, int]:
        lengths = bounds.diff()
        longest = int(lengths.max())
        inside = torch.arange(longest, device=bounds.device) < lengths[:, None]  # (N, longest)
        return lengths, inside, longest

    lengths_q, inside_q, _ = place(cu_q, q.shape[0])
    lengths_k, inside_k, _ = place(cu_k, k.shape[0])

    def pad(x: Tensor, inside: Tensor) -> Tensor:
        wide = x.new_zeros((*inside.shape, *x.shape[1:]))
        return wide.masked_scatter(inside[:, :, None, None], x)

    out, lse = core.attend(
        pad(q, inside_q), pad(k, inside_k), pad(v, inside_k), shift=lengths_k - lengths_q, ends=lengths_k, **options
    )
    return out[inside_q], lse.transpose(1, 2)[inside_q].transpose(0, 1)


def _gather_blocks(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_k: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of all sequences, packed, from the blocks of a paged cache."""
    core.check("k", k, "(blocks, block size, G, D)", (None, None, None, q.shape[2]))
    core.check("v", v, "(blocks, block size, G, F)", (*k.shape[:3], None))
    count, size = cu_seqlens_k.shape[0] - 1, k.shape[1]
    core.check_integers("block_table", block_table, q.device, (count, None), f"({count}, blocks a sequence)")
    bounds = cu_seqlens_k.to(torch.int64)
    total = int(bounds[-1])
    if int(bounds.diff().max()) > block_table.shape[1] * size:
        raise ValueError(
            f"block_table: expected blocks of {size} for all keys of the longest sequence, {int(bounds.diff().max())}, "
            f"got shape {tuple(block_table.shape)}"
        )
    row = torch.arange(total, device=q.device)
    sequence = torch.searchsorted(bounds[1:].contiguous(), row, right=True)
    inside = row - bounds[sequence]
    block = block_table.to(torch.int64)[sequence, inside // size]
    index = block * size + inside % size
    checks.same_kind("v", v, "k", k)
    return k.flatten(0, 1)[index], v.flatten(0, 1)[index]
