"""What the benchmarks beside other people's kernels share: rows that are asked for, bars, memory, the record."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import resource
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch._functorch.config

from mpkernels.commands import terminal

ROOT = Path(__file__).resolve().parents[1]
MEMORY = "x inputs and outputs"  # the growth of the resident set by that
OF_MEMORY = "of its memory"  # the growth by that of the other
AT_MOST = (MEMORY, OF_MEMORY)  # of the other bars, more is better


class Named(Protocol):
    """A row."""

    @property
    def name(self) -> str: ...


AnyRow = TypeVar("AnyRow", bound=Named)


def resident(name: str) -> int:
    """A size that Linux tells of this process, in bytes; elsewhere the most that was ever resident."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def judged(found: dict) -> list[tuple[str, float, float | None, bool]]:
    """(figure, asked, reached, met) for each bar of a row."""
    verdicts = []
    for figure, asked in found["bars"].items():
        value = found["reached"].get(figure)
        met = value is not None and (value <= asked if figure in AT_MOST else value >= asked)
        verdicts.append((figure, asked, value, met))
    return verdicts


def bar(found: dict) -> str:
    """The bars of a row, and whether they are met, in words."""
    return "; ".join(
        f"{figure} {asked:g}: {'met' if met else 'not measured' if value is None else 'MISSED'}"
        for figure, asked, value, met in judged(found)
    )


def chosen(rows: Iterable[AnyRow], only: Sequence[str]) -> list[AnyRow]:
    """The rows whose names have all the words of one of ``only``; all without any."""
    return [row for row in rows if not only or any(all(w in row.name for w in words.split()) for words in only)]


def record(data: dict, path: Path, names: Sequence[str]) -> None:
    """Writes the results; rows of the file that were not measured now stay, in the order of ``names``."""
    kept = json.loads(path.read_text())["measured"] if path.exists() else []
    found = {row["name"]: row for row in [*kept, *data["measured"]]}
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data | {"measured": [found[name] for name in names if name in found]}
    path.write_text(terminal.to_json(data) + "\n")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every such script has; :func:`check` says what is wrong with them."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--record", action="store_true")
    found.add_argument("--only", action="append", default=[], metavar="WORDS", help="of a row's name (repeatable)")
    found.add_argument("--threads", type=int, help="default: torch's")
    found.add_argument("--quick", action="store_true", help="an eighth of each length: to see that everything runs")
    found.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    found.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS", help="start no row after them")
    found.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    found.add_argument("--one", nargs=2, metavar=("ROW", "NAME"), help=argparse.SUPPRESS)
    return found


def check(found: argparse.ArgumentParser, asked: argparse.Namespace) -> argparse.Namespace:
    """``asked``, unless it is wrong: then the script ends, and says why."""
    if asked.record and asked.quick:
        found.error("--record: expected whole lengths, got --quick")
    if asked.threads is not None and asked.threads < 1:
        found.error(f"--threads: expected at least 1, got {asked.threads}")
    if asked.device == "cuda" and not torch.cuda.is_available():
        found.error("--device: expected cpu, got cuda: no CUDA device is visible to torch")
    return asked


def keep_freed_memory() -> None:
    """Has glibc reuse memory that was freed, as caching allocators do, for all contestants.

    By default it may return a large tensor to the system with every call, and the next call then waits for fresh pages:
    several times the time of a memory-bound kernel, or not, from one process to the next.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mappings of single tensors
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


@contextlib.contextmanager
def settings(threads: int | None) -> Iterator[None]:
    """Threads; graphs of FlexAttention that can be run backward again; no warnings about what we know."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    with torch._functorch.config.patch(donated_buffer=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(before)
