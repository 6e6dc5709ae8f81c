"""What the conditional flows share: a flow that is told something, trained beside the same flow that is not.

Both see the same batches, and take as many steps, so that what being told is worth is the difference of two figures of
one run.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpkernels.flows.nn import Transform
from python_models.digit_training import command
from python_models.likelihood_training import check_budget

C = TypeVar("C")

SCALE = "softclamp"  # of couplings: factors of a step are between e^-2 and e^2


class Logit(Transform):
    """Values in [-1/2, 1/2) to the whole line, by ln(p / (1 - p)) with p = a + (1 - 2 a) (x + 1/2), as RealNVP does.

    Paper and ink are intervals of a 256th each; here they are as wide as what is between them.

    Args:
        margin: a, which keeps p from 0 and 1.
    """

    def __init__(self, margin: float = 1e-5) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, ...) to (B, ...), and log|det| (B,)."""
        inside = 1 - 2 * self.margin
        outputs = torch.logit(self.margin + inside * (inputs + 0.5))
        return outputs, self._log_abs_det(outputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The way back, and log|det| of it."""
        inside = 1 - 2 * self.margin
        return (torch.sigmoid(inputs) - self.margin) / inside - 0.5, -self._log_abs_det(inputs)

    def _log_abs_det(self, y: Tensor) -> Tensor:
        each = math.log(1 - 2 * self.margin) - F.logsigmoid(y) - F.logsigmoid(-y)
        return each.flatten(1).sum(dim=1)


class Places(Transform):
    """A transform of vectors (B, D), for pictures: every place has parameters of its own.

    Args:
        transform: of (B, D).
    """

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform: Any = transform

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) to (B, C, H, W), and log|det| (B,)."""
        outputs, log_abs_det = self.transform(inputs.flatten(1), context)
        return outputs.view(inputs.shape), log_abs_det

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The way back, and log|det| of it."""
        outputs, log_abs_det = self.transform.inverse(inputs.flatten(1), context)
        return outputs.view(inputs.shape), log_abs_det


class Bounded(nn.Module):
    """A coupling's network that sees b tanh(x / b) instead of x.

    A ReLU network's shifts grow with its inputs. On the way back from noise, one element far from all data then makes
    others larger, step by step, until a part of the picture is lost (known of Glow and SRFlow at temperatures near 1).
    Of bounded inputs everything that the network gives is bounded.

    Args:
        network: ``network(seen, context)``.
        bound: b, in standard deviations of what the network is trained on, more or less.
    """

    def __init__(self, network: nn.Module, bound: float = 4.0) -> None:
        super().__init__()
        self.network, self.bound = network, bound

    def forward(self, seen: Tensor, *context: Tensor) -> Tensor:
        """As the network."""
        return self.network(self.bound * torch.tanh(seen / self.bound), *context)


class Beside(nn.Module):
    """Two flows that learn from the same batches: ``told`` has a context, ``untold`` has none.

    Args:
        told: its ``log_prob(x, context)`` is that of this module.
        untold: its ``log_prob(x)`` is learned too.
    """

    def __init__(self, told: nn.Module, untold: nn.Module) -> None:
        super().__init__()
        self.told: Any = told
        self.untold: Any = untold

    def log_prob(self, x: Tensor, context: Tensor) -> Tensor:
        """Nats log p of the flow that is told. In training its gradient is that of both flows, its value is not."""
        found = self.told.log_prob(x, context)
        if not self.training:
            return found
        beside = self.untold.log_prob(x)
        return found + (beside - beside.detach())


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of its parameters."""
    return next(model.parameters()).dtype


def configure(kind: type[C], sizes: dict[str, Any], **least: int) -> C:
    """A configuration, a dataclass ``kind``, of these sizes; those in ``least`` are integers of at least as much."""
    known = {field.name for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    for name in sizes:
        if name not in known:
            raise ValueError(f"{name}: expected one of {', '.join(sorted(known))}")
    config = kind(**sizes)
    for name, bound in least.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < bound:
            raise ValueError(f"{name}: expected an integer of at least {bound}, got {value!r}")
    return config


def check(minutes: float | None, steps: int | None, batch: int, temperature: float, samples: int) -> None:
    """Raises a ValueError unless these arguments of a ``fit`` are as they should be."""
    check_budget(minutes, steps, batch=batch, samples=samples)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature!r}")


def run(name: str, description: str, fit: Callable[..., dict], config: type, unit: str = "bits") -> None:
    """The command line of a model, with an option for each of its sizes."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--batch", type=int, help="examples in a step")
        parser.add_argument("--learning-rate", type=float)
        parser.add_argument("--samples", type=int, help="how many to draw of each")
        parser.add_argument("--temperature", type=float, help="standard deviation of the latents of samples")
        for field in dataclasses.fields(config):
            kind = {"float": float, "int": int}.get(str(field.type))
            if kind is not None:
                text = f"of the model, {field.default} by default"
                parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, help=text)

    command(name, description, fit, add, unit=unit, ops="mpkernels.flows")
