"""What the normalizing flows of python_models share: their data, dequantization, training, figures and pictures.

A flow has a density over real numbers, and pictures have values of n levels. Uniform noise makes them real
(Theis et al. 2016): x = level / n - 1/2 + U(0, 1/n), and then

    bits per dimension = (-log p(x) + D ln n) / (D ln 2)

is at least what the best discrete model of the same pictures would take, so that it compares with PixelCNN's figures
and with the size of a PNG file. Noise of training is new each time; that of held-out pictures is always the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

import mpkernels
from python_models.digit_training import moved_batches
from python_models.digits import Digits, load_digits, save_grid
from python_models.likelihood_training import Training, check_budget, draw_curve
from python_models.pixelcnn_pictures import photograph_baselines, random_patches, split_photographs, tiles
from python_models.transformer_training import Curve, Progress, train

LEVELS = 256
CURVE, MODEL, REPORT = "curve.png", "model.pt", "report.json"
UNIT = "bits_per_dimension"
EVALUATED = 100  # pictures at once

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)
Batch = tuple[Tensor, ...]  # levels (B, ...) uint8, then what they are conditioned on, if anything
LogProb = Callable[..., Tensor]  # of the model, x (B, ...) and conditions: nats (B,)


class FlowData(NamedTuple):
    """What a flow learns from and is judged by."""

    train: Iterator[Batch]  # without end
    valid: Batch
    test: Batch
    baselines: dict[str, float]  # bits per dimension of the test
    description: str = "pictures"
    levels: int = LEVELS


class Sheet(NamedTuple):
    """A picture to write: pictures side by side."""

    file: str
    title: str
    caption: str
    pictures: Tensor  # (N, 1 or 3, H, W) in [0, 1]
    columns: int = 10
    zoom: int = 2


class Found(NamedTuple):
    """What a trained model is asked besides its bits per dimension."""

    sheets: list[Sheet]
    figures: Mapping[str, float] = MappingProxyType({})


def dequantize(levels: Tensor, generator: torch.Generator, number: int = LEVELS) -> Tensor:
    """Levels 0 .. number - 1 of any dtype to float32 in [-1/2, 1/2): level / number - 1/2 + U(0, 1/number)."""
    noise = torch.rand(levels.shape, generator=generator)
    return (levels.float() + noise) / number - 0.5


def quantize(x: Tensor, number: int = LEVELS) -> Tensor:
    """The levels (int64) that dequantized values belong to; values outside get the first or the last one."""
    level = torch.floor((x.float() + 0.5) * number)
    return level.nan_to_num(0.0).clamp(0, number - 1).long()


def shown(x: Tensor, number: int = LEVELS) -> Tensor:
    """Dequantized values, or a flow's samples, as intensities in [0, 1]."""
    return quantize(x, number) / (number - 1)


def bits_per_dimension(log_prob: Tensor, dimensions: int, number: int = LEVELS) -> Tensor:
    """Nats log p of dequantized data to bits for each of its dimensions."""
    return (dimensions * math.log(number) - log_prob) / (dimensions * math.log(2))


@torch.no_grad()
def mean_log_prob(model: nn.Module, batch: Batch, log_prob: LogProb, number: int = LEVELS) -> float:
    """The mean of log p in nats over held-out data, with noise that is always the same."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for parts in zip(*(part.split(EVALUATED) for part in batch), strict=True):
        found.append(log_prob(model, dequantize(parts[0], generator, number), *parts[1:]).double())
    return torch.cat(found).mean().item()


def of_model(model: Any, x: Tensor, *conditions: Tensor) -> Tensor:
    """``model.log_prob(x, context)``: the log-density of most models."""
    return model.log_prob(x, *conditions)


def first_pass(model: nn.Module, batch: Batch, log_prob: LogProb, seed: int, number: int = LEVELS) -> None:
    """Shows a batch to a new model: actnorm takes its scales from the first one that it sees."""
    with torch.no_grad():
        log_prob(model.train(), dequantize(batch[0], torch.Generator().manual_seed(seed), number), *batch[1:])


def fit_flow(
    name: str,
    make: Callable[[], M],
    data: FlowData,
    *,
    settings: dict[str, Any],
    papers: str,
    finish: Callable[[M], Found],
    rate: float,
    minutes: float | None,
    steps: int | None,
    default_minutes: float,
    weight_decay: float = 0.0,
    earlier: dict[str, float] | None = None,
    log_prob: LogProb = of_model,
    quick: int = 200,
    backend: str | None = None,
    seed: int = 0,
    output: pathlib.Path | None,
    progress: Progress = None,
) -> dict:
    """Trains a flow, and says how many bits a dimension takes of what was held out.

    Args:
        name: of the model.
        make: returns it, with random first weights.
        data: what it learns from.
        settings: what the report says of the model and of the training besides.
        papers: their figures, in words.
        finish: takes the trained model; returns pictures to write, and more figures. Called in eval mode, without
            gradients, with torch's random numbers seeded.
        rate, weight_decay: of AdamW.
        minutes, steps: of training; ``default_minutes`` if neither is given.
        default_minutes: see ``minutes``.
        earlier: bits per dimension of other models.
        log_prob: see :data:`LogProb`; it may depend on anything in a batch.
        quick: how many of the validation data choose the best weights, at ten moments of the training.
        backend: of the flow's ops; None chooses.
        seed: of first weights and noise.
        output: a folder for model.pt, curve.png, report.json and the pictures, made if missing; None writes nothing.
        progress: called after each step; see :func:`python_models.transformer_training.train`. Ctrl-C ends the
            training: what was learned so far is evaluated and written.

    Returns:
        A JSON-serialisable dict: figures, baselines, settings, timings. The figure ``log_likelihood`` is the mean of
        log p of held-out data in nats, as NICE's paper has it: of values in an interval of length 1.
    """
    check_budget(minutes, steps)
    started = time.perf_counter()
    minutes = default_minutes if minutes is None and steps is None else minutes
    dimensions, number = data.test[0][0].numel(), data.levels
    with torch.random.fork_rng(devices=[]), mpkernels.use_backend(backend):
        torch.manual_seed(seed)
        model = make()
        first_pass(model, next(data.train), log_prob, seed, number)
        noise = torch.Generator().manual_seed(seed)

        def loss(model: M, batch: Batch) -> Tensor:
            nats = -log_prob(model, dequantize(batch[0], noise, number), *batch[1:]).mean()
            return nats / dimensions + math.log(number)

        training = Training(model, data.train, loss, rate=rate, weight_decay=weight_decay, shown=1 / math.log(2))

        def bits(batch: Batch) -> float:
            found = torch.tensor(mean_log_prob(model, batch, log_prob, number), dtype=torch.float64)
            return bits_per_dimension(found, dimensions, number).item()

        every = -(-len(data.valid[0]) // quick)
        some = tuple(part[::every] for part in data.valid)
        curve = train(training, lambda: training.validate(lambda _: bits(some)), steps, minutes, progress)
        training.finish()
        evaluating = time.perf_counter()
        found = {part: bits(batch) for part, batch in (("test", data.test), ("valid", data.valid))}
        drawing = time.perf_counter()
        torch.manual_seed(seed)
        with torch.no_grad():
            more = finish(model)
    seen = len(curve.losses) * len(next(data.train)[0])
    result = {
        "model": name,
        "data": data.description,
        "settings": settings
        | {"rate": rate, "weight_decay": weight_decay, "minutes": minutes, "steps": steps, "seed": seed}
        | {"threads": torch.get_num_threads()},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps_done": len(curve.losses),
        "interrupted": curve.interrupted,
        "figures": {
            UNIT: found["test"],
            f"{UNIT}_validation": found["valid"],
            "log_likelihood": dimensions * (math.log(number) - math.log(2) * found["test"]),
        }
        | dict(more.figures),
        "unit": UNIT,
        "baselines": data.baselines,
        "earlier_models": earlier or {},
        "papers": papers,
        "validation": curve.validation,
        "loss": {"first": curve.losses[0], "last": statistics.fmean(curve.losses[-20:])} if curve.losses else {},
        "pictures": [],
        "timings": {
            "train_seconds": curve.seconds,
            "examples_per_second": seen / max(curve.seconds, 1e-9),
            "evaluate_seconds": drawing - evaluating,
            "total_seconds": time.perf_counter() - started,
        },
    }
    if output is not None:
        _write(pathlib.Path(output), model, result, curve, more.sheets)
    return result


def _write(output: pathlib.Path, model: nn.Module, result: dict, curve: Curve, sheets: list[Sheet]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    torch.save({"settings": result["settings"], "model": model.state_dict()}, output / MODEL)
    bits = result["figures"][UNIT]
    draw_curve(curve, result, output / CURVE, top=1.1 * max(8.0, bits))
    caption = f"{bits:.3f} bits per dimension of what was held out."
    result["pictures"] = [{"file": CURVE, "title": "Bits per dimension while training", "caption": caption}]
    for sheet in sheets:
        save_grid(sheet.pictures, output / sheet.file, sheet.columns, zoom=sheet.zoom)
        result["pictures"].append({"file": sheet.file, "title": sheet.title, "caption": sheet.caption})
    (output / REPORT).write_text(json.dumps(result, indent=2) + "\n")


def saved(folder: pathlib.Path, config: Callable[..., C], make: Callable[[C], M]) -> M:
    """The model that :func:`fit_flow` wrote to a folder.

    Args:
        folder: with a model.pt.
        config: a dataclass, whose fields are among the settings.
        make: takes that and returns the model, whose state is then loaded.
    """
    path = pathlib.Path(folder) / MODEL
    if not path.is_file():
        raise FileNotFoundError(f"output: expected a folder with a {MODEL}, got {str(folder)!r}; train first")
    found = torch.load(path, weights_only=True, map_location="cpu")
    names = {field.name for field in dataclasses.fields(config)}  # pyright: ignore[reportArgumentType]
    model = make(config(**{name: value for name, value in found["settings"].items() if name in names}))
    model.load_state_dict(found["model"])
    return model.eval()


def earlier_bits(folder: pathlib.Path | None, *names: str) -> dict[str, float]:
    """Bits per dimension of models that were trained before, where folder/<name>/report.json says so."""
    paths = {} if folder is None else {name: folder / name / REPORT for name in names}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
    return {name: report["figures"][UNIT] for name, report in found.items() if UNIT in report["figures"]}


def check_choices(**values: tuple[Any, tuple[Any, ...]]) -> None:
    """Raises a ValueError where a value, the first of a pair, is none of the second."""
    for name, (value, choices) in values.items():
        if value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def digit_data(batch: int, seed: int, *, shift: float = 0.5, digits: Digits | None = None) -> FlowData:
    """The 5,000 digits with their 256 levels, (B, 1, 28, 28): 4,000 to train on, ``shift`` of them moved by a pixel."""
    parts = load_digits() if digits is None else digits
    generator = torch.Generator().manual_seed(seed)
    batches = ((moved[:, None],) for (moved,) in moved_batches(parts.train, batch, shift, generator))
    baselines = {"uniform": math.log2(LEVELS), "independent pixels": independent_bits(parts.train, parts.test)}
    description = f"{len(parts.train):,} digits of MNIST, 256 levels"
    return FlowData(batches, (parts.valid[:, None],), (parts.test[:, None],), baselines, description)


def independent_bits(train: Tensor, held_out: Tensor, number: int = LEVELS) -> float:
    """Bits per dimension by a model in which each pixel has its own histogram, and pixels know nothing of each other.

    A level that a pixel never had has a share of ten more pictures, which have the histogram of all pixels.

    Args:
        train: (pictures, ...) of integer levels.
        held_out: (pictures, ...) likewise.
    """
    train, held_out = train.flatten(1).long(), held_out.flatten(1).long()
    every = train.flatten().bincount(minlength=number) + 1.0
    counts = torch.zeros(train.shape[1], number).scatter_add_(1, train.T, torch.ones(train.T.shape))
    share = (counts + 10 * every / every.sum()) / (len(train) + 10)
    return -share.log2().gather(1, held_out.T).double().mean().item()


def photograph_data(batch: int, seed: int, side: int) -> FlowData:
    """Patches (B, 3, side, side) of the photographs that the PixelCNN learns from, with the same columns held out.

    Training patches begin anywhere and half of them are mirrored; those of validation and test overlap by a half.
    A photograph whose validation columns are fewer than ``side`` has no part in the validation.
    """
    parts = split_photographs()
    valid, test = (torch.cat([tiles(picture, side, max(side // 2, 1)) for picture in part]) for part in parts[1:])
    if len(valid) == 0 or len(test) == 0:
        raise ValueError(f"side: expected patches that fit into held-out columns, got {side}")
    batches = ((patches,) for patches in random_patches(parts[0], side, batch, seed))
    baselines = photograph_baselines(parts[0], parts[2], test)
    return FlowData(batches, (valid,), (test,), baselines, f"{side}x{side} patches of seven photographs")


class PictureFlow(nn.Module):
    """A flow over pictures x (N, C, H, W) in [-1/2, 1/2), its density and its samples.

    Args:
        flow: a :class:`mpkernels.flows.nn.Flow`.
    """

    def __init__(self, flow: Any) -> None:
        super().__init__()
        self.flow = flow

    def log_prob(self, x: Tensor) -> Tensor:
        """Nats (N,) of dequantized pictures."""
        return self.flow.log_prob(x)

    def latent(self, x: Tensor) -> Tensor:
        """Pictures to z (N, D)."""
        return self.flow.transform(x)[0]

    def pictures(self, z: Tensor) -> Tensor:
        """Latent z (N, D) to pictures."""
        return self.flow.transform.inverse(z)[0]

    def sample(self, count: int, temperature: float = 1.0) -> Tensor:
        """Pictures (count, C, H, W), by torch's random numbers; z is multiplied by the temperature."""
        return self.flow.sample(count, temperature=temperature)


def picture_sheets(model: PictureFlow, test: Tensor, samples: int, temperature: float) -> list[Sheet]:
    """Samples beside held-out pictures (N, C, H, W) of levels, and ways in latent space between pairs of those."""
    zoom = 2 if test.shape[-1] > 20 else 4
    drawn = against_real(model.sample(samples, temperature), test)
    caption = f"The first {samples} are drawn at temperature {temperature:g}; the others are held-out pictures."
    sheets = [Sheet("samples.png", "Samples", caption, drawn, zoom=zoom)]
    ends = test[:: max(1, len(test) // 10)][: min(10, len(test) // 2 * 2)]
    if len(ends) > 0:
        z = model.latent((ends.float() + 0.5) / LEVELS - 0.5)
        between = model.pictures(interpolate(z[0::2], z[1::2], 10).flatten(0, 1))
        caption = "Rows: straight lines in latent space between two held-out pictures, which are the ends."
        sheets.append(Sheet("interpolations.png", "Interpolations", caption, shown(between), zoom=zoom))
    return sheets


def interpolate(first: Tensor, second: Tensor, number: int) -> Tensor:
    """``number`` latent vectors on the straight lines from ``first`` to ``second`` (B, ...): (B, number, ...)."""
    share = torch.linspace(0, 1, number, dtype=first.dtype, device=first.device)
    return torch.lerp(first.unsqueeze(1), second.unsqueeze(1), share.view(1, -1, *[1] * (first.dim() - 1)))


def against_real(drawn: Tensor, real: Tensor, number: int = LEVELS) -> Tensor:
    """Samples in [-1/2, 1/2), then as many held-out pictures (N, C, H, W) of levels, in [0, 1]."""
    chosen = real[:: max(1, len(real) // max(len(drawn), 1))][: len(drawn)]
    return torch.cat([shown(drawn, number), chosen / (number - 1)])
