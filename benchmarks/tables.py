"""Writes the tables of README.md from the specs and from benchmarks/results: `make tables`, `--check` only compares."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from mpkernels.commands.bench_tables import cells
from mpkernels.commands.terminal import seconds
from mpkernels.spec import OpSpec, all_specs

ROOT = Path(__file__).resolve().parents[1]
FILE = "splatting.json"  # of benchmarks/splatting.py
BACKENDS = {  # backend -> what there is of it, in an op's folders
    "reference": "mpkernels/{family}/{op}/reference.py",
    "cpu": "csrc/{family}/{op}.cpp",
    "triton": "mpkernels/{family}/{op}/triton.py",
    "cuda": "csrc/{family}/{op}.cu",
    "fibres": "csrc/{family}/{op}.cu",
}


def ops() -> list[str]:
    """Every op, its formula, and the backends that have sources for it."""
    lines = [f"| op | formula | {' | '.join(BACKENDS)} |", f"|---|---|{'---|' * len(BACKENDS)}"]
    for spec in all_specs():
        marks = ["yes" if _source(spec, path).exists() else "-" for path in BACKENDS.values()]
        lines.append(f"| `{spec.name}` | {spec.formula} | {' | '.join(marks)} |")
    return lines


def _source(spec: OpSpec, path: str) -> Path:
    return ROOT / path.format(family=spec.family, op=spec.op)


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


def written(text: str, name: str, lines: list[str]) -> str:
    """``text`` with what stands between the marks of a table replaced."""
    marks = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)"
    body = "\n".join(lines)
    result, count = re.subn(marks, lambda m: f"{m[1]}\n{body}\n\n{m[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"README.md: expected one pair of marks for {name!r}, found {count}")
    return result


def main() -> None:
    """Writes the tables; with ``--check`` exits with 1 where README.md is not what would be written."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    wanted = text
    for name, table in (("ops", ops), ("results", results), ("splatting", splatting)):
        wanted = written(wanted, name, table())
    if "--check" in sys.argv[1:]:
        if wanted != text:
            raise SystemExit("README.md is not up to date: `make tables`")
    else:
        readme.write_text(wanted)


if __name__ == "__main__":
    main()
