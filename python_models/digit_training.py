"""How models of binary digits are trained and reported: :func:`fit`, with which fvsbn.py and nade.py end.

The papers' figures are for 50,000 training digits; here are 4,000, which every one of these models learns by heart.
Four things are done about that, the same for all models: pixels are drawn anew each time that a digit is seen
(Salakhutdinov and Murray 2008; the papers drew them once), most digits are moved by a pixel, weights decay, and the
weights that are reported are those that were best on digits apart (an average of them over steps, in fact).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpkernels import BackendError
from python_models import digits
from python_models.digits import SIDE, Digits, binarise, independent_nats, load_digits, save_grid
from python_models.likelihood_training import Training, check_budget, draw_curve, print_result, with_progress
from python_models.transformer_training import Progress, train

SAMPLES, CURVE, MODEL, REPORT = "samples.png", "curve.png", "model.pt", "report.json"


class DigitModel(Protocol):
    """What is trained here: an nn.Module with these two methods."""

    def log_prob(self, x: Tensor, backend: str | None = None) -> Tensor:
        """Nats (N,) of binary pictures (N, 784)."""
        ...

    def sample(self, count: int, seed: int, backend: str | None = None) -> Tensor:
        """Binary pictures (count, 784)."""
        ...


def moved_batches(
    pictures: Tensor, size: int, shift: float, generator: torch.Generator, *others: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Training pictures (size, side, side) uint8, without end, and what belongs to them of ``others`` (pictures, ...).

    ``shift`` is the share that is moved, by up to a pixel.
    """
    side = torch.arange(pictures.shape[-1])
    padded = F.pad(pictures, (1, 1, 1, 1))
    size = min(size, len(pictures))
    while True:
        for chosen in torch.randperm(len(pictures), generator=generator).split(size):
            moves = torch.randint(3, (2, len(chosen)), generator=generator)
            stays = torch.rand(len(chosen), generator=generator) >= shift
            top, left = torch.where(stays, 1, moves)
            rows, columns = top[:, None, None] + side[:, None], left[:, None, None] + side
            yield padded[chosen[:, None, None], rows, columns], *(other[chosen] for other in others)


def batches(pictures: Tensor, size: int, shift: float, seed: int) -> Iterator[Tensor]:
    """Binary training pictures (size, 784), without end; ``shift`` is the share that is moved, by up to a pixel."""
    generator = torch.Generator().manual_seed(seed)
    for (moved,) in moved_batches(pictures, size, shift, generator):
        yield binarise(moved, generator).flatten(1)


@torch.no_grad()
def mean_nats(model: DigitModel, pictures: Tensor, backend: str | None) -> float:
    """-ln p of binary pictures (N, 784), the mean."""
    found = [-model.log_prob(part, backend).double() for part in pictures.split(250)]
    return torch.cat(found).mean().item()


def fit(
    name: str,
    make: Callable[[Tensor], nn.Module],
    *,
    papers: str,
    earlier: dict[str, float],
    rate: float,
    weight_decay: float,
    shift: float,
    minutes: float | None,
    steps: int | None,
    default_minutes: float,
    batch: int = 100,
    samples: int = 50,
    backend: str | None,
    seed: int,
    output: pathlib.Path | None,
    progress: Progress,
    data: Digits | None,
) -> dict:
    """Trains a model on digits, and says how many nats digits take that were held out.

    Args:
        name: of the model.
        make: takes the frequencies (784,) of ink in training digits, and returns the model, a :class:`DigitModel`.
        papers: their figures, in words.
        earlier: nats of models before this one.
        rate, weight_decay: of AdamW.
        shift: share of training digits that is moved.
        minutes, steps: of training; ``default_minutes`` if neither is given.
        default_minutes: see ``minutes``.
        batch: digits in a step.
        samples: how many to draw.
        backend: of the op; None chooses.
        seed: of first weights, batches and samples.
        output: a folder for model.pt, samples.png, curve.png and report.json, made if missing; None writes nothing.
        progress: called after each step; see :func:`python_models.transformer_training.train`.
        data: other digits.

    Returns:
        A JSON-serialisable dict: figures, baselines, settings, timings.
    """
    check_budget(minutes, steps, batch=batch)
    started = time.perf_counter()
    data = load_digits() if data is None else data
    valid, test = (binarise(part).flatten(1) for part in (data.valid, data.test))
    ink = (data.train.double().sum(0) / 255 + 0.5) / (len(data.train) + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = make(ink.float().flatten())
    training = Training(
        model,
        batches(data.train, batch, shift, seed),
        lambda model, x: -model.log_prob(x, backend).mean(),
        rate=rate,
        weight_decay=weight_decay,
    )
    minutes = default_minutes if minutes is None and steps is None else minutes

    def validate() -> float:
        return training.validate(lambda model: mean_nats(model, valid, backend))

    curve = train(training, validate, steps, minutes, progress)  # pyright: ignore[reportArgumentType]
    training.finish()
    drawn = model.sample(samples, seed, backend)
    result = {
        "model": name,
        "data": "4,000 digits of MNIST, drawn binary" if len(data.train) == 4000 else "digits",
        "settings": {"rate": rate, "weight_decay": weight_decay, "shift": shift, "batch": batch, "minutes": minutes}
        | {"steps": steps, "seed": seed, "threads": torch.get_num_threads()},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps_done": len(curve.losses),
        "interrupted": curve.interrupted,
        "figures": {name: mean_nats(model, x, backend) for name, x in (("nats", test), ("nats_validation", valid))},
        "unit": "nats",
        "baselines": {
            "uniform": digits.UNIFORM,
            "independent pixels": independent_nats(data.train / 255, test.unflatten(1, (SIDE, SIDE))),
        },
        "earlier_models": earlier,
        "papers": papers,
        "validation": curve.validation,
        "loss": {"first": curve.losses[0], "last": statistics.fmean(curve.losses[-20:])} if curve.losses else {},
        "pictures": [],
        "timings": {
            "train_seconds": curve.seconds,
            "digits_per_second": len(curve.losses) * batch / max(curve.seconds, 1e-9),
            "total_seconds": time.perf_counter() - started,
        },
    }
    if output is not None:
        output = pathlib.Path(output)
        output.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), output / MODEL)
        draw_curve(curve, result, output / CURVE, top=2.5 * result["figures"]["nats"])
        shown = torch.cat([drawn, test[: len(drawn)]]).view(-1, 1, SIDE, SIDE)
        save_grid(shown, output / SAMPLES)
        nats = f"{result['figures']['nats']:.2f} nats for a digit that was held out."
        half = f"The first {len(drawn)} are drawn from the model; the others are held-out digits."
        result["pictures"] = [
            {"file": CURVE, "title": "Nats while training", "caption": nats},
            {"file": SAMPLES, "title": "Samples", "caption": half},
        ]
        (output / REPORT).write_text(json.dumps(result, indent=2) + "\n")
    return result


def earlier_nats(folder: pathlib.Path | None, *names: str) -> dict[str, float]:
    """Nats of models that were trained before, where folder/<name>/report.json says so."""
    paths = {} if folder is None else {name: folder / name / REPORT for name in names}
    return {name: json.loads(path.read_text())["figures"]["nats"] for name, path in paths.items() if path.is_file()}


def command(
    name: str,
    description: str,
    run: Callable[..., dict],
    add: Callable[[argparse.ArgumentParser], None],
    *,
    unit: str = "nats",
    ops: str = "mpkernels.convolution",
) -> None:
    """The command line of a model: trains with a bar of progress, then prints the figures."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out") / name, help="folder to write")
    parser.add_argument("--minutes", type=float, help="of training")
    parser.add_argument("--steps", type=int, help="of training, instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", help=f"of {ops}")
    add(parser)
    options = {key: value for key, value in vars(parser.parse_args()).items() if value is not None}
    try:
        result = with_progress(lambda progress: run(**options, progress=progress), unit)
    except (ValueError, FileNotFoundError, BackendError) as error:
        parser.error(str(error))
    print_result(result, options["output"])
    if result["interrupted"]:
        raise SystemExit(130)
