"""What compiled GPU kernels take of a multiprocessor, and the record of it (made by :mod:`static`)."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

TABLE = Path(__file__).with_name("kernels.json")
REFRESH = "python -m mpkernels.profiling.static --write"
ABOUT = f"Static resources of every GPU kernel, as compiled; refresh with: {REFRESH}"


@dataclass(frozen=True)
class KernelResources:
    """What one compiled kernel takes of a multiprocessor, on one architecture."""

    kernel: str  # the spec's name (Triton), or the demangled C++ name without its arguments (CUDA)
    backend: str  # "triton" or "cuda"
    family: str
    source: str  # relative to the repository
    arch: str  # "sm_90"
    registers: int  # a thread
    shared_bytes: int  # a block; CUDA: static only, as the dynamic part is decided at the launch
    spill_bytes: int  # a thread: CUDA: spill stores + loads; Triton: local memory, which it uses for nothing else
    stack_bytes: int  # a thread: spills, and local arrays with an index unknown to the compiler
    threads_per_block: int | None  # Triton: 32 * num_warps; CUDA: __launch_bounds__, or None


@dataclass(frozen=True)
class Failure:
    """A kernel, or a file of kernels, that does not compile."""

    kernel: str
    arch: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The resources of all kernels, with the compilers that they come from."""

    nvcc: str
    triton: str
    kernels: tuple[KernelResources, ...]
    failures: tuple[Failure, ...] = ()
    fingerprints: dict[str, str] = field(default_factory=dict)  # compilation, "source or kernel sm_90" -> fingerprint

    @property
    def spilling(self) -> tuple[KernelResources, ...]:
        """The kernels that spill registers to local memory."""
        return tuple(kernel for kernel in self.kernels if kernel.spill_bytes > 0)

    def problems(self) -> list[str]:
        """A line for every kernel that does not compile, or spills."""
        found = [f"{failure.kernel} ({failure.arch}) does not compile: {failure.reason}" for failure in self.failures]
        return found + [
            f"{kernel.kernel} ({kernel.backend}, {kernel.arch}, {kernel.source}) spills:"
            f" {kernel.spill_bytes} bytes a thread at {kernel.registers} registers"
            for kernel in self.spilling
        ]


def order(kernel: KernelResources) -> tuple:
    """The key by which the record is sorted."""
    return kernel.family, kernel.source, kernel.kernel, int(kernel.arch.removeprefix("sm_"))


def to_json(report: Report) -> str:
    """The report as text, one kernel a line, in a stable order and without dates."""
    rows = ",\n".join("    " + json.dumps(asdict(kernel)) for kernel in report.kernels)
    head = json.dumps({"about": ABOUT, "nvcc": report.nvcc, "triton": report.triton}, indent=2)
    failures = f',\n  "failures": {json.dumps([asdict(f) for f in report.failures])}' if report.failures else ""
    prints = ",\n".join(
        f"    {json.dumps(job)}: {json.dumps(value)}" for job, value in sorted(report.fingerprints.items())
    )
    prints = f',\n  "fingerprints": {{\n{prints}\n  }}' if prints else ""
    return head.removesuffix("\n}") + failures + prints + f',\n  "kernels": [\n{rows}\n  ]\n}}\n'


def from_json(text: str) -> Report:
    """The inverse of :func:`to_json`."""
    data = json.loads(text)
    kernels = tuple(KernelResources(**kernel) for kernel in data["kernels"])
    failures = tuple(Failure(**failure) for failure in data.get("failures", ()))
    return Report(data["nvcc"], data["triton"], kernels, failures, data.get("fingerprints", {}))


def read_table(path: Path = TABLE) -> Report:
    """The recorded resources, ``kernels.json`` of the package; compiles nothing.

    Raises:
        FileNotFoundError: there is no such file; the message says how to make it.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: make it with `{REFRESH}` in a clone")
    return from_json(path.read_text())


def differences(fresh: Report, recorded: Report) -> list[str]:
    """What makes a recorded table stale: other kernels, or other resources from the same compiler version."""

    def by_name(report: Report) -> dict[tuple[str, str, str], KernelResources]:
        return {(kernel.source, kernel.kernel, kernel.arch): kernel for kernel in report.kernels}

    now, then = by_name(fresh), by_name(recorded)
    same_version = {"cuda": fresh.nvcc == recorded.nvcc, "triton": fresh.triton == recorded.triton}
    found = [f"{', '.join(key)}: compiled, but not in the table" for key in now.keys() - then.keys()]
    found += [f"{', '.join(key)}: in the table, but no longer compiled" for key in then.keys() - now.keys()]
    for key in now.keys() & then.keys():
        if now[key] != then[key] and same_version[now[key].backend]:
            old, new = asdict(then[key]), asdict(now[key])
            changed = [f"{name} {old[name]} -> {new[name]}" for name in new if old[name] != new[name]]
            found.append(f"{', '.join(key)}: {', '.join(changed)}")
    return sorted(found)


def kernel_table(report: Report | None = None) -> Table:
    """The resources as a table for the terminal, a kernel a row and an architecture a column.

    Args:
        report: what to show; by default the recorded table.
    """
    from rich.markup import escape
    from rich.table import Table

    report = read_table() if report is None else report
    architectures = sorted({kernel.arch for kernel in report.kernels}, key=lambda arch: int(arch.removeprefix("sm_")))
    table = Table(
        title="GPU kernels as compiled: registers a thread, shared bytes a block",
        caption=f"nvcc {report.nvcc}, triton {report.triton}; CUDA: shared memory without what the launch adds",
    )
    table.add_column("source")
    table.add_column("kernel", overflow="fold")
    table.add_column("threads", justify="right")
    for arch in architectures:
        table.add_column(arch, justify="right")
    rows: dict[tuple[str, str], dict[str, KernelResources]] = {}
    for kernel in report.kernels:
        rows.setdefault((kernel.source, kernel.kernel), {})[kernel.arch] = kernel
    for (source, name), by_arch in rows.items():
        threads = next(iter(by_arch.values())).threads_per_block
        cells = [_cell(by_arch[arch]) if arch in by_arch else "" for arch in architectures]
        short = re.sub(r"^(?:(?:\w+|\(anonymous namespace\))::)+", "", name)
        table.add_row(source, escape(short), "" if threads is None else str(threads), *cells)
    return table


def _cell(kernel: KernelResources) -> str:
    spills = f"\n[bold red]spills {kernel.spill_bytes} B[/]" if kernel.spill_bytes else ""
    return f"{kernel.registers}, {kernel.shared_bytes:,}{spills}"
