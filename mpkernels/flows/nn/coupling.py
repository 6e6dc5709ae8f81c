"""Couplings: a part of x passes as it is, and a network makes of it how the rest is transformed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpkernels.flows.nn.base import Rebuilt, Transform, call_network, grad


class Coupling(Transform):
    """What couplings share: which elements the network sees, and the way back with one run of the network.

    A subclass writes :meth:`transform`, and names in ``numbers`` how many parameters an element has.
    """

    numbers = 1

    def __init__(self, network: nn.Module, mask: str | Tensor = "channel", parity: int = 0):
        super().__init__()
        if not callable(network):
            raise TypeError(f"network: expected a module or a function, got {type(network).__name__}")
        if isinstance(mask, Tensor):
            if mask.dtype != torch.bool:
                raise TypeError(f"mask: expected a bool tensor, True where x is kept, got {mask.dtype}")
        elif not isinstance(mask, str):
            raise TypeError(f"mask: expected 'channel', 'checkerboard' or a bool tensor, got {type(mask).__name__}")
        elif mask not in ("channel", "checkerboard"):
            raise ValueError(f"mask: expected 'channel', 'checkerboard' or a bool tensor, got {mask!r}")
        if parity not in (0, 1):
            raise ValueError(f"parity: expected 0 or 1, got {parity!r}")
        self.network = network
        self.parity = parity
        self._mask = None if isinstance(mask, Tensor) else mask
        self.register_buffer("kept", mask if isinstance(mask, Tensor) else None)

    @property
    def mask(self) -> str | Tensor:
        """The mask, as it was given."""
        return self.kept if self._mask is None else self._mask  # pyright: ignore[reportReturnType]

    def transform(self, inputs: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """``(outputs, logabsdet)`` of inputs (B, ...) under the network's output."""
        raise NotImplementedError(f"{type(self).__name__} has no transform")

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Data to noise: ``(outputs, logabsdet)``."""
        return self.transform(inputs, self.parameters_from(inputs, self.seen(inputs), context), False)

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Noise to data: ``(outputs, logabsdet)``."""
        return self.transform(inputs, self.parameters_from(inputs, self.seen(inputs), context), True)

    def rebuild(self, outputs: Tensor, context: Any = None, inverse: bool = False) -> Rebuilt:
        """See :meth:`Transform.rebuild`. The kept part is the outputs' own, so the network runs once."""
        with torch.enable_grad():
            seen = self.seen(outputs.detach()).detach().requires_grad_()
            parameters = self.parameters_from(outputs, seen, context)
        with torch.no_grad():
            inputs, _ = self.transform(outputs, parameters, not inverse)

        def gradients(grad_outputs, grad_log_abs_det, others):
            with torch.enable_grad():
                x = inputs.detach().requires_grad_()
                results = self.transform(x, parameters, inverse)
            of_x, of_seen, *rest = grad(results, (x, seen, *others), (grad_outputs, grad_log_abs_det))
            assert of_x is not None
            return self.add_to_kept(of_x, of_seen), rest

        return Rebuilt(inputs, gradients)

    def parameters_from(self, x: Tensor, seen: Tensor, context: Any) -> Tensor:
        """The network's output for what it has seen of x; its shape is checked."""
        parameters = call_network(self.network, seen, context)
        number = self.numbers * (x.shape[1] - seen.shape[1] if self._mask == "channel" else x.shape[1])
        if parameters.dim() < 2 or parameters.shape[1] != number:
            raise ValueError(
                f"network: expected an output of shape (B, {number}, ...), {self.numbers} for each transformed "
                f"element, got {tuple(parameters.shape)}"
            )
        return parameters

    def seen(self, x: Tensor) -> Tensor:
        """What the network is given: the kept channels, or x with 0 where it is transformed."""
        if x.dim() < 2:
            raise ValueError(f"inputs: expected shape (B, C, ...), got {tuple(x.shape)}")
        if self._mask == "channel":
            return x.narrow(1, *_kept_channels(x, self.parity))
        return x.masked_fill(self.transformed(x), 0)

    def transformed(self, x: Tensor) -> Tensor:
        """Where x is transformed: a bool tensor that broadcasts to x."""
        if self._mask == "channel":
            start, size = _kept_channels(x, self.parity)
            c = torch.arange(x.shape[1], device=x.device).reshape(-1, *[1] * (x.dim() - 2))
            return (c < start) | (c >= start + size)
        if self._mask is None:
            return ~self.kept  # pyright: ignore[reportOperatorIssue]
        position = torch.zeros((), dtype=torch.int64, device=x.device)
        for d in range(1 if x.dim() == 2 else 2, x.dim()):
            position = position[..., None] + torch.arange(x.shape[d], device=x.device)
        return position % 2 == self.parity

    def add_to_kept(self, of_x: Tensor, of_seen: Tensor | None) -> Tensor:
        """The gradient of x, and of what the network has seen of it."""
        if of_seen is None:
            return of_x
        if self._mask == "channel":
            of_x = of_x.clone() if of_x._is_view() else of_x
            of_x.narrow(1, *_kept_channels(of_x, self.parity)).add_(of_seen)
            return of_x
        return of_x + of_seen.masked_fill(self.transformed(of_x), 0)


def _kept_channels(x: Tensor, parity: int) -> tuple[int, int]:
    """(first, number) of the channels that are kept: the first part, or with parity 1 the second."""
    first = (x.shape[1] + 1) // 2
    return (first, x.shape[1] - first) if parity else (0, first)
