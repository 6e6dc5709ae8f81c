"""Gated PixelCNN (van den Oord et al. 2016b), on the masked convolutions of :mod:`mpkernels.convolution`.

    python -m python_models.pixelcnn                         # trains on digits, then on photographs; 4 minutes each
    python -m python_models.pixelcnn --data photographs      # the second alone
    python -m python_models.pixelcnn --compare-sampling      # how much faster sampling is that keeps what it computed

A picture is read in the order of text, and its likelihood is a product: p(x) = prod_i p(x_i | pixels before i), within
a pixel red before green before blue. Two stacks of layers see what came before, without a blind spot: the vertical one
reads the rows above, the horizontal one the pixels to the left, and what the vertical one found, layer by layer:

    tall = vertical convolution of v,         wide = horizontal convolution of h + 1x1 of tall
    v'   = tanh(tall[:p]) sigmoid(tall[p:]),  h'   = h + 1x1 of tanh(wide[:p]) sigmoid(wide[p:])

(figure 2 of the paper). Digits are binary: a pixel is a Bernoulli variable. Of photographs, a value of 256 levels has a
mixture of discretised logistics (Salimans et al. 2017, equation 2) instead of the paper's 256-way softmax, because the
few pixels that ten minutes on two cores allow teach a softmax little; the masks bring in the colours before it. To the
means of its logistics a linear prediction from the nearest values is added, which is learned with the rest.

What differs from the paper besides: a residual in the vertical stack too, a bias for each place of a digit, dropout,
and an average of the weights over the last steps, for 4,000 digits and seven photographs. Figures are not comparable
with the papers', which have 50,000 digits and 50,000 pictures; those are printed beside.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpkernels.convolution import horizontal_stack, masked_conv2d, vertical_stack
from python_models import digits
from python_models.digit_training import earlier_nats
from python_models.likelihood_training import Training, check_budget, draw_curve, print_result, with_progress
from python_models.pixelcnn_pictures import DATA, PATCH, Pictures, load
from python_models.transformer_training import Curve, Progress, train

LEAST_LOG_SCALE = -6.0  # of a logistic, where pixels are in [-1, 1]: finer than a level
PAPERS = {
    "digits": "nats on binarised MNIST, 50,000 digits: PixelCNN 81.45, Gated PixelCNN 81.50 (pytorch-generative)",
    "photographs": "bits per dimension on CIFAR-10: PixelCNN 3.14, Gated PixelCNN 3.03, PixelCNN++ 2.92",
}
EARLIER = ("fvsbn", "nade", "made_natural", "made")  # the models of digits before this one
SAMPLES, CURVE, MODEL = "samples.png", "curve.png", "model.pt"


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    colors: int = 1  # 1, or 3: red, green, blue
    side: int = digits.SIDE  # of the pictures
    width: int = 32  # channels of a stack, a multiple of colors
    layers: int = 8  # after the first
    first_kernel: int = 7
    kernel: int = 3
    hidden: int = 64  # channels between the last layer and the outputs, a multiple of colors
    mixture: int = 0  # how many logistics a value has; 0: it is 0 or 1, a Bernoulli variable
    places: bool = True  # whether each place has a bias of its own
    dropout: float = 0.0

    @property
    def outputs(self) -> int:
        """Numbers that describe the distribution of one value."""
        return 3 * self.mixture or 1


class Layer(nn.Module):
    """One layer of both stacks. The first has masks of type A, which leave out the pixel itself, and no residual."""

    def __init__(self, config: Config, first: bool) -> None:
        super().__init__()
        width, self.colors, self.first = config.width, config.colors, first
        size = config.first_kernel if first else config.kernel
        inputs = 2 * config.colors if first else width
        self.mask_type = "A" if first else "B"
        vertical, horizontal = inputs * size * (size // 2 + 1), inputs * (size // 2 + 1)  # taps that count
        self.vertical = _weight(2 * width, inputs, size, size, fan_in=vertical)
        self.vertical_bias = nn.Parameter(torch.zeros(2 * width))
        self.horizontal = _weight(2 * width, inputs, 1, size, fan_in=horizontal)
        self.horizontal_bias = nn.Parameter(torch.zeros(2 * width))
        self.link = _weight(2 * width, 2 * width, 1, 1, fan_in=2 * width)
        self.out = _weight(width, width, 1, 1, fan_in=width)
        self.out_bias = nn.Parameter(torch.zeros(width))
        self.dropout = nn.Dropout2d(config.dropout)  # of whole channels, which costs little

    def forward(self, v: Tensor, h: Tensor, place: Tensor | None, backend: str | None = None) -> tuple[Tensor, Tensor]:
        """(B, channels, H, W) of both stacks to (B, width, H, W) of both."""
        kind = {"mask_type": self.mask_type, "backend": backend}
        tall = vertical_stack(v, self.vertical, self.vertical_bias, **kind)
        if place is not None:
            tall = tall + place
        wide = horizontal_stack(h, self.horizontal, self.horizontal_bias, colors=self.colors, **kind)
        wide = wide + F.conv2d(tall, self.link)
        found = self.dropout(gate(wide, self.colors))
        out = masked_conv2d(found, self.out, self.out_bias, mask_type="B", colors=self.colors, backend=backend)
        if self.first:
            return gate(tall, 1), out
        return v + self.dropout(gate(tall, 1)), h + out


def _weight(outputs: int, inputs: int, height: int, width: int, fan_in: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(outputs, inputs, height, width) / math.sqrt(fan_in))


def gate(x: Tensor, colors: int, dim: int = 1) -> Tensor:
    """tanh(filters) sigmoid(gates), where each colour's block of channels has first its filters, then its gates."""
    filters, gates = x.unflatten(dim, (colors, 2, -1)).unbind(dim + 1)
    return (torch.tanh(filters) * torch.sigmoid(gates)).flatten(dim, dim + 1)


class PixelCNN(nn.Module):
    """What each value of a picture is like, given those before it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config, first=i == 0) for i in range(config.layers + 1))
        shape = (2 * config.width, config.side, config.side)
        self.places = nn.Parameter(torch.zeros(shape)) if config.places else None
        self.hidden = _weight(config.hidden, config.width, 1, 1, fan_in=config.width)
        self.hidden_bias = nn.Parameter(torch.zeros(config.hidden))
        outputs = config.colors * config.outputs
        self.out = nn.Parameter(torch.zeros(outputs, config.hidden, 1, 1))  # all pixels alike at first
        self.out_bias = nn.Parameter(first_bias(config))
        if config.mixture > 0:
            inputs = 2 * config.colors
            self.above = nn.Parameter(torch.zeros(config.colors, inputs, 3, 3))
            self.left = nn.Parameter(torch.zeros(config.colors, inputs, 1, 3))
            with torch.no_grad():  # at first the mean of two neighbours, and by how much the colour before missed it
                for color in range(config.colors):
                    self.above[color, 2 * color, 0, 1] = self.left[color, 2 * color, 0, 0] = 0.5
                    if color > 0:
                        before = 2 * color - 2
                        self.left[color, before, 0, 1] = 0.9
                        self.above[color, before, 0, 1] = self.left[color, before, 0, 0] = -0.45

    def forward(self, x: Tensor, backend: str | None = None) -> Tensor:
        """Distributions (B, colors, outputs, H, W) of the pixels (B, colors, H, W), which are in [-1, 1]."""
        v = h = with_ones(x)
        for i, layer in enumerate(self.layers):
            v, h = layer(v, h, self.places if i == 0 else None, backend)
        kind: dict[str, Any] = {"mask_type": "B", "colors": self.config.colors, "backend": backend}
        h = masked_conv2d(F.relu(h), self.hidden, self.hidden_bias, **kind)
        h = masked_conv2d(F.relu(h), self.out, self.out_bias, **kind)
        outputs = h.unflatten(1, (self.config.colors, self.config.outputs))
        if self.config.mixture == 0:
            return outputs
        seen, kind = with_ones(x), {"mask_type": "A", "backend": backend}
        linear = vertical_stack(seen, self.above, **kind)
        linear = linear + horizontal_stack(seen, self.left, colors=self.config.colors, **kind)
        logits, means, log_scales = outputs.chunk(3, dim=2)
        return torch.cat([logits, means + linear.unsqueeze(2), log_scales], dim=2)

    def log_prob(self, x: Tensor, backend: str | None = None) -> Tensor:
        """Nats of pictures (B, colors, H, W), as log p: (B,)."""
        outputs = self(x, backend)
        if self.config.mixture == 0:
            return -F.softplus(-x * outputs[:, :, 0]).flatten(1).sum(dim=1)
        return log_mixture(x, outputs).flatten(1).sum(dim=1)


def with_ones(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, 2 C, H, W): each colour, and ones, which show where the picture ends."""
    return torch.stack([x, torch.ones_like(x)], dim=2).flatten(1, 2)


def first_bias(config: Config) -> Tensor:
    """Where outputs begin: a fair coin; or logistics of equal weight, side by side around the linear prediction."""
    if config.mixture == 0:
        return torch.zeros(config.colors)
    means = torch.linspace(-0.1, 0.1, config.mixture)
    of_color = torch.cat([torch.zeros(config.mixture), means, torch.full((config.mixture,), -2.5)])
    return of_color.repeat(config.colors)


def log_mixture(x: Tensor, outputs: Tensor) -> Tensor:
    """Logarithm of the share that a mixture of logistics has in the 256th part around x (and beyond, at 0 and 255).

    With a and b the upper and the lower edge in units of a logistic, sigmoid(a) - sigmoid(b) is
    sigmoid(a) sigmoid(-b) (1 - e^(b - a)), whose logarithm neither cancels nor overflows.

    Args:
        x: (B, colors, H, W) in [-1, 1].
        outputs: (B, colors, 3 mixture, H, W): logits, means, logarithms of scales.
    """
    logits, means, log_scales = outputs.chunk(3, dim=2)
    per_scale = torch.exp(-log_scales.clamp(min=LEAST_LOG_SCALE))
    distance = x.unsqueeze(2) - means
    upper = torch.where(x.unsqueeze(2) > 1 - 1 / 255, math.inf, (distance + 1 / 255) * per_scale)
    lower = torch.where(x.unsqueeze(2) < -1 + 1 / 255, -math.inf, (distance - 1 / 255) * per_scale)
    inside = torch.log(-torch.expm1(-2 / 255 * per_scale))
    inside = torch.where((upper - lower).isinf(), 0.0, inside)
    log_share = F.logsigmoid(upper) + F.logsigmoid(-lower) + inside
    return torch.logsumexp(log_share + logits.log_softmax(dim=2), dim=2)


def draw(outputs: Tensor, uniform: Tensor) -> Tensor:
    """Values in [-1, 1] from distributions (B, outputs), by random numbers (B, 2) in (0, 1).

    A binary value takes the first of them. A mixture takes the first for the logistic and the second within it.
    """
    if outputs.shape[1] == 1:
        return torch.where(uniform[:, 0] < torch.sigmoid(outputs[:, 0]), 1.0, -1.0).to(outputs.dtype)
    logits, means, log_scales = outputs.chunk(3, dim=1)
    below = logits.softmax(dim=1).cumsum(dim=1) < uniform[:, :1]
    which = below.sum(dim=1, keepdim=True).clamp(max=logits.shape[1] - 1)
    scale = log_scales.gather(1, which)[:, 0].clamp(min=LEAST_LOG_SCALE).exp()
    value = means.gather(1, which)[:, 0] + scale * torch.logit(uniform[:, 1].to(scale.dtype))
    return ((value.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


@torch.no_grad()
def held_out(model: PixelCNN, pictures: Tensor, backend: str | None = None) -> float:
    """Nats of a binary picture, or bits of one value of a photograph: the mean over pictures."""
    nats = -torch.cat([model.log_prob(part, backend) for part in pictures.split(50)]).double().mean().item()
    return nats if model.config.mixture == 0 else nats / (math.log(2) * pictures[0].numel())


# By data: sizes, and what a step takes. Digits are few: some dropout. Patches are many: none.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "digits": ({"dropout": 0.1}, {"batch": 16, "learning_rate": 3e-3, "weight_decay": 0.02}),
    "photographs": (
        {
            "colors": 3,
            "side": PATCH,
            "width": 48,
            "layers": 6,
            "first_kernel": 5,
            "hidden": 96,
            "mixture": 5,
            "places": False,
        },
        {"batch": 32, "learning_rate": 3e-3, "weight_decay": 0.01},
    ),
}


def fit(
    data: str = "digits",
    *,
    minutes: float | None = None,
    steps: int | None = None,
    batch: int | None = None,
    learning_rate: float | None = None,
    backend: str | None = None,
    seed: int = 0,
    output: pathlib.Path | None,
    progress: Progress = None,
    pictures: Pictures | None = None,
    samples: int = 40,
    others: pathlib.Path | None = None,
    **sizes: Any,
) -> dict:
    """Train on digits or photographs, and say how likely pictures are that were held out.

    Args:
        data: "digits", binary ones, or "photographs", patches in three colours.
        minutes: of training; 4 if neither this nor ``steps`` is given.
        steps: of training, 0 or more, instead of minutes.
        batch: pictures in a step.
        learning_rate: of AdamW.
        backend: of the convolutions; None chooses.
        seed: of first weights, batches and samples.
        output: a folder for model.pt, samples.png, curve.png and report.json, made if missing; None writes nothing.
        progress: called after each step; see :func:`python_models.transformer_training.train`.
        pictures: to train on instead.
        samples: how many to draw.
        others: a folder with what earlier models wrote, whose figures are repeated beside: others/made/report.json.
        sizes: of the model, as in :class:`Config`.

    Returns:
        A JSON-serialisable dict: figures, baselines, settings, timings.

    Raises:
        ValueError: an argument is not as said; the message begins with its name.
        FileNotFoundError: a wheel with pictures is not there; the message says how to install it.
    """
    from python_models.pixelcnn_sampling import sample_cached, uniform_numbers

    if data not in DATA:
        raise ValueError(f"data: expected one of {', '.join(map(repr, DATA))}, got {data!r}")
    taken, given = SETTINGS[data][1], {"batch": batch, "learning_rate": learning_rate}
    taken = taken | {name: value for name, value in given.items() if value is not None}
    check_budget(minutes, steps, batch=taken["batch"])
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise ValueError(f"samples: expected an integer of at least 0, got {samples!r}")
    config = configure(SETTINGS[data][0] | sizes)
    started = time.perf_counter()
    pictures = load(data, taken["batch"], seed) if pictures is None else pictures
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PixelCNN(config)
        minutes = 4.0 if minutes is None and steps is None else minutes
        values = config.colors * config.side**2
        unit = "nats" if config.mixture == 0 else "bits_per_dimension"
        training = Training(
            model,
            pictures.train,
            lambda model, x: -model.log_prob(x, backend).mean() / values,
            rate=taken["learning_rate"],
            weight_decay=taken["weight_decay"],
            shown=float(values) if unit == "nats" else 1 / math.log(2),
        )
        quick = pictures.valid[:: -(-len(pictures.valid) // 250)]  # enough to choose by

        def validate() -> float:
            return training.validate(lambda model: held_out(model, quick, backend))

        curve = train(training, validate, steps, minutes, progress)
    model = training.finish()
    evaluating = time.perf_counter()
    found = {name: held_out(model, getattr(pictures, name), backend) for name in ("valid", "test")}
    sampling = time.perf_counter()
    drawn = sample_cached(model, uniform_numbers(config, samples, seed)) if samples else None
    result = {
        "model": "pixelcnn",
        "data": data,
        "settings": dataclasses.asdict(config)
        | taken
        | {"minutes": minutes, "steps": steps, "seed": seed, "threads": torch.get_num_threads()},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps_done": len(curve.losses),
        "interrupted": curve.interrupted,
        "figures": {unit: found["test"], f"{unit}_validation": found["valid"]},
        "unit": unit,
        "baselines": pictures.baselines,
        "earlier_models": earlier_nats(others, *EARLIER) if data == "digits" else {},
        "papers": PAPERS[data],
        "validation": curve.validation,
        "loss": {"first": curve.losses[0], "last": statistics.fmean(curve.losses[-20:])} if curve.losses else {},
        "pictures": [],
        "timings": {
            "train_seconds": curve.seconds,
            "pictures_per_second": len(curve.losses) * taken["batch"] / max(curve.seconds, 1e-9),
            "evaluate_seconds": sampling - evaluating,
            "sample_seconds": time.perf_counter() - sampling,
            "total_seconds": time.perf_counter() - started,
        },
    }
    if output is not None:
        _write(pathlib.Path(output), model, result, curve, drawn, pictures.test)
    return result


def configure(sizes: dict[str, Any]) -> Config:
    """A Config of these sizes, checked."""
    known = {field.name for field in dataclasses.fields(Config)}
    for name in sizes:
        if name not in known:
            raise ValueError(f"{name}: expected one of {', '.join(sorted(known))}")
    config = Config(**sizes)
    if config.colors not in (1, 3):
        raise ValueError(f"colors: expected 1 or 3, got {config.colors}")
    for name in ("width", "hidden"):
        value = getattr(config, name)
        if value < 1 or value % config.colors != 0:
            raise ValueError(f"{name}: expected a multiple of {config.colors} colours, got {value}")
    for name in ("kernel", "first_kernel"):
        if getattr(config, name) < 1 or getattr(config, name) % 2 == 0:
            raise ValueError(f"{name}: expected an odd number, got {getattr(config, name)}")
    if config.first_kernel == 1:
        raise ValueError("first_kernel: expected at least 3, got 1, which sees no other pixel")
    if config.layers < 0 or config.mixture < 0:
        raise ValueError(f"layers, mixture: expected at least 0, got {config.layers} and {config.mixture}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout: expected a share in [0, 1), got {config.dropout}")
    return config


def _write(
    output: pathlib.Path, model: PixelCNN, result: dict, curve: Curve, drawn: Tensor | None, test: Tensor
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    torch.save({"config": dataclasses.asdict(model.config), "model": model.state_dict()}, output / MODEL)
    draw_curve(curve, result, output / CURVE, top=2.5 * result["figures"][result["unit"]])
    unit = result["unit"].replace("_", " ")
    caption = f"{result['figures'][result['unit']]:.2f} {unit} of pictures that were held out."
    result["pictures"] = [{"file": CURVE, "title": f"{unit} while training", "caption": caption}]
    if drawn is not None and len(test) > 0:
        real = test[:: max(1, len(test) // len(drawn))][: len(drawn)]
        shown = torch.cat([drawn, real])
        digits.save_grid((shown + 1) / 2, output / SAMPLES, 10, zoom=4 if model.config.side < 20 else 2)
        caption = f"The first {len(drawn)} are drawn from the model; the others are held-out pictures."
        result["pictures"].append({"file": SAMPLES, "title": "Samples", "caption": caption})
    (output / "report.json").write_text(json.dumps(result, indent=2) + "\n")


def load_model(folder: pathlib.Path) -> PixelCNN:
    """The model that :func:`fit` wrote to this folder."""
    path = pathlib.Path(folder) / MODEL
    if not path.is_file():
        raise FileNotFoundError(f"output: expected a folder with a {MODEL}, got {str(folder)!r}; train first")
    saved = torch.load(path, weights_only=True, map_location="cpu")
    model = PixelCNN(Config(**saved["config"]))
    model.load_state_dict(saved["model"])
    return model.eval()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train gated PixelCNNs on digits and on patches of photographs.")
    parser.add_argument("--data", choices=(*DATA, "both"), default="both")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out/pixelcnn"), help="folder to write")
    parser.add_argument("--minutes", type=float, help="of training on each (4 if neither this nor --steps is given)")
    parser.add_argument("--steps", type=int, help="of training on each, instead of minutes")
    parser.add_argument("--batch", type=int, help="pictures in a step")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=40, help="pictures to draw")
    parser.add_argument("--backend", help="of mpkernels.convolution")
    for field in dataclasses.fields(Config):
        kind = {"float": float, "int": int}.get(str(field.type))
        if kind is not None and field.name not in ("colors", "side"):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, help="of the model")
    text = "train nothing: how much faster do the models in --output sample when they keep what they computed?"
    parser.add_argument("--compare-sampling", action="store_true", help=text)
    return parser


def main() -> None:
    """The command line: trains with a progress bar, then prints the figures; or compares two ways of sampling."""
    from python_models.pixelcnn_sampling import compare_sampling

    parser = _parser()
    options = vars(parser.parse_args())
    data, compare, output = options.pop("data"), options.pop("compare_sampling"), options.pop("output")
    for name in DATA if data == "both" else (data,):
        try:
            if compare:
                found = compare_sampling(load_model(output / name), seed=options["seed"], backend=options["backend"])
                print(f"{name}:", ", ".join(f"{key.replace('_', ' ')} {value:.5g}" for key, value in found.items()))
                continue
            given = {key: value for key, value in options.items() if value is not None}
            unit = "nats" if name == "digits" else "bits per dimension"
            result = with_progress(
                lambda progress: fit(name, output=output / name, others=output.parent, progress=progress, **given),  # noqa: B023
                unit,
            )
        except (ValueError, FileNotFoundError) as error:
            parser.error(str(error))
        print_result(result, output / name)
        if result["interrupted"]:
            raise SystemExit(130)


if __name__ == "__main__":
    main()
