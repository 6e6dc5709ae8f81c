"""``mpkernels demo``: fits an op's demonstration model (``spec.demo``) and keeps its figures and pictures."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from mpkernels import backends
from mpkernels.commands import machine, terminal
from mpkernels.spec import OpSpec, all_specs

RESULT = "result.json"


def demos() -> dict[str, OpSpec]:
    """Every op with a demonstration, by the demonstration's name."""
    return {spec.demo_title: spec for spec in all_specs() if spec.demo is not None}


def load(spec: OpSpec) -> ModuleType:
    """The module of a demo, with its ``fit``."""
    assert spec.demo is not None
    try:
        return importlib.import_module(spec.demo)
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        remedy = "run in a clone" if missing.startswith("python_models") else "pip install 'mpkernels[models]'"
        raise terminal.UsageError("NAME", f"the demo {spec.demo_title!r} needs {missing!r}: {remedy}") from error


def fit(spec: OpSpec, settings: dict[str, Any], output: Path) -> dict:
    """Runs a demo with a progress bar and writes its result beside its pictures.

    Args:
        spec: the op whose demo it is.
        settings: arguments of the demo's ``fit``; those that are None keep the demo's default.
        output: the demo's own folder.
    """
    function = load(spec).fit
    known = inspect.signature(function).parameters
    given = {name: value for name, value in settings.items() if value is not None}
    for name in given:
        if name not in known and name != "seed":
            raise terminal.UsageError(f"--{name}", f"the demo {spec.demo_title!r} has no such setting")
    output.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn(spec.demo_title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    interrupted = False
    started = time.perf_counter()
    with terminal.progress(*columns) as bar:
        task = bar.add_task("", total=None, figures="preparing")
        seen: dict[str, float] = {}

        def progress(report: dict) -> None:
            seen.update({name: value for name, value in report.items() if isinstance(value, (int, float))})
            figures = [f"{_label(n)} {seen[n]:.4g}" for n in seen if n not in ("step", "steps", "seconds_left")]
            bar.update(task, completed=report["step"], total=report["steps"], figures="  ".join(figures))

        # what a demo prints must not mix with our JSON
        with contextlib.redirect_stdout(sys.stderr):
            try:
                made = function(**{n: v for n, v in given.items() if n in known}, output=output, progress=progress)
            except (ValueError, FileNotFoundError) as error:
                name, _, message = str(error).partition(": ")
                argument = f"--{name}" if message and name in known else "NAME"
                raise terminal.UsageError(argument, message if argument != "NAME" else str(error)) from error
            except KeyboardInterrupt:
                made, interrupted = {"pictures": []}, True
    asked = made.get("settings", {}).get("steps")
    made |= {
        "demo": spec.demo_title,
        "versions": machine.versions(),
        "machine": machine.describe(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "seconds": time.perf_counter() - started,
        "interrupted": interrupted
        or made.get("interrupted", False)
        or (asked is not None and made.get("steps_done", asked) < asked),
    }
    (output / RESULT).write_text(terminal.to_json(made) + "\n")
    return made


def _label(name: str) -> str:
    return name.replace("psnr", "PSNR").replace("_", " ")


def figures(result: dict) -> list[tuple[str, str]]:
    """All numbers of a result with their names, those inside groups as "group: name"."""
    found = []
    left_out = ("versions", "machine", "pictures", "settings")

    def walk(prefix: str, x: Any) -> None:
        if isinstance(x, dict):
            for name, value in x.items():
                if name not in left_out:
                    walk(": ".join(filter(None, (prefix, "" if name == "figures" else _label(name)))), value)
        elif isinstance(x, (int, float)) and not isinstance(x, bool):
            found.append((prefix, f"{x:.4g}"))

    walk("", result)
    return found


def show(result: dict, output: Path, console: Console) -> None:
    """The figures, and where the pictures are."""
    table = terminal.table("figure", "value", numbers=("value",), title=result["demo"])
    for name, value in figures(result):
        table.add_row(escape(name), value)
    console.print(table)
    for picture in result.get("pictures", []):
        console.print(f"{output / picture['file']}: {escape(picture['title'])}", soft_wrap=True)
    console.print(f"{output / RESULT}", soft_wrap=True)


def run(name: str | None, settings: dict[str, Any], *, output: Path, as_json: bool) -> int:
    """Fits one demo, or each; returns the exit status."""
    known = demos()
    chosen = terminal.choices("NAME", [name] if name else list(known), list(known))
    if settings.get("backend") is not None:
        terminal.choices("--backend", [settings["backend"]], backends.BACKENDS)
    if settings.get("device") is not None:
        terminal.choices("--device", [settings["device"]], machine.devices())
    results = {}
    for demo in chosen:
        try:
            results[demo] = fit(known[demo], settings, output / demo)
        except backends.BackendError as error:
            sys.stderr.write(f"mpkernels: --backend: {error}\n")
            return terminal.WRONG
        if not as_json:
            show(results[demo], output / demo, terminal.output())
        if results[demo]["interrupted"]:
            break
    if as_json:
        terminal.print_json(results)
    return terminal.INTERRUPTED if any(r["interrupted"] for r in results.values()) else terminal.OK
