"""Writes the tables of the documents from the specs and from benchmarks/results: `make tables`; `--check` compares."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import attention as attention_script
import convolution as convolution_script
import flows as flows_script
import models as models_script
from peers import bar
from rows import Script, cell

from mpkernels import library
from mpkernels.commands.bench_tables import cells
from mpkernels.commands.terminal import seconds
from mpkernels.spec import OpSpec, all_specs

ROOT = Path(__file__).resolve().parents[1]
FILE = "splatting.json"  # of benchmarks/splatting.py
BACKENDS = ("reference", "cpu", "triton", "cuda", "fibres")


def ops() -> list[str]:
    """Every op, its formula, and the backends that have sources for it."""
    lines = [f"| op | formula | {' | '.join(BACKENDS)} |", f"|---|---|{'---|' * len(BACKENDS)}"]
    for spec in all_specs():
        marks = ["yes" if _has_source(spec, backend) else "-" for backend in BACKENDS]
        lines.append(f"| `{spec.name}` | {spec.formula} | {' | '.join(marks)} |")
    return lines


def _has_source(spec: OpSpec, backend: str) -> bool:
    """Whether there is an implementation in the sources, built or not."""
    if backend == "reference":
        return True
    if backend == "triton":
        return library.has_kernel("mpkernels_triton", spec.op, "CUDA")
    sources = (ROOT / "csrc" / spec.family).glob("*.cpp" if backend == "cpu" else "*.cu")
    return any(f'library.impl("{spec.op}"' in source.read_text() for source in sources)


def results() -> list[str]:
    """What was recorded, a section a machine and op."""
    lines: list[str] = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/*.json")):
        data = json.loads(path.read_text())
        if "rows" not in data:
            continue
        versions = data["versions"]
        lines += [f"**{path.stem}** on `{path.parent.name}`, {data['dtype']}, torch {versions['torch']}", ""]
        lines += [
            "| | pass | backend | time | x eager | x compiled | GB/s | of copy |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in data["rows"]:
            if row["implementation"] in ("eager torch", "torch.compile"):
                continue
            name, which, time, eager, compiled, rate, share = cells(row)[:7]
            lines.append(f"| {row['workload']} | {which} | {name} | {time} | {eager} | {compiled} | {rate} | {share} |")
        lines.append("")
    return lines[:-1] if lines else ["Nothing is recorded yet."]


def splatting() -> list[str]:
    """What benchmarks/splatting.py recorded, a section a machine."""
    lines: list[str] = []
    for path in sorted((ROOT / "benchmarks" / "results").glob(f"*/{FILE}")):
        data = json.loads(path.read_text())
        scene = data["scene"]
        lines += [
            f"**{data['scene_name']}** on `{path.parent.name}`: {scene['gaussians']:,} Gaussians "
            f"({scene['seen']:,} seen), {scene['width']} x {scene['height']}, "
            f"{scene['intersections']:,} intersections, "
            "float32 RGB",
            "",
        ]
        columns = [name for name in scene if name.startswith(("threads", "seconds"))]
        peer = data.get("peer") or {}
        titles = [c.replace("threads 1", "1 thread").replace("threads 2", "2 threads") for c in columns]
        lines += [f"| step | {' | '.join(titles)} | peer, 1 thread | x peer |", "|---|" + "---|" * (len(columns) + 2)]
        for step in scene[columns[0]]:
            times = [scene[c][step] for c in columns]
            theirs = peer.get(step)
            ratio = f"{theirs / times[-1]:.1f}x" if theirs else "-"
            shown = " | ".join(seconds(t) for t in times)
            lines.append(f"| {step} | {shown} | {seconds(theirs) if theirs else '-'} | {ratio} |")
        lines.append("")
        if data.get("sweep"):
            lines += [
                "| Gaussians | pixels | intersections | drawing | ns an intersection | backward | ns an intersection "
                "| rasterization, both passes | peak memory |",
                "|---|---|---|---|---|---|---|---|---|",
            ]
            for row in data["sweep"]:
                n = row["intersections"]
                lines.append(
                    f"| {row['gaussians']:,} | {row['pixels']:,} | {n:,} | {seconds(row['drawing'])} | "
                    f"{1e9 * row['drawing'] / n:.0f} | {seconds(row['backward'])} | {1e9 * row['backward'] / n:.0f} | "
                    f"{seconds(row['whole'])} | {row['peak_bytes'] / 2**20:.0f} MiB |"
                )
            lines.append("")
    return lines[:-1] if lines else ["Nothing is recorded yet."]


def attention() -> list[str]:
    """What benchmarks/attention.py recorded on CPUs, briefly: a line for each mask and pass."""
    lines: list[str] = []
    for machine, data in _recorded("cpu"):
        lines += [f"**attention** on `{machine}`, torch {data['versions']['torch']}", ""]
        lines += [
            "| | pass | float32 | x SDPA | x FlexAttention | bfloat16 | x SDPA | x FlexAttention |",
            "|---|---|---|---|---|---|---|---|",
        ]
        by_row: dict[tuple[str, str], dict[str, dict]] = {}
        for row in data["measured"]:
            if not row["memory"]:
                by_row.setdefault((_title(row), row["which"]), {})[row["dtype"]] = row
        for (title, which), rows in by_row.items():
            columns = [_brief(rows.get(dtype)) for dtype in ("float32", "bfloat16")]
            lines.append(f"| {title} | {which} | {' | '.join(columns)} |")
        lines.append("")
    return lines[:-1] if lines else ["Nothing is recorded yet."]


def attention_in_full() -> list[str]:
    """Everything that benchmarks/attention.py recorded, beside what issue 4 asks."""
    lines: list[str] = []
    for device in ("cpu", "cuda"):
        for machine, data in _recorded(device):
            rows = data["measured"]
            peers = [name for name in attention_script.CONTESTANTS[1:] if any(name in r["seconds"] for r in rows)]
            lines += [f"On `{machine}`, torch {data['versions']['torch']}:", ""]
            lines += [f"| | pass | dtype | mpkernels | {' | '.join(peers)} | rate | asked |"]
            lines += [f"|---|---|---|---|{'---|' * len(peers)}---|---|"]
            for row in rows:
                shown = [attention_script.cell(row, name, device) for name in ("mpkernels", *peers)]
                shown += [attention_script.rate(row), attention_script.bar(row)]
                lines.append(f"| {_title(row)} | {row['which']} | {row['dtype']} | {' | '.join(shown)} |")
            lines.append("")
    return lines[:-1] if lines else ["Nothing is recorded yet."]


def convolution() -> list[str]:
    """What benchmarks/convolution.py recorded, without what was asked."""
    return _peers(convolution_script.SCRIPT, asked=False)


def convolution_in_full() -> list[str]:
    """Everything that benchmarks/convolution.py recorded, beside what issue 5 asks."""
    return _peers(convolution_script.SCRIPT, asked=True)


def flows() -> list[str]:
    """What benchmarks/flows.py recorded, without what was asked."""
    return _peers(flows_script.SCRIPT, asked=False)


def flows_in_full() -> list[str]:
    """Everything that benchmarks/flows.py recorded, beside what issue 6 asks."""
    return _peers(flows_script.SCRIPT, asked=True)


def _peers(script: Script, asked: bool) -> list[str]:
    lines: list[str] = []
    family = script.file.removesuffix("_peers.json")
    for device in ("cpu", "cuda"):
        for machine, data in _recorded(device, script.file):
            found = data["measured"]
            peers = script.measured(found)[1:]
            lines += [f"**{family}** on `{machine}`, {data['threads']} threads, torch {data['versions']['torch']}", ""]
            lines += [f"| | pass | mpkernels | {' | '.join(peers)} | figures |" + (" asked |" if asked else "")]
            lines += [f"|---|---|---|{'---|' * len(peers)}---|" + ("---|" if asked else "")]
            for row in found:
                shown = [cell(row, name) for name in ("mpkernels", *peers)]
                shown += [script.figures(row) or "-", *([bar(row) or "-"] if asked else [])]
                memory = ", peak memory" if row["memory"] else ""
                lines.append(f"| {row['what']}{memory} | {row['which']} | {' | '.join(shown)} |")
            lines.append("")
    return lines[:-1] if lines else ["Nothing is recorded yet."]


def models() -> list[str]:
    """What the autoregressive models reached."""
    return _models(models_script.AUTOREGRESSIVE)


def flow_models() -> list[str]:
    """What the flows reached."""
    return _models(models_script.FLOWS)


def _models(names: Iterable[str]) -> list[str]:
    """What models reached, as benchmarks/models.py recorded it."""
    lines: list[str] = []
    for path in sorted((ROOT / "benchmarks" / "results").glob(f"*/{models_script.FILE}")):
        found = json.loads(path.read_text())["models"]
        lines += [f"On `{path.parent.name}`:", ""]
        lines += ["| model | data | held out | baselines | training | papers |", "|---|---|---|---|---|---|"]
        for name in names:
            if name not in found:
                continue
            row = found[name]
            unit = row["unit"].replace("_", " ")
            beaten = ", ".join(f"{what} {value:.4g}" for what, value in row["baselines"].items())
            minutes, steps = row["settings"].get("minutes"), row["steps_done"]
            trained = f"{steps:,} steps" + (f", {minutes:g} minutes" if minutes else "")
            value = f"**{row['figures'][row['unit']]:.4g}** {unit}"
            for also in models_script.ALSO.get(name, ()):
                value += f", {also.replace('_', ' ')} {row['figures'][also]:.4g}"
            lines.append(f"| {name} | {row['data']} | {value} | {beaten} | {trained} | {row.get('papers', '-')} |")
        lines.append("")
    return lines[:-1] if lines else ["Nothing is recorded yet."]


def _recorded(device: str, file: str = attention_script.FILE) -> list[tuple[str, dict]]:
    """(machine, what was recorded there on a device)."""
    paths = sorted((ROOT / "benchmarks" / "results").glob(f"*/{file}"))
    found = [(path.parent.name, json.loads(path.read_text())) for path in paths]
    return [(name, data) for name, data in found if data["device"] == device]


def _title(row: dict) -> str:
    """The name without pass and dtype."""
    memory = ", peak memory" if row["memory"] else ""
    return row["name"].split(f", {row['which']}, ")[0] + memory


def _brief(row: dict | None) -> str:
    """Our time and the ratios to it, as three cells."""
    if row is None or "mpkernels" not in row["seconds"]:
        return "- | - | -"
    ratios = [row["reached"].get(f"x {name}") for name in ("SDPA", "FlexAttention")]
    shown = [f"{x:.2f}x" if x else "-" for x in ratios]
    rate = f" ({row['reached']['GB/s']:.1f} GB/s)" if "GB/s" in row["reached"] else ""
    return f"{seconds(row['seconds']['mpkernels'])}{rate} | {' | '.join(shown)}"


TABLES = {
    "README.md": {
        "ops": ops,
        "results": results,
        "splatting": splatting,
        "attention": attention,
        "convolution": convolution,
        "flows": flows,
    },
    "docs/attention.md": {"attention": attention_in_full},
    "docs/convolution.md": {"convolution": convolution_in_full},
    "docs/autoregressive.md": {"models": models},
    "docs/flows.md": {"flows": flows_in_full, "models": flow_models},
}


def written(text: str, name: str, lines: list[str], document: str) -> str:
    """``text`` with what stands between the marks of a table replaced."""
    marks = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)"
    body = "\n".join(lines)
    result, count = re.subn(marks, lambda m: f"{m[1]}\n{body}\n\n{m[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{document}: expected one pair of marks for {name!r}, found {count}")
    return result


def main() -> None:
    """Writes the tables; with ``--check`` exits with 1 where a document is not what would be written."""
    for document, tables in TABLES.items():
        path = ROOT / document
        text = wanted = path.read_text()
        for name, table in tables.items():
            wanted = written(wanted, name, table(), document)
        if "--check" not in sys.argv[1:]:
            path.write_text(wanted)
        elif wanted != text:
            raise SystemExit(f"{document} is not up to date: `make tables`")


if __name__ == "__main__":
    main()
