"""What the autograd.Functions of all ops share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers


class Function(torch.autograd.Function):
    """torch's, applied in eager mode without reading the signature of ``forward`` in every call (40 us)."""

    @classmethod
    def apply(cls, *arguments):
        """See torch.autograd.Function.apply."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(arguments))


def differentiated(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd, a torch.func transform or the compiler has to see an autograd.Function.

    Where it is False the op is called directly: a Function costs as much as a small op.
    """
    return (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors))
        or torch._C._are_functorch_transforms_active()
        or forward_mode()
    )


def forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken."""
    return torch.autograd.forward_ad._current_level >= 0


def contiguous(x: Tensor | None) -> Tensor | None:
    """``x.contiguous()``, for arguments that may be missing."""
    return None if x is None else x.contiguous()


def fold(batch: int, in_dims: Sequence, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """For a Function's vmap: a mapped dimension as more of the first one, (V, N, ...) -> (V N, ...)."""
    return [None if x is None else x.flatten(0, 1) for x in mapped_first(batch, in_dims, tensors)]


def mapped_first(batch: int, in_dims: Sequence, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Every tensor with the mapped dimension in front, those without one expanded: (V, N, ...)."""
    return [
        None if x is None else x.expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims, strict=True)
    ]


def unfold(x: Tensor, batch: int) -> Tensor:
    """What :func:`fold` did, undone: (V N, ...) -> (V, N, ...)."""
    return x.unflatten(0, (batch, x.shape[0] // batch))


def one_by_one(function, batch: int, in_dims: Sequence, inputs: Sequence):
    """For a Function's vmap: each mapped problem by itself, where they cannot be made one; (results, their dims)."""
    found = [
        function.apply(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
        for i in range(batch)
    ]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(torch.stack(x) for x in zip(*found, strict=True)), (0,) * len(found[0])


def vjp(function: Callable, primals: Sequence):
    """(function(*primals), what takes gradients of that to gradients of ``primals``)."""
    found, transpose = torch.func.vjp(function, *primals)[:2]
    return found, transpose


def of_some(function: Callable, tensors: Sequence[Tensor | None], wanted: Sequence[int], kept: Sequence[int]):
    """(the results numbered ``kept`` as a function of the ``tensors`` numbered ``wanted``, those tensors)."""

    def chosen_results(*chosen: Tensor):
        full = list(tensors)
        for i, x in zip(wanted, chosen, strict=True):
            full[i] = x
        found = function(*full)
        return tuple(found[i] for i in kept)

    return chosen_results, [tensors[i] for i in wanted]


def directional(function: Callable, primals: Sequence, tangents: Sequence):
    """The derivative of ``function(*primals)`` along ``tangents``.

    Its gradient, transposed once more: forward mode within forward mode is not to be had.
    """
    found, transpose = vjp(function, primals)
    _, forwards = vjp(lambda *gradients: transpose(gradients), [torch.zeros_like(x) for x in found])
    return forwards(tuple(tangents))
