# ruff: noqa: E402 (built in place, the package is not installed: the path comes first)
"""Rung 6, on a machine with a GPU (``make gpu``): tests, compute-sanitizer and benchmarks of every op on the device.

    python benchmarks/gpu.py [OPS ...] [--only STAGE] [--results DIR] [--limit SECONDS]

1. ``tests``: every test marked ``gpu``, by pytest in a process of its own.
2. ``sanitize``: the small cases of every op on backend cuda, forward and backward, under memcheck and racecheck.
3. ``bench``: as ``mpkernels bench --record``, into ``<results>/<machine>/<op>.json``, with a third pass, the backward
   alone, and with copies of the inputs in turn where they would stay in L2.
4. ``peers``: families beside the kernels of others, by a script of the family's name, into <family>_peers.json.

It exits with 0; with 1 where a test, the sanitizer or one of our backends failed; with 2 where there is no GPU or an
argument is wrong. What does not fit into the time limit is told, and is a failure if it is a test.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch._functorch.config

from mpkernels import backends
from mpkernels.commands import bench, bench_tables, contestants, machine, terminal
from mpkernels.commands.contestants import COMPILED, EAGER, FORWARD, TRAINING, Run
from mpkernels.profiling import toolchain
from mpkernels.spec import Arguments, Cost, OpSpec, Workload, all_specs, find
from mpkernels.testing.checking import gradients

BACKWARD = "backward"
SHARES = {
    "tests": 0.45,
    "sanitize": 0.1,
    "bench": 0.25,
    "peers": 0.2,
}  # of the time limit, in the order in which the stages run
PEERS = ("attention", "convolution", "flows")  # families with a script of that name beside this one
TOOLS = ("memcheck", "racecheck")
FOUND_ERRORS = 99  # compute-sanitizer's exit status where it found any
BAR_SAMPLES = 2**24  # workloads of so many samples are held to the bars:
BARS = {FORWARD: 0.80, BACKWARD: 0.70}  # the least share of the device's copy bandwidth
PASS_SECONDS = 1.0  # of measuring


def why_no_gpu(specs: Sequence[OpSpec]) -> str | None:
    """None where the kernels of at least one op can run, else the reason. (Some have Triton kernels alone.)"""
    reasons = [backends.why_not(spec.op, spec.fastest_on_cuda, "cuda") for spec in specs]
    if torch.cuda.is_available() and None in reasons:
        return None
    return next(filter(None, reasons), "no CUDA device is visible to torch")


def device_line() -> str:
    """The device and the versions of everything between it and us."""
    found, driver, nvcc = torch.cuda.get_device_properties(0), "unknown", "missing"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.check_output(command, text=True, timeout=30).split("\n")[0].strip()
    with contextlib.suppress(toolchain.ToolchainError):
        nvcc = toolchain.require_nvcc().version
    return (
        f"{found.name}: driver {driver}, {found.multi_processor_count} multiprocessors, "
        f"{found.total_memory / 2**30:.0f} GiB, {found.L2_cache_size / 2**20:.0f} MiB of L2, "
        f"torch {torch.__version__}, triton {machine.versions()['triton'] or 'not installed'}, nvcc {nvcc}"
    )


def run_for(command: Sequence[str], seconds: float, *, capture: bool = False, **environment: str):
    """Runs a command and all that it starts for a limited time; (status, None past the limit; captured output)."""
    kept = {name: x for name, x in os.environ.items() if name not in ("TRITON_INTERPRET", "MPKERNELS_BACKEND")}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if capture else {}
    sys.stdout.flush()
    process = subprocess.Popen(
        command, cwd=ROOT, env=kept | environment, text=True, errors="replace", start_new_session=True, **output
    )
    try:
        said, _ = process.communicate(timeout=max(seconds, 1.0))
        return process.returncode, said or ""
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
        os.killpg(process.pid, signal.SIGKILL)
        if isinstance(stopped, KeyboardInterrupt):
            raise
        return None, process.communicate()[0] or ""


def pytest_command(specs: Sequence[OpSpec], everything: bool) -> list[str]:
    """Runs the tests marked ``gpu``: all, or those in tests/<family>/test_<folder of the op>*.py."""
    paths = ["tests"]
    if not everything:
        folders = dict.fromkeys(tuple(spec.function.__module__.split(".")[1:3]) for spec in specs)
        found = [path for family, op in folders for path in sorted((ROOT / "tests" / family).glob(f"test_{op}*.py"))]
        paths = [str(path.relative_to(ROOT)) for path in found]
    parallel = ["--numprocesses", "8", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", *paths, "-m", "gpu", "-q", "--tb=short", "--maxfail=40", *parallel]


def run_tests(specs: Sequence[OpSpec], everything: bool, seconds: float) -> list[str]:
    """Rung 6; returns what failed, in words."""
    status, _ = run_for(pytest_command(specs, everything), seconds, PYTHONUNBUFFERED="1")
    told = {None: f"not done after {seconds:.0f} s (--only tests gives them more)", 5: "no test marked gpu was found"}
    return [f"tests: {told.get(status, f'pytest exited with {status}')}"] if status != 0 else []


def sanitize(specs: Sequence[OpSpec], seconds: float) -> list[str]:
    """compute-sanitizer over the small cases of each op; returns what failed, in words."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        print("compute-sanitizer is not on PATH: left out")
        return []
    jobs = [(spec.name, tool) for spec in specs if not backends.why_not(spec.op, "cuda", "cuda") for tool in TOOLS]
    failures, end = [], time.monotonic() + seconds
    for i, (op, tool) in enumerate(jobs):
        left = (end - time.monotonic()) * min(1.0, 2 / (len(jobs) - i))
        # only our kernels are instrumented; without torch's cache of memory, tensors end where allocations do
        options = ["--tool", tool, "--error-exitcode", str(FOUND_ERRORS), "--target-processes", "application-only"]
        options += ["--kernel-name", "kns=mpkernels", "--print-limit", "20"]
        options += ["--report-api-errors", "no"] if tool == "memcheck" else []  # torch expects some
        worker = [sys.executable, str(Path(__file__).resolve()), "--worker", "sanitize", op]
        status, said = run_for([program, *options, *worker], left, capture=True, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if status is None:
            print(f"{tool} of {op}: not done after {left:.0f} s, left out")
        elif "Device not supported" in said:
            print(f"{tool} of {op}: left out, compute-sanitizer does not support this device")
        elif status == 0:
            told = [line.strip("= ") for line in said.splitlines() if "SUMMARY" in line or " cases, " in line]
            print(f"{tool} of {op}: {'; '.join(told)}")
        else:
            print("\n".join(said.splitlines()[-60:]))
            failures.append(f"{tool} of {op}: {'errors' if status == FOUND_ERRORS else f'exit status {status}'}")
    return failures


def sanitized_worker(specs: Sequence[OpSpec], backend: str = "cuda") -> int:
    """What runs under compute-sanitizer: the cases without ``large``, float32, forward and backward."""
    cases = [(spec, case) for spec in specs for case in spec.cases if not case.large]
    for spec, case in cases:
        gradients(contestants.ours(spec, backend), case.arguments(torch.float32, backend), spec.differentiable)
    if backend == "cuda":
        torch.cuda.synchronize()
    print(f"{len(cases)} cases, forward and backward")
    return 0


def backward_alone(spec: OpSpec, function: Callable, arguments: Arguments) -> Run:
    """The second half of what contestants.one_pass trains: the forward has run, and its graph is kept."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in spec.differentiable[:2]}
    outputs = function(**(arguments | leaves))[:3]
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.rand(x.shape, generator=generator).to(x.device, x.dtype) for x in outputs]
    return lambda: torch.autograd.grad(outputs, list(leaves.values()), seeds, retain_graph=True)


def in_turn(make: Callable[[Arguments], Run], arguments: Arguments, sets: int) -> Run:
    """Runs on the arguments and on copies of them in turn; the first call makes and runs all."""
    runs: collections.deque[Run] = collections.deque()

    def copy(x: object) -> object:
        return x.clone() if isinstance(x, torch.Tensor) else x

    def run() -> object:
        if not runs:
            copies = [{name: copy(x) for name, x in arguments.items()} for _ in range(sets - 1)]
            runs.extend(map(make, [arguments, *copies]))
            for each in runs:
                each()
        runs.rotate()
        return runs[0]()

    return run


@contextlib.contextmanager
def device_passes(cache: int) -> Iterator[None]:
    """Inside, ``bench`` also times the backward alone, and no pass finds its inputs in a cache of so many bytes."""
    one_pass, cost = contestants.one_pass, contestants.cost

    def any_passes(workload: Workload) -> tuple[str, ...]:
        return (FORWARD, BACKWARD, TRAINING) if workload.backward else (FORWARD,)

    def any_cost(spec: OpSpec, arguments: Arguments, which: str) -> Cost:
        return spec.cost(arguments, True) if which == BACKWARD else cost(spec, arguments, which)

    def any_pass(spec: OpSpec, function: Callable, arguments: Arguments, which: str) -> Run:
        def make(arguments: Arguments) -> Run:
            if which == BACKWARD:
                return backward_alone(spec, function, arguments)
            return one_pass(spec, function, arguments, which)

        size = spec.cost(arguments, False).bytes
        sets = math.ceil(3 * cache / size) if size > cache / 16 else 1  # tiny: a call's own cost, not memory's
        return in_turn(make, arguments, max(sets, 1))

    with (
        mock.patch.multiple(contestants, passes=any_passes, cost=any_cost, one_pass=any_pass),
        # a compiled backward that overwrites what its forward saved could run only once
        torch._functorch.config.patch(donated_buffer=False),
    ):
        yield


def run_benchmarks(specs: Sequence[OpSpec], seconds: float, results: Path) -> list[str]:
    """Times everything, writes and prints it; returns what of ours does not run."""
    request = bench.Request(ops=[spec.name for spec in specs], device="cuda", budget_s=PASS_SECONDS)
    with device_passes(torch.cuda.get_device_properties(0).L2_cache_size):
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)  # Ctrl-C: bench ends with what it has
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1.0))
        try:
            data = bench.collect(request)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    return finish(data, specs, results)


def run_peers(specs: Sequence[OpSpec], seconds: float, results: Path) -> list[str]:
    """The families of the ops beside others' kernels, as far as they have a script; the time is shared evenly."""
    families = [family for family in PEERS if any(spec.family == family for spec in specs)]
    failures = []
    for family in families:
        own = seconds / len(families)
        script = [sys.executable, str(ROOT / "benchmarks" / f"{family}.py"), "--device", "cuda", "--record"]
        # it starts no row when its time is nearly over, and a row compiles for some seconds
        status, _ = run_for([*script, "--results", str(results.resolve()), "--limit", f"{0.8 * own:.0f}"], own)
        told = {None: f"not done after {own:.0f} s", terminal.WRONG: "a row of ours did not run"}
        if status != terminal.OK:
            failures.append(f"{family}: {told.get(status, f'exit status {status}')}")
    return failures


def by_pass(rows: list[dict]) -> dict[tuple[str, str, str], dict[str, dict]]:
    """(op, workload, pass) -> contestant -> row."""
    found: dict[tuple[str, str, str], dict[str, dict]] = {}
    for row in rows:
        found.setdefault((row["op"], row["workload"], row["pass"]), {})[row["implementation"]] = row
    return found


def table(rows: list[dict], samples: dict[tuple[str, str], int]):
    """One line for every op, workload and pass: times, GB/s and share of copy of our backends, and the bar."""
    ours = [name for name in ("cuda", "triton", "cpu") if any(row["implementation"] == name for row in rows)]
    names = [*ours, EAGER, COMPILED]
    shares = [header for name in ours for header in (f"{name} GB/s", "of copy")]
    made = terminal.table("op: workload", "pass", *names, *shares, "bar", numbers=(*names, *shares))
    for (op, workload, which), found in by_pass(rows).items():
        cells = [terminal.seconds(found[n]["seconds"]) if "seconds" in found.get(n, {}) else "-" for n in names]
        for row in (found.get(name, {}) for name in ours):
            cells += [terminal.number(row.get("gb_per_s"), 4), bench_tables.percent(row.get("share_of_copy"))]
        judged = bar(which, samples.get((op, workload), 0), list(found.values()))
        made.add_row(f"{op}: {workload}", which, *cells, judged)
    return made


def bar(which: str, samples: int, rows: Sequence[dict]) -> str:
    """Whether the better of our backends reaches the share of copy bandwidth that is asked of a pass."""
    shares = [row["share_of_copy"] for row in rows if row["ours"] and "share_of_copy" in row]
    if not shares or samples < BAR_SAMPLES or which not in BARS:
        return ""
    return f"{'met' if max(shares) >= BARS[which] else 'MISSED'} ({BARS[which]:.0%})"


def fastest(rows: list[dict], recorded: str, op: str) -> str:
    """Which of cuda and triton is the faster for an op: the geometric mean over workloads of what training runs."""
    ratios = {
        (workload, which): found["triton"]["seconds"] / found["cuda"]["seconds"]
        for (name, workload, which), found in by_pass(rows).items()
        if name == op and which != BACKWARD and all("seconds" in found.get(b, {}) for b in ("cuda", "triton"))
    }
    sized = {key: x for key, x in ratios.items() if not key[0].startswith("call overhead")} or ratios
    if not sized:
        return f"{op}: cuda and triton did not both run, nothing to compare"
    mean = math.exp(sum(map(math.log, sized.values())) / len(sized))
    winner = "cuda" if mean >= 1 else "triton"
    other = "triton" if winner == "cuda" else "cuda"
    advice = "as the spec has it" if winner == recorded else f"the spec has {recorded!r}: change it"
    line = f"{op}: {winner} takes {min(mean, 1 / mean):.2f} of {other}'s time; fastest_on_cuda={winner!r}, {advice}"
    against = [f"{w}, {p} ({x:.2f})" for (w, p), x in ratios.items() if (x < 0.97 if mean >= 1 else x > 1.03)]
    return line + (f"; not for {'; '.join(against)} (triton's time by cuda's)" if against else "")


def finish(data: dict, specs: Sequence[OpSpec], results: Path) -> list[str]:
    """Writes the results, prints the table and which backend is the faster; returns what of ours does not run."""
    for path in bench.record(data, results):
        print(f"recorded {path}")
    if data["interrupted"]:
        print("bench: its time was over, the rest was not measured: name OPS, or give a longer --limit")
    print(f"\n{bench_tables.setting(data)}; {bench_tables.ceilings(data)}", flush=True)
    samples = {(spec.name, workload.name): workload.samples for spec in specs for workload in spec.workloads}
    terminal.output().print(table(data["rows"], samples))
    print(*(fastest(data["rows"], spec.fastest_on_cuda, spec.name) for spec in specs), sep="\n")
    broken = []
    for row in data["rows"]:
        if row["problem"]:
            line = f"bench: {row['op']}, {row['workload']}, {row['pass']} on {row['implementation']}: {row['problem']}"
            (broken.append if row["ours"] else print)(line)
    return broken


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="gpu.py", description="Rung 6: tests, sanitizer and benchmarks on a GPU.")
    parser.add_argument("ops", nargs="*", metavar="OPS", help="names of ops; all of them if none is given")
    parser.add_argument("--only", action="append", choices=list(SHARES), help="one stage (repeatable); default: all")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--limit", type=float, default=440.0, metavar="SECONDS", help="of everything; default 440")
    parser.add_argument("--worker", choices=["sanitize"], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages; returns the exit status."""
    start = time.monotonic()
    asked = parse(arguments)
    known = [spec.name for spec in all_specs()]
    try:
        terminal.positive("--limit", asked.limit)
        specs = [find(name) for name in terminal.choices("OPS", asked.ops, known) or known]
    except terminal.UsageError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return terminal.BAD_USAGE
    missing = why_no_gpu(specs)
    if missing is not None:
        print(f"gpu.py: the CUDA kernels cannot run here: {' '.join(missing.split())}", file=sys.stderr)
        return terminal.BAD_USAGE
    if asked.worker:
        return sanitized_worker(specs)

    print(device_line(), flush=True)
    stages = [stage for stage in SHARES if stage in (asked.only or SHARES)]
    failures: list[str] = []
    for i, stage in enumerate(stages):
        left = asked.limit - (time.monotonic() - start)
        seconds = max(left, 0) * SHARES[stage] / sum(SHARES[later] for later in stages[i:])
        print(f"\n== {stage} ({seconds:.0f} s)", flush=True)
        try:
            if stage == "tests":
                failures += run_tests(specs, not asked.ops, seconds)
            elif stage == "sanitize":
                failures += sanitize(specs, seconds)
            elif stage == "bench":
                failures += run_benchmarks(specs, seconds, asked.results)
            else:
                failures += run_peers(specs, seconds, asked.results)
        except Exception:  # the other stages go on
            failures.append(f"{stage}: {traceback.format_exc()}")

    print(*(f"FAILED {line}\n" for line in failures), sep="", end="")
    print(f"{'failed' if failures else 'passed'} after {time.monotonic() - start:.0f} s", flush=True)
    return terminal.WRONG if failures else terminal.OK


if __name__ == "__main__":
    sys.exit(main())
