"""A decoder-only transformer (Vaswani et al. 2017) on the bytes of text, through :func:`mpkernels.attention.attention`.

    python -m python_models.transformer                      # 9 minutes of training, then figures and samples
    python -m python_models.transformer --attention sdpa     # the same on torch's attention, and how the two compare
    python -m python_models.transformer --prompt "def "      # writes on from what was trained before

The text is the Python standard library (standard_library_text.py). The model reads bytes, so it needs no tokeniser and
its loss is what a compressor would write: -log2 p(byte | the bytes before it), summed over files that were held out.

What differs from the paper, for ten minutes on two cores: normalisation before each layer and of queries and keys (RMS,
no biases), squared ReLU (So et al. 2021), embeddings of hashed n-grams beside those of bytes (Pagnoni et al. 2024), and
Muon (Jordan et al. 2024) for the matrices of the layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpkernels import BackendError, masks
from mpkernels.attention import attention, decode_attention
from python_models import standard_library_text
from python_models.standard_library_text import BLOCK, START, Packed, Text, evaluation_rows, training_blocks
from python_models.transformer_training import ROWS, WARM_UP, Curve, Progress, Training, draw_curve, train

ATTENTIONS = ("mpkernels", "sdpa")
POSITIONS = ("rotary", "sinusoidal", "learned")
STRIDE = BLOCK * 3 // 4  # of the windows in which files are evaluated
VALIDATION_ROWS = 16  # for the curve
NGRAMS = (2, 3, 4, 5, 6)  # lengths of n-grams that have embeddings
PROMPTS = ("", "def ", "class ", "import ", "    def __init__(self")
SAMPLE_BYTES = 400
SAME_LOSS = 1e-3  # how far losses on the two attentions may be from each other, in bits per byte
MODEL, SAMPLES, CURVE = "model.pt", "samples.txt", "curve.png"


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    width: int = 256
    layers: int = 2
    heads: int = 4
    positions: str = "rotary"  # "sinusoidal" as in the paper, "learned", or "rotary" (Su et al. 2021)
    context: int = BLOCK  # the longest row that is read at once
    ngrams: tuple[int, ...] = NGRAMS  # () for none
    ngram_slots: int = 2**15  # rows of each table of n-grams
    ngram_width: int = 64


class Visible:
    """Who sees whom in packed rows: bytes of one document, none that comes later. Made once, for every layer."""

    def __init__(self, document: Tensor, implementation: str = "mpkernels", backend: str | None = None) -> None:
        self.backend, self.mask, self.pairs = backend, None, None
        if implementation == "mpkernels":
            self.mask = masks.causal() & masks.documents(document)
        else:  # torch takes a tensor of every pair
            same = document[:, :, None] == document[:, None, :]
            self.pairs = same.tril()[:, None]  # (rows, 1, length, length)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of (rows, heads, length, width) tensors."""
        if self.mask is not None:
            return cast(Tensor, attention(query, key, value, mask=self.mask, backend=self.backend))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.pairs)


class Cache:
    """Keys and values of what was read, for every layer, in memory that is allocated once."""

    def __init__(self, config: Config, rows: int, like: Tensor) -> None:
        shape = (config.layers, rows, config.heads, config.context, config.width // config.heads)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.tokens = torch.empty((rows, 0), dtype=torch.int64, device=like.device)  # what n-grams look back on

    @property
    def length(self) -> int:
        """How many tokens were read."""
        return self.tokens.shape[1]

    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the newest tokens (rows, heads, new, width) to all before them, which are kept."""
        new, known = query.shape[2], self.length
        self.keys[layer, :, :, known : known + new] = key
        self.values[layer, :, :, known : known + new] = value
        keys, values = self.keys[layer, :, :, : known + new], self.values[layer, :, :, : known + new]
        if new == 1:
            return decode_attention(query, keys, values)
        return cast(Tensor, attention(query, keys, values, mask=masks.causal(align="lower_right")))


def frequencies(count: int, device: torch.device) -> Tensor:
    """(count,): in radians a byte, from 1 down to 1 / 10000 in equal ratios."""
    return 10000 ** -torch.linspace(0, 1, count, device=device)


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions: turns the pairs (x[i], x[i + width / 2]) of the last dimension by angles of half the width."""
    (first, second), (cos, sin) = x.chunk(2, dim=-1), cos_sin
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def norm(x: Tensor) -> Tensor:
    """RMS normalisation of the last dimension, without a gain."""
    return F.rms_norm(x, (x.shape[-1],))


class Layer(nn.Module):
    """Multi-head attention, then a perceptron, each added to what it read."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.out.weight)  # a layer adds nothing at first
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None, attend: Callable[..., Tensor]) -> Tensor:
        """(rows, length, width) to the same, with attention of (rows, heads, length, width of a head) tensors."""
        rows, length, width = x.shape
        parts = self.query_key_value(norm(x)).view(rows, length, 3, self.heads, width // self.heads)
        query_key, value = norm(parts[:, :, :2]), parts[:, :, 2]
        if cos_sin is not None:
            query_key = rotate(query_key, cos_sin)
        heads = (part.transpose(1, 2) for part in (*query_key.unbind(2), value))
        x = x + self.out(attend(*heads).transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.relu(self.up(norm(x))).square())


class Transformer(nn.Module):
    """Logits of the next byte from the bytes of a document so far."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.bytes = nn.Embedding(257, config.width)
        self.ngrams = nn.ModuleList(nn.Embedding(config.ngram_slots, config.ngram_width) for _ in config.ngrams)
        if self.ngrams:
            self.from_ngrams = nn.Linear(len(config.ngrams) * config.ngram_width, config.width, bias=False)
        self.learned = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, 256, bias=False)
        nn.init.zeros_(self.head.weight)  # every byte is as likely as any other at first

    def embed(self, tokens: Tensor, offset: Tensor, before: Tensor | None = None) -> Tensor:
        """Embeddings of tokens (rows, length) and of the n-grams that end with them: (rows, length, width).

        Args:
            tokens: bytes, or START.
            offset: (rows, length), of a token in its document: an n-gram does not reach beyond its first token.
            before: (rows, any number), the tokens before these, where only part of a document is given.
        """
        x = self.bytes(tokens)
        if self.ngrams:
            known = tokens if before is None else torch.cat([before, tokens], dim=1)
            length, total = tokens.shape[1], known.shape[1]
            found, number = [], tokens
            for n in range(2, max(self.config.ngrams) + 1):
                earlier = F.pad(known, (n - 1, 0), value=START)[:, total - length : total]  # n - 1 places back
                number = number * 257 + torch.where(offset >= n - 1, earlier, START)
                if n in self.config.ngrams:
                    table = self.ngrams[self.config.ngrams.index(n)]
                    found.append(table(ngram_slot(number, self.config.ngram_slots)))
            x = x + self.from_ngrams(torch.cat(found, dim=-1))
        if self.learned is not None:
            x = x + self.learned(offset)
        if self.config.positions == "sinusoidal":
            angles = offset[..., None] * frequencies(self.config.width // 2, offset.device)
            x = x + torch.cat([angles.sin(), angles.cos()], dim=-1)
        return x

    def forward(self, packed: Packed, implementation: str = "mpkernels", backend: str | None = None) -> Tensor:
        """Logits (rows, length, 256) of packed documents, as if each was read by itself."""
        visible = Visible(packed.document, implementation, backend)
        return self._layers(packed.tokens, packed.offset, None, lambda _, *heads: visible.attention(*heads))

    def read(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits (rows, new, 256) after each of the tokens (rows, new), which follow those in the cache and join it."""
        new = torch.arange(cache.length, cache.length + tokens.shape[1], device=tokens.device)
        logits = self._layers(tokens, new.expand_as(tokens), cache.tokens, cache.attention)
        cache.tokens = torch.cat([cache.tokens, tokens], dim=1)
        return logits

    def _layers(self, tokens: Tensor, offset: Tensor, before: Tensor | None, attend: Callable[..., Tensor]) -> Tensor:
        x = norm(self.embed(tokens, offset, before))
        cos_sin = None
        if self.config.positions == "rotary":
            of_head = frequencies(self.config.width // (2 * self.config.heads), offset.device)
            angles = offset[:, :, None, None, None] * of_head  # (rows, length, 1, 1, half a head)
            cos_sin = angles.cos(), angles.sin()
        for number, layer in enumerate(self.layers):
            x = layer(x, cos_sin, functools.partial(attend, number))
        return self.head(norm(x))

    @torch.no_grad()
    def generate(
        self, prompt: bytes, bytes_wanted: int, *, temperature: float = 0.8, top_p: float = 0.95, seed: int = 0
    ) -> bytes:
        """Bytes that follow the prompt, drawn one at a time from the likeliest that make up ``top_p``.

        A cache keeps keys and values; when it is full, the later half of what was read is read again as a beginning.
        Temperature 0 takes the likeliest byte.
        """
        if not temperature >= 0 or not 0 < top_p <= 1:
            expected = "a temperature of at least 0 and a top_p in (0, 1]"
            raise ValueError(f"temperature, top_p: expected {expected}, got {temperature} and {top_p}")
        device, context = self.bytes.weight.device, self.config.context
        generator = torch.Generator().manual_seed(seed)
        known = [START, *prompt]
        cache, unread = Cache(self.config, 1, self.bytes.weight), known[-context // 2 :]
        for _ in range(bytes_wanted):
            if cache.length + len(unread) > context:
                cache, unread = Cache(self.config, 1, self.bytes.weight), known[-context // 2 :]
            logits = self.read(torch.tensor([unread], device=device), cache)[0, -1].float().cpu()
            unread = [draw(logits, temperature, top_p, generator)]
            known += unread
        return bytes(known[len(prompt) + 1 :])


def ngram_slot(number: Tensor, slots: int) -> Tensor:
    """Which row of a table an n-gram's number has: Fibonacci hashing (Knuth, TAOCP 6.4), by 2^64 / golden ratio."""
    return ((number * -7046029254386353131) >> 33).remainder(slots)


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A byte, from logits (256,): of the likeliest bytes, just so many that their share reaches ``top_p``."""
    if temperature == 0:
        return int(logits.argmax())
    share, byte = (logits / temperature).softmax(dim=0).sort(descending=True)
    share = torch.where(share.cumsum(dim=0) - share < top_p, share, 0)  # the first always stays
    return int(byte[torch.multinomial(share, 1, generator=generator)])


class Setting(NamedTuple):
    """How a model is run."""

    attention: str = "mpkernels"
    backend: str | None = None
    precision: str = "bfloat16"  # of matrix products and attention; weights and the loss are float32
    device: str = "cpu"

    def loss(self, model: Transformer, packed: Packed, reduction: str = "mean") -> Tensor:
        """-ln p of the targets: their mean, or their sum."""
        packed = Packed(*(part.to(self.device) for part in packed))
        half = self.precision == "bfloat16"
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=half):
            logits = model(packed, self.attention, self.backend)
        targets = packed.targets.reshape(-1)
        return F.cross_entropy(logits.float().view(-1, 256), targets, ignore_index=-1, reduction=reduction)


@torch.no_grad()
def bits_per_byte(model: Transformer, rows: Packed, setting: Setting) -> float:
    """Bits that the model needs for a byte: the mean over the targets of rows, as evaluation_rows makes them."""
    batches = zip(*(part.split(8) for part in rows), strict=True)
    nats = sum(setting.loss(model, Packed(*batch), "sum").double().item() for batch in batches)
    return nats / math.log(2) / int((rows.targets >= 0).sum())


def training_of(config: Config, text: Text, setting: Setting, seed: int) -> Training:
    """A new model with the text that it is to read; equal for equal arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(config).to(setting.device)
    blocks = training_blocks(text.train, ROWS, seed)
    embeddings = list(model.ngrams.parameters())
    matrices = [parameter for parameter in model.layers.parameters() if parameter.ndim == 2]
    return Training(model, matrices, embeddings, blocks, lambda packed: setting.loss(model, packed))


def compare(config: Config, text: Text, setting: Setting, seed: int, steps: int = 8) -> dict[str, float]:
    """Trains two equal models on the same bytes in turn, one on each attention: are losses equal, and which is faster?

    Returns:
        The largest difference of two losses, in bits per byte, and how long a step on SDPA takes beside one on ours
        (the median; the first step warms up).
    """
    pair = [training_of(config, text, setting._replace(attention=name), seed) for name in ATTENTIONS]
    difference, ratios = 0.0, []
    for step in range(steps):
        loss, seconds = [0.0, 0.0], [0.0, 0.0]
        for i in (0, 1) if step % 2 == 0 else (1, 0):
            started = time.perf_counter()
            loss[i] = pair[i].step(WARM_UP * (step + 1) / 4, BLOCK)  # at the full rates from the fourth on
            seconds[i] = time.perf_counter() - started
        difference = max(difference, abs(loss[0] - loss[1]))
        ratios.append(seconds[1] / seconds[0])
    return {"largest_difference_of_losses": difference, "sdpa_seconds_over_mpkernels": statistics.median(ratios[1:])}


def fit(
    *,
    minutes: float | None = None,
    steps: int | None = None,
    width: int = 256,
    layers: int = 2,
    heads: int = 4,
    positions: str = "rotary",
    ngrams: bool = True,
    attention: str = "mpkernels",
    precision: str = "bfloat16",
    device: str | None = None,
    backend: str | None = None,
    seed: int = 0,
    text: Text | None = None,
    output: pathlib.Path | None,
    progress: Progress = None,
) -> dict:
    """Train on the standard library's sources, and say how many bits a byte of files takes that were held out.

    Args:
        minutes: of training, before the evaluation of about one more; 9 if neither this nor ``steps`` is given.
        steps: of training, 0 or more, instead of minutes.
        width, layers, heads: the size of the model; a head has at most 256 of the width.
        positions: "rotary", "sinusoidal" or "learned".
        ngrams: whether n-grams have embeddings.
        attention: "mpkernels", or "sdpa" for torch's, which is compared with ours before the training.
        precision: "bfloat16" or "float32", of matrix products and attention.
        device: "cpu" (default) or "cuda".
        backend: of :func:`mpkernels.attention.attention`; None chooses.
        seed: of first weights, the order of the text, and samples.
        text: to train on and to hold out; None: the standard library's.
        output: a folder for model.pt, samples.txt, report.json and the curve, made if missing; None writes nothing.
        progress: called after each step with step, steps (an estimate), loss (bits per byte, a running mean),
            seconds_left, spent (a share) and, now and then, validation (bits per byte).

    Returns:
        A JSON-serialisable dict: figures, those of compressors on the same files, samples, pictures, timings.

    Raises:
        ValueError: an argument is not as said; the message begins with its name.
    """
    _check(locals())
    started = time.perf_counter()
    text = standard_library_text.load() if text is None else text
    config = Config(width, layers, heads, positions, ngrams=NGRAMS if ngrams else ())
    setting = Setting(attention, backend, precision, str(device or "cpu"))
    compared = compare(config, text, setting, seed) if attention == "sdpa" else {}
    training = training_of(config, text, setting, seed)
    minutes = 9.0 if minutes is None and steps is None else minutes
    validation = Packed(*(part[:VALIDATION_ROWS] for part in evaluation_rows(text.validation, BLOCK, STRIDE)))
    model = training.model
    curve = train(training, lambda: bits_per_byte(model, validation, setting), steps, minutes, progress)
    evaluating = time.perf_counter()
    held_out = bits_per_byte(model, evaluation_rows(text.held_out, BLOCK, STRIDE), setting)
    evaluated = time.perf_counter()
    compressors = standard_library_text.compressed_bits_per_byte(text)
    samples = {
        prompt: model.generate(prompt.encode(), SAMPLE_BYTES, seed=seed).decode(errors="replace") for prompt in PROMPTS
    }
    result = {
        "model": "transformer",
        "data": text.name,
        "settings": dataclasses.asdict(config)
        | setting._asdict()
        | {"minutes": minutes, "steps": steps, "seed": seed, "threads": torch.get_num_threads()},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "parameters_of_layers": sum(parameter.numel() for parameter in model.layers.parameters()),
        "steps_done": len(curve.losses),
        "bytes_read": len(curve.losses) * ROWS * BLOCK,
        "interrupted": curve.interrupted,
        "figures": {"bits_per_byte": held_out, "share_of_xz": held_out / compressors["xz, one stream"]},
        "compressors_bits_per_byte": compressors,
        "attentions_compared": compared,
        "loss": {"first": curve.losses[0], "last": statistics.fmean(curve.losses[-20:])} if curve.losses else {},
        "validation": curve.validation,
        "samples": samples,
        "pictures": [],
        "timings": {
            "train_seconds": curve.seconds,
            "bytes_per_second": len(curve.losses) * ROWS * BLOCK / max(curve.seconds, 1e-9),
            "evaluate_seconds": evaluated - evaluating,
            "total_seconds": time.perf_counter() - started,
        },
    }
    if output is not None:
        _write(pathlib.Path(output), model, result, curve)
    return result


def _check(arguments: dict[str, Any]) -> None:
    for name, least in (("steps", 0), ("width", 1), ("layers", 1), ("heads", 1)):
        value = arguments[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    minutes, steps, width, heads = (arguments[name] for name in ("minutes", "steps", "width", "heads"))
    if minutes is not None and (steps is not None or not 0 < minutes < math.inf):
        raise ValueError(f"minutes: expected a positive number, and no steps, got {minutes!r} and steps={steps!r}")
    if width % (2 * heads) != 0 or width // heads > 256:
        raise ValueError(f"width: expected an even number, at most 256, for each of {heads} heads, got {width}")
    known = {"positions": POSITIONS, "attention": ATTENTIONS, "precision": ("bfloat16", "float32")}
    for name, choices in known.items():
        if arguments[name] not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {arguments[name]!r}")
    kind = str(arguments["device"] or "cpu").partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: expected 'cpu', or 'cuda' where torch finds a GPU, got {arguments['device']!r}")


def _write(output: pathlib.Path, model: Transformer, result: dict, curve: Curve) -> None:
    output.mkdir(parents=True, exist_ok=True)
    torch.save({"config": dataclasses.asdict(model.config), "model": model.state_dict()}, output / MODEL)
    with (output / SAMPLES).open("w") as file:
        for prompt, sample in result["samples"].items():
            file.write(f"{' after ' + repr(prompt) + ' ':=^100}\n{prompt}{sample}\n")
    draw_curve(curve, result["figures"]["bits_per_byte"], result["compressors_bits_per_byte"], output / CURVE)
    caption = f"{result['figures']['bits_per_byte']:.3f} bits for a byte of the files that were held out."
    result["pictures"] = [{"file": CURVE, "title": "Bits per byte while training", "caption": caption}]
    (output / "report.json").write_text(json.dumps(result, indent=2) + "\n")


def load_model(folder: pathlib.Path) -> Transformer:
    """The model that :func:`fit` wrote to this folder."""
    path = pathlib.Path(folder) / MODEL
    if not path.is_file():
        raise FileNotFoundError(
            f"output: expected a folder with a {MODEL}, got {str(folder)!r}; train without --prompt"
        )
    saved = torch.load(path, weights_only=True, map_location="cpu")
    model = Transformer(Config(**saved["config"]))
    model.load_state_dict(saved["model"])
    return model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a transformer on the bytes of Python's standard library.")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out/transformer"), help="folder to write")
    parser.add_argument("--minutes", type=float, help="of training (9 if neither this nor --steps is given)")
    parser.add_argument("--steps", type=int, help="of training, instead of minutes")
    for name, default in (("width", 256), ("layers", 2), ("heads", 4), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--positions", default="rotary", help=", ".join(POSITIONS))
    parser.add_argument("--no-ngrams", dest="ngrams", action="store_false", help="no embeddings of n-grams")
    parser.add_argument("--attention", default="mpkernels", help="mpkernels, or sdpa: torch's, compared with ours")
    parser.add_argument("--precision", default="bfloat16", help="bfloat16 or float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--backend", help="of mpkernels.attention")
    parser.add_argument("--prompt", help="train nothing: write on from this, by the model in --output")
    parser.add_argument("--bytes", type=int, default=500, help="with --prompt: how many to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="with --prompt; 0: always the likeliest byte")
    parser.add_argument("--top-p", type=float, default=0.95, help="with --prompt: share of the likeliest bytes kept")
    return parser


def main() -> None:
    """The command line: trains with a progress bar, then prints the figures; or writes on from a prompt."""
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.table import Table

    parser = _parser()
    options = vars(parser.parse_args())
    prompt, wanted, temperature, top_p = (options.pop(name) for name in ("prompt", "bytes", "temperature", "top_p"))
    if prompt is not None:
        try:
            model = load_model(options["output"])
            draws = {"temperature": temperature, "top_p": top_p, "seed": options["seed"]}
            print(prompt + model.generate(prompt.encode(), wanted, **draws).decode(errors="replace"))
        except (ValueError, FileNotFoundError) as error:
            parser.error(str(error))
        return
    kinds = (rich_progress.BarColumn(), rich_progress.TextColumn("{task.fields[text]}"))
    with rich_progress.Progress(*kinds) as bar:
        task = bar.add_task("", total=1.0, text="preparing")
        seen: dict[str, Any] = {}

        def show(report: dict) -> None:
            seen.update(report)
            left = int(seen["seconds_left"])
            parts = [f"step {seen['step']}/{seen['steps']}", f"{seen['loss']:.3f} bits per byte"]
            parts += [f"validation {seen['validation']:.3f}"] if "validation" in seen else []
            parts += [f"{left // 60}:{left % 60:02} left" if seen["spent"] < 1 else "evaluating"]
            bar.update(task, completed=seen["spent"], text="  ".join(parts))

        try:
            result = fit(**options, progress=show)
        except (ValueError, FileNotFoundError, BackendError) as error:
            bar.stop()
            parser.error(str(error))
    table = Table("figure", "value")
    groups = {"": result["figures"], "bits per byte: ": result["compressors_bits_per_byte"]}
    for prefix, group in {**groups, "compared: ": result["attentions_compared"], "time: ": result["timings"]}.items():
        for name, value in group.items():
            table.add_row(prefix + name, f"{value:.6f}" if abs(value) < 0.01 else f"{value:.3f}")
    console = Console()
    console.print(table)
    console.print((options["output"] / SAMPLES).read_text(), markup=False, highlight=False, soft_wrap=True)
    console.print(f"{options['output']}: {MODEL}, {SAMPLES}, {CURVE}, report.json", soft_wrap=True)
    found, xz = result["figures"]["bits_per_byte"], result["compressors_bits_per_byte"]["xz, one stream"]
    console.print(f"A held-out byte takes {found:.3f} bits; {xz:.3f} by xz.", soft_wrap=True)
    compared = result["attentions_compared"]
    if compared:
        difference, ratio = compared["largest_difference_of_losses"], compared["sdpa_seconds_over_mpkernels"]
        words = f"SDPA: losses within {difference:.1e} of those on mpkernels; a step takes {ratio:.2f} times as long."
        console.print(words, soft_wrap=True)
        if not difference < SAME_LOSS:
            parser.exit(1, f"attention: expected losses within {SAME_LOSS}, got {difference}\n")
    if result["interrupted"]:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
