"""The masks: small frozen objects that say which keys a query sees, and combine with ``&``.

All but ``dense`` reduce to an interval [first, last) of keys for each query row; ``&`` intersects intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Union

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

ALIGNMENTS = ("upper_left", "lower_right")
_UNLIMITED = 2**31  # more than any length: a wider window changes nothing

Interval = tuple[Union[Tensor, None], Union[Tensor, None]]
Integers = Union[int, Sequence[int], Sequence[Sequence[int]], Tensor]


def _readable(x: Tensor) -> bool:
    """Whether the values of ``x`` may be read: not under torch.compile, torch.func or CUDA graph capture."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if isinstance(x, FakeTensor) or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _check_align(name: str, align: object) -> None:
    if align not in ALIGNMENTS:
        raise ValueError(f"{name}: align: expected 'upper_left' or 'lower_right', got {align!r}")


def _check_integers(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected integers or a tensor of them, got {type(value).__name__}")
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor, got {value.dtype}")


def _frozen(name: str, value: object) -> object:
    """Integers as they are kept: ints and tensors as they come, sequences as (nested) tuples."""
    if _is_int(value) or isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)):
        for item in value:
            if not _is_int(item) and not isinstance(item, (list, tuple)):
                raise TypeError(f"{name}: expected integers, got {type(item).__name__} in a {type(value).__name__}")
        return tuple(_frozen(name, item) for item in value)
    raise TypeError(f"{name}: expected integers or a tensor of them, got {type(value).__name__}")


def _tensor(value: object, device: torch.device) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64, device=device)


def _check_broadcast(name: str, shape: Sequence[int], target: Sequence[int], meaning: str) -> None:
    fits = len(shape) <= len(target)
    for size, wanted in zip(reversed(shape), reversed(target)):
        fits = fits and (size == 1 or size == wanted)
    if not fits:
        raise ValueError(f"{name}: shape {tuple(shape)} does not broadcast to {meaning} {tuple(target)} of the scores")


def _show(value: object) -> str:
    if isinstance(value, Mask):
        return repr(value)
    if not isinstance(value, Tensor):
        return repr(_thawed(value))
    if value.device.type == "cpu" and value.dim() <= 1 and value.numel() <= 8 and _readable(value):
        return f"tensor({value.tolist()})"
    where = "" if value.device.type == "cpu" else f" on {value.device}"
    return f"<{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{where}>"


def _thawed(value: object) -> object:
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if one is other:
            return True
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            return False
        return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)
    return one == other


class Mask:
    """Which keys each query sees. Made by the functions of ``mpkernels.masks``; masks combine with ``&``.

    Masks are frozen. They are equal where type and values are; those without tensors are hashable. The tensors in a
    mask are not to be written to afterwards.
    """

    def __and__(self, other: object) -> Mask:
        if not isinstance(other, (Mask, Tensor)):
            return NotImplemented
        return _both(self, as_mask("mask", other))

    def __rand__(self, other: object) -> Mask:
        if not isinstance(other, (Mask, Tensor)):
            return NotImplemented
        return _both(as_mask("mask", other), self)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return False
        return all(_same(mine, theirs) for mine, theirs in zip(self._values(), other._values()))

    def __hash__(self) -> int:
        if self.tensors():
            raise TypeError(f"unhashable mask, for it holds tensors: {self!r}")
        return hash((type(self), self._values()))

    def _values(self) -> tuple[object, ...]:
        """The fields that tell masks of one type apart."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self) if field.compare)  # type: ignore

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors the mask is made of; none where it is made of integers alone."""
        return tuple(value for value in self._values() if isinstance(value, Tensor))

    def check(self, outer: Sequence[int], length: int, keys: int) -> None:
        """Raises ValueError unless the mask fits scores of shape (\\*outer, length, keys)."""

    def outer(self) -> tuple[int, ...]:
        """The dimensions of batch and head, (..., H), that the mask tells apart; () where it is the same for all."""
        return ()

    def interval(self, length: int, keys: int, device: torch.device) -> Interval:
        """The first key and the one after the last key of each row, each broadcasting to (..., H, L), or None."""
        return None, None

    def dense(self, device: torch.device) -> Tensor | None:
        """What no interval says: a bool tensor that broadcasts to (..., H, L, S), or None."""
        return None


def as_mask(name: str, value: object) -> Mask:
    """``value`` as a mask: a bool tensor is dense. Raises TypeError for anything else."""
    if isinstance(value, Mask):
        return value
    if isinstance(value, Tensor):
        return _dense(name, value)
    raise TypeError(f"{name}: expected a mask of mpkernels.masks, a bool tensor or None, got {type(value).__name__}")


def _rows(length: int, keys: int, align: str, device: torch.device) -> Tensor:
    """The key that is level with each row."""
    rows = torch.arange(length, dtype=torch.int64, device=device)
    return rows + (keys - length) if align == "lower_right" else rows


def _batch_shape(value: object) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    shape: tuple[int, ...] = ()
    while isinstance(value, tuple):
        shape = (*shape, len(value))
        value = value[0] if value else 0
    return shape


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Causal(Mask):
    align: str
    strict: bool

    def __repr__(self) -> str:
        align = "" if self.align == "upper_left" else f"align={self.align!r}"
        return f"{'strictly_causal' if self.strict else 'causal'}({align})"

    def interval(self, length: int, keys: int, device: torch.device) -> Interval:
        return None, _rows(length, keys, self.align, device) + (0 if self.strict else 1)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Window(Mask):
    left: int | None
    right: int | None
    align: str

    def __repr__(self) -> str:
        align = "" if self.align == "upper_left" else f", align={self.align!r}"
        return f"window({self.left}, {self.right}{align})"

    def interval(self, length: int, keys: int, device: torch.device) -> Interval:
        rows = _rows(length, keys, self.align, device)
        first = None if self.left is None else rows - min(self.left, _UNLIMITED)
        last = None if self.right is None else rows + (min(self.right, _UNLIMITED) + 1)
        return first, last


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Prefix(Mask):
    n: object

    def __repr__(self) -> str:
        return f"prefix({_show(self.n)})"

    def check(self, outer: Sequence[int], length: int, keys: int) -> None:
        _check_broadcast("prefix: n", _batch_shape(self.n), outer[:-1], "the batch dimensions")

    def outer(self) -> tuple[int, ...]:
        return (*shape, 1) if (shape := _batch_shape(self.n)) else ()

    def interval(self, length: int, keys: int, device: torch.device) -> Interval:
        rows = _rows(length, keys, "upper_left", device) + 1
        if _is_int(self.n):
            return None, rows.clamp(min=min(self.n, _UNLIMITED))  # type: ignore[arg-type]
        return None, torch.maximum(rows, _tensor(self.n, device).to(torch.int64)[..., None, None])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Padding(Mask):
    lengths: object
    longest: int | None = dataclasses.field(compare=False)

    def __repr__(self) -> str:
        return f"padding({_show(self.lengths)})"

    def check(self, outer: Sequence[int], length: int, keys: int) -> None:
        _check_broadcast("padding: lengths", _batch_shape(self.lengths), outer[:-1], "the batch dimensions")
        if self.longest is not None and self.longest > keys:
            raise ValueError(f"padding: lengths: expected at most S = {keys} keys, got {self.longest}")

    def outer(self) -> tuple[int, ...]:
        return (*shape, 1) if (shape := _batch_shape(self.lengths)) else ()

    def interval(self, length: int, keys: int, device: torch.device) -> Interval:
        return None, _tensor(self.lengths, device).to(torch.int64)[..., None, None]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Documents(Mask):
    ids: object
    key_ids: object
    scattered: bool  # documents may lie in pieces: only a dense mask says it
    runs: tuple[Tensor, Tensor] | None = dataclasses.field(compare=False)

    def __repr__(self) -> str:
        keys = "" if self.key_ids is None else f", {_show(self.key_ids)}"
        return f"documents({_show(self.ids)}{keys}{', unsorted=' + repr('dense') if self.scattered else ''})"

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        queries = _batch_shape(self.ids)
        return queries, queries if self.key_ids is None else _batch_shape(self.key_ids)

    def check(self, outer: Sequence[int], length: int, keys: int) -> None:
        of_queries, of_keys = self._shapes()
        if of_queries[-1] != length:
            raise ValueError(f"documents: ids: expected L = {length} ids in a row, got {of_queries[-1]}")
        if of_keys[-1] != keys:
            name = (
                "ids (they also count for the keys where there are no key_ids)" if self.key_ids is None else "key_ids"
            )
            raise ValueError(f"documents: {name}: expected S = {keys} ids in a row, got {of_keys[-1]}")
        _check_broadcast("documents: ids", of_queries[:-1], outer[:-1], "the batch dimensions")
        _check_broadcast("documents: key_ids", of_keys[:-1], outer[:-1], "the batch dimensions")

    def outer(self) -> tuple[int, ...]:
        of_queries, of_keys = self._shapes()
        shape = tuple(torch.broadcast_shapes(of_queries[:-1], of_keys[:-1]))
        return (*shape, 1) if shape else ()

    def _both(self, device: torch.device) -> tuple[Tensor, Tensor]:
        ids = _tensor(self.ids, device)
        return ids, ids if self.key_ids is None else _tensor(self.key_ids, device)

    def interval(self, length: int, keys: int, device: torch.device) -> Interval:
        if self.scattered:
            return None, None
        first, last, _ = (*self.runs, None) if self.runs is not None else _runs(*self._both(device))
        return first[..., None, :], last[..., None, :]

    def dense(self, device: torch.device) -> Tensor | None:
        if not self.scattered:
            return None
        ids, key_ids = self._both(device)
        return ids[..., None, :, None] == key_ids[..., None, None, :]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dense(Mask):
    tensor: Tensor

    def __repr__(self) -> str:
        return f"dense({_show(self.tensor)})"

    def check(self, outer: Sequence[int], length: int, keys: int) -> None:
        _check_broadcast("mask", self.tensor.shape, (*outer, length, keys), "the shape")

    def outer(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape[:-2])

    def dense(self, device: torch.device) -> Tensor | None:
        return self.tensor


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Intervals(Mask):
    first: Tensor | None
    last: Tensor | None

    def __repr__(self) -> str:
        return f"intervals({_show(self.first)}, {_show(self.last)})"

    def check(self, outer: Sequence[int], length: int, keys: int) -> None:
        for name, value in (("first", self.first), ("last", self.last)):
            if value is not None:
                _check_broadcast(f"intervals: {name}", value.shape, (*outer, length), "the rows (..., H, L) =")

    def outer(self) -> tuple[int, ...]:
        return tuple(torch.broadcast_shapes(*(tuple(x.shape[:-1]) for x in self.tensors())))

    def interval(self, length: int, keys: int, device: torch.device) -> Interval:
        return self.first, self.last


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Both(Mask):
    parts: tuple[Mask, ...]

    def __repr__(self) -> str:
        return " & ".join(repr(part) for part in self.parts)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(x for part in self.parts for x in part.tensors())

    def check(self, outer: Sequence[int], length: int, keys: int) -> None:
        for part in self.parts:
            part.check(outer, length, keys)

    def outer(self) -> tuple[int, ...]:
        return tuple(torch.broadcast_shapes(*(part.outer() for part in self.parts)))

    def interval(self, length: int, keys: int, device: torch.device) -> Interval:
        first = last = None
        for part in self.parts:
            begin, end = part.interval(length, keys, device)
            first = begin if first is None else first if begin is None else torch.maximum(first, begin)
            last = end if last is None else last if end is None else torch.minimum(last, end)
        return first, last

    def dense(self, device: torch.device) -> Tensor | None:
        both = None
        for part in self.parts:
            one = part.dense(device)
            both = one if both is None else both if one is None else both & one
        return both


def _both(one: Mask, other: Mask) -> Mask:
    parts: tuple[Mask, ...] = ()
    for mask in (one, other):
        parts = parts + (mask.parts if isinstance(mask, Both) else (mask,))
    return Both(parts)


def causal(align: str = "upper_left") -> Mask:
    """Query i sees the keys up to its own: j <= i, or j <= i + S - L where ``align`` is "lower_right".

    "upper_left" is the meaning of ``is_causal`` in torch, "lower_right" that of flash-attn and of a cache of past keys.
    The two are one where L = S.

    Raises:
        ValueError: ``align`` is none of the two.

    Example:
        >>> from mpkernels import masks
        >>> masks.to_dense(masks.causal(align="lower_right"), (2, 3)).int()
        tensor([[1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    _check_align("causal", align)
    return Causal(align, False)


def strictly_causal(align: str = "upper_left") -> Mask:
    """Query i sees the keys before its own alone: j < i, or j < i + S - L where ``align`` is "lower_right".

    With "upper_left" the first row sees nothing: its output is 0.

    Raises:
        ValueError: ``align`` is none of the two.

    Example:
        >>> from mpkernels import masks
        >>> masks.to_dense(masks.strictly_causal(), (2, 2)).int()
        tensor([[0, 0],
                [1, 0]], dtype=torch.int32)
    """
    _check_align("strictly_causal", align)
    return Causal(align, True)


def window(left: int | None, right: int | None, align: str = "upper_left") -> Mask:
    """Query i sees the keys i - left <= j <= i + right; with "lower_right", i + S - L takes the place of i.

    Args:
        left: how many keys before its own a query sees; None or -1 for all of them.
        right: how many keys after its own a query sees; None or -1 for all of them. 0 is causal.
        align: "upper_left" or "lower_right", as in :func:`causal`.

    Raises:
        TypeError: ``left`` or ``right`` is no integer.
        ValueError: ``left`` or ``right`` is less than -1, or ``align`` is none of the two.

    Example:
        >>> from mpkernels import masks
        >>> masks.to_dense(masks.window(1, 0), (3, 3)).int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
    """
    _check_align("window", align)
    for name, value in (("left", left), ("right", right)):
        if value is not None and not _is_int(value):
            raise TypeError(f"window: {name}: expected an int or None, got {type(value).__name__}")
        if value is not None and value < -1:
            raise ValueError(f"window: {name}: expected at least 0, or -1 or None for no limit, got {value}")
    return Window(None if left == -1 else left, None if right == -1 else right, align)


def _check_not_negative(name: str, value: object) -> int | None:
    """Raises ValueError where ``value`` holds a negative number; returns the largest where it can be known."""
    if _is_int(value):
        least = largest = value
    elif isinstance(value, Tensor):
        if not value.numel() or not _readable(value):
            return None
        least, largest = torch.stack(value.aminmax()).tolist()
    else:
        flat = torch.tensor(value)
        if not flat.numel() or not _readable(flat):
            return None
        least, largest = torch.stack(flat.aminmax()).tolist()
    if least < 0:  # type: ignore[operator]
        raise ValueError(f"{name}: expected at least 0, got {least}")
    return largest  # type: ignore[return-value]


def _batch_integers(name: str, value: object) -> object:
    value = _frozen(name, value)
    if isinstance(value, Tensor):
        _check_integers(name, value)
        return value.clone()  # small, and what was checked stays true
    if isinstance(value, tuple):
        _regular(name, value)
    return value


def _regular(name: str, value: tuple) -> None:
    """Raises ValueError unless nested tuples are of one shape."""
    shapes = [_batch_shape(item) for item in value]
    for shape in shapes:
        if shape != shapes[0]:
            raise ValueError(f"{name}: expected rows of one length, got {shapes[0]} and {shape}")
    for item in value:
        if isinstance(item, tuple):
            _regular(name, item)


def prefix(n: Integers) -> Mask:
    """Prefix-LM: the first n keys are seen by every query, the others causally: j < max(i + 1, n).

    Args:
        n: an integer, or one for each batch item: a list or an integer tensor (B,) (any shape that broadcasts to the
            batch dimensions), on the device of the scores. May exceed S.

    Raises:
        TypeError: ``n`` holds no integers.
        ValueError: ``n`` is negative.

    Example:
        >>> from mpkernels import masks
        >>> masks.to_dense(masks.prefix(2), (3, 3)).int()
        tensor([[1, 1, 0],
                [1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    value = _batch_integers("prefix: n", n)
    _check_not_negative("prefix: n", value)
    return Prefix(value)


def padding(lengths: Integers) -> Mask:
    """Of each batch item only the first keys are real: every query sees j < lengths[b].

    Args:
        lengths: an integer for each batch item: a list or an integer tensor (B,) (any shape that broadcasts to the
            batch dimensions), on the device of the scores; one integer counts for all. The values are read once, here
            (on a GPU that waits for the device), and not at all under torch.compile, torch.func and CUDA graph
            capture: there a length past S counts as S, a negative one as 0.

    Raises:
        TypeError: ``lengths`` holds no integers.
        ValueError: a length is negative; where the mask is used, a length is past S.

    Example:
        >>> import torch
        >>> from mpkernels import masks
        >>> masks.to_dense(masks.padding([1, 3]), (2, 1, 1, 3))[:, 0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    value = _batch_integers("padding: lengths", lengths)
    return Padding(value, _check_not_negative("padding: lengths", value))


def _runs(ids: Tensor, key_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The run of keys of each query's document, [first, last) (..., L), and whether every document is one run ()."""
    wide = torch.broadcast_shapes(ids.shape[:-1], key_ids.shape[:-1])
    ids = ids.to(torch.int64).expand(*wide, ids.shape[-1]).contiguous()
    key_ids = key_ids.to(torch.int64).expand(*wide, key_ids.shape[-1])
    keys = key_ids.shape[-1]
    if keys == 0:
        zeros = torch.zeros_like(ids)
        return zeros, zeros, torch.ones((), dtype=torch.bool, device=ids.device)
    in_order, order = key_ids.contiguous().sort(dim=-1, stable=True)
    before = torch.searchsorted(in_order, ids)
    behind = torch.searchsorted(in_order, ids, right=True)
    first = order.gather(-1, before.clamp(max=keys - 1))
    together = ((order.diff(dim=-1) == 1) | (in_order.diff(dim=-1) != 0)).all()
    return first, first + (behind - before), together


def documents(ids: Integers, key_ids: Integers | None = None, unsorted: str = "error") -> Mask:
    """Packed sequences: a query sees the keys of its own document, those whose id equals its own.

    The keys of a document have to lie together, as they do where ids are sorted; then every row is an interval of keys.

    Args:
        ids: the document of each query, and of each key where ``key_ids`` is None: a list or an integer tensor (L,) or
            (B, L) (any batch dimensions that broadcast), on the device of the scores. The values are read once, here
            (on a GPU that waits for the device). Under torch.compile an assertion in the graph takes the place of the
            error; under torch.func and CUDA graph capture the order of ids is not checked.
        key_ids: the document of each key, (S,) or (B, S).
        unsorted: what happens where the keys of a document do not lie together: "error", or "dense" for a dense mask
            (B, 1, L, S) (under torch.compile, torch.func and CUDA graph capture always, for the ids are not read).

    Raises:
        TypeError: ids are no integers.
        ValueError: the keys of a document do not lie together and ``unsorted`` is "error"; wrong shapes or devices.

    Example:
        >>> from mpkernels import masks
        >>> masks.to_dense(masks.documents([0, 0, 1]), (3, 3)).int()
        tensor([[1, 1, 0],
                [1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
        >>> masks.documents([0, 1, 0])
        Traceback (most recent call last):
        ...
        ValueError: documents: ids: expected the keys of a document to lie together; sort the tokens first, with \
order = torch.argsort(ids, dim=-1, stable=True), or ask for unsorted="dense"
    """
    if unsorted not in ("error", "dense"):
        raise ValueError(f"documents: unsorted: expected 'error' or 'dense', got {unsorted!r}")
    kept = []
    for name, value in (("ids", ids), ("key_ids", key_ids)):
        value = None if value is None and name == "key_ids" else _frozen(f"documents: {name}", value)
        if isinstance(value, Tensor):
            _check_integers(f"documents: {name}", value)
        elif isinstance(value, tuple):
            _regular(f"documents: {name}", value)
        if value is not None and not _batch_shape(value):
            raise ValueError(f"documents: {name}: expected shape (L,) or (B, L), got one number")
        kept.append(value)
    given = [value for value in kept if isinstance(value, Tensor)]
    device = given[0].device if given else torch.device("cpu")
    if len(given) == 2 and given[1].device != device:
        raise ValueError(f"documents: key_ids: expected the device of ids, {device}, got {given[1].device}")
    of_queries = _tensor(kept[0], device)
    of_keys = of_queries if kept[1] is None else _tensor(kept[1], device)
    readable = _readable(of_queries) and _readable(of_keys)
    if unsorted == "dense" and not readable:
        return Documents(kept[0], kept[1], True, None)
    try:
        first, last, together = _runs(of_queries, of_keys)
    except RuntimeError as error:
        shapes = f"{tuple(of_queries.shape[:-1])} and {tuple(of_keys.shape[:-1])}"
        raise ValueError(f"documents: key_ids: batch dimensions of ids and key_ids do not match: {shapes}") from error
    name = "ids" if key_ids is None else "key_ids"
    message = (
        f"documents: {name}: expected the keys of a document to lie together; sort the tokens first, with "
        f'order = torch.argsort({name}, dim=-1, stable=True), or ask for unsorted="dense"'
    )
    scattered = False
    if readable:
        scattered = not bool(together)
        if scattered and unsorted == "error":
            raise ValueError(message)
    elif torch.compiler.is_compiling():
        torch._assert_async(together, message)
    # ids that came as lists go with the scores to any device, so their runs are computed there
    return Documents(kept[0], kept[1], scattered, (first, last) if given and not scattered else None)


def _dense(name: str, tensor: object) -> Mask:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a bool tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.bool:
        raise TypeError(
            f"{name}: expected a bool tensor (True: attend), got {tensor.dtype}; numbers that are added to the scores "
            "are a bias"
        )
    return Dense(tensor)


def dense(tensor: Tensor) -> Mask:
    """Any mask, as a bool tensor: query i sees key j where it is True.

    Args:
        tensor: bool, broadcasts to (..., H, L, S), on the device of the scores. It is not copied. The kernels
            summarise it by blocks and skip empty ones, but have to read it; the other masks cost nothing.

    Raises:
        TypeError: it is no bool tensor.

    Example:
        >>> import torch
        >>> from mpkernels import masks
        >>> masks.to_dense(masks.dense(torch.tensor([True, False, True])) & masks.causal(), (3, 3)).int()
        tensor([[1, 0, 0],
                [1, 0, 0],
                [1, 0, 1]], dtype=torch.int32)
    """
    return _dense("dense", tensor)


def intervals(first: Tensor | None, last: Tensor | None) -> Mask:
    """A query sees the keys first <= j < last of its row: the form in which kernels take every mask but ``dense``.

    Args:
        first: the first key of each row, an integer tensor that broadcasts to (..., H, L), on the device of the scores;
            None for 0. Values are clamped to [0, S], and first may exceed last: the row sees nothing. Not copied.
        last: the one after the last key, likewise; None for S.

    Raises:
        TypeError: ``first`` or ``last`` is no integer tensor.
        ValueError: both are None, or on two devices.

    Example:
        >>> import torch
        >>> from mpkernels import masks
        >>> masks.to_dense(masks.intervals(torch.tensor([0, 2]), torch.tensor([2, 3])), (2, 3)).int()
        tensor([[1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    for name, value in (("first", first), ("last", last)):
        if value is not None:
            _check_integers(f"intervals: {name}", value)
            if not value.dim():
                raise ValueError(f"intervals: {name}: expected shape (L,) or (..., H, L), got ()")
    if first is None and last is None:
        raise ValueError("intervals: first, last: expected at least one of them, got None twice")
    if first is not None and last is not None and first.device != last.device:
        raise ValueError(f"intervals: last: expected the device of first, {first.device}, got {last.device}")
    return Intervals(first, last)
