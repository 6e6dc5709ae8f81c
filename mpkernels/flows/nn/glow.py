"""A step of Glow: ActNorm, the invertible 1x1 convolution and an affine coupling as one module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpkernels.flows.glow_step import glow_step
from mpkernels.flows.nn.base import Rebuilt, Transform, add, call_network, grad
from mpkernels.flows.nn.couplings import affine_settings
from mpkernels.flows.nn.layers import ActNorm, InvertibleConv1x1


class GlowStep(Transform):
    """ActNorm, invertible 1x1 convolution, affine coupling by channels (Kingma and Dhariwal 2018, figure 2a).

    Args:
        channels: C of inputs (B, C, ...).
        network: of the coupling: (B, C - T, ...) kept channels, with ``network(kept, context)`` where there is a
            context, to (B, 2 T, ...), T = C // 2 with parity 0; see :class:`AffineCoupling`, as for ``scale``,
            ``layout``, ``epsilon``, ``parity`` and ``shift_first``.
        plu: see :class:`InvertibleConv1x1`.
        actnorm_epsilon, log_scale_factor: see :class:`ActNorm`, ``epsilon`` and ``log_scale_factor``.

    Example:
        >>> import torch
        >>> from mpkernels.flows import nn
        >>> step = nn.GlowStep(4, torch.nn.Conv2d(2, 4, 3, padding=1))
        >>> x = torch.randn(8, 4, 6, 6)
        >>> y, logabsdet = step(x)
        >>> torch.allclose(step.inverse(y)[0], x, atol=1e-4)
        True
    """

    def __init__(
        self,
        channels: int,
        network: nn.Module,
        *,
        plu: bool = True,
        scale: str = "sigmoid",
        layout: str = "shift_scale",
        epsilon: float = 0.0,
        parity: int = 0,
        shift_first: bool = False,
        actnorm_epsilon: float = 1e-6,
        log_scale_factor: float = 1.0,
    ):
        super().__init__()
        self.actnorm = ActNorm(channels, epsilon=actnorm_epsilon, log_scale_factor=log_scale_factor)
        self.conv = InvertibleConv1x1(channels, plu=plu)
        if not callable(network):
            raise TypeError(f"network: expected a module or a function, got {type(network).__name__}")
        affine_settings(scale, layout, epsilon, shift_first, None)
        if parity not in (0, 1):
            raise ValueError(f"parity: expected 0 or 1, got {parity!r}")
        self.network = network
        self.settings: dict[str, Any] = {
            "scale": scale, "layout": layout, "epsilon": epsilon, "parity": parity, "shift_first": shift_first,
        }  # fmt: skip

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Data to noise: ``(outputs, logabsdet)``."""
        self.actnorm.see(inputs)
        return self._run(inputs, self.network, context, False)

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Noise to data: ``(outputs, logabsdet)``."""
        return self._run(inputs, self.network, context, True)

    def rebuild(self, outputs: Tensor, context: Any = None, inverse: bool = False) -> Rebuilt:
        """See :meth:`Transform.rebuild`. The network runs once."""
        network = _Once(self.network, context)
        with torch.no_grad():
            inputs, _ = self._run(outputs, network.first, None, not inverse)

        def gradients(grad_outputs, grad_log_abs_det, others):
            network.others = others
            with torch.enable_grad():
                x = inputs.detach().requires_grad_()
                results = self._run(x, network.again, None, inverse)
            of_x, *rest = grad(results, (x, *others), (grad_outputs, grad_log_abs_det))
            return of_x, [add(a, b) for a, b in zip(rest, network.of_others, strict=True)]

        return Rebuilt(inputs, gradients)

    def _run(self, x: Tensor, network: Callable[..., Tensor], context: Any, inverse: bool) -> tuple[Tensor, Tensor]:
        return glow_step(
            x,
            self.actnorm.bias,
            self.actnorm.log_scale,
            self.conv.weight,
            network,
            context=context,
            inverse=inverse,
            **self.settings,
        )


class _Once:
    """A network that runs once, for the inverse and for the gradient: both see the same kept channels."""

    def __init__(self, network: Callable[..., Tensor], context: Any):
        self.network, self.context = network, context
        self.others: Sequence[Tensor] = ()
        self.of_others: list[Tensor | None] = []

    def first(self, kept: Tensor) -> Tensor:
        """Runs the network, and records its graph."""
        with torch.enable_grad():
            self.kept = kept.detach().requires_grad_()
            self.parameters = call_network(self.network, self.kept, self.context)
        return self.parameters.detach()

    def again(self, kept: Tensor) -> Tensor:
        """The same result; backward goes through the graph of the first run."""
        return _Again.apply(kept, self)  # pyright: ignore[reportReturnType]

    def backward(self, gradient: Tensor) -> Tensor | None:
        """The gradient of the kept channels; that of ``others`` is left in ``of_others``."""
        of_kept, *self.of_others = grad([self.parameters], (self.kept, *self.others), [gradient])
        return of_kept


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kept, network):
        ctx.network = network
        return network.parameters.detach()

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.network.backward(gradient), None
