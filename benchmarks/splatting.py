"""Times each step of Gaussian splatting on one scene, and how cost grows; records both for README.md.

    python benchmarks/splatting.py [--scene FILE.npz] [--sweep] [--record] [--seconds S] [--device cpu|cuda]

The scene: an .npz with means, scales, quats, opacities, colors, viewmats, Ks, width, height, as gsplat's profiling
script prepares its garden scene; without one, a synthetic scene of about the same cost. Steps are timed in turn, with
one thread and with all (medians). ``--sweep`` goes from 10k to 1M Gaussians and from 1/4 to 4 times the pixels, each in
a process of its own, whose peak memory is read beside. On a GPU gsplat is timed beside, where it can be imported.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from mpkernels import splatting
from mpkernels.commands import machine, terminal
from mpkernels.profiling import timing

ROOT = Path(__file__).resolve().parents[1]
FILE = "splatting.json"
COUNTS = (10_000, 30_000, 100_000, 300_000, 1_000_000)
SCALES = (0.5, 2**-0.5, 1.0, 2**0.5, 2.0)  # of the side: 1/4 to 4 times the pixels

# OpenSplat's CPU rasterizer (one thread, no tiles) on the garden scene, view 0, measured once on a machine of this
# kind; its licence keeps it out of this repository, so it is not run here.
PEER = {"projection": 17e-3, "forward": 425e-3, "backward": 340e-3}


def load(path: Path) -> dict[str, Tensor | int]:
    """A scene from an .npz; only its first view is drawn."""
    import numpy

    with numpy.load(path) as data:
        missing = {"means", "scales", "quats", "opacities", "colors", "viewmats", "Ks", "width", "height"} - set(data)
        if missing:
            raise SystemExit(f"--scene: expected arrays {', '.join(sorted(missing))} in {path}, got {', '.join(data)}")
        scene = {name: torch.from_numpy(data[name]) for name in data if data[name].ndim}
        return scene | {name: int(data[name]) for name in ("width", "height")}


def synthetic(count: int = 111_785, width: int = 648, height: int = 420) -> dict[str, Tensor | int]:
    """Gaussians of up to 0.02 in a box of 4 x 4 x 1.5, on and above a floor, seen from one side."""
    g = torch.Generator().manual_seed(0)
    means = (torch.rand(count, 3, generator=g) - 0.5) * torch.tensor([4.0, 1.5, 4.0])
    viewmat = torch.eye(4)
    viewmat[2, 3] = 3.2
    focal = 0.75 * width
    return {
        "means": means,
        "quats": torch.randn(count, 4, generator=g),
        "scales": torch.rand(count, 3, generator=g) * 0.02,
        "opacities": torch.rand(count, generator=g),
        "colors": torch.rand(count, 3, generator=g),
        "viewmats": viewmat[None],
        "Ks": torch.tensor([[[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]]),
        "width": width,
        "height": height,
    }


def resized(scene: dict, scale: float) -> dict:
    """The same view with more or fewer pixels."""
    K = scene["Ks"].clone()
    K[:, :2] *= scale
    return scene | {"Ks": K, "width": round(scene["width"] * scale), "height": round(scene["height"] * scale)}


class Steps:
    """The steps of one view as functions without arguments."""

    def __init__(self, scene: dict, device: str = "cpu"):
        scene = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in scene.items()}
        self.gaussians = [scene[name].requires_grad_() for name in ("means", "quats", "scales")]
        self.opacities, self.colors = scene["opacities"].requires_grad_(), scene["colors"].requires_grad_()
        self.cameras = (scene["viewmats"][:1], scene["Ks"][:1])
        self.size = (scene["width"], scene["height"])
        with torch.no_grad():
            self.projected = self.project()
            self.tiles = self.intersect()
        self.leaves = [x.detach().clone().requires_grad_() for x in self.drawn()]
        self.image_grad = torch.rand(1, self.size[1], self.size[0], 3, device=device)
        self.image = self.draw(self.leaves).colors
        self.reprojected = self.project()

    def project(self):
        return splatting.project_gaussians(*self.gaussians, *self.cameras, *self.size, opacities=self.opacities)

    def intersect(self):
        p = self.projected
        return splatting.intersect_tiles(
            *(p.means2d, p.radii, p.depths, *self.size),
            conics=p.conics,
            opacities=self.opacities.detach()[None],
        )

    def drawn(self):
        return self.projected.means2d, self.projected.conics, self.colors[None], self.opacities[None]

    def draw(self, tensors):
        return splatting.rasterize(*tensors, *self.size, self.tiles.isect_offsets, self.tiles.flatten_ids)

    def functions(self) -> dict[str, Callable[[], object]]:
        def without_gradient(function):
            def run():
                with torch.no_grad():
                    return function()

            return run

        p = self.reprojected
        projection_grads = [torch.rand_like(x) for x in (p.means2d, p.conics)]

        def whole():
            image, _, _ = splatting.rasterization(
                *(*self.gaussians, self.opacities, self.colors, *self.cameras, *self.size), packed=False
            )
            torch.autograd.grad(image, [*self.gaussians, self.opacities, self.colors], self.image_grad)

        return {
            "projection": without_gradient(self.project),
            "intersection": without_gradient(self.intersect),
            "drawing": without_gradient(lambda: self.draw(self.leaves)),
            "forward": without_gradient(lambda: (self.intersect(), self.draw(self.leaves))),
            "backward": lambda: torch.autograd.grad(self.image, self.leaves, self.image_grad, retain_graph=True),
            "backward of projection": lambda: torch.autograd.grad(
                (p.means2d, p.conics), self.gaussians, projection_grads, retain_graph=True
            ),
            "rasterization, forward and backward": whole,
        }


def measure(scene: dict, seconds: float, device: str) -> dict:
    """Median seconds of each step, for one thread and for all."""
    found: dict = {"gaussians": len(scene["means"]), "width": scene["width"], "height": scene["height"]}
    threads = torch.get_num_threads()
    for count in sorted({1, threads}) if device == "cpu" else (threads,):
        torch.set_num_threads(count)
        steps = Steps(scene, device)
        functions = steps.functions()
        times = timing.paired(functions, budget_s=seconds, min_rounds=5, device=device)
        found["intersections"] = steps.tiles.flatten_ids.numel()
        found["seen"] = int((steps.projected.radii > 0).all(-1).sum())
        found[f"threads {count}" if device == "cpu" else "seconds"] = {n: timing.median(times, n) for n in functions}
    torch.set_num_threads(threads)
    return found


def one_of_sweep(count: int, scale: float) -> dict:
    """One configuration of the sweep, in this process: times, intersections, and how much the peak memory grew."""
    scene = resized(synthetic(count), scale)
    steps = Steps(scene)
    functions = steps.functions()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chosen = {n: functions[n] for n in ("projection", "intersection", "drawing", "backward")}
    chosen["whole"] = functions["rasterization, forward and backward"]
    chosen["whole"]()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    times = timing.paired(chosen, budget_s=3.0, min_rounds=3)
    return {
        "gaussians": count,
        "pixels": scene["width"] * scene["height"],
        "intersections": steps.tiles.flatten_ids.numel(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "grown_bytes": grown,
        **{n: timing.median(times, n) for n in chosen},
    }


def sweep(console: Console) -> list[dict]:
    """All configurations, each in a new process."""
    rows = []
    configurations = [(count, 1.0) for count in COUNTS] + [(100_000, scale) for scale in SCALES if scale != 1]
    for count, scale in configurations:
        command = [sys.executable, __file__, "--one", str(count), str(scale)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command[1:])} failed:\n{done.stderr[-2000:]}")
        rows.append(json.loads(done.stdout))
        r = rows[-1]
        per = r["intersections"]
        console.print(
            f"{count:>9,} Gaussians, {r['pixels']:>9,} pixels, {per:>10,} intersections: "
            f"drawing {terminal.seconds(r['drawing'])} ({1e9 * r['drawing'] / per:.1f} ns an intersection), "
            f"backward {terminal.seconds(r['backward'])}, whole {terminal.seconds(r['whole'])}, "
            f"peak {r['peak_bytes'] / 2**20:.0f} MiB"
        )
    return rows


def beside_gsplat(scene: dict, seconds: float, console: Console) -> list[dict]:
    """On a GPU: ours and gsplat's whole pipeline in turn, the scene repeated 1 to 9 times beside itself."""
    try:
        import gsplat
    except ImportError:
        gsplat = None
        console.print("gsplat cannot be imported: absolute times alone")
    rows = []
    for side in (1, 2, 3):
        wide = _repeated(scene, side)
        names = ("means", "quats", "scales", "opacities", "colors", "viewmats", "Ks")
        tensors = {n: wide[n].cuda().requires_grad_(n not in ("viewmats", "Ks")) for n in names}
        leaves = [tensors[n] for n in names[:5]]
        grad = torch.rand(1, wide["height"], wide["width"], 3, device="cuda")
        functions: dict[str, Callable[[], object]] = {}
        row = {"times": side * side, "gaussians": len(wide["means"])}
        for name, render in (
            ("mpkernels", splatting.rasterization),
            ("gsplat", getattr(gsplat, "rasterization", None)),
        ):
            if render is None:
                continue

            draw = functools.partial(render, *tensors.values(), wide["width"], wide["height"], packed=False)
            forward = torch.no_grad()(draw)
            both = functools.partial(_both, draw, leaves, grad)

            functions |= {f"{name} forward": forward, f"{name} forward and backward": both}
            torch.cuda.reset_peak_memory_stats()
            both()
            row[f"{name} peak_bytes"] = torch.cuda.max_memory_allocated()
        times = timing.paired(functions, budget_s=seconds, device="cuda")
        row |= {name: timing.median(times, name) for name in functions}
        rows.append(row)
        console.print(row)
    return rows


def _both(draw, leaves: list[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(draw()[0], leaves, grad)


def _repeated(scene: dict, side: int) -> dict:
    """The scene side by side, ``side`` squared times, as gsplat's profiling enlarges it."""
    if side == 1:
        return scene
    step = scene["means"].amax(0) - scene["means"].amin(0)
    offsets = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float() - (side - 1) / 2
    names = ("quats", "scales", "opacities", "colors")
    means = torch.cat([scene["means"] + step * torch.tensor([x, 0.0, y]) for x, y in offsets.tolist()])
    return scene | {"means": means} | {n: scene[n].repeat(side * side, *(1,) * (scene[n].dim() - 1)) for n in names}


def show(data: dict, console: Console) -> None:
    """The steps as a table."""
    scene = data["scene"]
    console.print(
        f"{scene['gaussians']:,} Gaussians ({scene['seen']:,} seen), {scene['width']} x {scene['height']}, "
        f"{scene['intersections']:,} intersections"
    )
    columns = [name for name in scene if name.startswith(("threads", "seconds"))]
    table = terminal.table("step", *columns, "peer, 1 thread", numbers=(*columns, "peer, 1 thread"))
    for step in scene[columns[0]]:
        peer = PEER.get(step) if data["scene_name"] == "garden" else None
        table.add_row(
            step, *(terminal.seconds(scene[c][step]) for c in columns), terminal.seconds(peer) if peer else "-"
        )
    console.print(table)


def main() -> int:
    """Measures, prints, records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", type=Path, help="an .npz (default: a synthetic scene)")
    parser.add_argument("--name", default=None, help="what to call the scene in the record (default: the file's name)")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--one", nargs=2, metavar=("COUNT", "SCALE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(one_of_sweep(int(asked.one[0]), float(asked.one[1]))))
        return 0
    if asked.scene is not None and not asked.scene.is_file():
        parser.error(f"--scene: expected an .npz file, got {asked.scene}")
    console = terminal.output()
    scene = load(asked.scene) if asked.scene else synthetic()
    name = asked.name or (asked.scene.stem.removesuffix("_scene") if asked.scene else "synthetic")
    data: dict = {
        "versions": machine.versions(),
        "machine": machine.describe(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "load_before": machine.load(),
        "scene_name": name,
        "peer": PEER if name == "garden" else None,
        "scene": measure(scene, asked.seconds, asked.device),
    }
    show(data, console)
    path = ROOT / "benchmarks" / "results" / machine.name(asked.device) / FILE
    if path.exists():
        data = {k: v for k, v in json.loads(path.read_text()).items() if k in ("sweep", "gsplat")} | data
    try:
        if asked.sweep:
            data["sweep"] = sweep(console)
        if asked.device == "cuda":
            data["gsplat"] = beside_gsplat(scene, asked.seconds, console)
    except KeyboardInterrupt:
        console.print("Interrupted: the rest was not measured.")
    if asked.record:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n")
        console.print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
