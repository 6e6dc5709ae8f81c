"""NICE (Dinh et al. 2014): additive couplings on handwritten digits, with the modules of :mod:`mpkernels.flows.nn`.

    python -m python_models.nice      # four minutes of training, then log-likelihoods of held-out digits and samples

A digit is a vector x of 784 numbers, and z = S h(x) has independent logistic components. h is a chain of couplings, of
which each adds to one half of the numbers (at first the odd places, then the even ones, in turn) what a network of
rectified linear units makes of the other half. That changes no volume: log p(x) = sum_i (log p(z_i) + log S_ii).

What differs from the paper: 4,000 training digits instead of 50,000, which a network of the paper's size learns by
heart, so that it is smaller, has dropout and sees digits moved by a pixel; and the scales begin where they would be
best without couplings, one over the mean deviation of a pixel, because the steps of the optimiser that go there from 1
are a thousand. So that the first layers see numbers of one size, a part of the scales (one more that is learned) comes
before the couplings; the functions that a chain can be are the same with it and without it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpkernels.flows import nn as flows
from python_models import digit_training
from python_models.digits import SIDE
from python_models.flow_networks import Mlp
from python_models.flow_training import (
    LEVELS,
    UNIT,
    FlowData,
    Found,
    PictureFlow,
    check_choices,
    digit_data,
    fit_flow,
    picture_sheets,
    saved,
)
from python_models.likelihood_training import check_budget
from python_models.transformer_training import Progress

PAPERS = "NICE's log p of MNIST, 50,000 digits: 1980.5 nats, which is 4.36 bits per dimension"
PRIORS = ("logistic", "normal")


class Flat(flows.Transform):
    """Pictures (N, 1, side, side) to vectors (N, D), from which ``center`` (D,) is subtracted."""

    def __init__(self, center: Tensor) -> None:
        super().__init__()
        self.center: Tensor
        self.register_buffer("center", center)
        self.side = math.isqrt(len(center))

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """To vectors, and log|det| 0."""
        return inputs.flatten(1) - self.center, inputs.new_zeros(len(inputs))

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """To pictures, and log|det| 0."""
        return (inputs + self.center).unflatten(1, (1, self.side, self.side)), inputs.new_zeros(len(inputs))

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of one vector."""
        return (math.prod(shape),)

    def input_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of one picture."""
        return (1, self.side, self.side)


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    side: int = SIDE  # of the pictures
    hidden: int = 500  # units of each hidden layer of a coupling's network
    layers: int = 2  # hidden layers
    couplings: int = 4
    dropout: float = 0.1  # share of hidden units that is left out in training
    prior: str = "logistic"  # or "normal": of the components of z


class Nice(PictureFlow):
    """The flow, and its density of digits.

    Args:
        config: its sizes.
        center, deviation: (D,) of each place in training data: its median, and the mean distance from there; 0 and 1
            if not given.
    """

    def __init__(self, config: Config, center: Tensor | None = None, deviation: Tensor | None = None) -> None:
        size = config.side**2
        center = torch.zeros(size) if center is None else center
        deviation = torch.ones(size) if deviation is None else deviation
        halves = (size + 1) // 2, size // 2
        order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])  # even places, then odd ones
        first = flows.DiagonalScale(size)
        with torch.no_grad():
            first.log_scale.copy_(-torch.log(deviation))
        chain: list[nn.Module] = [Flat(center), first, flows.Permutation(order)]
        for i in range(config.couplings):
            kept, moved = halves[:: 1 if i % 2 == 0 else -1]
            network = Mlp(kept, moved, config.hidden, config.layers, dropout=config.dropout)
            chain.append(flows.AdditiveCoupling(network, parity=i % 2))
        chain.append(flows.DiagonalScale(size))
        base = "logistic" if config.prior == "logistic" else "standard normal"
        super().__init__(flows.Flow(flows.Sequential(*chain), base))
        self.config = config


def places(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Of levels (N, ...): median and mean distance from it at each place of dequantized pictures, (D,) each.

    Half a picture more, of mean distance 1/4, keeps a place that never has ink from a scale without bound.
    """
    x = (pictures.flatten(1).double() + 0.5) / LEVELS - 0.5
    center = x.median(dim=0).values
    distance = (x - center).abs().clamp(min=0.25 / LEVELS)  # the mean of the noise's distance, where there is no ink
    return center.float(), ((distance.sum(dim=0) + 0.5 * 0.25) / (len(x) + 0.5)).float()


def fit(
    *,
    minutes: float | None = None,
    steps: int | None = None,
    hidden: int = 500,
    layers: int = 2,
    couplings: int = 4,
    dropout: float = 0.1,
    prior: str = "logistic",
    batch: int = 100,
    learning_rate: float = 2e-3,
    backend: str | None = None,
    seed: int = 0,
    output: pathlib.Path | None,
    progress: Progress = None,
    data: FlowData | None = None,
    samples: int = 50,
) -> dict:
    """Train on digits, and say how likely digits are that were held out.

    Args:
        minutes: of training; 4 if neither this nor ``steps`` is given.
        steps: of training, 0 or more, instead of minutes.
        hidden, layers: units and hidden layers of each coupling's network.
        couplings: how many.
        dropout: share of hidden units that is left out in training.
        prior: of the components of z: "logistic" or "normal".
        batch: digits in a step.
        learning_rate: of AdamW.
        backend: of the couplings; None chooses.
        seed: of first weights, batches, noise and samples.
        output: a folder for model.pt, curve.png, samples.png, interpolations.png and report.json, made if missing;
            None writes nothing.
        progress: called after each step; see :func:`python_models.transformer_training.train`.
        data: to train on instead: pictures (B, 1, 28, 28).
        samples: how many to draw.

    Returns:
        A JSON-serialisable dict: figures, baselines, settings, timings.

    Raises:
        ValueError: an argument is not as said; the message begins with its name.
        FileNotFoundError: the digits are not there; the message says how to install them.
    """
    counts = {"hidden": hidden, "layers": layers, "couplings": couplings, "batch": batch, "samples": samples}
    check_budget(minutes, steps, **counts)
    check_choices(prior=(prior, PRIORS))
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a share in [0, 1), got {dropout}")
    data = digit_data(batch, seed) if data is None else data
    seen = torch.cat([next(data.train)[0] for _ in range(-(-2000 // batch))])
    config = Config(data.test[0].shape[-1], hidden, layers, couplings, dropout, prior)

    return fit_flow(
        "nice",
        lambda: Nice(config, *places(seen)),
        data,
        settings=dataclasses.asdict(config) | {"batch": batch},
        papers=PAPERS,
        finish=lambda model: Found(picture_sheets(model, data.test[0], samples, 1.0)),
        rate=learning_rate,
        weight_decay=0.05,
        minutes=minutes,
        steps=steps,
        default_minutes=4.0,
        backend=backend,
        seed=seed,
        output=output,
        progress=progress,
    )


def load_model(folder: pathlib.Path) -> Nice:
    """The model that :func:`fit` wrote to this folder."""
    return saved(folder, Config, Nice)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden", type=int, help="units of each hidden layer (500)")
    parser.add_argument("--layers", type=int, help="hidden layers of a coupling (2)")
    parser.add_argument("--couplings", type=int, help="how many (4)")
    parser.add_argument("--dropout", type=float, help="share of hidden units left out in training (0.1)")
    parser.add_argument("--prior", choices=PRIORS, help="of the components of z (logistic)")
    parser.add_argument("--batch", type=int, help="digits in a step (100)")
    parser.add_argument("--learning-rate", type=float, help="of AdamW (0.002)")
    parser.add_argument("--samples", type=int, help="digits to draw (50)")


def main() -> None:
    """The command line."""
    text, unit = "Train NICE on digits.", UNIT.replace("_", " ")
    digit_training.command("nice", text, fit, _options, unit=unit, ops="mpkernels.flows")


if __name__ == "__main__":
    main()
