"""What the scripts that time a family of ops beside other people's share: problems, rows, their table and their record.

A script has rows, each a problem or a loop of its own, and calls :func:`main`. Every row is timed in one process,
contestants in turn; a ratio is the median of those of the rounds. Memory is the growth of the resident set in a process
of its own; where time is measured, the process keeps what was freed, so that no call begins with page faults
(``--fresh-memory``: any may).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from peers import MEMORY, OF_MEMORY, bar, check, chosen, keep_freed_memory, parser, record, resident, settings
from rich.console import Console
from torch import Tensor

from mpkernels.commands import machine, terminal
from mpkernels.profiling import timing

FORWARD, TRAINING = "forward", "forward+backward"
OURS, EAGER, COMPILED, COPY = "mpkernels", "eager torch", "torch.compile", "copy"
OF_EAGER, OF_COMPILED, OF_COPY = f"x {EAGER}", f"x {COMPILED}", "of copy bandwidth"

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass
class Problem:
    """Tensors, and the same function of them by us and as users of torch write it."""

    leaves: list[Tensor]
    ours: Function
    eager: Function | None = None
    copied: Tensor | None = None  # what a memory-bound kernel reads, and writes as much
    peers: dict[str, Function] = field(default_factory=dict)  # of other packages

    def runs(self, which: str, compiled: bool) -> dict[str, Callable[[], object]]:
        """The contestants, by name, as functions without arguments."""
        functions = {OURS: self.ours} | ({EAGER: self.eager} if self.eager else {}) | self.peers
        if compiled:
            assert self.eager is not None
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


def normal(*shapes: tuple[int, ...], device: str) -> list[Tensor]:
    """Random tensors, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


@dataclass(frozen=True)
class Row:
    """What is measured, and what is asked of it (``bars``: by name of the figure)."""

    what: str
    which: str = FORWARD
    make: Callable[[str, int], Problem] | None = None  # of (device, scale): lengths are divided by the scale
    loop: Callable[[float], dict] | None = None  # of seconds
    threads: int | None = None
    bars: dict[str, float] = field(default_factory=dict)
    memory: bool = False
    compiled: bool = True
    beside: str = EAGER  # whose memory is measured too
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def name(self) -> str:
        """The one name of the row."""
        return f"{self.what}, {self.which}" + (", memory" if self.memory else "")


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


def measure_memory(found: dict, row: Row, script: str) -> None:
    """The peak memory of a row's contestants beyond their inputs, each in a new process of the script."""
    threads = str(torch.get_num_threads())
    for name in (OURS, row.beside):
        command = [sys.executable, script, "--threads", threads, "--one", row.name, name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            found["problems"][name] = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            continue
        sizes = json.loads(done.stdout)
        found.setdefault("bytes", {})[name] = sizes["grown"]
        if name == OURS:
            found["reached"][MEMORY] = sizes["grown"] / sizes["inputs and outputs"]
        else:
            found["reached"][OF_MEMORY] = found["bytes"][OURS] / sizes["grown"]


def cell(found: dict, name: str) -> str:
    """What a contestant took, and that by our time."""
    if name in found.get("bytes", {}):
        return f"{found['bytes'][name] / 2**20:.0f} MiB"
    seconds = found["seconds"].get(name)
    if seconds is None:
        return "-"
    ratio = found["reached"].get(f"x {name}")
    return terminal.seconds(seconds) if ratio is None else f"{terminal.seconds(seconds)} ({ratio:.2f}x)"


@dataclass(frozen=True)
class Script:
    """A script of rows: what its functions parse, measure, show and record."""

    doc: str | None
    path: str  # its ``__file__``
    file: str  # where it records, in benchmarks/results/<machine>
    rows: Sequence[Row]
    contestants: Sequence[str]  # in the order of the table's columns

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """The command line."""
        options = parser(self.doc)
        options.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
        options.add_argument("--fresh-memory", action="store_true", help="glibc's default: calls may wait for pages")
        options.add_argument("--seconds", type=float, default=4.0, help="of measuring a row; default 4")
        asked = options.parse_args(arguments)
        if asked.record and asked.fresh_memory:
            options.error("--record: expected memory that is kept, got --fresh-memory")
        return check(options, asked)

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Measures, prints, records; the exit status says whether all of ours ran."""
        asked = self.parse(arguments)
        with settings(asked.threads):
            if asked.one:
                row = next(row for row in self.rows if row.name == asked.one[0])
                print(json.dumps(memory_of_one(row, asked.one[1])))
                return 0
            on_device = [row for row in self.rows if asked.device in row.devices]
            if asked.device == "cuda":
                on_device = [row for row in on_device if row.loop is None and not row.memory]
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
            data["measured"] = self.collect(rows, asked, console)
            self.show(data["measured"], console)
            if asked.record and data["measured"]:
                path = asked.results / machine.name(asked.device) / self.file
                record(data, path, [row.name for row in self.rows])
                console.print(f"recorded {path}")
        return terminal.WRONG if any(OURS in found["problems"] for found in data["measured"]) else terminal.OK

    def collect(self, rows: Sequence[Row], asked: argparse.Namespace, console: Console) -> list[dict]:
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
                    measure_memory(found, row, self.path)
                else:
                    measure(found, row, asked)
                found["date"] = time.strftime("%Y-%m-%d %H:%M")
                print(row.name, found["reached"] or found["problems"], file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            console.print("Interrupted, or no time left: the rest was not measured.")
        return [found for found in results if found["reached"] or found["problems"]]

    def show(self, results: Sequence[dict], console: Console) -> None:
        """All rows as a table: times, the peer's time by ours, other figures, and the bars."""
        names = self.measured(results)
        made = terminal.table("row", *names, "figures", "bar", numbers=names)
        for found in results:
            made.add_row(found["name"], *(cell(found, name) for name in names), self.figures(found), bar(found))
        console.print(made)
        for found in results:
            for name, text in found["problems"].items():
                console.print(f"{found['name']}: {name}: {text}")

    def measured(self, results: Sequence[dict]) -> list[str]:
        """The contestants of these rows."""
        return [n for n in self.contestants if any(n in r["seconds"] or n in r.get("bytes", {}) for r in results)]

    def figures(self, found: dict) -> str:
        """What was reached besides ratios to a contestant that has a column."""
        shown = [f"x {name}" for name in self.contestants if name in found["seconds"]]
        return "; ".join(f"{value:.3g} {name}" for name, value in found["reached"].items() if name not in shown)
