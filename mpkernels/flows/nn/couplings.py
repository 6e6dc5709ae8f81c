"""The couplings: additive, affine and spline; and the affine injector, whose parameters come from the context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpkernels.flows.affine_coupling import affine_coupling
from mpkernels.flows.nn.base import Rebuilt, Transform, grad
from mpkernels.flows.nn.coupling import Coupling
from mpkernels.flows.spline_coupling import spline_coupling


class AffineCoupling(Coupling):
    """An affine coupling around a network: y = x e^l + t where x is transformed, y = x where it is kept.

    Args:
        network: makes both parameters, with ``network(seen)`` or ``network(seen, context)``. With ``mask="channel"``
            it sees the kept channels, and returns (B, 2 T, ...) for T transformed ones. Otherwise it sees x with 0 in
            place of what is transformed, and returns (B, 2 C, ...), of which what belongs to kept elements is not used.
        scale: "exp", "sigmoid", "tanh" or "softclamp": what l is, see :func:`mpkernels.flows.affine_coupling`, as
            for ``epsilon``, ``shift_first`` and ``clamp``.
        mask: "channel", "checkerboard" (on (B, D): every other feature), or a bool tensor that broadcasts to x, True
            where x is kept; it is part of the state_dict.
        parity: "channel": 0 transforms the second part of the channels, 1 the first, of (C + 1) // 2; "checkerboard":
            where the sum of the positions is even or odd.
        layout: how the network's output holds the two: "shift_scale" [t; s] (nflows), "scale_shift",
            "shift_scale_interleaved" (Glow), "scale_shift_interleaved".

    Raises:
        TypeError, ValueError: an argument is none of the above, or the network's output has another shape.

    Example:
        >>> import torch
        >>> from mpkernels.flows import nn
        >>> coupling = nn.AffineCoupling(torch.nn.Conv2d(2, 4, 3, padding=1), scale="sigmoid")
        >>> x = torch.randn(8, 4, 5, 5)
        >>> y, logabsdet = coupling(x)
        >>> torch.equal(y[:, :2], x[:, :2]), torch.allclose(coupling.inverse(y)[0], x, atol=1e-5)
        (True, True)
    """

    numbers = 2

    def __init__(
        self,
        network: nn.Module,
        *,
        scale: str = "sigmoid",
        mask: str | Tensor = "channel",
        parity: int = 0,
        layout: str = "shift_scale",
        epsilon: float = 0.0,
        shift_first: bool = False,
        clamp: float | None = None,
    ):
        super().__init__(network, mask, parity)
        self.settings = affine_settings(scale, layout, epsilon, shift_first, clamp)

    def transform(self, inputs: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """See :meth:`Coupling.transform`."""
        return affine_coupling(
            inputs, parameters, mask=self.mask, parity=self.parity, inverse=inverse, **self.settings
        )  # fmt: skip


class AdditiveCoupling(Coupling):
    """NICE's coupling: y = x + t where x is transformed (Dinh et al. 2014, eq. 7); the log-determinant is 0.

    Args:
        network: returns t: (B, T, ...) with ``mask="channel"``, else (B, C, ...); see :class:`AffineCoupling`, as for
            ``mask`` and ``parity``.

    Example:
        >>> import torch
        >>> from mpkernels.flows import nn
        >>> coupling = nn.AdditiveCoupling(torch.nn.Linear(6, 6), mask="checkerboard")
        >>> coupling(torch.randn(8, 6))[1].tolist() == [0.0] * 8
        True
    """

    def __init__(self, network: nn.Module, *, mask: str | Tensor = "channel", parity: int = 0):
        super().__init__(network, mask, parity)

    def transform(self, inputs: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """See :meth:`Coupling.transform`."""
        return affine_coupling(
            inputs, None, parameters, scale="additive", mask=self.mask, parity=self.parity, inverse=inverse
        )


class SplineCoupling(Coupling):
    """A rational-quadratic spline coupling (Durkan et al. 2019) with linear tails.

    Rounding y to float32 can lose x where the spline is flat (see :func:`mpkernels.flows.spline_coupling`): the inverse
    is then that of the rounded y. ``Sequential(memory="recompute")`` keeps the inputs of this step.

    Args:
        network: returns 3 K - 1 parameters for each transformed element, channel after channel as in nflows:
            (B, T (3 K - 1)), or (B, T (3 K - 1), H, W) for images; with other masks than "channel" C in place of T.
        bins: K >= 2.
        tail_bound: half the length of the interval that the spline maps to itself; outside y = x.
        mask, parity: see :class:`AffineCoupling`.

    Raises:
        TypeError, ValueError: an argument is none of the above, or the network's output has another shape.

    Example:
        >>> import torch
        >>> from mpkernels.flows import nn
        >>> coupling = nn.SplineCoupling(torch.nn.Linear(3, 3 * 23), bins=8)
        >>> x = torch.randn(8, 6)
        >>> y, logabsdet = coupling(x)
        >>> torch.allclose(coupling.inverse(y)[0], x, atol=1e-4)
        True
    """

    loses_input = True

    def __init__(
        self,
        network: nn.Module,
        *,
        bins: int = 8,
        tail_bound: float = 3.0,
        parity: int = 0,
        mask: str | Tensor = "channel",
    ):
        super().__init__(network, mask, parity)
        if not isinstance(bins, int) or bins < 2:
            raise ValueError(f"bins: expected an integer of at least 2, got {bins!r}")
        if not tail_bound > 0:
            raise ValueError(f"tail_bound: expected a number above 0, got {tail_bound!r}")
        self.bins = bins
        self.tail_bound = float(tail_bound)
        self.numbers = 3 * bins - 1

    def transform(self, inputs: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """See :meth:`Coupling.transform`."""
        parameters = parameters.to(inputs.dtype)  # autocast's networks give half types
        if self._mask != "channel":
            # what lies outside the interval stays, with a derivative of 1: so do the kept elements, put there
            transformed = self.transformed(inputs)
            moved = inputs.masked_fill(~transformed, 2 * self.tail_bound)
            outputs, log_abs_det = self._spline(moved, parameters, inverse)
            return torch.where(transformed, outputs, inputs), log_abs_det
        channels = inputs.shape[1]
        first = (channels + 1) // 2
        start, size = (0, first) if self.parity else (first, channels - first)
        outputs, log_abs_det = self._spline(inputs.narrow(1, start, size), parameters, inverse)
        kept = self.seen(inputs)
        return torch.cat([outputs, kept] if self.parity else [kept, outputs], 1), log_abs_det

    def _spline(self, x: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if x.dim() == 2:
            parameters = parameters.unflatten(1, (x.shape[1], self.numbers))
            return spline_coupling(x, parameters, tail_bound=self.tail_bound, inverse=inverse)
        return spline_coupling(x, parameters, tail_bound=self.tail_bound, inverse=inverse, parameters_dim=1)


class AffineInjector(Transform):
    """SRFlow's injector: h e^l + t with parameters from the context alone (Lugmayr et al. 2020, eq. 8).

    Args:
        network: ``network(context)`` returns (B, 2 C, ...), or what broadcasts to it.
        scale, layout, epsilon, shift_first, clamp: see :class:`AffineCoupling`.

    Raises:
        ValueError: there is no context.

    Example:
        >>> import torch
        >>> from mpkernels.flows import nn
        >>> injector = nn.AffineInjector(torch.nn.Conv2d(3, 8, 1), scale="exp")
        >>> h, low_resolution = torch.randn(2, 4, 6, 6), torch.randn(2, 3, 6, 6)
        >>> y, logabsdet = injector(h, low_resolution)
        >>> torch.allclose(injector.inverse(y, low_resolution)[0], h, atol=1e-5)
        True
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        scale: str = "sigmoid",
        layout: str = "shift_scale",
        epsilon: float = 0.0,
        shift_first: bool = False,
        clamp: float | None = None,
    ):
        super().__init__()
        if not callable(network):
            raise TypeError(f"network: expected a module or a function, got {type(network).__name__}")
        self.network = network
        self.settings = affine_settings(scale, layout, epsilon, shift_first, clamp)

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Data to noise: ``(outputs, logabsdet)``."""
        return affine_coupling(inputs, self._from(context), **self.settings)

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Noise to data: ``(outputs, logabsdet)``."""
        return affine_coupling(inputs, self._from(context), inverse=True, **self.settings)

    def rebuild(self, outputs: Tensor, context: Any = None, inverse: bool = False) -> Rebuilt:
        """See :meth:`Transform.rebuild`."""
        with torch.enable_grad():
            parameters = self._from(context)
        with torch.no_grad():
            inputs, _ = affine_coupling(outputs, parameters, inverse=not inverse, **self.settings)

        def gradients(grad_outputs, grad_log_abs_det, others):
            with torch.enable_grad():
                x = inputs.detach().requires_grad_()
                results = affine_coupling(x, parameters, inverse=inverse, **self.settings)
            of_x, *rest = grad(results, (x, *others), (grad_outputs, grad_log_abs_det))
            assert of_x is not None
            return of_x, rest

        return Rebuilt(inputs, gradients)

    def _from(self, context: Any) -> Tensor:
        if context is None:
            raise ValueError("context: expected what the injector's network takes, got None")
        return self.network(context)


def affine_settings(scale: str, layout: str, epsilon: float, shift_first: bool, clamp: float | None) -> dict[str, Any]:
    """The settings of an affine coupling with one network, checked once by an empty call."""
    settings: dict[str, Any] = {
        "scale": scale, "layout": layout, "epsilon": epsilon, "shift_first": shift_first, "clamp": clamp,
    }  # fmt: skip
    if layout is None:
        raise ValueError("layout: expected the name of a layout, got None")
    affine_coupling(torch.zeros(0, 1), torch.zeros(0, 2), backend="reference", **settings)
    return settings
