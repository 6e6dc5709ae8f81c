"""RealNVP (Dinh et al. 2017): affine couplings with checkerboards, then halves of channels, at several scales.

    python -m python_models.realnvp                 # patches of photographs; five minutes of training
    python -m python_models.realnvp --data digits

Couplings x e^s + t of one half of a picture's values, where s and t are what a residual network makes of the other
half. s is g tanh(.), with a factor g for each channel that is learned. A level has three couplings whose halves are the
fields of a checkerboard, then turns squares of 2x2 pixels into channels, has three couplings of halves of the channels,
and lets half of the channels go, which become a part of z; the last level has four couplings with a checkerboard.
Before all that, values go through logit(a + (1 - 2 a) v), v in [0, 1), a = 0.05, so that no sample leaves the interval.

What differs from the paper: actnorm (data-dependent at the start, as in Glow) in the place of batch normalisation;
networks without batch and weight normalisation; few training pictures, and five minutes. Bits per dimension compare
with the PixelCNN of pixelcnn.py, which learns from the same columns of the same photographs (in smaller patches), and
not with the papers, which have 50,000 pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
from typing import Any

import torch
from torch import Tensor, nn

from mpkernels.flows import nn as flows
from python_models import digit_training
from python_models.flow_networks import ResNet
from python_models.flow_training import (
    UNIT,
    FlowData,
    Found,
    PictureFlow,
    check_choices,
    digit_data,
    earlier_bits,
    fit_flow,
    photograph_data,
    picture_sheets,
    saved,
)
from python_models.glow import DATA, MEMORY, PAPERS
from python_models.likelihood_training import check_budget
from python_models.transformer_training import Progress

SIDE = 32
MARGIN = 0.05  # a of the logit
EARLIER = ("pixelcnn/photographs", "glow")


class Logit(flows.Transform):
    """y = logit(margin + (1 - 2 margin) (x + 1/2)) of values in [-1/2, 1/2]."""

    def __init__(self, margin: float = MARGIN) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, ...) to y and log|det| (B,)."""
        slope = 1 - 2 * self.margin
        inside = self.margin + slope * (inputs + 0.5)
        outputs = torch.logit(inside)
        return outputs, (math.log(slope) - torch.log(inside) - torch.log1p(-inside)).flatten(1).sum(dim=1)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, ...) to x and log|det| (B,)."""
        slope = 1 - 2 * self.margin
        inside = torch.sigmoid(inputs)
        log_slope = nn.functional.logsigmoid(inputs) + nn.functional.logsigmoid(-inputs) - math.log(slope)
        return (inside - self.margin) / slope - 0.5, log_slope.flatten(1).sum(dim=1)


class Bounded(nn.Module):
    """A network whose second half of outputs, the log-scales, are g tanh(.): shift and log-scale in one tensor.

    Args:
        network: gives (B, 2 channels, H, W).
        channels: that have a shift and a log-scale.
    """

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network = network
        self.factor = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """What the network makes of x, with bounded log-scales."""
        outputs = self.network(x) if context is None else self.network(x, context)
        shift, raw = outputs.chunk(2, dim=1)
        return torch.cat([shift, self.factor * torch.tanh(raw)], dim=1)


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    colors: int = 3
    side: int = SIDE
    levels: int = 3
    hidden: int = 32  # channels of a coupling's network
    blocks: int = 1  # residual blocks of a coupling's network
    memory: str = "store"  # or "recompute": activations are not kept, but rebuilt from the outputs


class RealNvp(PictureFlow):
    """The flow of :class:`Config`, and its density of pictures in [-1/2, 1/2)."""

    def __init__(self, config: Config) -> None:
        shape = (config.colors, config.side, config.side)
        super().__init__(flows.Flow(flows.MultiScale(make_levels(config), input_shape=shape)))
        self.config = config


def make_levels(config: Config) -> list[nn.Module]:
    """The levels of :class:`mpkernels.flows.nn.MultiScale`, after each the second half of the channels goes."""
    levels: list[nn.Module] = []
    channels, hidden = config.colors, config.hidden
    for level in range(config.levels):
        chain: list[nn.Module] = [Logit()] if level == 0 else []
        last = level == config.levels - 1
        for i in range(4 if last else 3):
            network = Bounded(ResNet(channels, 2 * channels, hidden, config.blocks), channels)
            coupling = flows.AffineCoupling(network, scale="exp", mask="checkerboard", parity=i % 2)
            chain += [flows.ActNorm(channels), coupling]
        if not last:
            chain.append(flows.Squeeze(2))
            channels = 4 * channels
            halves = (channels + 1) // 2, channels // 2
            for i in range(3):
                kept, moved = halves[:: 1 if i % 2 == 0 else -1]
                network = Bounded(ResNet(kept, 2 * moved, hidden, config.blocks), moved)
                coupling = flows.AffineCoupling(network, scale="exp", mask="channel", parity=i % 2)
                chain += [flows.ActNorm(channels), coupling]
        chain.append(flows.ActNorm(channels))
        channels = (channels + 1) // 2  # those that go on
        levels.append(flows.Sequential(*chain, memory=config.memory))
    return levels


def fit(
    data: str = "photographs",
    *,
    minutes: float | None = None,
    steps: int | None = None,
    levels: int | None = None,
    hidden: int = 32,
    blocks: int = 1,
    memory: str = "store",
    batch: int = 16,
    learning_rate: float = 3e-3,
    backend: str | None = None,
    seed: int = 0,
    output: pathlib.Path | None,
    progress: Progress = None,
    pictures: FlowData | None = None,
    samples: int = 40,
    others: pathlib.Path | None = None,
) -> dict:
    """Train on photographs or digits, and say how likely pictures are that were held out.

    Args:
        data: "photographs", patches of 32x32 in three colours, or "digits" of 28x28.
        minutes: of training; 5 if neither this nor ``steps`` is given.
        steps: of training, 0 or more, instead of minutes.
        levels: scales; 3 if not given.
        hidden: channels of a coupling's network.
        blocks: residual blocks of a coupling's network.
        memory: "store", or "recompute": activations are rebuilt from the outputs, not kept.
        batch: pictures in a step.
        learning_rate: of AdamW.
        backend: of the flow's ops; None chooses.
        seed: of first weights, batches, noise and samples.
        output: a folder for model.pt, curve.png, samples.png, interpolations.png and report.json, made if missing;
            None writes nothing.
        progress: called after each step; see :func:`python_models.transformer_training.train`.
        pictures: to train on instead.
        samples: how many to draw.
        others: a folder with what other models wrote, whose figures are repeated beside (photographs alone).

    Returns:
        A JSON-serialisable dict: figures, baselines, settings, timings.

    Raises:
        ValueError: an argument is not as said; the message begins with its name.
        FileNotFoundError: a wheel with pictures is not there; the message says how to install it.
    """
    check_choices(data=(data, DATA), memory=(memory, MEMORY))
    levels = 3 if levels is None else levels
    counts = {"levels": levels, "hidden": hidden, "blocks": blocks, "batch": batch, "samples": samples}
    check_budget(minutes, steps, **counts)
    if pictures is None:
        pictures = photograph_data(batch, seed, SIDE) if data == "photographs" else digit_data(batch, seed)
    test = pictures.test[0]
    config = Config(test.shape[1], test.shape[2], levels, hidden, blocks, memory)
    if config.side % 2 ** (levels - 1) != 0:
        raise ValueError(f"levels: expected that 2^(levels - 1) divides the side {config.side}, got {levels}")
    return fit_flow(
        "realnvp",
        lambda: RealNvp(config),
        pictures,
        settings=dataclasses.asdict(config) | {"batch": batch},
        papers=PAPERS[data],
        finish=lambda model: Found(picture_sheets(model, test, samples, 1.0)),
        rate=learning_rate,
        weight_decay=0.01,
        minutes=minutes,
        steps=steps,
        default_minutes=5.0,
        earlier=earlier_bits(others, *EARLIER) if data == "photographs" else {},
        backend=backend,
        seed=seed,
        output=output,
        progress=progress,
    )


def load_model(folder: pathlib.Path) -> RealNvp:
    """The model that :func:`fit` wrote to this folder."""
    return saved(folder, Config, RealNvp)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", choices=DATA, help="to train on (photographs)")
    parser.add_argument("--levels", type=int, help="scales (3)")
    parser.add_argument("--hidden", type=int, help="channels of a coupling's network (32)")
    parser.add_argument("--blocks", type=int, help="residual blocks of a coupling's network (1)")
    parser.add_argument("--memory", choices=MEMORY, help="of activations: keep them, or rebuild them (store)")
    parser.add_argument("--batch", type=int, help="pictures in a step (16)")
    parser.add_argument("--learning-rate", type=float, help="of AdamW (0.003)")
    parser.add_argument("--samples", type=int, help="pictures to draw (40)")


def main() -> None:
    """The command line."""

    def run(**options: Any) -> dict:
        return fit(**options, others=options["output"].parent)

    text, unit = "Train RealNVP on patches of photographs, or on digits.", UNIT.replace("_", " ")
    digit_training.command("realnvp", text, run, _options, unit=unit, ops="mpkernels.flows")


if __name__ == "__main__":
    main()
