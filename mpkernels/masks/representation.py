"""What the kernels take: one interval of keys a query row, and a dense mask for what no interval says."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpkernels.masks.values import Mask, as_mask

_MOST = 2**31 - 1
_CACHED = 32
_PAIRS_AT_ONCE = 2**24

Resolved = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


def _device(mask: Mask | None, device: torch.device | str | None) -> torch.device:
    if device is None:
        tensors = () if mask is None else mask.tensors()
        return tensors[0].device if tensors else torch.device("cpu")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(shape)
    if len(shape) < 2:
        raise ValueError(f"shape: expected (..., H, L, S) or (L, S), got {shape}")
    for size in shape:
        if size < 0:
            raise ValueError(f"shape: expected no negative size, got {shape}")
    if shape[-1] > _MOST or shape[-2] > _MOST:
        raise ValueError(f"shape: expected L and S below 2^31, got {shape}")
    return shape


def _intervals(mask: Mask, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
    *outer, length, keys = shape
    first, last = mask.interval(length, keys, device)
    if first is None and last is None:
        return None, None
    if first is None:
        first = torch.zeros((1,), dtype=torch.int32, device=device)
    if last is None:
        last = torch.full((1,), keys, dtype=torch.int32, device=device)
    one, other = ((1,) * (len(outer) + 1 - x.dim()) + tuple(x.shape) for x in (first, last))
    found = [b if a == 1 else a for a, b in zip(one, other, strict=True)]
    batch = outer[:-1] if any(size != 1 for size in found[:-2]) else [1] * (len(outer) - 1)
    wanted = (*batch, found[-2], length)

    def finish(x: Tensor) -> Tensor:
        return x.clamp(0, keys).to(torch.int32).expand(wanted).contiguous()

    return finish(first), finish(last)


@functools.lru_cache(maxsize=_CACHED)
def _cached(mask: Mask, shape: tuple[int, ...], device: torch.device, stream: int):
    return _for_any_use(mask, shape, device)


def _for_any_use(mask: Mask, shape: tuple[int, ...], device: torch.device):
    with torch.inference_mode(False):  # a later caller may save them for backward
        return _intervals(mask, shape, device)


def _kept_intervals(mask: Mask, shape: tuple[int, ...], device: torch.device):
    """As ``_intervals``, from what is known where it may be: masks of integers are cached, others keep their last."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or device.type not in ("cpu", "cuda")
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        or not mask.settled()
    ):
        return _intervals(mask, shape, device)
    stream = torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0
    if not mask.tensors():
        return _cached(mask, shape, device, stream)
    kept = mask.__dict__.get("resolved")
    if kept is None or kept[0] != (shape, device, stream):
        kept = ((shape, device, stream), _for_any_use(mask, shape, device))
        mask.__dict__["resolved"] = kept
    return kept[1]


def resolve(
    mask: Mask | Tensor | None, shape: Sequence[int], device: torch.device | str | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The mask of scores of shape (..., H, L, S), as the kernels take it: query i sees key j of head h where
    first[..., h, i] <= j < last[..., h, i] and dense[..., h, i, j].

    Plain torch operations without a wait for the device, so it traces in ``torch.compile(fullgraph=True)``. Answers are
    kept (those of masks of integers in a cache, others in the mask): ``first`` and ``last`` are not to be written to.

    Args:
        mask: a mask, a bool tensor (as :func:`dense`), or None.
        shape: (..., H, L, S), any number of batch dimensions, or (L, S).
        device: of the scores. Default: that of the mask's tensors, else the CPU.

    Returns:
        (first, last, dense). first and last: int32, contiguous, in [0, S], both of one shape (..., H or 1, L), in
        which the batch dimensions are either those of ``shape`` or all 1; first may exceed last: the row sees nothing.
        Both are None where no interval restricts. dense: bool, broadcasts to ``shape``, or None.

    Raises:
        TypeError: ``mask`` is something else.
        ValueError: the mask does not fit the shape, lies on another device, or has lengths past S.

    Example:
        >>> from mpkernels import masks
        >>> masks.resolve(masks.causal() & masks.window(1, None), (2, 8, 3, 4))
        (tensor([[[0, 0, 1]]], dtype=torch.int32), tensor([[[1, 2, 3]]], dtype=torch.int32), None)
    """
    if mask is None:
        return None, None, None
    mask = as_mask("mask", mask)
    device = _device(mask, device)
    shape = _check_shape(shape)
    for x in mask.tensors():
        if x.device != device:
            raise ValueError(f"mask: expected the device of the scores, {device}, got {x.device} in {mask!r}")
    flat = len(shape) == 2
    full = (1, *shape) if flat else shape
    mask.check(full[:-2], full[-2], full[-1])
    first, last = _kept_intervals(mask, full, device)
    dense = mask.dense(device)
    if flat:
        first, last = (None, None) if first is None or last is None else (first[0], last[0])
        dense = dense[0] if dense is not None and dense.dim() == 3 else dense
    return first, last, dense


def to_dense(mask: Mask | Tensor | None, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """The mask as one bool tensor, (..., H, L, S): True where the query sees the key. For tests and pictures.

    Args:
        mask: as in :func:`resolve`.
        shape: as in :func:`resolve`.
        device: as in :func:`resolve`.

    Returns:
        A bool tensor of that shape (expanded where the mask is the same for all).

    Raises:
        TypeError, ValueError: as :func:`resolve`.

    Example:
        >>> from mpkernels import masks
        >>> masks.to_dense(masks.causal(), (2, 2))
        tensor([[ True, False],
                [ True,  True]])
    """
    first, last, dense = resolve(mask, shape, device)
    return filled(first, last, dense, shape, _device(None if mask is None else as_mask("mask", mask), device))


def filled(first, last, dense, shape: Sequence[int], device: torch.device) -> Tensor:
    """Intervals and a dense mask as one bool tensor of ``shape``."""
    seen = torch.ones((1, 1), dtype=torch.bool, device=device) if dense is None else dense
    if first is not None:
        columns = torch.arange(shape[-1], dtype=torch.int32, device=device)
        seen = (first[..., None] <= columns) & (columns < last[..., None]) & seen
    return seen.expand(tuple(shape))


def visible_pairs(mask: Mask | Tensor | None, shape: Sequence[int]) -> int:
    """How many pairs of query and key of scores of shape (..., H, L, S) the mask lets through. For models of cost.

    Raises:
        TypeError, ValueError: as :func:`resolve`.

    Example:
        >>> from mpkernels import masks
        >>> masks.visible_pairs(masks.causal(), (2, 8, 100, 100))
        80800
    """
    first, last, dense = resolve(mask, shape)
    shape = tuple(shape)
    everything = math.prod(shape)
    if not everything or (first is None and dense is None):
        return everything
    if dense is None:
        assert first is not None
        assert last is not None
        held = (last - first).clamp(min=0).sum(dtype=torch.int64)
        return int(held) * (math.prod(shape[:-1]) // first.numel())
    # a slab of rows at a time, each no larger than the mask tells apart
    length = shape[-2]
    distinct = tuple(torch.broadcast_shapes(dense.shape[:-2], () if first is None else first.shape[:-1]))
    step = max(1, _PAIRS_AT_ONCE // max(1, math.prod(distinct) * shape[-1]))
    count = 0
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        slab = dense if dense.dim() < 2 or dense.shape[-2] == 1 else dense[..., rows, :]
        begin, end = (None, None) if first is None or last is None else (first[..., rows], last[..., rows])
        inside = (*distinct, rows.stop - rows.start, shape[-1])
        count += int(filled(begin, end, slab, inside, dense.device).sum(dtype=torch.int64))
    return count * (math.prod(shape[:-2]) // math.prod(distinct))
