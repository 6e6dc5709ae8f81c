"""WaveNet (van den Oord et al. 2016) on recorded speech, through :func:`mpkernels.convolution.gated_residual_layer`.

    python -m python_models.wavenet                          # 8 minutes of training, then figures and a sample
    python -m python_models.wavenet --audio FILE_OR_FOLDER   # the same on your own WAV files
    python -m python_models.wavenet --generate 10            # ten seconds more, by what was trained before

The speech is 25 minutes of one voice (speech.py), 8,000 samples a second. A sample is one of 256 classes by mu-law, and
the model says how likely each is, given all before: an embedding of the last sample, layers of gated convolutions whose
dilations double up to 256 and begin anew, the sum of what they skip ahead, and two more layers of width 1 (figure 4 of
the paper). Its loss is what a compressor would write, -log2 p(sample | those before it), in bits per sample.

In training it reads pieces of the recordings; held-out files are read whole, each piece with the state that the one
before has left, so that no sample lacks its past. Sound is drawn by :func:`mpkernels.convolution.wavenet_generate`,
which computes no position twice.

What differs from the paper, for ten minutes on two cores: the model is small, the sum of the skips is divided by the
square root of their number, and weights are averaged over the last steps. The paper gives no likelihoods of speech.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpkernels.convolution import (
    WaveNetLayer,
    WaveNetWeights,
    gated_residual_layer,
    mulaw_decode,
    mulaw_encode,
    pack_wavenet,
    wavenet_generate,
)
from python_models import speech
from python_models.likelihood_training import Training, check_budget, draw_curve, print_result, with_progress
from python_models.speech import Speech, Utterance
from python_models.transformer_training import Curve, Progress, train

CLASSES = 256
SILENCE = CLASSES // 2  # the class of 0, which counts as the sample before the first
PIECE = 16384  # samples of a held-out file that are read at a time
ORDER = 16  # of linear prediction
VALIDATION_SECONDS = 20.0  # of sound to choose the best weights by
MODEL, SOUND, CURVE, SPECTROGRAM = "model.pt", "generated.wav", "curve.png", "spectrogram.png"


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    residual: int = 64  # channels between layers
    gate: int = 64
    skip: int = 64
    hidden: int = 128  # channels before the output
    cycle: int = 9  # dilations 1, 2, 4, ... 2^(cycle - 1)
    cycles: int = 2
    kernel: int = 2
    sample_rate: int = speech.RATE  # samples a second

    @property
    def dilations(self) -> list[int]:
        """Of every layer."""
        return [2**i for _ in range(self.cycles) for i in range(self.cycle)]

    @property
    def receptive_field(self) -> int:
        """How many samples the next one is predicted from."""
        return (self.kernel - 1) * sum(self.dilations) + 1


class Layer(nn.Module):
    """The weights of one layer; the last has no residual, which nobody would read."""

    def __init__(self, config: Config, dilation: int, last: bool) -> None:
        super().__init__()
        residual, gate = config.residual, config.gate
        self.dilation = dilation
        self.weight = _weight(2 * gate, residual, config.kernel, fan_in=residual * config.kernel)
        self.bias = nn.Parameter(torch.zeros(2 * gate))
        self.residual = None if last else _weight(residual, gate, fan_in=gate)
        self.residual_bias = None if last else nn.Parameter(torch.zeros(residual))
        self.skip = _weight(config.skip, gate, fan_in=gate)
        self.skip_bias = nn.Parameter(torch.zeros(config.skip))

    def forward(
        self, x: Tensor, state: Tensor | None, backend: str | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(B, residual, T) and what came before to the residual, the skip and what the next part starts from."""
        return gated_residual_layer(
            x,
            self.weight,
            self.bias,
            residual_weight=self.residual,
            residual_bias=self.residual_bias,
            skip_weight=self.skip,
            skip_bias=self.skip_bias,
            dilation=self.dilation,
            initial_state=state,
            return_state=True,
            backend=backend,
        )


def _weight(*shape: int, fan_in: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / math.sqrt(fan_in))


class WaveNet(nn.Module):
    """How likely each class is for the next sample."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        dilations = config.dilations
        self.embedding = nn.Parameter(torch.randn(CLASSES, config.residual) * 0.3)
        with torch.no_grad():  # neighbours sound alike: a smooth part to begin with
            self.embedding[:, 0] = 2 * mulaw_decode(torch.arange(CLASSES))
            self.embedding[:, 1] = torch.linspace(-1, 1, CLASSES)
        self.layers = nn.ModuleList(Layer(config, d, i == len(dilations) - 1) for i, d in enumerate(dilations))
        self.hidden = _weight(config.hidden, config.skip, fan_in=config.skip)
        self.hidden_bias = nn.Parameter(torch.zeros(config.hidden))
        self.out = nn.Parameter(torch.zeros(CLASSES, config.hidden))  # all classes alike at first
        self.out_bias = nn.Parameter(torch.zeros(CLASSES))
        self.skip_scale = 1 / math.sqrt(len(dilations))

    def forward(
        self, before: Tensor, states: Sequence[Tensor | None] | None = None, backend: str | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Logits (B, T, classes) of the samples that follow each of (B, T), and what the next part starts from.

        Args:
            before: classes; the first is the sample before the first that is predicted.
            states: of a call that has read what came before; None: nothing did.
            backend: of the layers.
        """
        x = F.embedding(before, self.embedding).transpose(1, 2)  # channels last in memory
        skips, after = None, []
        for layer, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            x, skip, state = layer(x, state, backend)
            skips = skip if skips is None else skips + skip
            after.append(state)
        assert skips is not None
        h = F.relu(skips.transpose(1, 2) * self.skip_scale)
        h = F.relu(F.linear(h, self.hidden, self.hidden_bias))
        return F.linear(h, self.out, self.out_bias), after

    def loss(self, classes: Tensor, backend: str | None = None) -> Tensor:
        """The mean of -ln p of all samples (B, T) but the first, which is read alone."""
        logits, _ = self(classes[:, :-1], None, backend)
        return F.cross_entropy(logits.flatten(0, 1), classes[:, 1:].flatten())

    @torch.no_grad()
    def bits(self, classes: Tensor, backend: str | None = None) -> Tensor:
        """-log2 p of each sample of a whole recording (T,), read in pieces, each from where the last has stopped."""
        before = torch.cat([classes.new_tensor([SILENCE]), classes])[: len(classes)]
        found, states = [], None
        for inputs, targets in zip(before.split(PIECE), classes.split(PIECE), strict=True):
            logits, states = self(inputs[None], states, backend)
            found.append(F.cross_entropy(logits[0], targets, reduction="none") / math.log(2))
        return torch.cat(found)

    def weights(self) -> WaveNetWeights:
        """What :func:`mpkernels.convolution.wavenet_generate` needs to know."""
        layers = [
            WaveNetLayer(
                weight=layer.weight.detach(),
                residual=None if layer.residual is None else layer.residual.detach(),
                skip=layer.skip.detach(),
                dilation=layer.dilation,
                bias=layer.bias.detach(),
                residual_bias=None if layer.residual_bias is None else layer.residual_bias.detach(),
                skip_bias=layer.skip_bias.detach(),
            )
            for layer in self.layers
            if isinstance(layer, Layer)
        ]
        return WaveNetWeights(
            input=self.embedding.detach(),
            layers=layers,
            hidden=self.hidden.detach(),
            output=self.out.detach(),
            hidden_bias=self.hidden_bias.detach(),
            output_bias=self.out_bias.detach(),
            skip_scale=self.skip_scale,
        )

    def generate(
        self,
        steps: int,
        *,
        prompt: Tensor | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        backend: str | None = None,
    ) -> Tensor:
        """Classes (T0 + steps,): those of a prompt (T0,), and as many as asked for that follow."""
        start = None if prompt is None else prompt[None]
        settings: dict[str, Any] = {"prompt": start, "seed": seed, "temperature": temperature, "initial": SILENCE}
        return wavenet_generate(pack_wavenet(self.weights()), steps, backend=backend, **settings).samples[0]


def encode(utterances: list[Utterance]) -> list[Tensor]:
    """Their classes, int64."""
    return [mulaw_encode(utterance.sound, CLASSES) for utterance in utterances]


def pieces(recordings: list[Tensor], batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Batches (batch, length + 1) of pieces of the recordings, one behind the other in an order that changes.

    Every sample is in about one piece of every round; where the pieces begin changes, too.
    """
    generator = torch.Generator().manual_seed(seed)
    total = sum(len(recording) for recording in recordings)
    if total < batch * length + length + 1:
        raise ValueError(f"audio: expected at least {batch * length + length + 1} samples to train on, got {total}")
    while True:
        order = torch.randperm(len(recordings), generator=generator).tolist()
        stream = torch.cat([recordings[i] for i in order])
        start = int(torch.randint(length, (), generator=generator))
        begins = torch.arange(start, total - length, length)
        begins = begins[torch.randperm(len(begins), generator=generator)]
        for chosen in begins[: len(begins) // batch * batch].split(batch):
            yield torch.stack([stream[begin : begin + length + 1] for begin in chosen.tolist()])


class Baselines:
    """What models without layers make of the same training samples, in bits per sample of others.

    A table of how often each class follows one of 256 contexts is mixed with how often it occurs at all, which counts
    as much as ``PRIOR`` samples in each context. The context is the last sample (a Markov chain of first order), or the
    class of what linear prediction from the last ORDER samples expects (Makhoul 1975; least squares).
    """

    PRIOR = 20.0

    def __init__(self, train: list[Tensor]) -> None:
        self.share = torch.stack([recording.bincount(minlength=CLASSES) for recording in train]).sum(dim=0).double()
        self.share = (self.share + 0.5) / (self.share + 0.5).sum()
        self.coefficients = torch.zeros(ORDER, dtype=torch.float64)
        normal = torch.zeros(ORDER + 1, ORDER + 1, dtype=torch.float64)
        for recording in train:
            for rows in self._windows(recording).split(1 << 18):
                normal += rows.T @ rows
        ridge = 1e-6 * normal.diagonal().mean() * torch.eye(ORDER, dtype=torch.float64)
        self.coefficients = torch.linalg.solve(normal[:-1, :-1] + ridge, normal[:-1, -1])
        self.tables = {}
        for name in ("first order", f"linear prediction of order {ORDER}"):
            counts = torch.zeros(CLASSES * CLASSES, dtype=torch.int64)
            for recording in train:
                counts += (self._context(name, recording) * CLASSES + recording).bincount(minlength=CLASSES**2)
            table = counts.view(CLASSES, CLASSES).double()
            table = (table + self.PRIOR * self.share) / (table.sum(dim=1, keepdim=True) + self.PRIOR)
            self.tables[name] = table

    @staticmethod
    def _windows(recording: Tensor) -> Tensor:
        """Each sample and the ORDER before it: (T, ORDER + 1), oldest first; silence before the first."""
        sound = mulaw_decode(recording, CLASSES, torch.float64)
        return F.pad(sound, (ORDER, 0)).unfold(0, ORDER + 1, 1)

    def _context(self, name: str, recording: Tensor) -> Tensor:
        if name == "first order":
            return F.pad(recording[:-1], (1, 0), value=SILENCE)
        return mulaw_encode(self._windows(recording)[:, :-1] @ self.coefficients, CLASSES)

    def bits(self, recordings: list[Tensor]) -> dict[str, float]:
        """Bits per sample by each of them."""
        total = sum(len(recording) for recording in recordings)
        found = {"uniform": math.log2(CLASSES)}
        found["independent samples"] = -sum(self.share.log2()[r].sum().item() for r in recordings) / total
        for name, table in self.tables.items():
            bits = table.log2()
            found[name] = -sum(bits[self._context(name, r), r].sum().item() for r in recordings) / total
        return found


def bits_per_sample(model: WaveNet, recordings: list[Tensor], backend: str | None = None) -> float:
    """Of whole recordings: the mean over their samples."""
    total = sum(len(recording) for recording in recordings)
    return sum(model.bits(recording, backend).double().sum().item() for recording in recordings) / total


def fit(
    *,
    minutes: float | None = None,
    steps: int | None = None,
    batch: int = 4,
    length: int = 4096,
    learning_rate: float = 4e-3,
    backend: str | None = None,
    seed: int = 0,
    audio: pathlib.Path | None = None,
    sound: Speech | None = None,
    output: pathlib.Path | None,
    seconds: float = 8.0,
    progress: Progress = None,
    **sizes: Any,
) -> dict:
    """Train on recorded speech, and say how many bits a sample of recordings takes that were held out.

    Args:
        minutes: of training, before a minute of evaluation and generation; 8 if neither this nor ``steps`` is given.
        steps: of training, 0 or more, instead of minutes.
        batch: pieces in a step.
        length: samples of a piece.
        learning_rate: of AdamW.
        backend: of the layers and of the generation; None chooses.
        seed: of first weights, the order of pieces, and what is generated.
        audio: a WAV file or a folder of them; None: the spoken prompts of Asterisk, fetched where they are not there.
        sound: what :func:`python_models.speech.load` would return, instead.
        output: a folder for model.pt, generated.wav, spectrogram.png, curve.png and report.json; None writes nothing.
        seconds: of sound to generate, 0 or more.
        progress: called after each step; see :func:`python_models.transformer_training.train`.
        sizes: of the model, as in :class:`Config`.

    Returns:
        A JSON-serialisable dict: figures, baselines, settings, timings.

    Raises:
        ValueError: an argument is not as said; the message begins with its name.
        FileNotFoundError: there is no speech, and none could be fetched; the message says what to do.
    """
    config = configure(sizes)
    check_budget(minutes, steps, batch=batch, length=length)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds: expected 0 or more, got {seconds!r}")
    started = time.perf_counter()
    sound = speech.load(audio, config.sample_rate) if sound is None else sound
    parts = {name: encode(part) for name, part in sound._asdict().items() if name != "rate"}
    baselines = Baselines(parts["train"]).bits(parts["test"])
    quick, left = [], round(VALIDATION_SECONDS * config.sample_rate)
    for recording in parts["valid"]:
        if left > 0:
            quick.append(recording[:left])
            left -= len(recording)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WaveNet(config)
        minutes = 8.0 if minutes is None and steps is None else minutes
        training = Training(
            model,
            pieces(parts["train"], batch, length, seed),
            lambda model, classes: model.loss(classes, backend),
            rate=learning_rate,
            weight_decay=0.01,
            shown=1 / math.log(2),
        )

        def validate() -> float:
            return training.validate(lambda model: bits_per_sample(model, quick, backend))

        curve = train(training, validate, steps, minutes, progress)
    model = training.finish()
    evaluating = time.perf_counter()
    found = {name: bits_per_sample(model, parts[name], backend) for name in ("test", "valid")}
    generating = time.perf_counter()
    drawn = model.generate(round(seconds * config.sample_rate), seed=seed, backend=backend)
    generated = time.perf_counter()
    result = {
        "model": "wavenet",
        "data": "spoken prompts of Asterisk" if audio is None else pathlib.Path(audio).name,
        "settings": dataclasses.asdict(config)
        | {"minutes": minutes, "steps": steps, "batch": batch, "length": length, "learning_rate": learning_rate}
        | {"seed": seed, "threads": torch.get_num_threads()},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "receptive_field": config.receptive_field,
        "seconds_of_sound": {name: sum(map(len, part)) / config.sample_rate for name, part in parts.items()},
        "steps_done": len(curve.losses),
        "interrupted": curve.interrupted,
        "unit": "bits_per_sample",
        "figures": {"bits_per_sample": found["test"], "bits_per_sample_validation": found["valid"]},
        "baselines": baselines,
        "validation": curve.validation,
        "loss": {"first": curve.losses[0], "last": statistics.fmean(curve.losses[-20:])} if curve.losses else {},
        "pictures": [],
        "timings": {
            "train_seconds": curve.seconds,
            "samples_per_second_in_training": len(curve.losses) * batch * length / max(curve.seconds, 1e-9),
            "evaluate_seconds": generating - evaluating,
            "samples_per_second_in_generation": len(drawn) / max(generated - generating, 1e-9),
            "total_seconds": time.perf_counter() - started,
        },
    }
    if output is not None:
        longest = max(sound.test, key=lambda utterance: len(utterance.sound))
        _write(pathlib.Path(output), model, result, curve, mulaw_decode(drawn, CLASSES), longest)
    return result


def configure(sizes: dict[str, Any]) -> Config:
    """A Config of these sizes, checked."""
    known = [field.name for field in dataclasses.fields(Config)]
    for name, value in sizes.items():
        if name not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    if sizes.get("cycle", 1) > 16:
        raise ValueError(f"cycle: expected at most 16, got {sizes['cycle']}")
    return Config(**sizes)


def _write(output: pathlib.Path, model: WaveNet, result: dict, curve: Curve, drawn: Tensor, real: Utterance) -> None:
    output.mkdir(parents=True, exist_ok=True)
    torch.save({"config": dataclasses.asdict(model.config), "model": model.state_dict()}, output / MODEL)
    draw_curve(curve, result, output / CURVE, top=5.0)
    caption = f"{result['figures']['bits_per_sample']:.3f} bits for a sample of recordings that were held out."
    result["pictures"] = [{"file": CURVE, "title": "Bits per sample while training", "caption": caption}]
    if len(drawn) > 0:
        speech.write_wav(output / SOUND, drawn, model.config.sample_rate)
        draw_spectrograms(
            [("generated", drawn), (real.name, real.sound)], model.config.sample_rate, output / SPECTROGRAM
        )
        caption = f"Above, what the model draws ({SOUND}); below, a recording that was held out."
        result["pictures"].append({"file": SPECTROGRAM, "title": "Spectrograms", "caption": caption})
    (output / "report.json").write_text(json.dumps(result, indent=2) + "\n")


def draw_spectrograms(sounds: list[tuple[str, Tensor]], rate: int, path: pathlib.Path) -> None:
    """A picture of power in decibels by time and frequency, windows of 32 ms, one sound below the other."""
    from matplotlib.figure import Figure

    window = max(16, rate * 32 // 1000)
    seconds = max(len(sound) for _, sound in sounds) / rate
    figure = Figure(figsize=(10, 2.6 * len(sounds)), layout="constrained")
    for axes, (name, sound) in zip(figure.subplots(len(sounds), 1, squeeze=False)[:, 0], sounds, strict=True):
        padded = F.pad(sound.float(), (0, max(0, window - len(sound))))
        power = torch.stft(padded, window, window // 4, window=torch.hann_window(window), return_complex=True).abs()
        decibels = 20 * power.clamp(min=1e-4).log10()
        extent = (0, len(padded) / rate, 0, rate / 2000)
        top = decibels.max().item()
        axes.imshow(decibels.numpy(), origin="lower", aspect="auto", extent=extent, vmin=top - 70, vmax=top)
        axes.set(title=name, xlabel="seconds", ylabel="kHz", xlim=(0, seconds))
    figure.savefig(path, dpi=110)


def load_model(folder: pathlib.Path) -> WaveNet:
    """The model that :func:`fit` wrote to this folder."""
    path = pathlib.Path(folder) / MODEL
    if not path.is_file():
        raise FileNotFoundError(f"output: expected a folder with a {MODEL}, got {str(folder)!r}; train first")
    saved = torch.load(path, weights_only=True, map_location="cpu")
    model = WaveNet(Config(**saved["config"]))
    model.load_state_dict(saved["model"])
    return model.eval()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a WaveNet on recorded speech.")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out/wavenet"), help="folder to write")
    parser.add_argument(
        "--audio", type=pathlib.Path, help="a WAV file or a folder of them, instead of Asterisk's prompts"
    )
    parser.add_argument("--minutes", type=float, help="of training (8 if neither this nor --steps is given)")
    parser.add_argument("--steps", type=int, help="of training, instead of minutes")
    for name, default in (("batch", 4), ("length", 4096), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for field in dataclasses.fields(Config):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--seconds", type=float, default=8.0, help="of sound to generate after training")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--backend", help="of mpkernels.convolution")
    parser.add_argument("--generate", type=float, metavar="SECONDS", help="train nothing: by the model in --output")
    parser.add_argument("--temperature", type=float, default=1.0, help="with --generate; 0: always the likeliest class")
    return parser


def main() -> None:
    """The command line: trains with a progress bar, then prints the figures; or generates sound."""
    parser = _parser()
    options = vars(parser.parse_args())
    generate, temperature = options.pop("generate"), options.pop("temperature")
    try:
        if generate is not None:
            model = load_model(options["output"])
            steps = round(generate * model.config.sample_rate)
            drawn = model.generate(steps, seed=options["seed"], temperature=temperature, backend=options["backend"])
            speech.write_wav(options["output"] / SOUND, mulaw_decode(drawn, CLASSES), model.config.sample_rate)
            print(options["output"] / SOUND)
            return
        result = with_progress(lambda progress: fit(**options, progress=progress), "bits per sample")
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    print_result(result, options["output"])
    if result["interrupted"]:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
