"""Super-resolution by a conditional flow (SRFlow, Lugmayr et al. 2020): many sharp pictures for one of few pixels.

    python -m python_models.srflow      # five minutes of training, then figures and pictures

A patch of 8x8 pixels does not say what the 32x32 pixels were from which it was made. The flow has the distribution
p(x | low) of all that fit. Of a photograph's patch x, and of low, which is the mean of 4x4 pixels each, rounded:

    x = bicubic(low) + residual,   z = flow(residual; features of low),   log p(x | low) = log N(z; 0, 1) + log|det|

(the residual to the upsampled picture is what the flow models, and has the density of x itself). A small residual
network finds the features. A step of the flow is, as in the paper, actnorm, a 1x1 convolution, an affine injector,
whose shift and scale are made of the features alone, and an affine coupling, whose network sees the features too:

    h <- (h + bias) e^log_scale,  h <- W h,  h <- h s(features) + t(features),  coupling(h; features)

It learns by likelihood alone: no loss of perception, no adversary. Latents of 0 give one picture near the middle of
what fits; random ones of a standard deviation (the temperature) of 0.8 give others, each with its own details.

Scales are kept between e^-2 and e^2 (the paper: a sigmoid and 1e-4), and couplings see bounded inputs: otherwise
some samples of a model so early in its training explode.

Smaller than the paper's: seven photographs instead of 3,450, five minutes instead of five days, patches of 32x32.
Figures are not comparable with the paper's.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpkernels.flows.nn import (
    ActNorm,
    AffineCoupling,
    AffineInjector,
    Flow,
    InvertibleConv1x1,
    MultiScale,
    Sequential,
    Squeeze,
)
from python_models.conditional_training import SCALE, Bounded, check, configure, dtype_of, run
from python_models.flow_networks import ZeroConv2d
from python_models.flow_training import (
    LEVELS,
    FlowData,
    Found,
    Sheet,
    bits_per_dimension,
    dequantize,
    fit_flow,
    photograph_data,
    saved,
)
from python_models.transformer_training import Progress

PAPERS = (
    "DIV2K x4, 3,450 photographs: PSNR bicubic 26.70, RRDB 29.44, SRFlow 27.09 dB at temperature 0.9, which looks best"
)
FACTOR = 4
COLORS = 3
TEMPERATURES = (0.0, 0.4, 0.8, 0.8, 0.9)  # of the pictures that are shown
SHOWN = 10  # rows of pictures
PICTURES = "super_resolution.png"


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    side: int = 32  # of patches
    levels: int = 2  # each halves the sides, and all but the last put half of the channels aside
    depth: int = 6
    hidden: int = 40  # channels of the networks of couplings and injectors
    features: int = 40  # channels of the encoder
    blocks: int = 3  # of the encoder


def lower(pictures: Tensor) -> Tensor:
    """Levels (B, 3, H, W) to the levels of a quarter of the sides, the means of 4x4 pixels: uint8."""
    return F.avg_pool2d(pictures.float(), FACTOR).round().to(torch.uint8)


def bicubic(low: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Levels (B, 3, h, w) to pictures (B, 3, 4 h, 4 w) in [-1/2, 1/2]."""
    x = (low.to(dtype) + 0.5) / LEVELS - 0.5
    return F.interpolate(x, scale_factor=FACTOR, mode="bicubic", align_corners=False).clamp(-0.5, 0.5)


class Encoder(nn.Module):
    """Features of the low-resolution picture: residual blocks of 3x3 convolutions.

    The paper's has 23 blocks of dense connections, and was trained for super-resolution beforehand.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.first = nn.Conv2d(COLORS, config.features, 3, padding=1)
        self.blocks = nn.ModuleList()
        for _ in range(config.blocks):
            first = nn.Conv2d(config.features, config.features, 3, padding=1)
            last = ZeroConv2d(config.features, config.features)  # a new block changes nothing
            self.blocks.append(nn.Sequential(nn.ReLU(), first, nn.ReLU(), last))

    def forward(self, low: Tensor) -> Tensor:
        """(B, 3, h, w) in [-1/2, 1/2] to (B, features, h, w)."""
        h = self.first(4 * low)
        for block in self.blocks:
            h = h + block(h)
        return h


class InjectorNetwork(nn.Module):
    """Shift and raw scale of every element, from the features alone.

    Args:
        features, outputs, hidden: channels; ``outputs`` of shift and scale together.
        larger: how many times the sides of the outputs are those of the features.
    """

    def __init__(self, features: int, outputs: int, hidden: int, larger: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(features, hidden, 3, padding=1)
        self.last = ZeroConv2d(hidden, outputs * larger**2)
        self.larger = larger

    def forward(self, context: Tensor) -> Tensor:
        """(B, features, h, w) to (B, outputs, larger h, larger w)."""
        return F.pixel_shuffle(self.last(F.relu(self.first(context))), self.larger)


class CouplingNetwork(nn.Module):
    """Glow's network, to whose first layer the features are added, at a resolution of ``larger`` times their own."""

    def __init__(self, inputs: int, outputs: int, hidden: int, features: int, larger: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.told = nn.Conv2d(features, hidden * larger**2, 1)
        self.second = nn.Conv2d(hidden, hidden, 1)
        self.last = ZeroConv2d(hidden, outputs)
        self.larger = larger

    def forward(self, kept: Tensor, context: Tensor) -> Tensor:
        """(B, inputs, H, W) and (B, features, h, w) to (B, outputs, H, W)."""
        h = F.relu(self.first(kept) + F.pixel_shuffle(self.told(context), self.larger))
        return self.last(F.relu(self.second(h)))


class SRFlow(nn.Module):
    """p(x | low) of patches x (B, 3, side, side) in [-1/2, 1/2), given levels (B, 3, side / 4, side / 4)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        levels, channels, larger = [], COLORS, FACTOR
        for _ in range(config.levels):
            channels, larger = 4 * channels, larger // 2
            steps = [layer for _ in range(config.depth) for layer in self._step(channels, larger)]
            transition = [ActNorm(channels), InvertibleConv1x1(channels)]  # before the injectors, as in the paper
            levels.append(Sequential(Squeeze(), *transition, *steps))
            channels //= 2
        self.flow = Flow(MultiScale(levels, input_shape=(COLORS, config.side, config.side)))

    def _step(self, channels: int, larger: int) -> list[nn.Module]:
        hidden, features = self.config.hidden, self.config.features
        coupling = CouplingNetwork((channels + 1) // 2, 2 * (channels // 2), hidden, features, larger)
        return [
            ActNorm(channels),
            InvertibleConv1x1(channels),
            AffineInjector(InjectorNetwork(features, 2 * channels, hidden, larger), scale=SCALE),
            AffineCoupling(Bounded(coupling), scale=SCALE),
        ]

    @property
    def transform(self) -> Any:
        """Residuals to latents (B, 3 side^2)."""
        return self.flow.transform

    def context(self, low: Tensor) -> Tensor:
        """Levels of low-resolution patches to features."""
        return self.encoder((low.to(dtype_of(self)) + 0.5) / LEVELS - 0.5)

    def log_prob(self, x: Tensor, low: Tensor) -> Tensor:
        """Nats (B,) of patches, given low-resolution ones."""
        return self.flow.log_prob(x - bicubic(low, x.dtype), self.context(low))

    def sample(self, low: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """One patch (B, 3, side, side) for each low-resolution one, not cut to [-1/2, 1/2]."""
        dimensions = COLORS * self.config.side**2
        noise = torch.randn(len(low), dimensions, generator=generator, dtype=dtype_of(self))
        residual, _ = self.transform.inverse(temperature * noise, self.context(low))
        return bicubic(low, residual.dtype) + residual


def load(batch: int, seed: int, side: int) -> FlowData:
    """Patches of photographs, and their low-resolution versions."""
    data = photograph_data(batch, seed, side)
    train = ((patches, lower(patches)) for (patches,) in data.train)
    valid, test = ((patches, lower(patches)) for (patches,) in (data.valid, data.test))
    scale = residual_scale(data.valid[0])
    baselines = data.baselines | {"a Laplace distribution around bicubic": laplace_bits(data.test[0], scale)}
    return data._replace(train=train, valid=valid, test=test, baselines=baselines)


def residual_scale(patches: Tensor) -> Tensor:
    """Mean distance from the bicubic picture, by the colour and the place within 4x4 pixels: (3, 4, 4)."""
    distance = ((patches + 0.5) / LEVELS - 0.5 - bicubic(lower(patches))).abs()
    return distance.unflatten(3, (-1, FACTOR)).unflatten(2, (-1, FACTOR)).mean(dim=(0, 2, 4))


def laplace_bits(patches: Tensor, scale: Tensor) -> float:
    """Bits per dimension by a Laplace distribution around the bicubic picture, of mean distances (3, 4, 4)."""
    distance = (dequantize(patches, torch.Generator().manual_seed(1)) - bicubic(lower(patches))).abs()
    each = scale.repeat(1, patches.shape[2] // FACTOR, patches.shape[3] // FACTOR)
    log_prob = -(distance / each + (2 * each).log()).flatten(1).sum(dim=1)
    return bits_per_dimension(log_prob.double().mean(), patches[0].numel()).item()


def as_levels(x: Tensor) -> Tensor:
    """Pictures in [-1/2, 1/2] to the nearest levels in [0, 255], as floats."""
    return ((x + 0.5) * LEVELS - 0.5).round().clamp(0, LEVELS - 1)


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, by the mean square over all pictures of levels."""
    square = (found.double() - wanted.double()).square().mean().item()
    return math.inf if square == 0 else 10 * math.log10(255**2 / square)


@torch.no_grad()
def evaluate(
    model: SRFlow, truth: Tensor, low: Tensor, samples: int, temperature: float, seed: int
) -> dict[str, float]:
    """What pictures are like that the model makes of low-resolution ones.

    Args:
        model: a trained one.
        truth: (N, 3, H, W) levels.
        low: (N, 3, H / 4, W / 4) levels.
        samples: how many of each.
        temperature: of the samples.
        seed: of the samples.

    Returns:
        PSNR in dB, against the truth: of nearest and bicubic interpolation, of the picture at temperature 0, of samples
        and of the mean of samples. PSNR of what is made of lower resolution again, against ``low``: consistency. The
        standard deviation between the samples of one picture, in levels of 256: diversity.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(temperature: float) -> Tensor:
        parts = [model.sample(part, temperature, generator) for part in low.split(100)]
        return as_levels(torch.cat(parts))

    middle, several = drawn(0.0), torch.stack([drawn(temperature) for _ in range(samples)])
    smooth = as_levels(bicubic(low))
    nearest = low.repeat_interleave(FACTOR, dim=2).repeat_interleave(FACTOR, dim=3)
    return {
        "psnr_nearest": psnr(nearest, truth),
        "psnr_bicubic": psnr(smooth, truth),
        "psnr_temperature_0": psnr(middle, truth),
        "psnr_mean_of_samples": psnr(several.mean(dim=0), truth),
        "psnr_sample": psnr(several, truth.expand(several.shape)),
        "consistency_bicubic": psnr(lower(smooth), low),
        "consistency_temperature_0": psnr(lower(middle), low),
        "consistency_sample": psnr(lower(several.flatten(0, 1)), low.repeat(samples, 1, 1, 1)),
        "diversity": several.std(dim=0, correction=0).mean().item(),
    }


@torch.no_grad()
def sheet(model: SRFlow, truth: Tensor, low: Tensor, seed: int) -> Sheet:
    """Those with most detail: low resolution, bicubic, samples, the truth."""
    most = (truth.float() - as_levels(bicubic(low))).abs().flatten(1).mean(dim=1)
    chosen = most.argsort(descending=True)[: max(len(most) // 2, 1)]
    chosen = chosen[:: -(-len(chosen) // SHOWN)]
    truth, low = truth[chosen], low[chosen]
    generator = torch.Generator().manual_seed(seed)
    columns = [low.repeat_interleave(FACTOR, dim=2).repeat_interleave(FACTOR, dim=3), as_levels(bicubic(low))]
    columns += [as_levels(model.sample(low, temperature, generator)) for temperature in TEMPERATURES]
    pictures = torch.stack([column.float() for column in (*columns, truth)], dim=1)
    numbers = ", ".join(f"{temperature:g}" for temperature in TEMPERATURES)
    text = f"In a row: {low.shape[3]} pixels a side, bicubic, samples at temperatures {numbers}, and the truth."
    title = f"From {low.shape[3]} to {truth.shape[3]} pixels a side, held out"
    return Sheet(PICTURES, title, text, pictures.flatten(0, 1) / (LEVELS - 1), columns=pictures.shape[1], zoom=3)


def fit(
    *,
    minutes: float | None = None,
    steps: int | None = None,
    batch: int = 16,
    learning_rate: float = 3e-3,
    samples: int = 8,
    temperature: float = 0.8,
    backend: str | None = None,
    seed: int = 0,
    output: pathlib.Path | None,
    progress: Progress = None,
    data: FlowData | None = None,
    **sizes: Any,
) -> dict:
    """Trains on patches of photographs and what is left of them at a quarter of the resolution.

    Args:
        minutes, steps: of training; 5 minutes if neither is given.
        batch: patches in a step.
        learning_rate: of AdamW.
        samples: how many to draw of each held-out patch.
        temperature: standard deviation of their latents.
        backend: of the flow's ops; None chooses.
        seed: of first weights, batches and samples.
        output: a folder for model.pt, super_resolution.png, curve.png and report.json; None writes nothing.
        progress: called after each step; see :func:`python_models.transformer_training.train`.
        data: to train on instead: patches and low-resolution patches.
        sizes: of the model, as in :class:`Config`.

    Returns:
        A JSON-serialisable dict, as that of :func:`python_models.flow_training.fit_flow`, with the figures of
        :func:`evaluate`.

    Raises:
        ValueError: an argument is not as said; the message begins with its name.
        FileNotFoundError: a wheel with photographs is not installed; the message says so.
    """
    check(minutes, steps, batch, temperature, samples)
    config = configure(Config, sizes, side=8, levels=1, depth=1, hidden=1, features=1, blocks=0)
    if config.levels > 2:
        raise ValueError(f"levels: expected 1 or 2, at the resolutions above that of the features, got {config.levels}")
    if config.side % FACTOR != 0:
        raise ValueError(f"side: expected a multiple of {FACTOR}, got {config.side}")
    data = load(batch, seed, config.side) if data is None else data
    truth, low = data.test

    def finish(model: SRFlow) -> Found:
        figures = evaluate(model, truth, low, samples, temperature, seed)
        return Found([sheet(model, truth, low, seed)], figures)

    return fit_flow(
        "srflow",
        lambda: SRFlow(config),
        data,
        settings=dataclasses.asdict(config) | {"batch": batch, "samples": samples, "temperature": temperature},
        papers=PAPERS,
        finish=finish,
        rate=learning_rate,
        minutes=minutes,
        steps=steps,
        default_minutes=5.0,
        backend=backend,
        seed=seed,
        output=output,
        progress=progress,
    )


def load_model(folder: pathlib.Path) -> SRFlow:
    """The model that :func:`fit` wrote to this folder."""
    return saved(folder, Config, SRFlow)


def main() -> None:
    """The command line: trains with a progress bar, then prints the figures."""
    run("srflow", "Train a flow for super-resolution on patches of photographs.", fit, Config)


if __name__ == "__main__":
    main()
