"""torch's scaled_dot_product_attention, on the kernels of this package."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import checks, masks
from mpkernels.attention.attention import attention
from mpkernels.attention.attention.schema import HIDES


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch.nn.functional.scaled_dot_product_attention computes, with its arguments in its order.

    Where torch says nothing or its kernels differ, this is as :func:`attention`: a query that sees no key gets 0, a
    NaN in a hidden key or value does not leak, gradients are deterministic, of any order, and include that of a float
    ``attn_mask``. One value differs: a row of nothing but the lowest float32, which torch gives the mean of the values,
    counts as hidden, and gets 0.

    Args:
        query: (..., H, L, E); float32, float64, bfloat16 or float16. All leading dimensions broadcast.
        key: (..., G, S, E); G = H or 1, or with ``enable_gqa`` a divisor of H.
        value: (..., G, S, F).
        attn_mask: broadcasts to (..., H, L, S). bool: True where a query takes part in the attention to a key.
            Of ``query``'s dtype (or float32, with bfloat16 or float16): added to the scores.
        dropout_p: the share of the weights to drop, whether the model trains or not.
        is_causal: query i sees the keys j <= i (the upper left corner of a matrix that is not square). Not together
            with ``attn_mask``.
        scale: factor of the scores; default 1 / sqrt(E).
        enable_gqa: query head h reads key head h // (H / G).

    Returns:
        (..., H, L, F).

    Raises:
        TypeError: an argument is no tensor, or of a wrong dtype.
        ValueError: shapes or devices do not match, a number is out of range, both ``attn_mask`` and ``is_causal``.

    Example:
        >>> import torch
        >>> from mpkernels.attention import scaled_dot_product_attention
        >>> x = torch.randn(2, 8, 16, 64)
        >>> ours = scaled_dot_product_attention(x, x, x, is_causal=True)
        >>> theirs = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        >>> torch.allclose(ours, theirs, atol=1e-5)
        True
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.floating(name, x)
    mask = bias = None
    if attn_mask is not None:
        checks.tensor("attn_mask", attn_mask)
        if is_causal:
            raise ValueError("attn_mask: expected None together with is_causal=True, got both")
        if attn_mask.dtype == torch.bool:
            mask = attn_mask
        else:
            bias = _bias(attn_mask, query)
    elif is_causal:
        mask = masks.causal()
    if not enable_gqa:
        query, key, value = _broadcast_heads(query, key, value)
        enable_gqa = query.dim() > 2 and key.shape[-3] == 1
    try:
        out = attention(
            query, key, value, mask=mask, bias=bias, scale=scale, enable_gqa=enable_gqa, dropout_p=dropout_p
        )
    except (TypeError, ValueError) as error:
        # the function calls it attn_mask
        name, found, text = str(error).partition(":")
        if attn_mask is not None and name in ("mask", "bias"):
            raise type(error)("attn_mask" + found + text) from None
        raise
    assert isinstance(out, Tensor)
    return out


def _bias(attn_mask: Tensor, query: Tensor) -> Tensor:
    """A float mask in the dtype of the query; what narrow numbers cannot hold must not come to hide by that."""
    low = query.dtype in (torch.bfloat16, torch.float16)
    if attn_mask.dtype == query.dtype:
        return attn_mask
    if not (low and attn_mask.dtype == torch.float32):
        raise TypeError(f"attn_mask: expected bool or the dtype of query, {query.dtype}, got {attn_mask.dtype}")
    most = torch.finfo(query.dtype).max
    return torch.where(attn_mask <= HIDES, -torch.inf, attn_mask.clamp(-most, most)).to(query.dtype)


def _broadcast_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Torch broadcasts the heads too: one key head serves all queries, one query head asks all keys."""

    def widen(x: Tensor, heads: int) -> Tensor:
        return x.expand(*x.shape[:-3], heads, *x.shape[-2:]) if x.dim() > 2 and x.shape[-3] == 1 else x

    heads, key_heads, value_heads = (x.shape[-3] if x.dim() > 2 else 1 for x in (query, key, value))
    if heads == key_heads == value_heads:
        return query, key, value
    if key_heads != value_heads:
        key, value = widen(key, value_heads), widen(value, key_heads)
    if heads == 1:
        query = widen(query, max(key_heads, value_heads))
    return query, key, value
