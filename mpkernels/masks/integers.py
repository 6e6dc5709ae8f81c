"""The integers that masks are made of: ints, nested tuples of ints and tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

ALIGNMENTS = ("upper_left", "lower_right")

Integers = int | Sequence[int] | Sequence[Sequence[int]] | Tensor


def readable(x: Tensor) -> bool:
    """Whether the values of ``x`` may be read: not under torch.compile, torch.func or CUDA graph capture."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if isinstance(x, FakeTensor) or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def is_int(value: object) -> bool:
    """Whether ``value`` is an integer (a symbolic one under torch.compile), and no bool."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_align(name: str, align: object) -> None:
    """Raises ValueError unless ``align`` is one of the two."""
    if align not in ALIGNMENTS:
        raise ValueError(f"{name}: align: expected 'upper_left' or 'lower_right', got {align!r}")


def check_integers(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is an integer tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected integers or a tensor of them, got {type(value).__name__}")
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor, got {value.dtype}")


def frozen(name: str, value: object) -> object:
    """Integers as they are kept: ints and tensors as they come, sequences as (nested) tuples."""
    if is_int(value) or isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)):
        for item in value:
            if not is_int(item) and not isinstance(item, (list, tuple)):
                raise TypeError(f"{name}: expected integers, got {type(item).__name__} in a {type(value).__name__}")
        return tuple(frozen(name, item) for item in value)
    raise TypeError(f"{name}: expected integers or a tensor of them, got {type(value).__name__}")


def as_tensor(value: object, device: torch.device) -> Tensor:
    """A tensor as it is; ints as an int64 tensor on ``device``."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64, device=device)


def check_broadcast(name: str, shape: Sequence[int], target: Sequence[int], meaning: str) -> None:
    """Raises ValueError unless ``shape`` broadcasts to ``target``."""
    fits = len(shape) <= len(target)
    for size, wanted in zip(reversed(shape), reversed(target), strict=False):
        fits = fits and (size == 1 or size == wanted)
    if not fits:
        raise ValueError(f"{name}: shape {tuple(shape)} does not broadcast to {meaning} {tuple(target)} of the scores")


def described(value: object) -> str:
    """``value`` as in the expression that made it; large tensors by dtype, shape and device."""
    if not isinstance(value, Tensor):
        return repr(thawed(value))
    if value.device.type == "cpu" and value.dim() <= 1 and value.numel() <= 8 and readable(value):
        return f"tensor({value.tolist()})"
    where = "" if value.device.type == "cpu" else f" on {value.device}"
    return f"<{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{where}>"


def thawed(value: object) -> object:
    """Nested tuples as the lists they came as."""
    return [thawed(item) for item in value] if isinstance(value, tuple) else value


def same(one: object, other: object) -> bool:
    """Whether two fields of masks are equal by value."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if one is other:
            return True
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            return False
        return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def batch_shape(value: object) -> tuple[int, ...]:
    """The shape of a tensor, of nested tuples, of a number: ()."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    shape: tuple[int, ...] = ()
    while isinstance(value, tuple):
        shape = (*shape, len(value))
        value = value[0] if value else 0
    return shape


def check_not_negative(name: str, value: object) -> int | None:
    """Raises ValueError where ``value`` holds a negative number; returns the largest where it can be known."""
    if is_int(value):
        least = largest = value
    else:
        values = value if isinstance(value, Tensor) else torch.tensor(value)
        if not values.numel() or not readable(values):
            return None
        least, largest = torch.stack(values.aminmax()).tolist()
    if least < 0:  # type: ignore[operator]
        raise ValueError(f"{name}: expected at least 0, got {least}")
    return largest  # type: ignore[return-value]


def batch_integers(name: str, value: object) -> object:
    """An integer, or integers for the items of a batch, as a mask keeps them."""
    value = frozen(name, value)
    if isinstance(value, Tensor):
        check_integers(name, value)
        return value.clone()  # small, and what was checked stays true
    if isinstance(value, tuple):
        check_regular(name, value)
    return value


def check_regular(name: str, value: tuple) -> None:
    """Raises ValueError unless nested tuples are of one shape."""
    shapes = [batch_shape(item) for item in value]
    for shape in shapes:
        if shape != shapes[0]:
            raise ValueError(f"{name}: expected rows of one length, got {shapes[0]} and {shape}")
    for item in value:
        if isinstance(item, tuple):
            check_regular(name, item)


def runs(ids: Tensor, key_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
