"""``mpkernels info``: what is installed, what this machine is, and which backend runs which op."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mpkernels import backends, library
from mpkernels.commands import machine, terminal
from mpkernels.spec import OpSpec, all_specs


def collect() -> dict:
    """Versions, machine and the matrix op by backend by device, for JSON."""
    return {
        "versions": machine.versions(),
        "machine": machine.describe(),
        "devices": machine.devices(),
        "backends": list(backends.BACKENDS),
        "matrix": [_cell(spec, b, d) for d in machine.devices() for spec in all_specs() for b in backends.BACKENDS],
    }


def _cell(spec: OpSpec, backend: str, device: str) -> dict:
    reason = backends.why_not(spec.op, backend, device)
    if reason is not None and backend == "cuda" and "cuda" not in machine.devices():
        reason = library.why_not_loaded("cuda")  # what is missing, rather than where the tensors are
    return {
        "op": spec.name,
        "family": spec.family,
        "device": device,
        "backend": backend,
        "available": reason is None,
        "default": reason is None and _default(spec, device) == backend,
        "reason": reason,
    }


def _default(spec: OpSpec, device: str) -> str | None:
    try:
        return backends.choose(spec.op, device, None)
    except backends.BackendError:  # MPKERNELS_BACKEND names one that cannot run here
        return None


def show(data: dict, console: Console) -> None:
    """The tables, and every reason in full."""
    facts = terminal.table("", "")
    facts.show_header = False
    found = {name: value or "not installed" for name, value in data["versions"].items()}
    if data["versions"]["cuda"] is None:
        found["cuda"] = "torch is built without CUDA"
    m = data["machine"]
    found |= {
        "processor": f"{m['processor']} ({m['architecture']}), {m['threads']} threads",
        "features": " ".join(m["cpu_features"]) or "none known",
        "instruction set": m["instruction_set"] or "the C++ library is not built",
        "gpu": ", ".join(m["gpus"]) or "none",
    }
    for name, value in found.items():
        facts.add_row(f"[bold]{name}[/]", value)
    console.print(facts)
    reasons: dict[str, int] = {}
    for device in data["devices"]:
        console.print()
        console.print(_matrix(data, device, reasons))
    console.print()
    console.print("[green]✓[/] runs here   [bold green]✓*[/] runs what names no backend   a number: why not, below")
    for reason, index in reasons.items():
        console.print(f"  [bold]{index}[/]  {escape(reason)}")


def _matrix(data: dict, device: str, reasons: dict[str, int]) -> Table:
    table = terminal.table("op", *data["backends"], title=f"{device} tensors")
    rows: dict[str, list[str]] = {}
    for cell in data["matrix"]:
        if cell["device"] != device:
            continue
        if cell["available"]:
            text = "[bold green]✓*[/]" if cell["default"] else "[green]✓[/]"
        else:
            reason = f"{cell['backend']}: {cell['reason']}"
            text = f"[yellow]{reasons.setdefault(reason, len(reasons) + 1)}[/]"
        rows.setdefault(cell["op"], []).append(text)
    for op, cells in rows.items():
        table.add_row(op, *cells)
    return table


def run(*, kernels: bool, as_json: bool) -> int:
    """Prints it; returns the exit status."""
    data = collect()
    table = None
    if kernels:
        from mpkernels.profiling import resources

        try:
            report = resources.read_table()
        except FileNotFoundError as error:
            terminal.errors().print(f"mpkernels: --kernels: {escape(str(error))}", soft_wrap=True)
            return terminal.WRONG
        data["kernels"] = asdict(report)
        table = resources.kernel_table(report)
    if as_json:
        terminal.print_json(data)
        return terminal.OK
    console = terminal.output()
    show(data, console)
    if table is not None:
        console.print()
        console.print(table)
    return terminal.OK
