"""The attention of Hugging Face transformers on the kernels of this library.

    from mpkernels.compat.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="mpkernels")

What transformers asks a mask function for, is answered by intervals of keys where that is possible: causal masks,
sliding windows, chunks, packed sequences and padding on either side are then an int32 tensor (B or 1, 1, L, 2) instead
of a bool (B, 1, L, S), and the kernels skip what they hide. Anything else is the bool tensor that transformers makes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpkernels import backends, masks
from mpkernels.attention.attention import attention
from mpkernels.attention.decode_attention import decode_attention
from mpkernels.attention.decode_attention.schema import FORWARD as DECODE
from mpkernels.autograd import differentiated

_MASK_ELEMENTS = 2**22  # of a bool mask that are looked at together, to find the intervals of its rows


def register(name: str = "mpkernels") -> None:
    """Makes ``attn_implementation=name`` known to transformers, for attention and for its masks.

    Args:
        name: what models ask for, as ``attn_implementation`` or by ``model.set_attn_implementation``.

    Raises:
        ImportError: transformers is not installed, or older than 4.53 (which has no interface for masks).
        TypeError, ValueError: ``name`` is no string, or one that transformers uses itself.

    Example:
        >>> from mpkernels.compat.transformers import register
        >>> register()  # doctest: +SKIP
        >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="mpkernels")  # doctest: +SKIP
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {type(name).__name__}")
    interface, mask_interface = _interfaces()
    found = interface().get(name)
    if not name or (found is not None and found is not attention_forward) or name == "eager":
        raise ValueError(f"name: expected one that transformers does not use itself, got {name!r}")
    interface.register(name, attention_forward)
    mask_interface.register(name, attention_mask)


def _interfaces() -> tuple[Any, Any]:
    try:
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "mpkernels.compat.transformers.register needs Hugging Face transformers: `pip install transformers`"
        ) from error
    try:
        return transformers.AttentionInterface, transformers.AttentionMaskInterface
    except AttributeError as error:
        raise ImportError(
            "mpkernels.compat.transformers.register needs transformers 4.53 or later, which have AttentionInterface "
            f"and AttentionMaskInterface; this is {transformers.__version__}"
        ) from error


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for attention; see transformers.AttentionInterface.

    Args:
        module: the attention layer. Its ``is_causal`` counts where neither a mask nor the argument says it.
        query: (B, H, L, D).
        key: (B, G, S, D), H a multiple of G.
        value: (B, G, S, F).
        attention_mask: what :func:`attention_mask` made; or bool (True sees) or float (added), of a shape that
            broadcasts to (B, H, L, S or more); or (B, places), 1 for the keys that are no padding, of which the last S
            count; or None. The
            last two say nothing about the order: ``is_causal`` and ``sliding_window`` then do, and the queries are the
            last L of the S places. A mask of four dimensions says it all.
        scaling: factor of the scores. Default 1 / sqrt(D).
        dropout: the share of the weights to drop.
        sliding_window: how many keys a query sees, its own included, on each side unless causal.
        softcap: scores become softcap tanh(score / softcap).
        is_causal: whether query i sees the keys j <= i + S - L alone.
        s_aux: (H,), attention sinks: one more score of each head, without a value.
        position_bias: added to the scores, broadcasts to (B, H, L, S). Differentiable.
        kwargs: everything else that transformers passes along, ignored; but a paged ``cache`` is an error.

    Returns:
        out (B, L, H, F), contiguous, and None in place of the weights, which are never stored.
    """
    if kwargs.get("cache") is not None:
        raise NotImplementedError("cache: paged caches (continuous batching) are not supported by mpkernels")
    if kwargs.get("output_attentions"):
        warnings.warn("output_attentions: mpkernels stores no weights; use attn_implementation='eager'", stacklevel=2)
    rows, keys = query.shape[2], key.shape[2]
    mask, bias = None, position_bias
    if attention_mask is None or attention_mask.dim() == 2:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = _order(bool(causal), sliding_window)
        if attention_mask is not None:
            mask = _and(mask, _padding(attention_mask[:, max(0, attention_mask.shape[1] - keys) :].bool(), keys))
    elif attention_mask.dtype == torch.int32:
        if attention_mask.dim() != 4 or attention_mask.shape[-1] != 2:
            raise ValueError(
                "attention_mask: expected the intervals that mpkernels made for transformers, (B, 1, L, 2), got "
                f"{tuple(attention_mask.shape)}; a model that changes its masks needs another attn_implementation"
            )
        mask = masks.intervals(attention_mask[..., 0], attention_mask[..., 1])
    elif attention_mask.dtype == torch.bool:
        mask = masks.dense(attention_mask[..., :keys])
    else:
        added = attention_mask[..., :keys].to(query.dtype)
        bias = added if bias is None else bias + added

    with_sink = s_aux is not None
    options: dict[str, Any] = {"mask": mask, "bias": bias, "scale": scaling, "softcap": softcap or None}
    if rows == 1 and not dropout and not differentiated((query, key, value, bias, s_aux)) and _decodes(query):
        out, lse = decode_attention(query, key, value, **options, return_lse=True)
    else:
        out, lse = attention(query, key, value, **options, enable_gqa=True, dropout_p=dropout, return_lse=True)
    if with_sink:
        # the sum of the exponentials grows by e^s, so out shrinks by e^lse / (e^lse + e^s)
        out = out * torch.sigmoid(lse - s_aux[:, None].to(lse.dtype))[..., None].to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def attention_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str | None = None,
    cache_position: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """What transformers calls for a mask; see transformers.AttentionMaskInterface.

    Args:
        batch_size, q_length, kv_length: the sizes of the scores, (batch_size, H, q_length, kv_length).
        q_offset, kv_offset: the position of the first query, and of the first key.
        mask_function: (batch, head, query position, key position) -> bool, by index; by default the causal one.
        attention_mask: (B, positions), True for those that are no padding, or None.
        local_size: ignored: ``mask_function`` says it.
        allow_is_causal_skip, allow_is_bidirectional_skip: where both are False for a mask that needs no code to
            describe, the model is about to change it, and gets a bool tensor.
        device: of the mask.
        cache_position: (q_length,), the positions of the queries, from versions that do not pass the two numbers.
        kwargs: what else transformers' own mask functions take.

    Returns:
        int32 (B or 1, 1, q_length, 2): the first key that a query sees, and the one after the last. Where the rows are
        no intervals: bool (B, 1, q_length, kv_length).
    """
    from transformers import masking_utils  # pyright: ignore[reportMissingImports]

    function = mask_function or masking_utils.causal_mask_function
    if cache_position is not None:
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
    assert q_length is not None
    if device is None:
        device = attention_mask.device if attention_mask is not None else "cpu"

    def dense(start: int, stop: int) -> Tensor:
        where: dict[str, Any] = {"q_length": stop - start, "q_offset": q_offset + start, "device": device}
        if cache_position is not None:
            where = {"cache_position": cache_position[start:stop]}
        made = masking_utils.sdpa_mask(
            batch_size=batch_size,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            **where,
            **kwargs,
        )
        assert made is not None
        return made

    plain = function in (
        masking_utils.causal_mask_function,
        getattr(masking_utils, "bidirectional_mask_function", None),
    )
    if plain and not allow_is_causal_skip and not allow_is_bidirectional_skip:
        return dense(0, q_length)
    tracing = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    window = None if tracing else _window_of(function, masking_utils)
    if plain or window is not None:
        place = torch.arange(q_length, device=device)[None] + (q_offset - kv_offset)  # (1, L)
        seen = None
        if attention_mask is not None:
            seen = attention_mask[:, kv_offset : kv_offset + kv_length]
            if tracing or (ends := _ends(seen)) is None:
                return dense(0, q_length)
            seen = ends
        first = torch.zeros_like(place) if window is None else place - (window - 1)
        if function is masking_utils.causal_mask_function or window is not None:
            last = place + 1
        else:
            last = torch.full_like(place, kv_length)
        if seen is not None:
            first, last = torch.maximum(first, seen[0][:, None]), torch.minimum(last, seen[1][:, None])
        return torch.stack([first, last], -1).clamp(0, kv_length).to(torch.int32)[:, None]
    if tracing:
        return dense(0, q_length)
    # a mask of any function: look at some of its rows at a time, and keep their intervals
    step = max(1, _MASK_ELEMENTS // max(1, batch_size * kv_length))
    found = []
    for start in range(0, q_length, step):
        ends = _ends(dense(start, min(start + step, q_length)))
        if ends is None:
            return dense(0, q_length)
        found.append(torch.stack(ends, -1))
    return torch.cat(found, 2).to(torch.int32) if found else torch.zeros((1, 1, 0, 2), dtype=torch.int32, device=device)


def _decodes(query: Tensor) -> bool:
    try:
        return backends.choose(DECODE, query.device.type, None) != "reference"
    except backends.BackendError:
        return False


def _and(one: masks.Mask | None, other: masks.Mask) -> masks.Mask:
    return other if one is None else one & other


def _order(causal: bool, sliding_window: int | None) -> masks.Mask | None:
    reach = None if sliding_window is None else sliding_window - 1
    if not causal and reach is None:
        return None
    return masks.window(reach, 0 if causal else reach, align="lower_right")


def _padding(seen: Tensor, keys: int) -> masks.Mask:
    """The mask of (B, S or less) bools, False for padding, also behind where it is shorter than the keys."""
    ends = None if torch.compiler.is_compiling() else _ends(seen)
    if ends is not None:
        return masks.intervals(*(x[:, None, None] for x in ends))  # (B, 1, 1)
    return masks.dense(torch.nn.functional.pad(seen, (0, keys - seen.shape[1]))[:, None, None])


def _ends(seen: Tensor) -> tuple[Tensor, Tensor] | None:
    """(first, last) of the True run in each row of (..., S), (0, 0) where there is none; None if a row has several."""
    if not seen.shape[-1]:
        nothing = torch.zeros(seen.shape[:-1], dtype=torch.int64, device=seen.device)
        return nothing, nothing
    counts = seen.sum(-1)
    first = seen.to(torch.uint8).argmax(-1)
    last = torch.where(counts > 0, seen.shape[-1] - seen.flip(-1).to(torch.uint8).argmax(-1), 0)
    return (first, last) if bool((last - first == counts).all()) else None


def _window_of(function: Callable, masking_utils: Any) -> int | None:
    """The size of the window, where the function is what transformers makes for a causal sliding window."""

    def enclosed(f: Callable, maker: str, name: str) -> Any:
        code = getattr(f, "__code__", None)
        if code is None or not f.__qualname__.startswith(maker) or f.__module__ != masking_utils.__name__:
            return None
        return dict(zip(code.co_freevars, f.__closure__ or (), strict=True)).get(name)

    parts = enclosed(function, "and_masks.", "mask_functions")
    parts = () if parts is None else parts.cell_contents
    if len(parts) != 2 or parts[1] is not masking_utils.causal_mask_function:
        return None
    size = enclosed(parts[0], "sliding_window_overlay.", "sliding_window")
    return size.cell_contents if size is not None and isinstance(size.cell_contents, int) else None
