"""A density: a transform of data to noise, and the noise's distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional
from torch.utils import _pytree as pytree

from mpkernels.flows.nn.base import Shape, Transform, check_module, run, wide

BASES = ("standard normal", "logistic")


class Flow(nn.Module):
    """The density of data under a transform to noise: log p(x) = log p_base(f(x)) + log |det df/dx|.

    Args:
        transform: data to noise, a module with nflows' contract.
        base: "standard normal", "logistic" (both element by element), or a torch.distributions.Distribution over one
            sample of noise, or over its last dimensions (the others are summed). Its parameters are not the module's.
        shape: the shape of one sample of data. None: that of the first ``log_prob``. It is part of the state_dict.

    Example:
        >>> import torch
        >>> from mpkernels.flows import nn
        >>> flow = nn.Flow(nn.ActNorm(2), "logistic", shape=(2,))
        >>> flow.log_prob(torch.randn(5, 2)).shape, flow.sample(3).shape
        (torch.Size([5]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        transform: nn.Module,
        base: str | Distribution = "standard normal",
        *,
        shape: Sequence[int] | None = None,
    ):
        super().__init__()
        check_module("transform", transform)
        if isinstance(base, str) and base not in BASES:
            raise ValueError(f"base: expected 'standard normal', 'logistic' or a distribution, got {base!r}")
        if not isinstance(base, (str, Distribution)):
            raise TypeError(f"base: expected a name or a torch.distributions.Distribution, got {type(base).__name__}")
        self.transform = transform
        self.base = base
        self._shape: Shape | None = None if shape is None else tuple(shape)

    def log_prob(self, inputs: Tensor, context: Any = None) -> Tensor:
        """The log-density of each sample of ``inputs`` (B, ...), in nats: (B,), float32 (float64 for float64)."""
        if self._shape is None:
            self._shape = tuple(inputs.shape[1:])
        noise, log_abs_det = self.transform(inputs, context)
        return self.base_log_prob(noise) + log_abs_det

    def base_log_prob(self, noise: Tensor) -> Tensor:
        """The log-density of the base distribution: (B, ...) -> (B,)."""
        noise = noise.to(wide(noise))
        if self.base == "standard normal":
            each = -0.5 * (noise.square() + math.log(2 * math.pi))
        elif self.base == "logistic":
            each = -noise - 2 * functional.softplus(-noise)
        else:
            each = self.base.log_prob(noise)  # pyright: ignore[reportAttributeAccessIssue]
        return each.flatten(1).sum(1) if each.dim() > 1 else each

    @torch.no_grad()
    def sample(
        self,
        number: int,
        context: Any = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws samples of data.

        Args:
            number: of samples, n.
            context: for n samples; tensors with one row in dimension 0 are repeated for all.
            temperature: the noise is multiplied by it.
            generator: of the noise; None takes torch's own. Not for a ``base`` that is a distribution.

        Returns:
            (n, ...).

        Raises:
            ValueError: the shape of a sample is not known (see ``shape``).
        """
        noise = self.noise(number, generator) * temperature
        context = pytree.tree_map(
            lambda x: x.expand(number, *x.shape[1:]) if isinstance(x, Tensor) and x.shape[:1] == (1,) else x, context
        )
        return run(self.transform, noise, context, True)[0]

    def noise(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws samples of the base distribution: (n, ...)."""
        if self._shape is None:
            raise ValueError("shape: expected the shape of a sample, or log_prob to run first, got neither")
        shape = self._shape
        if isinstance(self.transform, Transform):
            shape = self.transform.output_shape(shape)
        if isinstance(self.base, Distribution):
            if generator is not None:
                raise ValueError("generator: expected None with a base that is a distribution, which draws by itself")
            one = len(self.base.batch_shape) + len(self.base.event_shape)
            return self.base.sample(torch.Size([number, *shape[: len(shape) - one]]))
        like = next(iter([*self.transform.parameters(), *self.transform.buffers()]), torch.empty(0))
        kind = {"device": like.device, "dtype": like.dtype if like.is_floating_point() else None}
        if self.base == "standard normal":
            return torch.randn(number, *shape, generator=generator, **kind)
        uniform = torch.rand(number, *shape, generator=generator, **kind)
        tiny = torch.finfo(uniform.dtype).eps
        return torch.logit(uniform.clamp(tiny / 2, 1 - tiny / 2))

    def get_extra_state(self) -> dict:
        """The shape of a sample, for state_dict."""
        return {"shape": self._shape}

    def set_extra_state(self, state: dict) -> None:
        """The shape of a sample, from state_dict."""
        self._shape = None if state["shape"] is None else tuple(state["shape"])
