"""``mpkernels report``: one page of everything that was validated, measured, compiled and rendered."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from mpkernels.commands import bench, bench_tables, demo, info, machine, report_page, terminal, validate
from mpkernels.commands.plan import Request

PAGE = "index.html"


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise terminal.UsageError("--output", f"{path} is no JSON: {error}; delete it, or run with --fresh") from error


def validation(output: Path, fresh: bool) -> dict:
    """The results of ``validate --output``, or of validating now."""
    path = output / "validation.json"
    if path.exists() and not fresh:
        return _read(path)
    data = validate.collect(Request())
    if not data["interrupted"]:
        path.write_text(terminal.to_json(data) + "\n")
    return data


def benches(fresh: bool, allowed: bool) -> list[dict]:
    """Recorded results of every machine, this one's first; measured now if this one has none."""
    here = machine.name(machine.devices()[-1])
    paths = sorted(bench.RESULTS.glob("*/*.json"), key=lambda path: (path.parent.name != here, path))
    recorded = [data for data in map(_read, paths) if "rows" in data]  # (other scripts record there too)
    mine = [data for data in recorded if data["machine_name"] == here]
    if allowed and (fresh or not mine):
        recorded = [bench.collect(bench.Request()), *(data for data in recorded if data not in mine)]
    return recorded


def demos(output: Path) -> list[dict]:
    """Results of demos inside the output folder."""
    return [_read(path) | {"folder": path.parent.name} for path in sorted(output.glob(f"*/{demo.RESULT}"))]


def kernels() -> dict | None:
    """The recorded resources of compiled kernels, if there are any."""
    try:
        from mpkernels.profiling import resources

        return asdict(resources.read_table())
    except (ImportError, FileNotFoundError):
        return None


def _cells(*cells: object, style: str = "") -> dict:
    return {"cells": [str(cell) for cell in cells], "style": style}


def _validation_section(data: dict) -> dict:
    rows = [
        _cells(*cells, style="" if row["ok"] else "bad")
        for row, cells in zip(data["rows"], map(validate.cells, data["rows"]), strict=True)
    ]
    failures = [
        f"{row['op']}, {row['backend']}, {row['dtype']}: {validate.detail(f)}"
        for row in data["rows"]
        for f in row["failures"]
    ]
    return {
        "headers": validate.HEADERS,
        "numbers": validate.NUMBERS,
        "rows": rows,
        "failures": failures,
        "holes": validate.holes(data),
        "verdict": validate.verdict(data),
        "date": data["date"],
    }


def _bench_section(data: dict) -> dict:
    tables = [
        {
            "title": f"{op}: {workload}",
            "rows": [_cells(*bench_tables.cells(row), style="default" if row["default"] else "") for row in rows],
        }
        for (op, workload), rows in bench_tables.groups(data).items()
    ]
    return {
        "setting": bench_tables.setting(data),
        "peers": bench_tables.peers(data),
        "ceilings": bench_tables.ceilings(data),
        "headlines": bench_tables.headlines(data),
        "headers": bench_tables.HEADERS,
        "numbers": bench_tables.NUMBERS,
        "tables": tables,
    }


def _demo_section(data: dict, output: Path) -> dict:
    pictures = []
    for picture in data.get("pictures", []):
        source = Path(picture["file"])
        name = f"{data['folder']}/{source.name}"
        if source.is_absolute() and source.exists() and source != (output / name).resolve():
            shutil.copyfile(source, output / name)
        pictures.append({"src": name, "title": picture["title"], "caption": picture["caption"]})
    return {
        "name": data["demo"],
        "data": data.get("data", ""),
        "date": data.get("date"),
        "pictures": pictures,
        "figures": [_cells(*row) for row in demo.figures(data)],
    }


def _kernel_section(data: dict | None) -> dict | None:
    if data is None:
        return None
    headers = ("source", "kernel", "architecture", "threads", "registers", "shared bytes", "spilled bytes")
    rows = [
        _cells(
            *(k["source"], k["kernel"], k["arch"], k["threads_per_block"] or "-"),
            *(k["registers"], k["shared_bytes"], k["spill_bytes"]),
            style="bad" if k["spill_bytes"] else "",
        )
        for k in data["kernels"]
    ]
    return {"nvcc": data["nvcc"], "triton": data["triton"], "headers": headers, "numbers": headers[3:], "rows": rows}


def collect(output: Path, *, fresh: bool, bench: bool) -> dict:
    """All parts of the page, for JSON."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "info": info.collect(),
        "validation": validation(output, fresh),
        "benches": benches(fresh, bench),
        "demos": demos(output),
        "kernels": kernels(),
    }


def page(data: dict, output: Path) -> str:
    """The page as HTML; copies pictures that are not in the output folder yet."""
    matrix: dict[str, dict[str, list[dict]]] = {}
    for cell in data["info"]["matrix"]:
        matrix.setdefault(cell["device"], {}).setdefault(cell["op"], []).append(cell)
    sections = [_bench_section(found) for found in data["benches"]]
    summary = [validate.verdict(data["validation"])]
    if data["benches"]:
        mine = machine.name(machine.devices()[-1])
        summary += [x for b in data["benches"] if b["machine_name"] == mine for x in bench_tables.headlines(b)]
    if not data["demos"]:
        summary.append("No demo has run yet: mpkernels demo")
    return report_page.render(
        date=data["date"],
        info=data["info"],
        summary=summary,
        demos=[_demo_section(found, output) for found in data["demos"]],
        matrix=matrix,
        validation=_validation_section(data["validation"]),
        benches=sections,
        kernels=_kernel_section(data["kernels"]),
    )


def run(output: Path, *, fresh: bool, bench: bool, as_json: bool) -> int:
    """Writes the page and says where; exit status 1 where a check fails."""
    output.mkdir(parents=True, exist_ok=True)
    data = collect(output, fresh=fresh, bench=bench)
    path = output / PAGE
    path.write_text(page(data, output))
    if as_json:
        terminal.print_json(data | {"page": os.fspath(path)})
    else:
        console = terminal.output()
        console.print(validate.verdict(data["validation"]))
        console.print(f"{path}", soft_wrap=True)
    if data["validation"]["interrupted"] or any(found["interrupted"] for found in data["benches"]):
        return terminal.INTERRUPTED
    return terminal.OK if data["validation"]["ok"] else terminal.WRONG
