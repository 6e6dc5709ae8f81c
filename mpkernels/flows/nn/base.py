"""What every module of a flow is: a map with an inverse, log|det J|, and a way back from outputs to inputs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


class _Rebuilding(threading.local):
    active = False


rebuilding = _Rebuilding()
"""Whether backward is rebuilding activations: what a module learns from its first batch, it does not learn then."""


class Rebuilt(NamedTuple):
    """What :meth:`Transform.rebuild` returns.

    ``gradients(grad_outputs, grad_log_abs_det, others)`` returns the gradient of the inputs, and a list with those of
    ``others`` (parameters, and tensors of the context; None for one that takes no part). It is called once at most.
    """

    inputs: Tensor
    gradients: Callable[[Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, list[Tensor | None]]]


class Transform(nn.Module):
    """A bijection with its log-determinant; data to noise is forward, as in nflows.

    Subclasses write :meth:`forward` and :meth:`inverse`; both take ``(inputs, context=None)`` and return
    ``(outputs, logabsdet)``, with log|det J| a sample, shape (B,), in float32 (float64 for float64).
    Those that change shapes override :meth:`output_shape` and :meth:`input_shape`; those that can go back from outputs
    to inputs with one run of their network override :meth:`rebuild`.
    """

    loses_input = False
    """True where rounding the outputs can lose the inputs: ``Sequential(memory="recompute")`` keeps the inputs then."""

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Maps data (B, ...) towards noise: ``(outputs, logabsdet)``."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Maps noise towards data: ``(outputs, logabsdet)``, with the log-determinant of the inverse."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse")

    def output_shape(self, shape: Sequence[int]) -> Shape:
        """The shape of one sample's outputs, from that of its inputs (both without the batch)."""
        return tuple(shape)

    def input_shape(self, shape: Sequence[int]) -> Shape:
        """The shape of one sample's inputs, from that of its outputs (both without the batch)."""
        return tuple(shape)

    def rebuild(self, outputs: Tensor, context: Any = None, inverse: bool = False) -> Rebuilt:
        """Finds the inputs that gave ``outputs``, and how to differentiate at them.

        ``Sequential(memory="recompute")`` calls this in backward, without gradients being recorded. This default runs
        the inverse, then forward once more: a network twice. ``inverse=True`` where ``outputs`` came from
        :meth:`inverse`.
        """
        return rebuild_by_inverse(self, outputs, context, inverse)


def run(transform: nn.Module, inputs: Tensor, context: Any, inverse: bool) -> tuple[Tensor, Tensor]:
    """A transform, or its inverse; any module with nflows' contract."""
    return transform.inverse(inputs, context) if inverse else transform(inputs, context)


def rebuild_by_inverse(transform: nn.Module, outputs: Tensor, context: Any, inverse: bool) -> Rebuilt:
    """The default of :meth:`Transform.rebuild`, for any module with nflows' contract."""
    with torch.no_grad(), same_random_numbers(outputs.device):
        inputs, _ = run(transform, outputs, context, not inverse)
    return Rebuilt(inputs, lambda *given: gradients_at(transform, inputs, context, inverse, *given))


def gradients_at(
    transform: nn.Module,
    inputs: Tensor,
    context: Any,
    inverse: bool,
    grad_outputs: Tensor,
    grad_log_abs_det: Tensor,
    others: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradients of a step whose inputs are known, by running it with gradients recorded."""
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        results = run(transform, inputs, context, inverse)
    grad_inputs, *rest = grad(results, (inputs, *others), (grad_outputs, grad_log_abs_det))
    return torch.zeros_like(inputs) if grad_inputs is None else grad_inputs, rest


def grad(outputs: Sequence[Tensor], inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """torch.autograd.grad over those ``outputs`` that depend on anything; None for inputs that take no part."""
    pairs = [(y, g.to(y.dtype)) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
    if not pairs:
        return [None for _ in inputs]
    return list(
        torch.autograd.grad([y for y, _ in pairs], list(inputs), [g for _, g in pairs], allow_unused=True),
    )


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients, either of which may be missing."""
    return b if a is None else a if b is None else a + b


def same_random_numbers(device: torch.device):
    """What is drawn inside is drawn again after it."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], device_type="cuda")


def call_network(network: Callable, seen: Tensor, context: Any) -> Tensor:
    """``network(seen)``, or ``network(seen, context)`` where there is a context."""
    return network(seen) if context is None else network(seen, context)


def wide(x: Tensor) -> torch.dtype:
    """The dtype of log-determinants."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def no_log_abs_det(x: Tensor) -> Tensor:
    """The log-determinant of what keeps volumes: zeros (B,)."""
    return x.new_zeros((x.shape[0],), dtype=wide(x))


def check_module(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a module with an inverse."""
    if not isinstance(value, nn.Module) or not callable(getattr(value, "inverse", None)):
        raise TypeError(f"{name}: expected a torch.nn.Module with forward and inverse, got {type(value).__name__}")


class Inverse(Transform):
    """A transform the other way round: forward is ``transform.inverse``, inverse is its forward.

    Example:
        >>> import torch
        >>> from mpkernels.flows import nn
        >>> squeeze = nn.Squeeze()
        >>> nn.Inverse(squeeze)(torch.zeros(1, 4, 3, 3))[0].shape
        torch.Size([1, 1, 6, 6])
    """

    def __init__(self, transform: nn.Module):
        super().__init__()
        check_module("transform", transform)
        self.transform = transform

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """``transform.inverse``."""
        return self.transform.inverse(inputs, context)

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """``transform.forward``."""
        return self.transform(inputs, context)

    def output_shape(self, shape: Sequence[int]) -> Shape:
        """See :meth:`Transform.output_shape`."""
        return self.transform.input_shape(shape) if isinstance(self.transform, Transform) else tuple(shape)

    def input_shape(self, shape: Sequence[int]) -> Shape:
        """See :meth:`Transform.input_shape`."""
        return self.transform.output_shape(shape) if isinstance(self.transform, Transform) else tuple(shape)
