"""What the commands share: consoles, progress bars, JSON, choices, and errors of one line."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

OK, WRONG, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130  # exit statuses

PIPE_WIDTH = 160  # columns of a table that is not printed on a terminal

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class UsageError(Exception):
    """A bad argument: one line that names it, and exit status 2."""

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(f"{argument}: {message}")


def choices(argument: str, asked: Iterable[str], known: Sequence[str]) -> list[str]:
    """What was asked for, each checked to be known.

    Raises:
        UsageError: one is not; the message lists those that are.
    """
    found = list(dict.fromkeys(asked))
    for name in found:
        if name not in known:
            raise UsageError(argument, f"expected one of {', '.join(map(repr, known))}, got {name!r}")
    return found


def positive(argument: str, number: float | None) -> None:
    """Refuses numbers that are not above zero."""
    if number is not None and not number > 0:
        raise UsageError(argument, f"expected a positive number, got {number}")


def output() -> Console:
    """The console of results: standard output."""
    return _console(stderr=False)


def errors() -> Console:
    """The console of progress and of errors: standard error."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else int(os.environ.get("COLUMNS", PIPE_WIDTH))
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)


def progress(*columns: Any) -> Progress:
    """A progress bar on standard error that leaves nothing behind; silent where that is no terminal."""
    console = errors()
    shown = columns or (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*shown, console=console, transient=True, disable=not console.is_terminal)


def table(*headers: str, numbers: Sequence[str] = (), title: str | None = None) -> Table:
    """A plain table; the columns in ``numbers`` are flush right."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for header in headers:
        made.add_column(header, justify="right" if header in numbers else "left", overflow="fold")
    return made


def print_json(data: Any) -> None:
    """The only thing on standard output under ``--json``. Numbers that JSON lacks (infinity, NaN) become null."""
    sys.stdout.write(to_json(data) + "\n")


def to_json(data: Any) -> str:
    """JSON text, indented."""
    return json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(name): _plain(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x


def seconds(s: float) -> str:
    """A duration with a unit that suits it.

    >>> seconds(0.0123), seconds(4.2e-6)
    ('12.3 ms', '4.20 us')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if s >= size:
            return f"{s / size:.3g} {unit}" if s / size >= 100 else f"{_three(s / size)} {unit}"
    return f"{_three(s / 1e-6)} us"


def _three(x: float) -> str:
    """Three digits, trailing zeros kept."""
    digits = 2 - (math.floor(math.log10(abs(x))) if x else 0)
    return f"{x:.{max(digits, 0)}f}"


def number(x: float | None, digits: int = 3) -> str:
    """A number for a table; what is missing or infinite in words."""
    if x is None:
        return "-"
    return "inf" if math.isinf(x) else f"{x:.{digits}g}"
