"""Glow (Kingma & Dhariwal 2018): actnorm, invertible 1x1 convolutions and affine couplings at several scales.

    python -m python_models.glow                            # photographs; five minutes of training
    python -m python_models.glow --data digits
    python -m python_models.glow --levels 3 --depth 32 --memory recompute   # activations rebuilt from the outputs

A picture becomes noise in levels: each turns squares of 2x2 pixels into channels, does ``depth`` steps of flow
(:class:`mpkernels.flows.nn.GlowStep`), and lets half of its channels go, which become a part of z; the next level has
the others. In the paper the mean and the scale of a part that is let go are predicted from what goes on; here that is
one more coupling at the end of a level, which takes the prediction off, the same density. Bits per dimension compare
with the PixelCNN of pixelcnn.py, which learns from the same columns of the same photographs (in smaller patches), and
not with the papers, which have 50,000 pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from typing import Any

from torch import nn

from mpkernels.flows import nn as flows
from python_models import digit_training
from python_models.flow_networks import ConvNet
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
from python_models.likelihood_training import check_budget
from python_models.transformer_training import Progress

DATA = ("photographs", "digits")
MEMORY = ("store", "recompute")
PAPERS = {
    "photographs": "bits per dimension on CIFAR-10: NICE 4.48, RealNVP 3.49, Glow 3.35, PixelCNN++ 2.92",
    "digits": "bits per dimension of MNIST, 50,000 digits: NICE 4.36 (1980.5 nats); Glow 1.05 as listed by FFJORD",
}
SIDE = 32  # of a patch of a photograph
EARLIER = ("pixelcnn/photographs", "realnvp")


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    colors: int = 3
    side: int = SIDE
    levels: int = 3  # L of the paper
    depth: int = 8  # K of the paper: steps of flow in a level
    hidden: int = 64  # channels of a coupling's network
    memory: str = "store"  # or "recompute": activations are not kept, but rebuilt from the outputs


class Glow(PictureFlow):
    """The flow of :class:`Config`, and its density of pictures in [-1/2, 1/2)."""

    def __init__(self, config: Config) -> None:
        shape = (config.colors, config.side, config.side)
        super().__init__(flows.Flow(flows.MultiScale(make_levels(config), input_shape=shape)))
        self.config = config


def make_levels(config: Config) -> list[nn.Module]:
    """The levels of :class:`mpkernels.flows.nn.MultiScale`, after each the second half of the channels goes."""
    levels: list[nn.Module] = []
    channels = config.colors
    for level in range(config.levels):
        channels *= 4
        kept, moved = (channels + 1) // 2, channels // 2
        steps: list[nn.Module] = [flows.Squeeze(2)]
        for _ in range(config.depth):
            steps.append(flows.GlowStep(channels, ConvNet(kept, 2 * moved, config.hidden)))
        if level < config.levels - 1:
            steps.append(flows.AffineCoupling(ConvNet(kept, 2 * moved, config.hidden), scale="exp"))
        else:
            steps.append(flows.ActNorm(channels))
        levels.append(flows.Sequential(*steps, memory=config.memory))
        channels = kept
    return levels


def fit(
    data: str = "photographs",
    *,
    minutes: float | None = None,
    steps: int | None = None,
    levels: int | None = None,
    depth: int = 8,
    hidden: int = 64,
    memory: str = "store",
    batch: int = 16,
    learning_rate: float = 2e-3,
    temperature: float = 0.7,
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
        steps: of training, 0 or more, instead of minutes. (Steps of flow are ``depth``.)
        levels: L; 3 for photographs, 2 for digits if not given.
        depth: K, steps of flow in a level.
        hidden: channels of a coupling's network.
        memory: "store", or "recompute": activations are rebuilt from the outputs, not kept.
        batch: pictures in a step.
        learning_rate: of AdamW.
        temperature: of samples: what their z is multiplied by.
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
    levels = {"photographs": 3, "digits": 2}[data] if levels is None else levels
    counts = {"levels": levels, "depth": depth, "hidden": hidden, "batch": batch, "samples": samples}
    check_budget(minutes, steps, **counts)
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if pictures is None:
        pictures = photograph_data(batch, seed, SIDE) if data == "photographs" else digit_data(batch, seed)
    test = pictures.test[0]
    config = Config(test.shape[1], test.shape[2], levels, depth, hidden, memory)
    if config.side % 2**levels != 0:
        raise ValueError(f"levels: expected that 2^levels divides the side {config.side}, got {levels}")

    return fit_flow(
        "glow",
        lambda: Glow(config),
        pictures,
        settings=dataclasses.asdict(config) | {"batch": batch, "temperature": temperature},
        papers=PAPERS[data],
        finish=lambda model: Found(picture_sheets(model, test, samples, temperature)),
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


def load_model(folder: pathlib.Path) -> Glow:
    """The model that :func:`fit` wrote to this folder."""
    return saved(folder, Config, Glow)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", choices=DATA, help="to train on (photographs)")
    parser.add_argument("--levels", type=int, help="L of the paper: scales (3; 2 for digits)")
    parser.add_argument("--depth", type=int, help="K of the paper: steps of flow in a level (8)")
    parser.add_argument("--hidden", type=int, help="channels of a coupling's network (64)")
    parser.add_argument("--memory", choices=MEMORY, help="of activations: keep them, or rebuild them (store)")
    parser.add_argument("--batch", type=int, help="pictures in a step (16)")
    parser.add_argument("--learning-rate", type=float, help="of AdamW (0.002)")
    parser.add_argument("--temperature", type=float, help="of samples (0.7)")
    parser.add_argument("--samples", type=int, help="pictures to draw (40)")


def main() -> None:
    """The command line."""

    def run(**options: Any) -> dict:
        return fit(**options, others=options["output"].parent)

    text, unit = "Train Glow on patches of photographs, or on digits.", UNIT.replace("_", " ")
    digit_training.command("glow", text, run, _options, unit=unit, ops="mpkernels.flows")


if __name__ == "__main__":
    main()
