"""A step of Glow: ActNorm, the invertible 1x1 convolution and an affine coupling as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpkernels.flows.actnorm import actnorm
from mpkernels.flows.invertible_conv1x1 import invertible_conv1x1
from mpkernels.flows.nn.base import Rebuilt, Transform, add, grad
from mpkernels.flows.nn.couplings import AffineCoupling
from mpkernels.flows.nn.layers import ActNorm, InvertibleConv1x1


class GlowStep(Transform):
    """ActNorm, invertible 1x1 convolution, affine coupling by channels (Kingma and Dhariwal 2018, figure 2a).

    Args:
        channels: C of inputs (B, C, ...).
        network: of the coupling: (B, C - T, ...) kept channels, with ``network(kept, context)`` where there is a
            context, to (B, 2 T, ...), T = C // 2 with parity 0; see :class:`AffineCoupling`, as for ``scale``,
            ``layout``, ``epsilon``, ``parity``, ``shift_first`` and ``clamp``.
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
        clamp: float | None = None,
        actnorm_epsilon: float = 1e-6,
        log_scale_factor: float = 1.0,
    ):
        super().__init__()
        self.actnorm = ActNorm(channels, epsilon=actnorm_epsilon, log_scale_factor=log_scale_factor)
        self.conv = InvertibleConv1x1(channels, plu=plu)
        self.coupling = AffineCoupling(
            network, scale=scale, layout=layout, epsilon=epsilon, parity=parity, shift_first=shift_first, clamp=clamp
        )

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Data to noise: ``(outputs, logabsdet)``."""
        self.actnorm.see(inputs)
        state, linear = self._linear(inputs, False)
        outputs, log_abs_det = self.coupling(state, context)
        return outputs, linear + log_abs_det

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Noise to data: ``(outputs, logabsdet)``."""
        state, log_abs_det = self.coupling.inverse(inputs, context)
        outputs, linear = self._linear(state, True)
        return outputs, linear + log_abs_det

    def rebuild(self, outputs: Tensor, context: Any = None, inverse: bool = False) -> Rebuilt:
        """See :meth:`Transform.rebuild`. The network runs once."""
        if inverse:
            with torch.no_grad():
                state, _ = self._linear(outputs, False)
            inputs, of_coupling = self.coupling.rebuild(state, context, True)
        else:
            state, of_coupling = self.coupling.rebuild(outputs, context)
            with torch.no_grad():
                inputs, _ = self._linear(state, True)

        def gradients(grad_outputs, grad_log_abs_det, others):
            def of_linear(grad_outputs):
                with torch.enable_grad():
                    x = (state if inverse else inputs).detach().requires_grad_()
                    results = self._linear(x, inverse)
                of_x, *rest = grad(results, (x, *others), (grad_outputs, grad_log_abs_det))
                return of_x, rest

            if inverse:
                of_state, first = of_linear(grad_outputs)
                of_inputs, second = of_coupling(of_state, grad_log_abs_det, others)
            else:
                of_state, first = of_coupling(grad_outputs, grad_log_abs_det, others)
                of_inputs, second = of_linear(of_state)
            return of_inputs, [add(a, b) for a, b in zip(first, second, strict=True)]

        return Rebuilt(inputs, gradients)

    def _linear(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """ActNorm and the 1x1 convolution, or their inverse."""
        parts = [
            lambda x: actnorm(x, self.actnorm.bias, self.actnorm.log_scale, inverse=inverse),
            lambda x: invertible_conv1x1(x, self.conv.weight, inverse=inverse),
        ]
        y, first = parts[inverse](x)
        y, second = parts[not inverse](y)
        return y, first + second
