"""``mpkernels validate``: every op on every backend that exists here, against float64.

The bound is that of :mod:`mpkernels.testing.checking`: twice the error of the reference in the same dtype, and a band.
So the rows of the reference itself show how precise a dtype is, but cannot fail; the verdict does not count them (its
own tests compare it with closed forms).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from mpkernels import library
from mpkernels.commands import jobs, machine, terminal
from mpkernels.commands.plan import Request, Row, load_implementation, plan, plan_implementation

HEADERS = ("op", "backend", "device", "dtype", "cases", "worst error", "bound", "ratio", "where", "verdict")
NUMBERS = ("cases", "worst error", "bound", "ratio")
FAILURES_SHOWN = 12  # a row, on the terminal; the JSON has all


def _fill(rows: Sequence[Row], implementation: Callable | None) -> Iterator[Row]:
    """Runs the cases of the rows; yields the row after each case."""
    here = [row for row in rows if row.how != "interpreter" or library.triton_interpreted()]
    for row in here:
        for job in row.jobs():
            row.add(job.case, jobs.run(job, implementation))
            yield row
    elsewhere = [(row, job) for row in rows if row not in here for job in row.jobs()]
    if elsewhere:
        answers = jobs.run_interpreted([job for _, job in elsewhere])
        for (row, job), findings in zip(elsewhere, answers, strict=True):
            row.add(job.case, findings)
            yield row


def collect(request: Request) -> dict:
    """Runs everything asked for, with a progress bar; Ctrl-C ends it early. Returns the results, for JSON."""
    implementation = load_implementation(request.implementation) if request.implementation is not None else None
    rows, holes = plan(request) if implementation is None else (plan_implementation(request), [])
    interrupted = False
    with terminal.progress() as bar:
        task = bar.add_task("validating", total=sum(len(row.cases) for row in rows))
        try:
            for row in _fill(rows, implementation):
                bar.update(task, advance=1, description=f"{row.op} {row.backend} {row.dtype}")
        except KeyboardInterrupt:
            interrupted = True
    named_holes = [hole for hole in holes if hole["backend"] in request.backends]
    return {
        "versions": machine.versions(),
        "machine": machine.describe(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "rows": [row.to_dict() for row in rows if row.done or not interrupted],
        "not_run": holes,
        "restricted_to": request.restrictions(),
        "interrupted": interrupted,
        "ok": all(not row.failures for row in rows) and not named_holes and not interrupted,
    }


def cells(row: dict) -> list[str]:
    """One row as text, in the order of HEADERS."""
    return [
        row["op"],
        row["backend"] + (" (interpreter)" if row["interpreter"] else ""),
        row["device"],
        row["dtype"],
        str(row["cases"]) if row["cases"] == row["of"] else f"{row['cases']} of {row['of']}",
        terminal.number(row["error"]),
        terminal.number(row["bound"]),
        terminal.number(row["ratio"], 2),
        "exact" if row["ratio"] == 0 else f"{row['output']}, {row['case']}",
        "FAILS" if not row["ok"] else "sets the bound" if row["sets_bound"] else "ok",
    ]


def holes(data: dict) -> list[str]:
    """A line for each backend that did not run, with the reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for hole in data["not_run"]:
        reasons.setdefault((hole["backend"], hole["reason"]), []).append(hole["op"])
    return [f"not run: {backend} ({', '.join(ops)}): {reason}" for (backend, reason), ops in reasons.items()]


def show(data: dict, console: Console) -> None:
    """The table, the failures in detail, and the verdict in words."""
    table = terminal.table(*HEADERS, numbers=NUMBERS)
    for row in data["rows"]:
        colour = "green" if row["ok"] else "bold red"
        *texts, last = map(escape, cells(row))
        table.add_row(*texts, f"[{colour}]{last}[/]")
    console.print(table)
    for row in data["rows"]:
        if row["ok"]:
            continue
        title = f"{row['op']}, {row['backend']}, {row['device']}, {row['dtype']}: {len(row['failures'])} failures"
        console.print(f"\n[bold red]{escape(title)}[/]")
        for failure in row["failures"][:FAILURES_SHOWN]:
            console.print(f"  {escape(detail(failure))}")
        if len(row["failures"]) > FAILURES_SHOWN:
            console.print(f"  and {len(row['failures']) - FAILURES_SHOWN} more (--json has all)")
    if data["not_run"]:
        console.print()
        for line in holes(data):
            console.print(escape(line))
    console.print(f"\n{escape(verdict(data))}")


def detail(failure: dict) -> str:
    """A failing output in one line."""
    text = f"{failure['case']}: {failure['output']}"
    if failure["output"] != "exception":
        text += f": error {terminal.number(failure['error'])}, bound {terminal.number(failure['bound'])}"
    return f"{text} ({failure['problem']})" if failure["problem"] else text


def verdict(data: dict) -> str:
    """The result in one line."""
    checked = sum(row["cases"] for row in data["rows"] if not row["sets_bound"])
    failing = [f"{row['op']} {row['backend']} {row['dtype']}" for row in data["rows"] if not row["ok"]]
    text = f"{checked} checks against the reference, all within their bounds."
    if failing:
        text = f"FAILS: {'; '.join(failing)} ({checked} checks)."
    elif not checked:
        text = "Nothing was checked but the reference, which sets the bounds."
    if data["not_run"]:
        text += f" Not run here: {', '.join(dict.fromkeys(hole['backend'] for hole in data['not_run']))}."
    if data["restricted_to"]:
        text += f" Restricted to {'; '.join(data['restricted_to'])}."
    return text + (" Interrupted: the rest was not checked." if data["interrupted"] else "")


def run(request: Request, *, as_json: bool, output: Path | None = None) -> int:
    """Collects and prints; returns the exit status."""
    data = collect(request)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "validation.json").write_text(terminal.to_json(data) + "\n")
    if as_json:
        terminal.print_json(data)
    else:
        show(data, terminal.output())
    if data["interrupted"]:
        return terminal.INTERRUPTED
    return terminal.OK if data["ok"] else terminal.WRONG
