"""What the functions of flash_attn share: masks, ALiBi, the choice of the op, names in errors."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from mpkernels import backends, checks, masks
from mpkernels.attention.attention import attention
from mpkernels.attention.decode_attention import decode_attention
from mpkernels.attention.decode_attention.api import MOST_QUERIES
from mpkernels.attention.decode_attention.schema import FORWARD as DECODE
from mpkernels.autograd import differentiated

Window = tuple["int | None", "int | None"]
NAMES = {"query": "q", "key": "k", "value": "v", "scale": "softmax_scale"}


def renamed(error: Exception, names: dict[str, str]) -> Exception:
    """The same error, in which the arguments have the names that the caller knows."""
    text = re.sub(r"\b(query|key|value|scale)\b", lambda found: names[found[0]], str(error))
    return type(error)(text)


def check(name: str, x: object, meaning: str, sizes: tuple[int | None, ...]) -> None:
    """Raises unless ``x`` is a floating-point tensor of these sizes; None stands for any."""
    checks.floating(name, x)  # pyright: ignore[reportArgumentType]
    assert isinstance(x, Tensor)
    fits = x.dim() == len(sizes) and all(want in (None, size) for size, want in zip(x.shape, sizes, strict=True))
    if not fits:
        known = tuple("any" if size is None else size for size in sizes)
        raise ValueError(f"{name}: expected shape {meaning}, here {known}, got {tuple(x.shape)}")


def check_integers(name: str, x: object, device: torch.device, shape: tuple[int | None, ...], meaning: str) -> None:
    """Raises unless ``x`` is an int32 or int64 tensor of these sizes on the device; None stands for any."""
    checks.tensor(name, x)
    assert isinstance(x, Tensor)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: expected the device of q, {device}, got {x.device}")
    if x.dim() != len(shape) or any(want not in (None, size) for size, want in zip(x.shape, shape, strict=True)):
        raise ValueError(f"{name}: expected shape {meaning}, got {tuple(x.shape)}")


def readable(x: object) -> bool:
    """Whether the values of ``x`` can be looked at without a wait for a GPU, or a break of a graph."""
    return isinstance(x, Tensor) and x.device.type == "cpu" and not torch.compiler.is_compiling()


def window_of(window_size: object, causal: bool) -> Window:
    """(left, right) with None for no limit; a causal mask sets the right one to 0, as in flash_attn."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size: expected (left, right), got {window_size!r}")
    for x in window_size:
        if isinstance(x, bool) or not isinstance(x, int):
            raise TypeError(f"window_size: expected two integers, got {window_size!r}")
    left, right = (None if x < 0 else x for x in window_size)
    return left, 0 if causal else right


def softcap_of(softcap: object) -> float | None:
    """None where there is none: flash_attn writes that as 0."""
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap: expected a number, got {type(softcap).__name__}")
    if softcap < 0:
        raise ValueError(f"softcap: expected a positive number, or 0 for none, got {softcap}")
    return softcap or None


def check_slopes(alibi_slopes: object, batch: int, heads: int, device: torch.device) -> None:
    """Raises unless ``alibi_slopes`` are None, or one for each head, or one for each head of each row."""
    if alibi_slopes is None:
        return
    checks.floating("alibi_slopes", alibi_slopes)  # pyright: ignore[reportArgumentType]
    assert isinstance(alibi_slopes, Tensor)
    if alibi_slopes.device != device:
        raise ValueError(f"alibi_slopes: expected the device of q, {device}, got {alibi_slopes.device}")
    if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes: expected shape {(heads,)} or {(batch, heads)}, got {tuple(alibi_slopes.shape)}"
        )


def attend(
    q: Tensor,  # (B, L, H, E)
    k: Tensor,  # (B, S, G, E)
    v: Tensor,  # (B, S, G, F)
    *,
    window: Window,
    shift: Tensor | None = None,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    names: dict[str, str] = NAMES,
) -> tuple[Tensor, Tensor]:
    """(out (B, L, H, F), lse (B, H, L)). Query i stands at the key i + shift, (B,), by default S - L, and sees the keys
    ``window`` around it, from ``starts`` up to ``ends``, (B,), by default all.

    ALiBi is the bias -slope |i + shift - j|. It depends on i - j alone, so it is kept as one line of L + S - 1 numbers
    a head: with the queries in reverse order, rows of the bias are windows of that line, each one further than the one
    before, and torch has a view for that. No L x S buffer is made, and the logarithms stay those of the definition.
    """
    rows, keys = q.shape[1], k.shape[1]
    query, key, value = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    reverse = alibi_slopes is not None and rows > 1
    bias = None if alibi_slopes is None else _alibi(alibi_slopes, rows, keys, shift, query)
    few = (
        rows <= MOST_QUERIES
        and not dropout_p
        and (rows == 1 or (window[1] == 0 and not reverse))  # more queries are causal there
        and not differentiated((query, key, value, alibi_slopes))
        and _decodes(query.device.type)
    )
    mask = _mask(window, rows, keys, shift, starts, ends, reverse, query.device)
    options: dict[str, Any] = {"mask": mask, "bias": bias, "scale": softmax_scale, "softcap": softcap}
    try:
        if few:
            out, lse = decode_attention(query, key, value, **options, return_lse=True)
        else:
            if reverse:
                query = query.flip(2)
            out, lse = attention(query, key, value, **options, enable_gqa=True, dropout_p=dropout_p, return_lse=True)
            if reverse:
                out, lse = out.flip(2), lse.flip(2)
    except (TypeError, ValueError) as error:
        raise renamed(error, names) from None
    return out.transpose(1, 2), lse


def _decodes(device: str) -> bool:
    """Whether the op for few queries has a kernel here, on the backend that the caller may have asked for."""
    try:
        return backends.choose(DECODE, device, None) != "reference"
    except backends.BackendError:
        return False


def _alibi(slopes: Tensor, rows: int, keys: int, shift: Tensor | None, query: Tensor) -> Tensor | None:
    """(1 or B, H, L, S), of which the first row belongs to the last query; it takes up L + S - 1 numbers a head."""
    if not rows or not keys:
        return None
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    line = torch.arange(rows + keys - 1, device=query.device)
    last = keys - 1 if shift is None else (shift.to(torch.int64) + rows - 1)[:, None]  # where the last query stands
    distance = (line - last).abs().to(wide)  # (L + S - 1,) or (B, L + S - 1)
    slopes = slopes.to(wide)
    if slopes.dim() == 1:
        slopes = slopes[None]
    if distance.dim() == 1:
        distance = distance[None]
    least = torch.finfo(query.dtype).min  # far away is less than near, and not -inf, which hides
    return (-slopes[:, :, None] * distance[:, None]).clamp(min=least).to(query.dtype).unfold(-1, keys, 1)


def _mask(
    window: Window,
    rows: int,
    keys: int,
    shift: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    reverse: bool,
    device: torch.device,
) -> masks.Mask | None:
    left, right = window
    if shift is None and starts is None and ends is None:
        if left is None and right is None:
            return None
        mask = masks.window(left, right, align="lower_right")
        if not reverse:
            return mask
        first, last, _ = masks.resolve(mask, (1, rows, keys), device)
        assert first is not None
        assert last is not None
        return masks.intervals(first.flip(-1), last.flip(-1))
    start = torch.zeros((1, 1), dtype=torch.int64, device=device) if starts is None else starts.to(torch.int64)[:, None]
    end = torch.full((1, 1), keys, dtype=torch.int64, device=device) if ends is None else ends.to(torch.int64)[:, None]
    row = torch.arange(rows - 1, -1, -1, device=device) if reverse else torch.arange(rows, device=device)
    place = row + (keys - rows if shift is None else shift.to(torch.int64)[:, None])  # (1 or B, L)
    first = start if left is None else torch.maximum(start, place - left)
    last = end if right is None else torch.minimum(end, place + right + 1)
    first, last = (x.clamp(0, keys).expand(-1, rows)[:, None] for x in torch.broadcast_tensors(first, last))
    return masks.intervals(first, last)  # (1 or B, 1, L)
