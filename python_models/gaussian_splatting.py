"""Gaussian splatting (Kerbl et al., SIGGRAPH 2023) through :func:`mpkernels.splatting.rasterization`.

    python -m python_models.gaussian_splatting                      # the stereo pair that scikit-image ships
    python -m python_models.gaussian_splatting --data DIR           # photographs with cameras
    python -m python_models.gaussian_splatting --image FILE         # one photograph, in two dimensions

By default the left photograph of a pair becomes Gaussians by its disparity, they are fitted to the left photograph
alone, and the right one, which takes part in nothing else, says how well they show what is seen from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.resources
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import mpkernels
from mpkernels import splatting
from python_models import gaussian_splatting_basics as basics
from python_models import gaussian_splatting_stereo as stereo
from python_models import gaussian_splatting_training as training
from python_models.plane_sweep import StereoPair, load_motorcycle

Progress = Callable[[dict], None] | None

STEREO_RATES = {"scales": 5e-3, "opacities": 2e-2, "sh0": 5e-3}  # of Adam; depths come from disparity and stay
STEREO_WIDTH = 0.5  # standard deviation of a Gaussian at first, in pixels
STEREO_OPACITY = 0.98
STEREO_BLUR = 0.1  # eps2d, pixels squared: a third of what is usual, as every pixel has its own Gaussian
SIZE_LOSS = 0.01  # weight of how much Gaussians leave their first size, which the left view alone does not tell


def _check_integers(**values: tuple[int, int]) -> None:
    for name, (value, least) in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def fit(
    *,
    steps: int = 100,
    scale: int = 1,
    backend: str | None = None,
    seed: int = 0,
    output: pathlib.Path | None,
    progress: Progress = None,
) -> dict:
    """Fit Gaussians to the left photograph of the Motorcycle pair and say how well they show the right one.

    Args:
        steps: of Adam, 0 or more.
        scale: photographs are averaged over squares of so many pixels; 1: 741x500.
        backend: of :func:`mpkernels.splatting.rasterization`; None chooses.
        seed: without an influence: nothing is random.
        output: a folder for the pictures, scene.ply and report.json, made if missing; None writes nothing.
        progress: called after each step with step, steps, loss, seconds_left and, now and then, psnr_held_out.

    Returns:
        A JSON-serialisable dict: figures of the right photograph (PSNR in dB, SSIM), of the same warped by disparity
        (the baseline), pictures, timings.
    """
    _check_integers(steps=(steps, 0), scale=(scale, 1))
    started = time.perf_counter()
    pair = stereo.at_scale(load_motorcycle(), scale)
    cameras = stereo.StereoCameras.at(scale)
    gaussians = stereo.surface_gaussians(pair, cameras, width=STEREO_WIDTH, opacity=STEREO_OPACITY)
    warped, holes = stereo.warp_baseline(pair.left, pair.disparity)

    def view(number: int) -> Tensor:
        height, width = pair.disparity.shape
        K, viewmat = cameras.Ks[number], cameras.viewmats[number]
        return basics.render(gaussians, viewmat, K, width, height, sh_degree=0, eps2d=STEREO_BLUR, backend=backend)[0]

    def figures(right: Tensor) -> dict[str, float]:
        return {
            "psnr_right": basics.psnr(right, pair.right),
            "ssim_right": basics.ssim(right, pair.right, backend=backend),
            "psnr_right_seen_by_left": basics.psnr(right, pair.right, ~holes),
            "psnr_right_unseen_by_left": basics.psnr(right, pair.right, holes),
        }

    with torch.no_grad():
        before = figures(view(1))
    fitting = time.perf_counter()
    losses = _fit_left(gaussians, pair.left, lambda: view(0), lambda: view(1), pair.right, steps, backend, progress)
    fitted = time.perf_counter()
    with torch.no_grad():
        left, right = view(0), view(1)
    result = {
        "model": "gaussian_splatting",
        "data": f"Middlebury 2014 Motorcycle, as shipped in scikit-image, at {pair.left.shape[1]}x{pair.left.shape[0]}",
        "settings": {"steps": steps, "scale": scale, "seed": seed, "backend": backend},
        "gaussians": len(gaussians["means"]),
        "share_unseen_by_left": holes.float().mean().item(),
        "steps_done": len(losses),
        "figures": figures(right) | {"psnr_left": basics.psnr(left, pair.left)},
        "figures_before_fitting": before,
        "baseline_warped_by_disparity": figures(warped),
        "loss": {"first": losses[0], "last": losses[-1]} if losses else {},
        "pictures": [],
        "timings": {
            "fit_seconds": fitted - fitting,
            "seconds_per_step": (fitted - fitting) / max(len(losses), 1),
            "total_seconds": time.perf_counter() - started,
        },
    }
    if output is not None:
        output = pathlib.Path(output)
        result["pictures"] = _stereo_pictures(output, pair, left, right, warped, holes)
        splatting.save_ply(output / training.PLY, **{name: value.detach() for name, value in gaussians.items()})
        (output / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _fit_left(
    gaussians: torch.nn.ParameterDict,
    photograph: Tensor,
    view_left: Callable[[], Tensor],
    view_right: Callable[[], Tensor],
    right: Tensor,
    steps: int,
    backend: str | None,
    progress: Progress,
) -> list[float]:
    """Adam on sizes, opacities and colours; the right photograph is for the progress report alone. The losses."""
    groups = [{"params": [gaussians[name]], "lr": rate} for name, rate in STEREO_RATES.items()]
    optimiser = torch.optim.Adam(groups, eps=1e-15, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    first_sizes = gaussians["scales"].detach().clone()
    losses: list[float] = []
    started = time.perf_counter()
    try:
        for step in range(steps):
            loss = basics.photometric_loss(view_left(), photograph, None, backend)
            loss = loss + SIZE_LOSS * (gaussians["scales"] - first_sizes).square().mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
            if progress is not None:
                report = {"step": step + 1, "steps": steps, "loss": losses[-1]}
                if step % 20 == 0 or step + 1 == steps:
                    with torch.no_grad():
                        report["psnr_held_out"] = basics.psnr(view_right(), right)
                report["seconds_left"] = (time.perf_counter() - started) / (step + 1) * (steps - step - 1)
                progress(report)
    except KeyboardInterrupt:
        print(f"Interrupted after {len(losses)} of {steps} steps; writing what is fitted so far.")
    return losses


def _stereo_pictures(
    output: pathlib.Path, pair: StereoPair, left: Tensor, right: Tensor, warped: Tensor, holes: Tensor
) -> list[dict[str, str]]:
    output.mkdir(parents=True, exist_ok=True)
    masked = torch.where(holes[..., None], pair.right * 0.15 + 0.85, pair.right)
    shown = [
        ("left", "Left photograph", "Fitted to, with its disparity.", pair.left),
        ("left_rendered", "Left view of the Gaussians", "One for each pixel of the left photograph.", left),
        ("right", "Right photograph", "Held out: seen by nothing but the figures.", pair.right),
        ("right_rendered", "Right view of the Gaussians", "What the left camera did not see is guessed.", right),
        ("right_warped", "Baseline", "The left photograph warped by disparity, holes filled by the nearest.", warped),
        ("right_error", "Error of the Gaussians", "Absolute difference, times 4.", (right - pair.right).abs() * 4),
        ("warped_error", "Error of the baseline", "Absolute difference, times 4.", (warped - pair.right).abs() * 4),
        ("unseen", "Unseen by the left camera", "White: no left pixel of known disparity lands there.", masked),
    ]
    for name, _, _, picture in shown:
        basics.save_picture(output / f"{name}.png", picture)
    return [{"file": f"{name}.png", "title": title, "caption": caption} for name, title, caption, _ in shown]


def fit_image(
    image: Tensor, *, gaussians: int = 2000, steps: int = 500, seed: int = 0, progress: Progress = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Fit Gaussians to one picture (height, width, 3) in [0, 1]: an orthographic camera looks at the plane z = 1.

    Returns the picture that they make, and the Gaussians: arguments of rasterization before exp and sigmoid.
    """
    height, width, _ = image.shape
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(gaussians, 2, generator=generator) * torch.tensor([width, height])  # in pixels
    size = 0.5 * math.sqrt(height * width / gaussians)
    params = {
        "means": torch.cat([place, torch.ones(gaussians, 1)], dim=1),
        "scales": torch.full((gaussians, 3), math.log(size)),
        "quats": torch.tensor([1.0, 0, 0, 0]) + 0.1 * torch.randn(gaussians, 4, generator=generator),
        "opacities": torch.zeros(gaussians),
        "colors": image[place[:, 1].long(), place[:, 0].long()].clone(),
    }
    rates = {"means": 0.2, "scales": 0.02, "quats": 0.02, "opacities": 0.02, "colors": 0.01}
    groups = [{"params": [value.requires_grad_()], "lr": rates[name]} for name, value in params.items()]
    optimizer = torch.optim.Adam(groups, fused=True)

    def render() -> Tensor:
        shown = (params["means"], params["quats"], params["scales"].exp(), params["opacities"].sigmoid())
        camera = (torch.eye(4)[None], torch.eye(3)[None], width, height)
        return splatting.rasterization(*shown, params["colors"], *camera, camera_model="ortho")[0][0]

    for step in range(steps):
        loss = (render() - image).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress is not None:
            report = {"step": step + 1, "steps": steps, "loss": loss.item()}
            progress(report | {"psnr": -10 * math.log10(max(loss.item(), 1e-12)), "gaussians": gaussians})
    with torch.no_grad():
        return render(), {name: value.detach() for name, value in params.items()}


def load_image(path: pathlib.Path | None, longest: int = 512) -> Tensor:
    """A picture (height, width, 3) in [0, 1] of at most `longest` pixels a side; None: scikit-image's astronaut."""
    if path is None:
        path = pathlib.Path(str(importlib.resources.files("skimage") / "data" / "astronaut.png"))
    if not path.is_file():
        raise FileNotFoundError(f"image: expected a file, got {str(path)!r}")
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except OSError as error:
        raise ValueError(f"image: expected a picture that pillow reads, got {str(path)!r} ({error})") from error
    picture.thumbnail((longest, longest))
    return torch.from_numpy(np.array(picture)).float() / 255


def run_image(
    path: pathlib.Path | None,
    *,
    output: pathlib.Path,
    gaussians: int = 2000,
    steps: int = 500,
    seed: int = 0,
    progress: Progress = None,
) -> dict:
    """:func:`fit_image` of a file, with its figures and the picture written to the folder `output`."""
    _check_integers(gaussians=(gaussians, 1), steps=(steps, 0))
    image = load_image(path)
    started = time.perf_counter()
    picture, _ = fit_image(image, gaussians=gaussians, steps=steps, seed=seed, progress=progress)
    seconds = time.perf_counter() - started
    output.mkdir(parents=True, exist_ok=True)
    basics.save_picture(output / "image.png", image, picture)
    caption = f"The photograph, and {gaussians} Gaussians fitted to it."
    result = {
        "model": "gaussian_splatting",
        "data": f"{'astronaut (scikit-image)' if path is None else path.name} at {image.shape[1]}x{image.shape[0]}",
        "settings": {"gaussians": gaussians, "steps": steps, "seed": seed},
        "figures": {"psnr": basics.psnr(picture, image), "ssim": basics.ssim(picture, image)},
        "pictures": [{"file": "image.png", "title": "One photograph", "caption": caption}],
        "timings": {"fit_seconds": seconds, "seconds_per_step": seconds / max(steps, 1)},
    }
    (output / training.RESULT).write_text(json.dumps(result, indent=2) + "\n")
    return result


_MODES = {  # which options each way of running takes; those that are not given keep its defaults
    "data": ("strategy", "sh_degree", "points", "max_gaussians", "downscale", "seed", "backend", "steps", "minutes")
    + ("resume", "device"),
    "image": ("gaussians", "steps", "seed"),
    "pair": ("steps", "scale", "seed", "backend"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fit 3D Gaussians to photographs: by default, to a stereo pair.")
    parser.add_argument("--data", type=pathlib.Path, help="folder: transforms.json, or a COLMAP model and images")
    parser.add_argument("--image", nargs="?", const="", help="fit one picture in 2-D (without FILE: an astronaut)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out/gaussian_splatting"), help="folder")
    parser.add_argument("--steps", type=int, help="of Adam (with --data: the budget; else --minutes)")
    parser.add_argument("--minutes", type=float, help="with --data: the budget, 20 if neither is given")
    parser.add_argument("--resume", action="store_true", default=None, help="with --data: go on from --output")
    parser.add_argument("--strategy", help="with --data: default or mcmc")
    parser.add_argument("--sh-degree", type=int, help="with --data: of colours, 0 to 3")
    parser.add_argument("--points", type=int, help="with --data: random ones to begin with, where there are none")
    parser.add_argument("--max-gaussians", type=int, help="with --data: never more than this")
    parser.add_argument("--downscale", type=int, help="with --data: average squares of so many pixels")
    parser.add_argument("--device", help="with --data: cpu or cuda")
    parser.add_argument("--gaussians", type=int, help="with --image: how many")
    parser.add_argument("--scale", type=int, help="of the stereo pair: average squares of so many pixels")
    parser.add_argument("--seed", type=int, help="of everything random")
    parser.add_argument("--backend", help="of mpkernels.splatting.rasterization")
    return parser


def _run(arguments: argparse.Namespace, given: dict[str, Any], progress: Progress) -> dict:
    if arguments.data is not None:
        names = {field.name for field in dataclasses.fields(training.Settings)}
        settings = training.Settings(**{name: value for name, value in given.items() if name in names})
        others = {name: value for name, value in given.items() if name not in names}
        return training.train(arguments.data, output=arguments.output, settings=settings, progress=progress, **others)
    if arguments.image is not None:
        path = pathlib.Path(arguments.image) if arguments.image else None
        return run_image(path, output=arguments.output, progress=progress, **given)
    return fit(output=arguments.output, progress=progress, **given)


def main() -> None:
    """The command line: fits with a progress bar, then prints the figures."""
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.table import Table

    parser = _parser()
    arguments = parser.parse_args()
    if arguments.data is not None and arguments.image is not None:
        parser.error("--image: expected one of --data and --image, got both")
    mode = "data" if arguments.data is not None else "image" if arguments.image is not None else "pair"
    options = {name: value for name, value in vars(arguments).items() if name not in ("data", "image", "output")}
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in _MODES[mode]:
            ways = [f"--{way}" for way in ("data", "image") if name in _MODES[way]] or ["neither --data nor --image"]
            parser.error(f"--{name.replace('_', '-')}: expected {' or '.join(ways)} with it")
    kinds = (rich_progress.BarColumn(), rich_progress.TextColumn("{task.fields[text]}"))
    with rich_progress.Progress(*kinds) as bar:
        task = bar.add_task("", total=1.0, text="preparing")
        seen: dict[str, Any] = {}

        def show(report: dict) -> None:
            seen.update(report)
            name = "psnr_held_out" if "psnr_held_out" in seen else "psnr"
            parts = [f"step {seen['step']}/{seen['steps']}", f"loss {seen['loss']:.4f}"]
            parts += [f"{name.replace('psnr', 'PSNR').replace('_', ' ')} {seen[name]:.2f} dB"] if name in seen else []
            parts += [f"{seen['gaussians']} Gaussians"] if "gaussians" in seen else []
            left = seen.get("seconds_left")
            parts += [f"{int(left) // 60}:{int(left) % 60:02} left"] if left is not None else []
            share = report.get("spent", report["step"] / max(report["steps"], 1))
            bar.update(task, completed=share, text="  ".join(parts))

        try:
            result = _run(arguments, given, show)
        except (ValueError, FileNotFoundError, mpkernels.BackendError) as error:
            bar.stop()
            parser.error(str(error))
    table = Table("figure", "value")
    groups = {"": result["figures"], "baseline: ": result.get("baseline_warped_by_disparity", {})}
    for prefix, group in {**groups, "time: ": result["timings"]}.items():
        for name, value in group.items():
            table.add_row(prefix + name, str(value) if isinstance(value, int) else f"{value:.3f}")
    console = Console()
    console.print(table)
    for picture in result["pictures"]:
        console.print(f"{arguments.output / picture['file']}: {picture['title']}", soft_wrap=True)
    if result.get("interrupted"):
        console.print("Interrupted; --resume goes on from here.")
        raise SystemExit(130)


if __name__ == "__main__":
    main()
