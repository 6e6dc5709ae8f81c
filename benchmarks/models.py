"""Records what the generative models of python_models reached: out/*/report.json, for the tables of the documents.

python -m python_models.fvsbn   # and the others: each writes its report
python benchmarks/models.py     # writes benchmarks/results/<machine>/models.json; models without a report stay
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mpkernels.commands import machine, terminal

ROOT = Path(__file__).resolve().parents[1]
FILE = "models.json"
AUTOREGRESSIVE = {  # row -> folder of out/; in the order of the table
    "FVSBN": "fvsbn",
    "NADE": "nade",
    "MADE, natural order": "made_natural",
    "MADE, mixture of orders": "made",
    "gated PixelCNN": "pixelcnn/digits",
    "gated PixelCNN, RGB": "pixelcnn/photographs",
    "WaveNet": "wavenet",
    "TCN": "tcn",
}
FLOWS = {
    "NICE": "nice",
    "RealNVP": "realnvp",
    "Glow": "glow",
    "class-conditional flow": "conditional_flow",
    "SRFlow": "srflow",
    "StyleFlow": "styleflow",
    "C-Flow": "cflow",
}
ALSO = {  # row -> further figures that its table shows
    "NICE": ("log_likelihood",),
    "class-conditional flow": ("bits_per_dimension_not_told", "accuracy", "accuracy_of_nearest_neighbours"),
    "SRFlow": ("psnr_temperature_0", "psnr_bicubic", "consistency_sample", "consistency_bicubic", "diversity"),
    "StyleFlow": ("slant_moved", "thickness_moved", "breadth_moved", "others_changed", "class_kept"),
    "C-Flow": ("bits_per_dimension_not_told", "bits_per_dimension_told_another_half"),
}
REPORTS = AUTOREGRESSIVE | FLOWS
KEPT = ("data", "settings", "parameters", "steps_done", "figures", "unit", "baselines", "papers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the reports, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "out", metavar="DIR", help="where the reports are")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    asked = parser.parse_args(arguments)
    path = asked.results / machine.name("cpu") / FILE
    models = json.loads(path.read_text())["models"] if path.exists() else {}
    for row, folder in REPORTS.items():
        report = asked.output / folder / "report.json"
        if report.exists():
            found = json.loads(report.read_text())
            models[row] = {name: found[name] for name in KEPT if name in found}
            print(f"{row}: {found['figures']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"versions": machine.versions(), "models": {row: models[row] for row in REPORTS if row in models}}
    path.write_text(terminal.to_json(data) + "\n")
    print(f"recorded {path}")
    return terminal.OK


if __name__ == "__main__":
    raise SystemExit(main())
