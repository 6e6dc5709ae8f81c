"""A temporal convolutional network (Bai, Kolter & Koltun 2018) that predicts the next chord of Bach's chorales.

    python -m python_models.tcn      # four minutes of training, then nats a frame of held-out chorales, and a sample

A frame x_t is the set of keys, of 88, that sound on a quarter note (chorales.py). Layers of causal convolutions whose
dilation doubles, :func:`mpkernels.convolution.dilated_conv1d`, read the frames so far, and

    p(x_t | x_1 ... x_{t-1}) = prod_key Bernoulli(x_t[key]; sigmoid(logit_t[key])).

As in the paper: residual blocks of two convolutions with weight normalisation, rectifiers and dropout. What differs: a
training chorale is moved to a random key each time that it is seen, and the weights that are reported are those that
were best on chorales apart. A chorale is written with the state of every convolution kept, so that a new frame costs
the same however long the chorale is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mpkernels import BackendError
from mpkernels.convolution import dilated_conv1d
from python_models.chorales import KEYS, Chorales, load_chorales
from python_models.likelihood_training import Training, check_budget, draw_curve, print_result, with_progress
from python_models.transformer_training import Curve, Progress, train

PAPERS = "TCN 8.10, LSTM 8.45 nats a frame (Bai et al. 2018, JSB chorales, another split of 382)"
WINDOW = 64  # frames of a training chorale
TRANSPOSED = 5  # at most so many half tones, down or up
MODEL, CHORALE, CURVE, REPORT = "model.pt", "chorale.png", "curve.png", "report.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    width: int = 160
    levels: int = 3  # residual blocks; the dilation is 1, 2, 4, ...
    kernel: int = 3
    dropout: float = 0.4


class Convolution(nn.Module):
    """A causal convolution with weight normalisation (Salimans & Kingma 2016): w = g v / |v|, for each output."""

    weight: Tensor

    def __init__(self, channels: int, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.weight = nn.Parameter(torch.randn(width, channels, kernel) * math.sqrt(1 / (channels * kernel)))
        self.bias = nn.Parameter(torch.zeros(width))
        parametrizations.weight_norm(self)

    def forward(self, x: Tensor, state: Tensor | None, backend: str | None) -> tuple[Tensor, Tensor]:
        """(B, channels, T) to (B, width, T), and the state after it."""
        return dilated_conv1d(
            x,
            self.weight,
            self.bias,
            dilation=self.dilation,
            initial_state=state,
            return_state=True,
            backend=backend,
        )


class Block(nn.Module):
    """Two convolutions, each rectified and thinned out, added to what they read."""

    def __init__(self, channels: int, config: Config, dilation: int) -> None:
        super().__init__()
        self.first = Convolution(channels, config.width, config.kernel, dilation)
        self.second = Convolution(config.width, config.width, config.kernel, dilation)
        self.shortcut = nn.Conv1d(channels, config.width, 1) if channels != config.width else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, states: list[Tensor | None], backend: str | None) -> tuple[Tensor, list[Tensor]]:
        """(B, channels, T) to (B, width, T), and the states of the two convolutions after it."""
        inner, first = self.first(x, states[0], backend)
        inner, second = self.second(self.dropout(F.relu(inner)), states[1], backend)
        return F.relu(self.shortcut(x) + self.dropout(F.relu(inner))), [first, second]


class Tcn(nn.Module):
    """Logits of the next frame from those so far."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        channels = [KEYS] + [config.width] * config.levels
        self.blocks = nn.ModuleList(Block(c, config, 2**level) for level, c in enumerate(channels[:-1]))
        self.head = nn.Conv1d(channels[-1], KEYS, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(KEYS, 1))
        nn.init.zeros_(self.head.weight)

    def read(
        self, x: Tensor, states: list[list[Tensor]] | None = None, backend: str | None = None
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """Logits (B, 88, T) of the frames after each of x (B, 88, T), which follow those that left ``states``."""
        kept = []
        for block, state in zip(self.blocks, states or [[None, None]] * len(self.blocks), strict=True):
            x, after = block(x, state, backend)
            kept.append(after)
        return self.head(x) + self.bias, kept

    def forward(self, x: Tensor, backend: str | None = None) -> Tensor:
        """Logits (B, 88, T) of the frames after each of x (B, 88, T)."""
        return self.read(x, backend=backend)[0]

    @torch.no_grad()
    def write(self, beginning: Tensor, frames: int, seed: int, temperature: float = 1.0) -> Tensor:
        """Continues (T, 88) by so many frames: (T + frames, 88)."""
        generator = torch.Generator().manual_seed(seed)
        logits, states = self.read(beginning.T[None])
        found = [beginning]
        for _ in range(frames):
            share = torch.sigmoid(logits[:, :, -1] / temperature)
            found.append((torch.rand(share.shape, generator=generator) < share).float())
            logits, states = self.read(found[-1][:, :, None], states)
        return torch.cat(found)


class Batch(NamedTuple):
    """Chorales side by side, zeros behind the shorter ones."""

    frames: Tensor  # (B, 88, T)
    inside: Tensor  # (B, T) bool: frames that are predicted, the first of a chorale not


def batch_of(chorales: list[Tensor]) -> Batch:
    """Chorales (frames, 88) as one batch."""
    frames = nn.utils.rnn.pad_sequence(chorales, batch_first=True)
    length = torch.tensor([len(chorale) for chorale in chorales])
    place = torch.arange(frames.shape[1])
    return Batch(frames.transpose(1, 2).contiguous(), (place > 0) & (place < length[:, None]))


def batches(chorales: list[Tensor], size: int, seed: int) -> Iterator[Batch]:
    """Training batches without end: of every chorale at most WINDOW frames, in a random key."""
    generator = torch.Generator().manual_seed(seed)

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    def part(chorale: Tensor) -> Tensor:
        start = draw(0, max(0, len(chorale) - WINDOW))
        return transpose(chorale[start : start + WINDOW], draw(-TRANSPOSED, TRANSPOSED))

    while True:
        for chosen in torch.randperm(len(chorales), generator=generator).split(size):
            yield batch_of([part(chorales[i]) for i in chosen.tolist()])


def transpose(chorale: Tensor, by: int) -> Tensor:
    """(frames, 88), so many keys higher; keys that leave the piano are lost."""
    return F.pad(chorale, (by, -by))


def nats(model: Tcn, batch: Batch, backend: str | None = None) -> Tensor:
    """-ln p of all frames of a batch but the first ones: the sum over keys, the mean over frames."""
    logits = model(batch.frames[:, :, :-1], backend)
    each = F.binary_cross_entropy_with_logits(logits, batch.frames[:, :, 1:], reduction="none").sum(1)  # (B, T - 1)
    inside = batch.inside[:, 1:]
    return torch.where(inside, each, 0).sum() / inside.sum().clamp(min=1)


@torch.no_grad()
def held_out(model: Tcn, chorales: list[Tensor], backend: str | None = None) -> float:
    """Nats a frame of chorales."""
    return nats(model, batch_of(chorales), backend).item()


def baselines(train_on: list[Tensor], held_out: list[Tensor]) -> dict[str, float]:
    """Nats a frame by models that know nothing, how often each key sounds, and whether it sounded a frame before."""
    now, before = (torch.cat([chorale[part] for chorale in train_on]) for part in (slice(1, None), slice(-1)))
    target, previous = (torch.cat([chorale[part] for chorale in held_out]) for part in (slice(1, None), slice(-1)))

    def cost(share: Tensor) -> float:
        return F.binary_cross_entropy(share, target, reduction="none").sum(1).double().mean().item()

    often = (now.sum(0) + 0.5) / (len(now) + 1)
    # with half a frame for and half a frame against, drawn towards how often the key sounds
    after = [((now * was).sum(0) + often) / (was.sum(0) + 1) for was in (1 - before, before)]
    return {
        "uniform": KEYS * math.log(2),
        "independent keys": cost(often.expand_as(target)),
        "each key from itself": cost(torch.where(previous > 0, after[1], after[0])),
    }


def fit(
    *,
    minutes: float | None = None,
    steps: int | None = None,
    batch: int = 16,
    backend: str | None = None,
    seed: int = 0,
    output: pathlib.Path | None,
    progress: Progress = None,
    data: Chorales | None = None,
    **sizes: Any,
) -> dict:
    """Train on chorales, and say how many nats a frame of chorales takes that were held out.

    Args:
        minutes: of training; 4 if neither this nor ``steps`` is given.
        steps: of training, 0 or more, instead of minutes.
        batch: chorales in a step.
        backend: of :func:`mpkernels.convolution.dilated_conv1d`; None chooses.
        seed: of first weights, batches and the chorale that is written.
        output: a folder for model.pt, chorale.png, curve.png and report.json, made if missing; None writes nothing.
        progress: called after each step; see :func:`python_models.transformer_training.train`.
        data: chorales to train on instead.
        sizes: of the model, as in :class:`Config`.

    Returns:
        A JSON-serialisable dict: figures, baselines, settings, timings.

    Raises:
        ValueError: an argument is not as said; the message begins with its name.
        FileNotFoundError: the scores are not there; the message says how to install them.
    """
    config = _configure(sizes)
    check_budget(minutes, steps, batch=batch)
    started = time.perf_counter()
    data = load_chorales() if data is None else data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Tcn(config)
        often = torch.cat(data.train).mean(0)
        with torch.no_grad():
            model.bias.copy_(torch.logit(often.clamp(1e-4, 1 - 1e-4))[:, None])
        training = Training(
            model,
            batches(data.train, batch, seed),
            lambda model, batch: nats(model, batch, backend),
            rate=2e-3,
            weight_decay=0.05,
        )
        minutes = 4.0 if minutes is None and steps is None else minutes

        def validate() -> float:
            return training.validate(lambda model: held_out(model, data.valid, backend))

        curve = train(training, validate, steps, minutes, progress)  # pyright: ignore[reportArgumentType]
    training.finish()
    beginning = data.test[0][:8]
    writing = time.perf_counter()
    written = model.write(beginning, 56, seed)
    wrote = time.perf_counter()
    result = {
        "model": "tcn",
        "data": "Bach's chorales, 88 keys, a frame a quarter note",
        "settings": dataclasses.asdict(config)
        | {"batch": batch, "minutes": minutes, "steps": steps, "seed": seed, "threads": torch.get_num_threads()},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "receptive_field": 1 + 2 * (config.kernel - 1) * (2**config.levels - 1),
        "steps_done": len(curve.losses),
        "interrupted": curve.interrupted,
        "figures": {
            "nats_a_frame": held_out(model, data.test, backend),
            "nats_a_frame_validation": held_out(model, data.valid, backend),
        },
        "unit": "nats_a_frame",
        "baselines": baselines(data.train, data.test),
        "earlier_models": {},
        "papers": PAPERS,
        "validation": curve.validation,
        "loss": {"first": curve.losses[0], "last": statistics.fmean(curve.losses[-20:])} if curve.losses else {},
        "pictures": [],
        "timings": {
            "train_seconds": curve.seconds,
            "frames_written_per_second": 56 / max(wrote - writing, 1e-9),
            "total_seconds": time.perf_counter() - started,
        },
    }
    if output is not None:
        _write(pathlib.Path(output), model, result, curve, [written, data.test[0]], len(beginning))
    return result


def _configure(sizes: dict[str, Any]) -> Config:
    known = {field.name for field in dataclasses.fields(Config)}
    for name in sizes:
        if name not in known:
            raise ValueError(f"{name}: expected one of {', '.join(sorted(known))}")
    config = Config(**sizes)
    check_budget(None, None, width=config.width, levels=config.levels, kernel=config.kernel)
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout: expected a share in [0, 1), got {config.dropout}")
    return config


def _write(output: pathlib.Path, model: Tcn, result: dict, curve: Curve, rolls: list[Tensor], given: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    torch.save({"config": dataclasses.asdict(model.config), "model": model.state_dict()}, output / MODEL)
    draw_curve(curve, result, output / CURVE, top=1.6 * result["baselines"]["each key from itself"])
    _draw_rolls(rolls, given, output / CHORALE)
    found = f"{result['figures']['nats_a_frame']:.3f} nats for a frame of chorales that were held out."
    result["pictures"] = [
        {"file": CURVE, "title": "Nats a frame while training", "caption": found},
        {
            "file": CHORALE,
            "title": "A chorale",
            "caption": f"Above, the model goes on from the first {given} frames of the held-out chorale below.",
        },
    ]
    (output / REPORT).write_text(json.dumps(result, indent=2) + "\n")


def _draw_rolls(rolls: list[Tensor], given: int, path: pathlib.Path) -> None:
    """Piano rolls below each other; a line where the model takes over in the first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    longest = len(rolls[0])
    for i, (roll, title) in enumerate(zip(rolls, ("written by the model", "by Bach, held out"), strict=True)):
        axes = figure.add_subplot(len(rolls), 1, i + 1, title=title, xlabel="quarter note", ylabel="key")
        axes.imshow(1 - roll[:longest].T, cmap="gray", aspect="auto", origin="lower", interpolation="nearest")
        axes.set_ylim(14, 68)
        if i == 0:
            axes.axvline(given - 0.5, color="C1")
    figure.savefig(path, dpi=120)


def load_model(folder: pathlib.Path) -> Tcn:
    """The model that :func:`fit` wrote to this folder."""
    path = pathlib.Path(folder) / MODEL
    if not path.is_file():
        raise FileNotFoundError(f"output: expected a folder with a {MODEL}, got {str(folder)!r}; train first")
    saved = torch.load(path, weights_only=True, map_location="cpu")
    model = Tcn(Config(**saved["config"]))
    model.load_state_dict(saved["model"])
    return model.eval()


def main() -> None:
    """The command line: trains with a bar of progress, then prints the figures."""
    parser = argparse.ArgumentParser(description="Train a temporal convolutional network on Bach's chorales.")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out/tcn"), help="folder to write")
    parser.add_argument("--minutes", type=float, help="of training (4 if neither this nor --steps is given)")
    parser.add_argument("--steps", type=int, help="of training, instead of minutes")
    parser.add_argument("--batch", type=int, help="chorales in a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", help="of mpkernels.convolution")
    for field in dataclasses.fields(Config):
        parser.add_argument(f"--{field.name}", type=float if field.name == "dropout" else int, help="of the model")
    options = {key: value for key, value in vars(parser.parse_args()).items() if value is not None}
    try:
        result = with_progress(lambda progress: fit(**options, progress=progress), "nats a frame")
    except (ValueError, FileNotFoundError, BackendError) as error:
        parser.error(str(error))
    papers = result.pop("papers")
    print_result(result, options["output"])
    print(f"For scale, from papers: {papers}.")
    if result["interrupted"]:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
