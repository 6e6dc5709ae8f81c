"""Gaussian splatting of a scene: what :mod:`python_models.gaussian_splatting` does with ``--data``.

The method is that of Kerbl et al., "3D Gaussian Splatting for Real-Time Radiance Field Rendering", SIGGRAPH 2023, with
the learning rates of gsplat 1.5.3's trainer: in each step one training photograph is rendered, the loss is
0.8 |error| + 0.2 (1 - SSIM), Adam moves the Gaussians, and a strategy adds and removes some of them.

A budget of steps or of minutes drives the schedule: rates fall and the strategy stops at shares of the budget.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpkernels import splatting
from python_models import scenes
from python_models.gaussian_splatting_basics import (
    initial_gaussians,
    photometric_loss,
    psnr,
    render,
    save_picture,
    ssim,
)
from python_models.plane_sweep import shrink
from python_models.scenes import Scene

RATES = {  # of Adam; that of means is times the scene's scale, and falls to MEANS_RATE_END of itself
    "means": 1.6e-4,
    "scales": 5e-3,
    "quats": 1e-3,
    "opacities": 5e-2,
    "sh0": 2.5e-3,
    "shN": 2.5e-3 / 20,
}
MEANS_RATE_END = 0.01
REFINE_UNTIL = 0.5  # share of the budget in which the default strategy adds and removes Gaussians
RELOCATE_UNTIL = 0.8  # share of the budget in which MCMC does
EVALUATE_EVERY = 0.1  # share of the budget between two evaluations, each with a checkpoint
COARSE_UNTIL, COARSE = 0.25, 2  # share of the budget in which photographs are trained on at 1/COARSE of their size
COARSE_LEAST = 100  # pixels of the shorter side, below which photographs are always trained on as they are
SH_DEGREE_EVERY = 1000  # steps after which spherical harmonics get one degree more
MCMC_OPACITY, MCMC_SCALE = 0.01, 0.01  # weights of the mean opacity and size in the loss (Kheradmand 2024)
CHECKPOINT, PLY, RESULT = "checkpoint.pt", "scene.ply", "result.json"
STRATEGIES = ("default", "mcmc")

Progress = Callable[[dict], None] | None


@dataclass(frozen=True)
class Settings:
    """What a training run is told; a checkpoint carries it."""

    strategy: str = "default"
    sh_degree: int = 3
    points: int = 20_000  # random ones to begin with, where the scene has none
    max_gaussians: int = 60_000
    downscale: int = 1
    seed: int = 0
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy: expected one of {', '.join(map(repr, STRATEGIES))}, got {self.strategy!r}")
        for name, least, most in (("sh_degree", 0, 3), ("points", 1, 10**9), ("max_gaussians", 1, 10**9)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name}: expected an integer from {least} to {most}, got {value!r}")


@dataclass
class Budget:
    """How long to train: a number of steps, or of minutes; one of the two."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"steps: expected either steps or minutes, got {self.steps!r} and {self.minutes!r}")
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 0):
            raise ValueError(f"steps: expected an integer of at least 0, got {self.steps!r}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes: expected a positive number, got {self.minutes!r}")

    def spent(self, steps: int, seconds: float) -> float:
        """The share of the budget that is used up; 1 or more at the end."""
        if self.steps is not None:
            return steps / self.steps if self.steps else 1.0
        assert self.minutes is not None
        return seconds / (60 * self.minutes)


class CappedStrategy(splatting.DefaultStrategy):
    """The default strategy with a largest number of Gaussians: where too many would grow, the highest gradients do."""

    cap: int = 10**9

    def _grow(self, params: Any, optimizers: Any, state: dict[str, Any], step: int) -> tuple[int, int]:
        usual, count = self.grow_grad2d, len(params["means"])
        room = max(self.cap - count, 0)
        if room < count:
            mean = state["grad2d"] / state["count"].clamp_min(1)
            self.grow_grad2d = max(usual, mean.topk(room + 1).values[-1].item())  # above it are `room` at most
        try:
            return super()._grow(params, optimizers, state, step)
        finally:
            self.grow_grad2d = usual


class Interruption:
    """While it is open, Ctrl-C sets `asked` instead of raising; the second Ctrl-C raises."""

    def __enter__(self) -> Interruption:
        self.asked = False
        try:
            self._before = signal.signal(signal.SIGINT, self._ask)
        except ValueError:  # not the main thread, which alone gets signals
            self._before = None
        return self

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


class Trainer:
    """Gaussians, their optimizers and their strategy, and all else that the next step depends on."""

    def __init__(
        self,
        scene: Scene,
        settings: Settings,
        budget: Budget,
        device: torch.device,
        gaussians: torch.nn.ParameterDict | None = None,
    ) -> None:
        self.scene, self.settings, self.budget, self.device = scene, settings, budget, device
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.noise = torch.Generator(device).manual_seed(settings.seed)  # of the strategy
        self.step = 0
        self.seconds = 0.0  # since training began, over all runs
        self.order: list[int] = []  # training views still to come before all are drawn again
        self.history: list[dict[str, float]] = []
        self.viewmats, self.Ks = scene.viewmats.to(device), scene.Ks.to(device)
        self.background = scene.background.to(device) if scene.background.any() else None
        self.gaussians = (self._first_gaussians() if gaussians is None else gaussians).to(device)
        factors = {"means": scene.scale}
        self.optimizers = {
            name: torch.optim.Adam([self.gaussians[name]], lr=rate * factors.get(name, 1.0), eps=1e-15, fused=True)
            for name, rate in RATES.items()
        }
        self.strategy = self._make_strategy()
        self.state = self._first_state()

    def _first_gaussians(self) -> torch.nn.ParameterDict:
        points, colours = self.scene.points, self.scene.point_colours
        if points is None or colours is None:
            points, colours = scenes.random_points(self.scene, self.settings.points, self.generator)
        if len(points) > self.settings.max_gaussians:
            kept = torch.randperm(len(points), generator=self.generator)[: self.settings.max_gaussians]
            points, colours = points[kept], colours[kept]
        return initial_gaussians(points, colours, sh_degree=self.settings.sh_degree, largest=0.1 * self.scene.scale)

    def _make_strategy(self) -> splatting.DefaultStrategy | splatting.MCMCStrategy:
        if self.settings.strategy == "mcmc":
            return splatting.MCMCStrategy(cap_max=self.settings.max_gaussians, generator=self.noise)
        strategy = CappedStrategy(generator=self.noise)
        strategy.cap = self.settings.max_gaussians
        return strategy

    def _first_state(self) -> dict[str, Any]:
        self.strategy.check_sanity(self.gaussians, self.optimizers)
        if isinstance(self.strategy, splatting.MCMCStrategy):
            return self.strategy.initialize_state()
        return self.strategy.initialize_state(scene_scale=self.scene.scale)

    @property
    def spent(self) -> float:
        """The share of the budget that is used up."""
        return self.budget.spent(self.step, self.seconds)

    @property
    def sh_degree(self) -> int:
        """Of the colours in this step."""
        return min(self.step // SH_DEGREE_EVERY, self.settings.sh_degree)

    def _next_view(self) -> int:
        if not self.order:
            drawn = torch.randperm(len(self.scene.train), generator=self.generator).tolist()
            self.order = [self.scene.train[i] for i in drawn]
        return self.order.pop()

    def _target(self, view: int, factor: int = 1) -> tuple[Tensor, Tensor | None]:
        """A photograph (height, width, 3) averaged over squares of pixels, and where all of a square is seen."""
        image, mask = scenes.as_float(self.scene.images[view].to(self.device)), self.scene.masks[view]
        mask = None if mask is None else mask.to(self.device)
        if factor > 1:
            image = shrink(image, factor)
            mask = None if mask is None else shrink(mask[..., None].float(), factor)[..., 0] == 1
        return image, mask

    def render(self, view: int, factor: int = 1) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """A view of the scene as the Gaussians show it now, at 1/factor of the photograph's size."""
        height, width = (size // factor for size in self.scene.images[view].shape[:2])
        K = self.Ks[view].clone()
        K[:2] /= factor
        return render(
            self.gaussians,
            self.viewmats[view],
            K,
            width,
            height,
            sh_degree=self.sh_degree,
            background=self.background,
            backend=self.settings.backend,
        )

    def train_step(self) -> float:
        """One step on one photograph; returns its loss."""
        spent = min(self.spent, 1.0)
        means_rate = RATES["means"] * self.scene.scale * MEANS_RATE_END**spent
        self.optimizers["means"].param_groups[0]["lr"] = means_rate
        view = self._next_view()
        small = min(self.scene.images[view].shape[:2]) < COARSE_LEAST
        factor = COARSE if spent < COARSE_UNTIL and not small else 1
        target, mask = self._target(view, factor)
        picture, _, info = self.render(view, factor)
        self.strategy.step_pre_backward(self.gaussians, self.optimizers, self.state, self.step, info)
        loss = photometric_loss(picture, target, mask, self.settings.backend)
        if self.settings.strategy == "mcmc":
            loss = loss + MCMC_OPACITY * torch.sigmoid(self.gaussians["opacities"]).mean()
            loss = loss + MCMC_SCALE * self.gaussians["scales"].exp().mean()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of step {self.step} is {value}; the last checkpoint is as it was")
        loss.backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._refine(info, spent, means_rate)
        self.step += 1
        return value

    def _refine(self, info: dict[str, Any], spent: float, means_rate: float) -> None:
        arguments = (self.gaussians, self.optimizers, self.state, self.step, info)
        if isinstance(self.strategy, splatting.MCMCStrategy):
            self.strategy.refine_stop_iter = self.step + 1 if spent < RELOCATE_UNTIL else self.step
            self.strategy.step_post_backward(*arguments, lr=means_rate)
        elif spent < REFINE_UNTIL:
            self.strategy.refine_stop_iter = self.step + 1
            self.strategy.step_post_backward(*arguments)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """PSNR in dB and SSIM of the held-out views, means over them."""
        views = self.scene.held_out or self.scene.train[:1]
        found = []
        for view in views:
            target, mask = self._target(view)
            picture = self.render(view)[0]
            found.append((psnr(picture, target, mask), ssim(picture, target, mask, self.settings.backend)))
        both = [sum(column) / len(found) for column in zip(*found, strict=True)]
        return {"psnr_held_out": both[0], "ssim_held_out": both[1], "gaussians": len(self.gaussians["means"])}

    def save(self, path: pathlib.Path) -> None:
        """Writes a checkpoint; the old one is there until the new one is whole."""
        content = {
            "settings": dataclasses.asdict(self.settings),
            "budget": dataclasses.asdict(self.budget),
            "views": self.scene.names,
            "step": self.step,
            "seconds": self.seconds,
            "order": self.order,
            "history": self.history,
            "generators": [self.generator.get_state(), self.noise.get_state()],
            "gaussians": {name: value.detach() for name, value in self.gaussians.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "state": self.state,
        }
        partial = path.with_name(path.name + ".partial")
        torch.save(content, partial)
        os.replace(partial, path)

    @classmethod
    def load(
        cls, path: pathlib.Path, scene: Scene, settings: Settings, budget: Budget, device: torch.device
    ) -> Trainer:
        """The trainer that :meth:`save` wrote; the next step is the one it would have made.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it is of other settings or another scene; the message says which.
        """
        if not path.is_file():
            raise FileNotFoundError(f"resume: expected a checkpoint, there is none: {path}")
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in dataclasses.asdict(settings).items():
            if content["settings"][name] != value:
                before = content["settings"][name]
                raise ValueError(f"{name}: expected {before!r} as in {path}, got {value!r}")
        if content["views"] != scene.names:
            raise ValueError(
                f"data: expected the views of {path}, {content['views'][:3]} ..., got {scene.names[:3]} ..."
            )
        gaussians = {name: torch.nn.Parameter(value) for name, value in content["gaussians"].items()}
        trainer = cls(scene, settings, budget, device, torch.nn.ParameterDict(gaussians))
        for name, optimizer in trainer.optimizers.items():
            optimizer.load_state_dict(content["optimizers"][name])
        trainer.state = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in content["state"].items()
        }
        for name in ("step", "seconds", "order", "history"):
            setattr(trainer, name, content[name])
        trainer.generator.set_state(content["generators"][0])
        trainer.noise.set_state(content["generators"][1])
        return trainer

    def save_ply(self, path: pathlib.Path) -> None:
        """Writes the Gaussians as viewers of 3DGS read them."""
        splatting.save_ply(path, **{name: value.detach().cpu() for name, value in self.gaussians.items()})


def _loop(trainer: Trainer, progress: Progress, checkpoint: pathlib.Path) -> bool:
    """Trains until the budget is used up, or until Ctrl-C; returns whether it was that. Evaluates now and then."""
    begun = time.perf_counter() - trainer.seconds
    begun_steps, begun_seconds = trainer.step, trainer.seconds
    average, seen = math.nan, trainer.history[-1] if trainer.history else {}
    mark = math.floor(trainer.spent / EVALUATE_EVERY)
    with Interruption() as interruption:
        while trainer.spent < 1 and not interruption.asked:
            loss = trainer.train_step()
            average = loss if math.isnan(average) else 0.95 * average + 0.05 * loss
            trainer.seconds = time.perf_counter() - begun
            if math.floor(trainer.spent / EVALUATE_EVERY + 1e-9) > mark and trainer.spent < 1:
                mark = math.floor(trainer.spent / EVALUATE_EVERY + 1e-9)
                seen = {"step": trainer.step, "seconds": trainer.seconds, **trainer.evaluate()}
                trainer.history.append(seen)
                trainer.save(checkpoint)
                trainer.seconds = time.perf_counter() - begun
            if progress is not None:
                spent = trainer.spent
                if trainer.budget.minutes is not None:
                    left = 60 * trainer.budget.minutes - trainer.seconds
                    steps = max(round(trainer.step / max(spent, 1e-9)), trainer.step)
                else:
                    assert trainer.budget.steps is not None
                    steps = trainer.budget.steps
                    pace = (trainer.seconds - begun_seconds) / (trainer.step - begun_steps)
                    left = pace * (steps - trainer.step)
                report = {"step": trainer.step, "steps": steps, "loss": average, "seconds_left": max(left, 0.0)}
                report |= {"gaussians": len(trainer.gaussians["means"]), "spent": min(spent, 1.0)}
                if "psnr_held_out" in seen:
                    report["psnr_held_out"] = seen["psnr_held_out"]
                try:
                    progress(report)
                except KeyboardInterrupt:
                    interruption.asked = True
    return trainer.spent < 1


@torch.no_grad()
def _pictures(trainer: Trainer, output: pathlib.Path) -> list[dict[str, str]]:
    """Three held-out views, each beside its photograph."""
    views = trainer.scene.held_out
    chosen = sorted({views[i * (len(views) - 1) // 2] for i in range(3)}) if views else []
    entries = []
    for number, view in enumerate(chosen):
        target, mask = trainer._target(view)
        picture = trainer.render(view)[0]
        if mask is not None:
            picture = torch.where(mask[..., None], picture, target)
        name = f"held_out_{number}.png"
        save_picture(output / name, target, picture, (picture - target).abs() * 4)
        caption = "A photograph that was held out, the Gaussians from its camera, and the difference times 4."
        entries.append({"file": name, "title": f"Held-out view {trainer.scene.names[view]}", "caption": caption})
    return entries


def train(
    data: str | pathlib.Path,
    *,
    output: str | pathlib.Path,
    steps: int | None = None,
    minutes: float | None = None,
    settings: Settings | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    progress: Progress = None,
) -> dict:
    """Train Gaussians on a scene and say how well they show its held-out views.

    Args:
        data: the scene's folder, see :func:`python_models.scenes.load_scene`.
        output: a folder, made if missing: checkpoint.pt, scene.ply, result.json and pictures.
        steps: the budget in steps, or
        minutes: in minutes, evaluations included. 20 minutes if neither is given.
        settings: all else; what a resumed run is told must be what it was told before, but for the budget.
        resume: go on from the checkpoint in `output`. With the same budget of steps and the same number of threads,
            what comes out is bit for bit what it would have been without a stop.
        device: "cpu" (default) or "cuda".
        progress: called after each step with step, steps, loss (a running mean), seconds_left, gaussians, spent
            (the share of the budget) and, once it is known, psnr_held_out.

    Returns:
        A JSON-serialisable dict: figures of the held-out views, their history, pictures, timings, and whether Ctrl-C
        ended training.
    """
    settings = settings or Settings()
    budget = Budget(steps, 20.0 if steps is None and minutes is None else minutes)
    kind = str(device or "cpu").partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: expected 'cpu', or 'cuda' where torch finds a GPU, got {str(device)!r}")
    place = torch.device(device or "cpu")
    scene = scenes.load_scene(data, downscale=settings.downscale)
    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / CHECKPOINT
    if resume:
        trainer = Trainer.load(checkpoint, scene, settings, budget, place)
    else:
        trainer = Trainer(scene, settings, budget, place)
    begun = trainer.seconds, trainer.step
    interrupted = _loop(trainer, progress, checkpoint)
    trainer.save(checkpoint)
    trainer.save_ply(output / PLY)
    done = trainer.step - begun[1]
    result = {
        "model": "gaussian_splatting",
        "data": f"{pathlib.Path(data).resolve().name}: {len(scene.train)} photographs, {len(scene.held_out)} held out",
        "settings": dataclasses.asdict(settings) | dataclasses.asdict(budget) | {"device": str(place)},
        "steps_done": trainer.step,
        "interrupted": interrupted,
        "figures": trainer.evaluate(),
        "history": trainer.history,
        "pictures": _pictures(trainer, output),
        "ply": PLY,
        "timings": {
            "train_seconds": trainer.seconds,
            "seconds_per_step": (trainer.seconds - begun[0]) / max(done, 1),
        },
    }
    (output / RESULT).write_text(json.dumps(result, indent=2) + "\n")
    return result
