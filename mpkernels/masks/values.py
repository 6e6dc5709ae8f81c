"""The masks: small frozen objects that say which keys a query sees, and combine with ``&``.

All but ``dense`` reduce to an interval [first, last) of keys for each query row; ``&`` intersects intervals.
"""
# ruff: noqa: D102  (Mask says once what each method of a mask is for)

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from mpkernels.masks.integers import as_tensor, batch_shape, check_broadcast, described, is_int, runs, same

_UNLIMITED = 2**31  # more than any length: a wider window changes nothing

Interval = tuple[Tensor | None, Tensor | None]


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
        return all(same(mine, theirs) for mine, theirs in zip(self._values(), other._values(), strict=True))

    def __hash__(self) -> int:
        if self.tensors():
            raise TypeError(f"unhashable mask, for it holds tensors: {self!r}")
        return hash((type(self), self._values()))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "resolved"}

    def _values(self) -> tuple[object, ...]:
        """The fields that tell masks of one type apart."""
        raise NotImplementedError

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors the mask is made of; none where it is made of integers alone."""
        return tuple(value for value in self._values() if isinstance(value, Tensor))

    def settled(self) -> bool:
        """Whether nobody else can write to what ``interval`` reads, so that its answer may be kept."""
        return True

    def check(self, outer: Sequence[int], length: int, keys: int) -> None:
        """Raises ValueError unless the mask fits scores of shape outer + (length, keys)."""

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
        return dense_mask(name, value)
    raise TypeError(f"{name}: expected a mask of mpkernels.masks, a bool tensor or None, got {type(value).__name__}")


def dense_mask(name: str, tensor: object) -> Mask:
    """A bool tensor as a mask; raises TypeError for anything else."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a bool tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.bool:
        raise TypeError(
            f"{name}: expected a bool tensor (True: attend), got {tensor.dtype}; numbers that are added to the scores "
            "are a bias"
        )
    return Dense(tensor)


def _rows(length: int, keys: int, align: str, device: torch.device) -> Tensor:
    """The key that is level with each row."""
    rows = torch.arange(length, dtype=torch.int64, device=device)
    return rows + (keys - length) if align == "lower_right" else rows


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Causal(Mask):
    """Up to the key that is level with the row, or strictly before it."""

    align: str
    strict: bool

    def __repr__(self) -> str:
        align = "" if self.align == "upper_left" else f"align={self.align!r}"
        return f"{'strictly_causal' if self.strict else 'causal'}({align})"

    def _values(self) -> tuple[object, ...]:
        return self.align, self.strict

    def interval(self, length: int, keys: int, device: torch.device) -> Interval:
        return None, _rows(length, keys, self.align, device) + (0 if self.strict else 1)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Window(Mask):
    """Around the key that is level with the row."""

    left: int | None
    right: int | None
    align: str

    def __repr__(self) -> str:
        align = "" if self.align == "upper_left" else f", align={self.align!r}"
        return f"window({self.left}, {self.right}{align})"

    def _values(self) -> tuple[object, ...]:
        return self.left, self.right, self.align

    def interval(self, length: int, keys: int, device: torch.device) -> Interval:
        rows = _rows(length, keys, self.align, device)
        first = None if self.left is None else rows - min(self.left, _UNLIMITED)
        last = None if self.right is None else rows + (min(self.right, _UNLIMITED) + 1)
        return first, last


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Prefix(Mask):
    """Causal, but the first n keys are seen by all rows."""

    n: object

    def __repr__(self) -> str:
        return f"prefix({described(self.n)})"

    def _values(self) -> tuple[object, ...]:
        return (self.n,)

    def check(self, outer: Sequence[int], length: int, keys: int) -> None:
        check_broadcast("prefix: n", batch_shape(self.n), outer[:-1], "the batch dimensions")

    def outer(self) -> tuple[int, ...]:
        return (*shape, 1) if (shape := batch_shape(self.n)) else ()

    def interval(self, length: int, keys: int, device: torch.device) -> Interval:
        rows = _rows(length, keys, "upper_left", device) + 1
        if is_int(self.n):
            return None, rows.clamp(min=min(self.n, _UNLIMITED))  # type: ignore[arg-type]
        return None, torch.maximum(rows, as_tensor(self.n, device).to(torch.int64)[..., None, None])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Padding(Mask):
    """The first keys of each batch item."""

    lengths: object
    longest: int | None  # the largest, where it is known

    def __repr__(self) -> str:
        return f"padding({described(self.lengths)})"

    def _values(self) -> tuple[object, ...]:
        return (self.lengths,)

    def check(self, outer: Sequence[int], length: int, keys: int) -> None:
        check_broadcast("padding: lengths", batch_shape(self.lengths), outer[:-1], "the batch dimensions")
        if self.longest is not None and self.longest > keys:
            raise ValueError(f"padding: lengths: expected at most S = {keys} keys, got {self.longest}")

    def outer(self) -> tuple[int, ...]:
        return (*shape, 1) if (shape := batch_shape(self.lengths)) else ()

    def interval(self, length: int, keys: int, device: torch.device) -> Interval:
        return None, as_tensor(self.lengths, device).to(torch.int64)[..., None, None]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Documents(Mask):
    """The keys with the id of the row."""

    ids: object
    key_ids: object
    scattered: bool  # documents may lie in pieces: only a dense mask says it
    runs: tuple[Tensor, Tensor] | None  # of tensors of ids

    def __repr__(self) -> str:
        keys = "" if self.key_ids is None else f", {described(self.key_ids)}"
        return f"documents({described(self.ids)}{keys}{', unsorted=' + repr('dense') if self.scattered else ''})"

    def _values(self) -> tuple[object, ...]:
        return self.ids, self.key_ids, self.scattered

    def settled(self) -> bool:
        return self.scattered or self.runs is not None or not self.tensors()

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        queries = batch_shape(self.ids)
        return queries, queries if self.key_ids is None else batch_shape(self.key_ids)

    def check(self, outer: Sequence[int], length: int, keys: int) -> None:
        of_queries, of_keys = self._shapes()
        if of_queries[-1] != length:
            raise ValueError(f"documents: ids: expected L = {length} ids in a row, got {of_queries[-1]}")
        if of_keys[-1] != keys:
            name = (
                "ids (they also count for the keys where there are no key_ids)" if self.key_ids is None else "key_ids"
            )
            raise ValueError(f"documents: {name}: expected S = {keys} ids in a row, got {of_keys[-1]}")
        check_broadcast("documents: ids", of_queries[:-1], outer[:-1], "the batch dimensions")
        check_broadcast("documents: key_ids", of_keys[:-1], outer[:-1], "the batch dimensions")

    def outer(self) -> tuple[int, ...]:
        of_queries, of_keys = self._shapes()
        shape = tuple(torch.broadcast_shapes(of_queries[:-1], of_keys[:-1]))
        return (*shape, 1) if shape else ()

    def _both(self, device: torch.device) -> tuple[Tensor, Tensor]:
        ids = as_tensor(self.ids, device)
        return ids, ids if self.key_ids is None else as_tensor(self.key_ids, device)

    def interval(self, length: int, keys: int, device: torch.device) -> Interval:
        if self.scattered:
            return None, None
        first, last, _ = (*self.runs, None) if self.runs is not None else runs(*self._both(device))
        return first[..., None, :], last[..., None, :]

    def dense(self, device: torch.device) -> Tensor | None:
        if not self.scattered:
            return None
        ids, key_ids = self._both(device)
        return ids[..., None, :, None] == key_ids[..., None, None, :]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dense(Mask):
    """A bool tensor."""

    tensor: Tensor

    def __repr__(self) -> str:
        return f"dense({described(self.tensor)})"

    def _values(self) -> tuple[object, ...]:
        return (self.tensor,)

    def check(self, outer: Sequence[int], length: int, keys: int) -> None:
        check_broadcast("mask", self.tensor.shape, (*outer, length, keys), "the shape")

    def outer(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape[:-2])

    def dense(self, device: torch.device) -> Tensor | None:
        return self.tensor


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Intervals(Mask):
    """First and last key, as they are given."""

    first: Tensor | None
    last: Tensor | None

    def __repr__(self) -> str:
        return f"intervals({described(self.first)}, {described(self.last)})"

    def _values(self) -> tuple[object, ...]:
        return self.first, self.last

    def settled(self) -> bool:
        return False

    def check(self, outer: Sequence[int], length: int, keys: int) -> None:
        for name, value in (("first", self.first), ("last", self.last)):
            if value is not None:
                check_broadcast(f"intervals: {name}", value.shape, (*outer, length), "the rows (..., H, L) =")

    def outer(self) -> tuple[int, ...]:
        return tuple(torch.broadcast_shapes(*(tuple(x.shape[:-1]) for x in self.tensors())))

    def interval(self, length: int, keys: int, device: torch.device) -> Interval:
        return self.first, self.last


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Both(Mask):
    """What every part lets through."""

    parts: tuple[Mask, ...]

    def __repr__(self) -> str:
        return " & ".join(repr(part) for part in self.parts)

    def _values(self) -> tuple[object, ...]:
        return self.parts

    def settled(self) -> bool:
        return all(part.settled() for part in self.parts)

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
