"""Times attention beside torch's scaled_dot_product_attention and FlexAttention, measures its memory; records both.

    python benchmarks/attention.py [--record] [--only WORDS] [--threads N] [--quick] [--no-flex] [--device cpu|cuda]

Every row of CPU_ROWS or GPU_ROWS is timed in one process, contestants in turn; a ratio is the median of those of the
rounds. FlexAttention comes last: it compiles for seconds a mask, and on a CPU it has no backward. Memory is the growth
of the resident set of a process of its own, inputs and outputs included. ``--only`` chooses the rows that have all of
its words in their names; ``--record`` replaces these rows in benchmarks/results/<machine>/attention_peers.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from peers import MEMORY, bar, check, chosen, parser, record, resident, settings
from rich.console import Console
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpkernels import masks
from mpkernels.attention import attention, decode_attention
from mpkernels.commands import machine, terminal
from mpkernels.profiling import timing

ROOT = Path(__file__).resolve().parents[1]
FILE = "attention_peers.json"  # attention.json is that of `mpkernels bench attention --record`

FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward+backward"
FULL, CAUSAL, WINDOW, DOCUMENTS = "full", "causal", "window 256", "documents of 512"
BOOL, BIAS, DECODE = "causal as a bool tensor", "learnable bias (L, S)", "decode"

OURS, SDPA, FLEX = "mpkernels", "SDPA", "FlexAttention"
FLASH, CUDNN = "SDPA flash", "SDPA cuDNN"
UNMASKED = "mpkernels, full"  # the block-density bound is a share of this
STREAM = "stream read"  # of as many bytes as the keys and values have
CONTESTANTS = (OURS, SDPA, FLASH, CUDNN, FLEX, STREAM)  # as tables show them

OF_SDPA, OF_FLEX, OF_FLASH = f"x {SDPA}", f"x {FLEX}", f"x {FLASH}"
RATE, OPERATIONS, DENSITY = "GB/s", "TFLOP/s", "of the block-density bound"

Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """What is measured, and what issue 4 asks of it (``bars``: by name of the figure, see ``reached``)."""

    what: str
    which: str = FORWARD
    dtype: str = "float32"
    bars: dict[str, float] = field(default_factory=dict)
    batch: int = 1
    heads: int = 8
    key_heads: int = 8
    length: int = 4096
    width: int = 64
    memory: bool = False

    @property
    def name(self) -> str:
        """The one name of the row."""
        heads = f"H{self.heads}" + (f"/{self.key_heads}" if self.key_heads != self.heads else "")
        shape = f"B{self.batch} {heads} S{self.length} D{self.width}"
        return f"{self.what}, {shape}, {self.which}, {self.dtype}" + (", memory" if self.memory else "")


_HALF = "bfloat16"
_LONG = {"length": 16384, "memory": True, "bars": {MEMORY: 2.0}}
_DECODE = {"heads": 32, "length": 16384, "width": 128, "bars": {RATE: 25.0}}
CPU_ROWS = (
    Row(FULL, bars={OF_SDPA: 0.9}),
    Row(FULL, dtype=_HALF, bars={OF_SDPA: 0.7}),
    Row(CAUSAL, bars={OF_SDPA: 1.0}),
    Row(CAUSAL, dtype=_HALF, bars={OF_SDPA: 0.8}),
    Row(WINDOW, bars={OF_SDPA: 9.0, OF_FLEX: 1.8}),
    Row(WINDOW, dtype=_HALF, bars={OF_SDPA: 6.0}),
    Row(DOCUMENTS, bars={OF_SDPA: 8.0}),
    Row(DOCUMENTS, dtype=_HALF, bars={OF_SDPA: 5.0}),
    Row(BOOL, bars={OF_SDPA: 2.0}),
    Row(BOOL, dtype=_HALF, bars={OF_SDPA: 2.0}),
    Row(CAUSAL, TRAINING, bars={OF_SDPA: 1.3}),
    Row(CAUSAL, TRAINING, _HALF, {OF_SDPA: 1.3}),
    Row(CAUSAL, TRAINING, bars={OF_SDPA: 1.7}, heads=1, key_heads=1),
    Row(CAUSAL, TRAINING, _HALF, {OF_SDPA: 1.7}, heads=1, key_heads=1),
    Row(WINDOW, TRAINING, bars={OF_SDPA: 6.0}),
    Row(WINDOW, TRAINING, _HALF, {OF_SDPA: 6.0}),
    Row(BIAS, TRAINING, bars={OF_SDPA: 3.0}, length=2048),
    Row(DECODE, **_DECODE),
    Row(DECODE, dtype=_HALF, **_DECODE),
    *(Row(CAUSAL, which, dtype, **_LONG) for which in (FORWARD, TRAINING) for dtype in ("float32", _HALF)),
)


def _gpu_bars(what: str, which: str, width: int, length: int) -> dict[str, float]:
    """Those of an H100; TFLOP/s are asked at D128 and long sequences, as the peers' figures are given."""
    if what in (WINDOW, DOCUMENTS):
        return {DENSITY: 0.75}
    if which == BACKWARD:
        return {OF_FLASH: 0.9}
    return {OPERATIONS: {FULL: 460.0, CAUSAL: 400.0}[what]} if width == 128 and length >= 8192 else {}


# 16k tokens of 2,048 features, as flash-attention's benchmark has; first what matters most, should time run out
GPU_ROWS = tuple(
    Row(
        *(what, which, _HALF, _gpu_bars(what, which, width, length)),
        **{"batch": 16384 // length, "heads": 2048 // width, "key_heads": 2048 // width},
        **{"length": length, "width": width},
    )
    for width in (128, 64)
    for length in (8192, 16384, 4096, 2048)
    for which in (FORWARD, BACKWARD)
    for what in (FULL, CAUSAL, WINDOW, DOCUMENTS)
)


def mask_of(row: Row, device: str = "cpu") -> masks.Mask | Tensor | None:
    """The mask as we take it."""
    return {
        CAUSAL: masks.causal,
        WINDOW: lambda: masks.causal() & masks.window(256, 0),
        DOCUMENTS: lambda: masks.documents(torch.arange(row.length, device=device) // 512),
        BOOL: lambda: torch.ones(row.length, row.length, dtype=torch.bool, device=device).tril(),
    }.get(row.what, lambda: None)()


# as FlexAttention takes them
MASK_MODS = {
    FULL: None,
    CAUSAL: lambda b, h, i, j: j <= i,
    WINDOW: lambda b, h, i, j: (j <= i) & (i - j <= 256),
    DOCUMENTS: lambda b, h, i, j: i // 512 == j // 512,
}


def block_density(mask: masks.Mask | None, length: int, block: int = 128) -> float:
    """The share of the blocks of ``block`` queries by ``block`` keys in which a mask of intervals shows anything."""
    first, last, _ = masks.resolve(mask, (length, length), "cpu")
    if first is None or last is None:
        return 1.0
    count = math.ceil(length / block)
    pad = (0, count * block - length)
    seen = functional.pad(first < last, pad)
    low = torch.where(seen, functional.pad(first, pad) // block, count).view(count, block).amin(1)
    high = torch.where(seen, -(-functional.pad(last, pad) // block), 0).view(count, block).amax(1)
    return int((high - low).clamp(min=0).sum()) / count**2


class Problem:
    """The tensors of a row, and every contestant as a function without arguments."""

    def __init__(self, row: Row, device: str = "cpu"):
        self.row, self.device = row, device
        dtype = terminal.DTYPES[row.dtype]
        generator = torch.Generator(device).manual_seed(0)
        wanted = {"dtype": dtype, "device": device, "generator": generator}
        queries = 1 if row.what == DECODE else row.length
        self.query = torch.randn(row.batch, row.heads, queries, row.width, **wanted)
        self.key, self.value = (torch.randn(row.batch, row.key_heads, row.length, row.width, **wanted) for _ in "kv")
        self.leaves = [self.query, self.key, self.value]
        self.bias = None
        if row.what == BIAS:
            self.bias = torch.randn(row.length, row.length, **wanted)
            self.leaves.append(self.bias)
        if row.which != FORWARD:
            self.gradient = torch.randn(self.query.shape, **wanted)
            for x in self.leaves:
                x.requires_grad_()

    def inputs(self) -> Iterable[Tensor]:
        """What exists before the first call."""
        return [*self.leaves, self.gradient] if self.row.which != FORWARD else self.leaves

    def names(self, flex: bool) -> list[str]:
        """Who is timed in turn: FlexAttention beside us alone, or all others."""
        row = self.row
        if flex:
            able = row.what in MASK_MODS and not row.memory and (self.device == "cuda" or row.which == FORWARD)
            return [OURS, FLEX] if able else []
        if row.what == DECODE:
            return [OURS, SDPA, STREAM]
        if self.device == "cpu":
            return [OURS, SDPA]
        return [OURS, FLASH, CUDNN] if row.what in (FULL, CAUSAL) else [OURS, SDPA, UNMASKED]

    def run(self, name: str) -> Run:
        """One contestant, in the pass of the row."""
        if name == STREAM:
            buffer = torch.ones(self.cache_bytes() // 4, device=self.device)
            return buffer.sum
        attend = {OURS: self._ours, UNMASKED: self._unmasked, FLEX: self._flex}.get(name, self._sdpa)(name)
        if self.row.which == FORWARD:

            def forward() -> object:
                with torch.no_grad():
                    return attend()

            return forward
        if self.row.which == TRAINING:
            return lambda: torch.autograd.grad(attend(), self.leaves, self.gradient)
        out = attend()
        return lambda: torch.autograd.grad(out, self.leaves, self.gradient, retain_graph=True)

    def _ours(self, _: str) -> Callable[[], Tensor]:
        if self.row.what == DECODE:
            return lambda: decode_attention(self.query, self.key, self.value)
        mask = mask_of(self.row, self.device)
        return lambda: attention(self.query, self.key, self.value, mask=mask, bias=self.bias)

    def _unmasked(self, _: str) -> Callable[[], Tensor]:
        return lambda: attention(self.query, self.key, self.value)

    def _sdpa(self, name: str) -> Callable[[], Tensor]:
        settings: dict = {"enable_gqa": True} if self.row.what == DECODE else {}
        if self.row.what == CAUSAL:
            settings["is_causal"] = True
        elif self.row.what == BIAS:
            settings["attn_mask"] = self.bias
        elif (mask := mask_of(self.row, self.device)) is not None:
            shape = (self.row.length, self.row.length)
            settings["attn_mask"] = masks.to_dense(mask, shape, self.device).contiguous()
        backend = {FLASH: SDPBackend.FLASH_ATTENTION, CUDNN: SDPBackend.CUDNN_ATTENTION}.get(name)

        def attend() -> Tensor:
            with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
                return functional.scaled_dot_product_attention(self.query, self.key, self.value, **settings)

        return attend

    def _flex(self, _: str) -> Callable[[], Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._dynamo.reset()  # else the ninth shape is one too many
        compiled = torch.compile(flex_attention, dynamic=False)
        visible, length = MASK_MODS[self.row.what], self.row.length
        block_mask = visible and create_block_mask(visible, None, None, length, length, device=self.device)
        return lambda: compiled(self.query, self.key, self.value, block_mask=block_mask)

    def cache_bytes(self) -> int:
        """Of the keys and values."""
        return 2 * self.key.numel() * self.key.element_size()

    def flops(self) -> int:
        """Of the visible pairs: 4 D forward; 10 D backward, which computes the scores again."""
        row = self.row
        pairs = masks.visible_pairs(mask_of(row), (row.batch, row.heads, self.query.shape[2], row.length))
        return {FORWARD: 4, BACKWARD: 10, TRAINING: 14}[row.which] * row.width * pairs


def measure(found: dict, row: Row, device: str, seconds: float, rounds: int, flex: bool) -> None:
    """Times a row's contestants in turn, and adds what it finds to ``found``."""
    problem = Problem(row, device)
    functions: dict[str, Run] = {}
    for name in problem.names(flex):
        try:
            functions[name] = problem.run(name)
            functions[name]()
        except Exception as error:  # the others are timed
            functions.pop(name, None)
            found["problems"][name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    if OURS not in functions or (flex and FLEX not in functions):
        return
    times = timing.paired(functions, budget_s=seconds, min_rounds=rounds, device=device, warm_up=1)
    for name in functions:
        if name != OURS:
            found["reached"][f"x {name}"] = timing.ratio(times, name, OURS)
        if name != OURS or not flex:
            found["seconds"][name] = timing.median(times, name)
            found["spread"][name] = timing.spread(times, name)
    if flex:
        return
    found["flops"], own = problem.flops(), found["seconds"][OURS]
    found["reached"][OPERATIONS] = found["flops"] / own * 1e-12
    if row.what == DECODE:
        found["cache_bytes"] = problem.cache_bytes()
        found["reached"][RATE] = problem.cache_bytes() / own * 1e-9
    if UNMASKED in functions:
        density = block_density(mask_of(row), row.length)
        found["block_density"] = density
        found["reached"][DENSITY] = found["reached"].pop(f"x {UNMASKED}") * density


def memory_of_one(row: Row, name: str) -> dict[str, int]:
    """In this process: how far one call grows the resident set, and the bytes of its inputs and outputs."""
    Problem(replace(row, length=128)).run(name)()  # threads and libraries are there
    before = resident("VmRSS")
    problem = Problem(row)
    run = problem.run(name)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    outputs = run()
    peak = resident("VmHWM")
    gradients = outputs if isinstance(outputs, tuple) else ()
    shared = sum(
        x.numel() * x.element_size() for x in [*problem.inputs(), problem.query, *gradients]
    )  # out is as query
    return {"grown": peak - before, "inputs and outputs": shared}


def measure_memory(found: dict, row: Row) -> None:
    """The peak memory of a row's contestants, each in a new process."""
    threads = str(torch.get_num_threads())
    for name in (OURS, SDPA):
        command = [sys.executable, __file__, "--threads", threads, "--one", json.dumps(asdict(row)), name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            found["problems"][name] = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            continue
        sizes = json.loads(done.stdout)
        found.setdefault("bytes", {})[name] = sizes["grown"]
        found["bytes"]["inputs and outputs"] = sizes["inputs and outputs"]
        if name == OURS:
            found["reached"][MEMORY] = sizes["grown"] / sizes["inputs and outputs"]


def show(results: Sequence[dict], device: str, console: Console) -> None:
    """All rows as a table: times (on a GPU TFLOP/s), the peer's time by ours, GFLOP/s or GB/s, and the bars."""
    names = [n for n in CONTESTANTS if any(n in r["seconds"] or n in r.get("bytes", {}) for r in results)]
    made = terminal.table("row", *names, "rate", "bar", numbers=(*names, "rate"))
    for found in results:
        made.add_row(found["name"], *(cell(found, name, device) for name in names), rate(found), bar(found))
    console.print(made)
    for found in results:
        for name, text in found["problems"].items():
            console.print(f"{found['name']}: {name}: {text}")


def cell(found: dict, name: str, device: str) -> str:
    """What a contestant took, and that by our time."""
    if name in found.get("bytes", {}):
        return f"{found['bytes'][name] / 2**20:.0f} MiB"
    seconds = found["seconds"].get(name)
    if seconds is None:
        return "-"
    text = f"{found['flops'] / seconds * 1e-12:.0f} TFLOP/s" if device == "cuda" else terminal.seconds(seconds)
    ratio = found["reached"].get(f"x {name}")
    return text if ratio is None else f"{text} ({ratio:.2f}x)"


def rate(found: dict) -> str:
    """GFLOP/s of the visible pairs, GB/s of keys and values, or memory by that of inputs and outputs."""
    reached = found["reached"]
    if MEMORY in reached:
        return f"{reached[MEMORY]:.2f} {MEMORY}"
    if RATE in reached:
        return f"{reached[RATE]:.1f} {RATE}"
    if DENSITY in reached:
        return f"{reached[DENSITY]:.0%} {DENSITY}"
    return f"{reached[OPERATIONS] * 1e3:.0f} GFLOP/s" if OPERATIONS in reached else "-"


def collect(rows: Sequence[Row], asked: argparse.Namespace, console: Console) -> list[dict]:
    """Measures the rows; where time is up, or at Ctrl-C, the rest is left out."""
    empty = {"seconds": {}, "spread": {}, "reached": {}, "problems": {}}
    results = [{"name": row.name, **asdict(row), **{k: dict(x) for k, x in empty.items()}} for row in rows]
    seconds = asked.seconds or (0.05 if asked.quick else 4.0 if asked.device == "cpu" else 0.3)
    end = time.monotonic() + asked.limit
    try:
        for flex in (False, True) if asked.flex else (False,):
            for row, found in zip(rows, results, strict=True):
                if time.monotonic() > end:
                    raise KeyboardInterrupt
                if row.memory:
                    if not flex:
                        measure_memory(found, row)
                else:
                    measure(found, row, asked.device, seconds, 2 if asked.quick else 5, flex)
                found["date"] = time.strftime("%Y-%m-%d %H:%M")
                if not flex:
                    own = found["seconds"].get(OURS)
                    print(found["name"], terminal.seconds(own) if own else "", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        console.print("Interrupted, or no time left: the rest was not measured.")
    return [found for found in results if found["reached"] or found["problems"]]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__)
    options.add_argument("--no-flex", dest="flex", action="store_false", help="without FlexAttention")
    options.add_argument("--seconds", type=float, help="of measuring a row; default 4, on a GPU 0.3")
    return check(options, options.parse_args(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, records; the exit status says whether all of ours ran."""
    asked = parse(arguments)
    with settings(asked.threads):
        if asked.one:
            print(json.dumps(memory_of_one(Row(**json.loads(asked.one[0])), asked.one[1])))
            return 0
        everything = CPU_ROWS if asked.device == "cpu" else GPU_ROWS
        rows = chosen(everything, asked.only)
        if not rows:
            names = "\n  ".join(row.name for row in everything)
            print(f"--only: expected words of one of\n  {names}\ngot {asked.only}", file=sys.stderr)
            return terminal.BAD_USAGE
        if asked.quick:
            rows = [replace(row, length=row.length // 8) for row in rows]
        console = terminal.output()
        data: dict = {
            "versions": machine.versions(),
            "machine": machine.describe(),
            "device": asked.device,
            "load_before": machine.load(),
        }
        data["measured"] = collect(rows, asked, console)
        show(data["measured"], asked.device, console)
        if asked.record and data["measured"]:
            path = asked.results / machine.name(asked.device) / FILE
            record(data, path, [row.name for row in everything])
            console.print(f"recorded {path}")
    return terminal.WRONG if any(OURS in found["problems"] for found in data["measured"]) else terminal.OK


if __name__ == "__main__":
    raise SystemExit(main())
