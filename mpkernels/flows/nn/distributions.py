"""Modules of a flow as torch.distributions' transforms, for torch's and zuko's distributions."""

from __future__ import annotations

import math
from typing import Any

from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import Transform as TorchTransform
from torch.utils import _pytree as pytree

from mpkernels.flows.nn.base import Transform, check_module, run


class _Last:
    """The last evaluation of a transform and its inverse, which both share."""

    def __init__(self):
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None
        self.log_abs_det: Tensor | None = None


class DistributionTransform(TorchTransform):
    """A module with nflows' contract as a ``torch.distributions.transforms.Transform``; see
    :func:`as_distribution_transform`, which makes it.
    """

    bijective = True

    def __init__(self, module: nn.Module, dims: tuple[int, int], context: Any, context_event_dim: int, inverse: bool):
        super().__init__(cache_size=0)
        self.module = module
        self.context, self.context_event_dim = context, context_event_dim
        self._dims = dims  # number of dimensions of the module's inputs and outputs, for one sample
        self._inverse_way = inverse
        self._last = _Last()

    @property
    def domain(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Real inputs, the last dimensions of which are one event."""
        return constraints.independent(constraints.real, self._dims[self._inverse_way])

    @property
    def codomain(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Real outputs, the last dimensions of which are one event."""
        return constraints.independent(constraints.real, self._dims[not self._inverse_way])

    @property
    def inv(self) -> DistributionTransform:
        """The inverse, which shares the module and the last evaluation; ``t.inv.inv is t``."""
        if self._inv is None:
            other = DistributionTransform(
                self.module, self._dims, self.context, self.context_event_dim, not self._inverse_way
            )
            other._last, other._inv, self._inv = self._last, self, other
        return self._inv  # pyright: ignore[reportReturnType]

    def with_cache(self, cache_size: int = 1) -> DistributionTransform:
        """The same transform, which keeps its last evaluation already."""
        return self

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y, log |det dy/dx|) by one evaluation, as zuko's transforms have it."""
        return self._evaluate(x, self._inverse_way)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log |det dy/dx|, one for each event; that of the last evaluation, if it was the one that gave x and y."""
        first, second = (y, x) if self._inverse_way else (x, y)
        if first is self._last.inputs and second is self._last.outputs and self._last.log_abs_det is not None:
            log_abs_det = self._last.log_abs_det
        else:
            log_abs_det = self._evaluate(first, False)[1]
        return -log_abs_det if self._inverse_way else log_abs_det

    def forward_shape(self, shape) -> Size:
        """The shape of y, from that of x."""
        return self._shape(Size(shape), self._inverse_way)

    def inverse_shape(self, shape) -> Size:
        """The shape of x, from that of y."""
        return self._shape(Size(shape), not self._inverse_way)

    def __getstate__(self):
        state = super().__getstate__()
        state["_last"] = _Last()  # tensors inside a graph cannot be copied
        return state

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.module).__name__}{', inverse' if self._inverse_way else ''})"

    def _call(self, x: Tensor) -> Tensor:
        return self._evaluate(x, self._inverse_way)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._evaluate(y, not self._inverse_way)[0]

    def _evaluate(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The module or its inverse on (..., event), and its log-determinant (...)."""
        batch = x.shape[: x.dim() - self._dims[inverse]]
        flat = x.reshape(math.prod(batch), *x.shape[len(batch) :])
        outputs, log_abs_det = run(self.module, flat, self._context_for(batch), inverse)
        outputs = outputs.reshape(*batch, *outputs.shape[1:])
        log_abs_det = log_abs_det.reshape(batch)
        last = self._last
        if inverse:
            last.inputs, last.outputs, last.log_abs_det = outputs, x, -log_abs_det
        else:
            last.inputs, last.outputs, last.log_abs_det = x, outputs, log_abs_det
        return outputs, log_abs_det

    def _context_for(self, batch: Size) -> Any:
        def expanded(c):
            if not isinstance(c, Tensor):
                return c
            event = c.shape[c.dim() - self.context_event_dim :]
            return c.expand(*batch, *event).reshape(math.prod(batch), *event)

        return pytree.tree_map(expanded, self.context)

    def _shape(self, shape: Size, inverse: bool) -> Size:
        if not isinstance(self.module, Transform):
            return shape
        at = len(shape) - self._dims[inverse]
        event = shape[at:]
        return shape[:at] + Size(self.module.input_shape(event) if inverse else self.module.output_shape(event))


def as_distribution_transform(
    module: nn.Module,
    *,
    event_dim: int = 1,
    output_event_dim: int | None = None,
    context: Any = None,
    context_event_dim: int = 1,
) -> DistributionTransform:
    """A module of a flow as a transform of ``torch.distributions``: ``t(x)`` is ``module(x)``, data to noise.

    So ``t.inv`` maps noise to data, as ``torch.distributions.TransformedDistribution(base, [t.inv])`` wants it, and
    ``zuko.distributions.NormalizingFlow(t, base)`` takes ``t`` itself. It has zuko's ``call_and_ladj``; with torch's
    own calls, ``t(x)`` followed by ``t.log_abs_det_jacobian(x, y)`` evaluates the module once: the last evaluation (its
    graph included) is kept for that pair of tensors. Calls always evaluate, so that parameters may change in between.

    Args:
        module: a module with nflows' contract.
        event_dim: the number of dimensions of one sample of data: 1 for (B, D), 3 for (B, C, H, W). All dimensions of
            a tensor in front of these are the batch.
        output_event_dim: that of noise; None: 1 for :class:`MultiScale`, else ``event_dim``.
        context: what the module is given besides, a tensor (..., event) or a nest of them, which expands to the batch.
        context_event_dim: the number of dimensions that are not the batch's in tensors of the context.

    Raises:
        TypeError: ``module`` is no module with an inverse.
        ValueError: ``event_dim`` is below 1.

    Example:
        >>> import torch
        >>> from torch.distributions import Independent, Normal, TransformedDistribution
        >>> from mpkernels.flows import nn
        >>> transform = nn.as_distribution_transform(nn.AffineCoupling(torch.nn.Linear(2, 4)), event_dim=1)
        >>> base = Independent(Normal(torch.zeros(4), torch.ones(4)), 1)
        >>> density = TransformedDistribution(base, [transform.inv])
        >>> density.log_prob(density.sample((5,))).shape
        torch.Size([5])
    """
    check_module("module", module)
    if not isinstance(event_dim, int) or event_dim < 1:
        raise ValueError(f"event_dim: expected an integer of at least 1, got {event_dim!r}")
    if output_event_dim is None:
        output_event_dim = 1 if getattr(module, "flat_outputs", False) else event_dim
    return DistributionTransform(module, (event_dim, output_event_dim), context, context_event_dim, False)
