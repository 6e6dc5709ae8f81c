"""``mpkernels bench``: our backends beside eager and compiled torch, in turn in one process.

Every ratio is the median over rounds of two times of the same round. GB/s divides the least bytes an op must move
(``spec.cost``) by its time; the share of copy bandwidth divides that by torch's own copy, timed in the same rounds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mpkernels import backends
from mpkernels.commands import contestants, machine, terminal
from mpkernels.commands.bench_tables import show
from mpkernels.commands.contestants import COMPILED, EAGER
from mpkernels.profiling import roofline, timing
from mpkernels.spec import OpSpec, Workload, all_specs, find

COPY, DENSE = "copy", "dense"  # yardsticks that run in the same rounds
RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    ops: Sequence[str] = ()
    workload: str = ""
    repeats: int | None = None
    threads: int | None = None
    compile: bool = True
    dtype: str = "float32"
    device: str | None = None
    budget_s: float = 3.0  # for one pass of one workload

    def chosen_device(self) -> str:
        """The device to time on: the GPU, where there is one and none is named."""
        if self.device is None:
            return machine.devices()[-1]
        terminal.choices("--device", [self.device], backends.DEVICES)
        if self.device not in machine.devices():
            raise terminal.UsageError("--device", "no CUDA device is visible to torch")
        return self.device

    def workloads(self) -> list[tuple[OpSpec, Workload]]:
        """Every op with each of its workloads for the device."""
        known = [spec.name for spec in all_specs()]
        names = terminal.choices("OPS", self.ops, known) or known
        device = self.chosen_device()
        found = [(spec, w) for spec in map(find, names) for w in spec.workloads if device in w.devices]
        kept = [(spec, w) for spec, w in found if self.workload in w.name]
        if not kept:
            raise terminal.UsageError(
                "--workload", f"expected part of one of {'; '.join(w.name for _, w in found)}, got {self.workload!r}"
            )
        return kept


def collect(request: Request) -> dict:
    """Runs everything asked for, with a progress bar; Ctrl-C ends it early. Returns the results, for JSON."""
    terminal.positive("--repeats", request.repeats)
    terminal.positive("--threads", request.threads)
    terminal.choices("--dtype", [request.dtype], list(terminal.DTYPES))
    workloads, device = request.workloads(), request.chosen_device()
    threads = torch.get_num_threads()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    try:
        return _collect(request, workloads, device)
    finally:
        torch.set_num_threads(threads)


def _collect(request: Request, workloads: list[tuple[OpSpec, Workload]], device: str) -> dict:
    rows: list[dict] = []
    ceilings = None
    load = machine.load()
    with terminal.progress() as bar:
        total = 1 + sum(len(contestants.passes(workload)) for _, workload in workloads)
        task = bar.add_task("this machine's ceilings", total=total)
        try:
            ceilings = roofline.measure(device)
            bar.update(task, advance=1)
            for spec, workload in workloads:
                bar.update(task, description=f"{spec.name}: {workload.name}")
                for found in _workload(request, spec, workload, device, ceilings):
                    rows += found
                    bar.update(task, advance=1)
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
    return {
        "versions": machine.versions(),
        "machine": machine.describe(),
        "machine_name": machine.name(device),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "load_before": load,
        "device": device,
        "dtype": request.dtype,
        "ceilings": ceilings.to_dict() if ceilings else None,
        "rows": rows,
        "interrupted": interrupted,
    }


def _workload(
    request: Request, spec: OpSpec, workload: Workload, device: str, ceilings: roofline.Ceilings
) -> Iterator[list[dict]]:
    """The rows of each pass of a workload."""
    dtype = terminal.DTYPES[request.dtype]
    arguments = workload.arguments(dtype, device)
    functions = {backend: contestants.ours(spec, backend) for backend in contestants.real_backends(spec, device)}
    default = next(iter(functions))
    if workload.eager:
        functions[EAGER] = spec.eager
        if request.compile:
            functions[COMPILED] = contestants.compiled(spec)
    dense = _dense(spec, workload, device)
    overhead = workload.name.startswith("call overhead")
    copy, copied = roofline.copy(device)
    for which in contestants.passes(workload):
        runs = {name: contestants.one_pass(spec, f, arguments, which) for name, f in functions.items()}
        problems = {name: contestants.first_call(run) for name, run in runs.items()}
        timed = {name: run for name, run in runs.items() if problems[name] is None}
        if not overhead:
            timed[COPY] = copy
        if dense is not None:
            timed[DENSE] = contestants.one_pass(spec, functions[default], dense.arguments(dtype, device), which)
        times = timing.paired(timed, budget_s=request.budget_s, rounds=request.repeats, device=device)
        cost = contestants.cost(spec, arguments, which)
        rows = []
        for name in functions:
            row = {
                "op": spec.name,
                "workload": workload.name,
                "pass": which,
                "implementation": name,
                "ours": name not in (EAGER, COMPILED),
                "default": name == default,
                "call_overhead": overhead,
                "problem": problems[name],
            }
            if problems[name] is None:
                seconds = timing.median(times, name)
                row |= {
                    "seconds": seconds,
                    "spread": timing.spread(times, name),
                    "rounds": len(times[name]),
                    "ns_per_sample": seconds / workload.samples * 1e9,
                    "times_faster_than_eager": timing.ratio(times, EAGER, name) if EAGER in times else None,
                    "times_faster_than_compiled": timing.ratio(times, COMPILED, name) if COMPILED in times else None,
                    "bytes": cost.bytes,
                    "flops": cost.flops,
                }
                if not overhead:
                    row |= {
                        "gb_per_s": cost.bytes / seconds / 1e9,
                        "share_of_copy": timing.ratio(times, COPY, name) * cost.bytes / copied,
                        "bound": ceilings.bound(cost),
                        "share_of_roofline": ceilings.seconds(cost) / seconds,
                    }
                if dense is not None and name == default:
                    per_sample = dense.samples / workload.samples
                    row["sample_time_by_dense"] = timing.ratio(times, name, DENSE) * per_sample
            rows.append(row)
        yield rows


def _dense(spec: OpSpec, workload: Workload, device: str) -> Workload | None:
    """What a packed workload is compared with, a sample: the op's first workload, which is dense."""
    if not workload.name.startswith("packed"):
        return None
    return next((w for w in spec.workloads if device in w.devices and not w.name.startswith("packed")), None)


def record(data: dict, folder: Path) -> list[Path]:
    """Writes a file for every op, ``<folder>/<machine>/<op>.json`` (another dtype than float32 is in the name)."""
    suffix = "" if data["dtype"] == "float32" else f"-{data['dtype']}"
    written = []
    for op in dict.fromkeys(row["op"] for row in data["rows"]):
        path = folder / data["machine_name"] / f"{op}{suffix}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for row in data["rows"] if row["op"] == op]
        path.write_text(terminal.to_json(data | {"rows": rows}) + "\n")
        written.append(path)
    return written


def run(request: Request, *, as_json: bool, write: bool) -> int:
    """Collects, prints and records; returns the exit status."""
    if write and request.workload:
        raise terminal.UsageError("--record", "a file holds all workloads of an op: leave --workload out")
    data = collect(request)
    if as_json:
        terminal.print_json(data)
    else:
        show(data, terminal.output())
    if data["interrupted"]:
        return terminal.INTERRUPTED
    if write:
        for path in record(data, RESULTS):
            terminal.errors().print(f"recorded {path}")
    ours_broken = any(row["ours"] and row["problem"] for row in data["rows"])
    return terminal.WRONG if ours_broken else terminal.OK
