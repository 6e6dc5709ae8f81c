"""Times the convolutions beside what users of torch write, eager and compiled; measures memory; records both.

    python benchmarks/convolution.py [--record] [--only WORDS] [--threads N] [--quick] [--no-compile] [--device DEVICE]

Every row of ROWS is timed in one process, contestants in turn; a ratio is the median of those of the rounds. The peers
of wavenet_generate are timed over few samples. Memory is the growth of the resident set in a process of its own; where
time is measured, the process keeps what was freed, so that no call begins with page faults (``--fresh-memory``: any
may). ``--only`` chooses the rows that have all of its words in their names; ``--record`` replaces these rows in
benchmarks/results/<machine>/convolution_peers.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from peers import MEMORY, bar, check, chosen, keep_freed_memory, parser, record, resident, settings
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from mpkernels.commands import machine, terminal
from mpkernels.convolution import (
    depthwise_conv1d,
    dilated_conv1d,
    gated_residual_layer,
    masked_conv2d,
    masked_linear,
    pack_wavenet,
    pixelcnn_mask,
    wavenet_generate,
)
from mpkernels.convolution.wavenet_generate import spec as wavenet
from mpkernels.profiling import timing

ROOT = Path(__file__).resolve().parents[1]
FILE = "convolution_peers.json"
FORWARD, TRAINING = "forward", "forward+backward"
OURS, EAGER, COMPILED, COPY = "mpkernels", "eager torch", "torch.compile", "copy"
CAUSAL = "causal-conv1d"  # where it is installed
CONTESTANTS = (OURS, EAGER, COMPILED, COPY, CAUSAL)
OF_EAGER, OF_COMPILED, OF_COPY = f"x {EAGER}", f"x {COMPILED}", "of copy bandwidth"
RATE, OF_RECOMPUTING, OF_CACHED, OF_NAIVE = "kHz", "x recomputing", "x cached loop", "x naive loop"

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass
class Problem:
    """Tensors, and the same function of them by us and as users of torch write it."""

    leaves: list[Tensor]
    ours: Function
    eager: Function
    copied: Tensor | None = None  # what a memory-bound kernel reads, and writes as much
    peers: dict[str, Function] = field(default_factory=dict)  # of other packages

    def runs(self, which: str, compiled: bool) -> dict[str, Callable[[], object]]:
        """The contestants, by name, as functions without arguments."""
        functions = {OURS: self.ours, EAGER: self.eager} | self.peers
        if compiled:
            torch._dynamo.reset()
            functions[COMPILED] = torch.compile(self.eager, dynamic=False)
        found = {name: partial(self._run, function, which) for name, function in functions.items()}
        if self.copied is not None and which == FORWARD:
            found[COPY] = partial(torch.empty_like(self.copied).copy_, self.copied)
        return found

    def _run(self, function: Function, which: str) -> object:
        if which == FORWARD:
            with torch.no_grad():
                return function(*self.leaves)
        for x in self.leaves:
            x.requires_grad_()
        out = function(*self.leaves)
        out = out if isinstance(out, tuple) else (out,)
        if not hasattr(self, "gradients"):
            self.gradients = tuple(torch.randn_like(x) for x in out)
        return torch.autograd.grad(out, self.leaves, self.gradients)


def _normal(*shapes: tuple[int, ...], device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def dilated(device: str, scale: int, channels: int, outputs: int, dilation: int, length: int = 16_000) -> Problem:
    """A convolution over time, and torch's of a padded copy."""
    x, weight, bias = _normal((1, channels, length // scale), (outputs, channels, 2), (outputs,), device=device)
    return Problem(
        [x, weight, bias],
        lambda x, weight, bias: dilated_conv1d(x, weight, bias, dilation=dilation),
        lambda x, weight, bias: functional.conv1d(functional.pad(x, (dilation, 0)), weight, bias, dilation=dilation),
    )


def gated(device: str, scale: int, residual: int = 64, skip: int = 128, dilation: int = 16) -> Problem:
    """WaveNet's layer."""
    x, weight, bias, of_residual, residual_bias, of_skip, skip_bias = _normal(
        *((1, residual, 16_000 // scale), (2 * residual, residual, 2), (2 * residual,)),
        *((residual, residual), (residual,), (skip, residual), (skip,)),
        device=device,
    )
    leaves = [x, weight * 0.1, bias, of_residual * 0.1, residual_bias, of_skip * 0.1, skip_bias]

    def ours(x, weight, bias, of_residual, residual_bias, of_skip, skip_bias):
        return gated_residual_layer(
            *(x, weight, bias),
            **{"residual_weight": of_residual, "residual_bias": residual_bias},
            **{"skip_weight": of_skip, "skip_bias": skip_bias, "dilation": dilation},
        )[:2]

    def eager(x, weight, bias, of_residual, residual_bias, of_skip, skip_bias):
        z = functional.conv1d(functional.pad(x, (dilation, 0)), weight, bias, dilation=dilation)
        filters, gates = z.chunk(2, 1)
        h = torch.tanh(filters) * torch.sigmoid(gates)
        added = functional.conv1d(h, of_residual[:, :, None], residual_bias)
        return x + added, functional.conv1d(h, of_skip[:, :, None], skip_bias)

    return Problem(leaves, ours, eager)


def depthwise(device: str, scale: int) -> Problem:
    """Each channel by itself, with SiLU; compiled is the unrolled sum that causal-conv1d's users compare with."""
    width = 4
    x, weight, bias = _normal((2, 1024, 2048 // scale), (1024, width), (1024,), device=device)

    def eager(x, weight, bias):
        if torch.compiler.is_compiling():
            padded = functional.pad(x, (width - 1, 0))
            taps = (padded[:, :, k : k + x.shape[2]] * weight[:, k, None] for k in range(width))
            return functional.silu(sum(taps) + bias[:, None])
        padded = functional.pad(x, (width - 1, 0))
        return functional.silu(functional.conv1d(padded, weight[:, None], bias, groups=weight.shape[0]))

    peers = {}
    if device == "cuda" and importlib.util.find_spec("causal_conv1d") is not None:
        causal_conv1d = importlib.import_module("causal_conv1d")
        peers[CAUSAL] = lambda x, weight, bias: causal_conv1d.causal_conv1d_fn(x, weight, bias, activation="silu")
    ours = partial(depthwise_conv1d, activation="silu")
    return Problem([x, weight, bias], ours, eager, x, peers)


def masked2d(device: str, scale: int, colors: int) -> Problem:
    """PixelCNN's convolution 5 x 5 of type B."""
    channels, outputs = (64, 128) if colors == 1 else (66, 126)
    x, weight, bias = _normal(
        (max(8 // scale, 1), channels, 32, 32), (outputs, channels, 5, 5), (outputs,), device=device
    )
    mask = pixelcnn_mask(5, 5, outputs, channels, "B", colors).to(device)
    return Problem(
        [x, weight, bias],
        lambda x, weight, bias: masked_conv2d(x, weight, bias, mask_type="B", colors=colors),
        lambda x, weight, bias: functional.conv2d(x, weight * mask, bias, padding=2),
    )


def made(device: str, scale: int, ordered: bool) -> Problem:
    """MADE's three layers 784-2000-2000-784; ``ordered`` or with the pixels in a random order."""
    generator = torch.Generator().manual_seed(0)
    sizes = (784, 2000 // scale, 2000 // scale, 784)
    x, *weights = _normal((256, 784), *((o, i) for i, o in itertools.pairwise(sizes)), device=device)
    biases = _normal(*((o,) for o in sizes[1:]), device=device)
    pixels = torch.arange(784) if ordered else torch.randperm(784, generator=generator)
    hidden = [torch.arange(n) * 783 // n for n in sizes[1:3]]
    degrees = [d.to(device) for d in (pixels, *hidden, pixels)]
    allowed = [
        (i < o[:, None] if last else i <= o[:, None]).float()
        for i, o, last in zip(degrees, degrees[1:], (False, False, True), strict=False)
    ]

    def layers(linear: Callable[[Tensor, int, Tensor, Tensor], Tensor]) -> Function:
        def network(x, *parameters):
            for layer in range(3):
                x = linear(x, layer, parameters[layer], parameters[3 + layer])
                x = functional.relu(x) if layer < 2 else x
            return x

        return network

    return Problem(
        [x, *(w * 0.03 for w in weights), *biases],
        layers(lambda x, n, w, b: masked_linear(x, w, b, degrees[n], degrees[n + 1], strict=n == 2)),
        layers(lambda x, n, w, b: functional.linear(x, w * allowed[n], b)),
    )


def generate(seconds: float, dtype: torch.dtype, steps: int = 2_000) -> dict:
    """nv-wavenet's "Medium" on one core: samples a second, beside recomputing and a loop with caches in torch."""
    network = wavenet.random_network(torch.float32, torch.Generator().manual_seed(0), **wavenet.MEDIUM)
    packed = pack_wavenet(network, dtype)
    field_of_view = 1 + sum((layer.weight.shape[2] - 1) * layer.dilation for layer in network.layers)
    past = torch.randint(256, (1, field_of_view), generator=torch.Generator().manual_seed(0))
    cached_steps = 40
    times = timing.paired(
        {
            OURS: lambda: wavenet_generate(packed, steps),
            OF_CACHED: lambda: wavenet.eager_cached(network, cached_steps),
            OF_RECOMPUTING: lambda: wavenet.recomputed(network, past),
        },
        budget_s=seconds,
        min_rounds=3,
        warm_up=1,
    )
    own = timing.median(times, OURS) / steps
    return {
        "seconds": {OURS: own},
        "spread": {OURS: timing.spread(times, OURS)},
        "reached": {
            RATE: 1e-3 / own,
            OF_CACHED: timing.ratio(times, OF_CACHED, OURS) * steps / cached_steps,
            OF_RECOMPUTING: timing.ratio(times, OF_RECOMPUTING, OURS) * steps,
        },
    }


def sample_pictures(_: float) -> dict:
    """PixelCNN on 28 x 28: the cached loop beside the whole network a pixel, 16 pictures at a time."""
    sys.path.insert(0, str(ROOT))
    from python_models import pixelcnn, pixelcnn_sampling

    model = pixelcnn.PixelCNN(pixelcnn.Config())
    found = pixelcnn_sampling.compare_sampling(model, 16)
    return {
        "seconds": {OURS: found["cached_seconds"]},
        "spread": {},
        "reached": {OF_NAIVE: found["naive_over_cached"]},
    }


@dataclass(frozen=True)
class Row:
    """What is measured, and what issue 5 asks of it (``bars``: by name of the figure)."""

    what: str
    which: str = FORWARD
    make: Callable[[str, int], Problem] | None = None  # of (device, scale): lengths are divided by the scale
    loop: Callable[[float], dict] | None = None  # of seconds
    threads: int | None = None
    bars: dict[str, float] = field(default_factory=dict)
    memory: bool = False
    compiled: bool = True

    @property
    def name(self) -> str:
        """The one name of the row."""
        return f"{self.what}, {self.which}" + (", memory" if self.memory else "")


def _dilated_rows() -> list[Row]:
    rows = []
    for channels, outputs, asked in ((64, 128, 1.0), (128, 256, 1.3)):
        for dilation in (1, 512):
            make = partial(dilated, channels=channels, outputs=outputs, dilation=dilation)
            what = f"dilated_conv1d {channels}->{outputs}, dilation {dilation}"
            rows += [Row(what, which, make, bars={OF_EAGER: asked}, compiled=False) for which in (FORWARD, TRAINING)]
    make = partial(dilated, channels=64, outputs=64, dilation=512, length=400_000)
    return [*rows, Row("dilated_conv1d 64->64, T=400,000", FORWARD, make, bars={MEMORY: 0.55}, memory=True)]


LAYER = {OF_EAGER: 1.5, OF_COMPILED: 1.2}
ROWS = (
    *_dilated_rows(),
    *(Row("gated_residual_layer R64 S128", which, gated, bars=LAYER) for which in (FORWARD, TRAINING)),
    Row("depthwise_conv1d + SiLU", FORWARD, depthwise, bars={OF_EAGER: 3.0, OF_COMPILED: 1.2, OF_COPY: 0.5}),
    Row("depthwise_conv1d + SiLU", TRAINING, depthwise),
    *(
        Row(f"masked_conv2d 5x5 B, {n}", which, partial(masked2d, colors=c), bars={OF_EAGER: 1.5}, compiled=False)
        for c, n in ((1, "64->128"), (3, "66->126, colors=3"))
        for which in (FORWARD, TRAINING)
    ),
    *(
        Row(f"masked_linear 784-2000-2000-784, {n}", which, partial(made, ordered=o), bars={OF_EAGER: 1.5})
        for o, n in ((True, "in order"), (False, "random order"))
        for which in (FORWARD, TRAINING)
    ),
    *(
        Row(
            f"wavenet_generate Medium, {str(dtype).removeprefix('torch.')} weights, 1 thread",
            loop=partial(generate, dtype=dtype),
            threads=1,
            bars={RATE: 16.0, OF_RECOMPUTING: 200.0, OF_CACHED: 20.0},
        )
        for dtype in (torch.float32, torch.bfloat16)
    ),
    Row("pixelcnn sampling 28x28, 16 pictures", loop=sample_pictures, bars={OF_NAIVE: 50.0}),
)


def measure(found: dict, row: Row, asked: argparse.Namespace) -> None:
    """Times a row's contestants in turn, and adds what it finds to ``found``."""
    assert row.make is not None
    runs = row.make(asked.device, 8 if asked.quick else 1).runs(row.which, asked.compile and row.compiled)
    for name in list(runs):
        try:
            runs[name]()
        except Exception as error:  # the others are timed
            runs.pop(name)
            found["problems"][name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    if OURS not in runs:
        return
    seconds = 0.05 if asked.quick else asked.seconds
    times = timing.paired(runs, budget_s=seconds, min_rounds=2 if asked.quick else 5, device=asked.device, warm_up=1)
    for name in runs:
        found["seconds"][name] = timing.median(times, name)
        found["spread"][name] = timing.spread(times, name)
        if name == COPY:
            found["reached"][OF_COPY] = timing.ratio(times, COPY, OURS)
        elif name != OURS:
            found["reached"][f"x {name}"] = timing.ratio(times, name, OURS)


def memory_of_one(row: Row, name: str) -> dict[str, int]:
    """In this process: how far one call grows the resident set, and the bytes of what it reads and writes."""
    assert row.make is not None
    problem = row.make("cpu", 1)
    row.make("cpu", 100).runs(row.which, False)[name]()  # threads and libraries are there
    run = problem.runs(row.which, False)[name]
    before = resident("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    outputs = run()
    peak = resident("VmHWM")
    tensors = [*problem.leaves, *(outputs if isinstance(outputs, tuple) else (outputs,))]
    return {"grown": peak - before, "inputs and outputs": sum(x.numel() * x.element_size() for x in tensors)}


def measure_memory(found: dict, row: Row) -> None:
    """The peak memory of a row's contestants beyond their inputs, each in a new process."""
    threads = str(torch.get_num_threads())
    for name in (OURS, EAGER):
        command = [sys.executable, __file__, "--threads", threads, "--one", row.name, name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            found["problems"][name] = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            continue
        sizes = json.loads(done.stdout)
        found.setdefault("bytes", {})[name] = sizes["grown"]
        if name == OURS:
            found["reached"][MEMORY] = sizes["grown"] / sizes["inputs and outputs"]


def collect(rows: Sequence[Row], asked: argparse.Namespace, console: Console) -> list[dict]:
    """Measures the rows; where time is up, or at Ctrl-C, the rest is left out."""
    results = []
    end = time.monotonic() + asked.limit
    try:
        for row in rows:
            if time.monotonic() > end:
                raise KeyboardInterrupt
            found: dict = {
                "name": row.name,
                "what": row.what,
                "which": row.which,
                "bars": row.bars,
                "memory": row.memory,
            }
            found |= {"seconds": {}, "spread": {}, "reached": {}, "problems": {}}
            results.append(found)
            if row.loop is not None:
                with settings(row.threads):
                    found |= row.loop(0.1 if asked.quick else asked.seconds)
            elif row.memory:
                measure_memory(found, row)
            else:
                measure(found, row, asked)
            found["date"] = time.strftime("%Y-%m-%d %H:%M")
            print(row.name, found["reached"] or found["problems"], file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        console.print("Interrupted, or no time left: the rest was not measured.")
    return [found for found in results if found["reached"] or found["problems"]]


def cell(found: dict, name: str) -> str:
    """What a contestant took, and that by our time."""
    if name in found.get("bytes", {}):
        return f"{found['bytes'][name] / 2**20:.0f} MiB"
    seconds = found["seconds"].get(name)
    if seconds is None:
        return "-"
    ratio = found["reached"].get(f"x {name}")
    return terminal.seconds(seconds) if ratio is None else f"{terminal.seconds(seconds)} ({ratio:.2f}x)"


def figures(found: dict) -> str:
    """What was reached besides ratios to a contestant that has a column."""
    shown = (OF_EAGER, OF_COMPILED)
    return "; ".join(f"{value:.3g} {name}" for name, value in found["reached"].items() if name not in shown)


def show(results: Sequence[dict], console: Console) -> None:
    """All rows as a table: times, the peer's time by ours, other figures, and the bars."""
    names = [n for n in CONTESTANTS if any(n in r["seconds"] or n in r.get("bytes", {}) for r in results)]
    made = terminal.table("row", *names, "figures", "bar", numbers=names)
    for found in results:
        made.add_row(found["name"], *(cell(found, name) for name in names), figures(found), bar(found))
    console.print(made)
    for found in results:
        for name, text in found["problems"].items():
            console.print(f"{found['name']}: {name}: {text}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__)
    options.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    options.add_argument("--fresh-memory", action="store_true", help="glibc's default: calls may wait for fresh pages")
    options.add_argument("--seconds", type=float, default=4.0, help="of measuring a row; default 4")
    asked = options.parse_args(arguments)
    if asked.record and asked.fresh_memory:
        options.error("--record: expected memory that is kept, got --fresh-memory")
    return check(options, asked)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, records; the exit status says whether all of ours ran."""
    asked = parse(arguments)
    with settings(asked.threads):
        if asked.one:
            row = next(row for row in ROWS if row.name == asked.one[0])
            print(json.dumps(memory_of_one(row, asked.one[1])))
            return 0
        on_device = [row for row in ROWS if asked.device == "cpu" or (row.loop is None and not row.memory)]
        rows = chosen(on_device, asked.only)
        if not rows:
            names = "\n  ".join(row.name for row in on_device)
            print(f"--only: expected words of one of\n  {names}\ngot {asked.only}", file=sys.stderr)
            return terminal.BAD_USAGE
        if not asked.fresh_memory:
            keep_freed_memory()
        console = terminal.output()
        data: dict = {
            "versions": machine.versions(),
            "machine": machine.describe(),
            "device": asked.device,
            "threads": torch.get_num_threads(),
            "load_before": machine.load(),
        }
        data["measured"] = collect(rows, asked, console)
        show(data["measured"], console)
        if asked.record and data["measured"]:
            path = asked.results / machine.name(asked.device) / FILE
            record(data, path, [row.name for row in ROWS])
            console.print(f"recorded {path}")
    return terminal.WRONG if any(OURS in found["problems"] for found in data["measured"]) else terminal.OK


if __name__ == "__main__":
    raise SystemExit(main())
