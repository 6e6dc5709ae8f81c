"""How models of likelihood are trained: AdamW, an average of the weights, and the best of them on validation data.

And what their commands share: the check of a budget, a bar of progress, a table and a curve of the result.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from python_models.transformer_training import Curve, Progress

M = TypeVar("M", bound=nn.Module)
B = TypeVar("B")

WARM_UP, COOL_DOWN = 0.03, 0.6  # shares of the budget in which the rate rises, and falls to zero
MOMENTUM = 0.998  # of the average of the weights, in the end


class Training(Generic[M, B]):
    """A model, its optimiser and what it learns from; its steps fit :func:`python_models.transformer_training.train`.

    Args:
        model: what is trained; :meth:`finish` gives it the best weights.
        batches: what it learns from, without end.
        loss: what falls, of the model and a batch.
        rate: of AdamW, after the warm-up.
        weight_decay: of AdamW, for matrices and larger tensors.
        shown: the loss is multiplied by this where it is shown.
    """

    def __init__(
        self,
        model: M,
        batches: Iterator[B],
        loss: Callable[[M, B], Tensor],
        *,
        rate: float,
        weight_decay: float = 0.0,
        shown: float = 1.0,
    ) -> None:
        self.model, self.batches, self.loss, self.rate, self.shown = model, batches, loss, rate, shown
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
        self.parameters = [p.detach() for p in parameters]
        self.average = [p.clone() for p in self.parameters]
        self.best: tuple[float, list[Tensor]] | None = None
        self.steps = 0

    def step(self, spent: float) -> float:
        """One step, where this share of the budget is spent; the loss."""
        factor = min(1.0, (spent + 1e-3) / WARM_UP) * min(1.0, (1 - spent) / COOL_DOWN)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * factor
        self.model.train()
        loss = self.loss(self.model, next(self.batches))
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.steps += 1
        newest = 1 - min(MOMENTUM, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.average, self.parameters, newest)
        return loss.item() * self.shown

    def validate(self, evaluate: Callable[[M], float]) -> float:
        """What ``evaluate`` (lower is better) finds for the average of the weights, which is kept if it is the best."""
        trained = [p.clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, self.average)
        found = evaluate(self.model.eval())
        torch._foreach_copy_(self.parameters, trained)
        if self.best is None or found < self.best[0]:
            self.best = found, [p.clone() for p in self.average]
        return found

    def finish(self) -> M:
        """The model with the weights that were best, or with their average if there was no validation."""
        torch._foreach_copy_(self.parameters, self.average if self.best is None else self.best[1])
        return self.model.eval()


def check_budget(minutes: float | None, steps: int | None, **counts: int) -> None:
    """Raises a ValueError unless there are minutes or steps or none of both, and each count is 1 or more."""
    for name, value, least in (("steps", steps, 0), *((name, value, 1) for name, value in counts.items())):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if minutes is not None and (steps is not None or not 0 < minutes < math.inf):
        raise ValueError(f"minutes: expected a positive number, and no steps, got {minutes!r} and steps={steps!r}")


def with_progress(fit: Callable[[Progress], dict], unit: str) -> dict:
    """Runs ``fit`` with a bar of its progress, where losses are in ``unit``."""
    from rich import progress as rich_progress

    kinds = (rich_progress.BarColumn(), rich_progress.TextColumn("{task.fields[text]}"))
    with rich_progress.Progress(*kinds) as bar:
        task = bar.add_task("", total=1.0, text="preparing")
        seen: dict[str, Any] = {}

        def show(report: dict) -> None:
            seen.update(report)
            left = int(seen["seconds_left"])
            parts = [f"step {seen['step']}/{seen['steps']}", f"{seen['loss']:.3f} {unit}"]
            parts += [f"validation {seen['validation']:.3f}"] if "validation" in seen else []
            parts += [f"{left // 60}:{left % 60:02} left" if seen["spent"] < 1 else "evaluating"]
            bar.update(task, completed=seen["spent"], text="  ".join(parts))

        return fit(show)


def print_result(result: dict, output: pathlib.Path | None) -> None:
    """A table of figures, of baselines and earlier models beside them, and of timings; then what was written."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", result["unit"].replace("_", " "), title=f"{result['model']}: {result['data']}")
    table.add_row("held out", f"{result['figures'][result['unit']]:.3f}", style="bold")
    for name, value in (result["baselines"] | result.get("earlier_models", {})).items():
        table.add_row(name, f"{value:.3f}")
    console = Console()
    console.print(table)
    unit = result["unit"]
    more = {name: value for name, value in result["figures"].items() if name not in (unit, f"{unit}_validation")}
    if more:
        console.print(", ".join(f"{name.replace('_', ' ')} {value:.5g}" for name, value in more.items()))
    if "papers" in result:
        console.print(f"For scale, from papers: {result['papers']}. Not comparable: here is far less data.")
    console.print(", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in result["timings"].items()))
    if output is not None:
        names = ", ".join(["model.pt", "report.json", *(picture["file"] for picture in result["pictures"])])
        console.print(f"{output}: {names}", soft_wrap=True)


def draw_curve(curve: Curve, result: dict, path: pathlib.Path, top: float) -> None:
    """A picture of the loss by steps up to ``top``, with lines for the held-out figure, baselines and other models."""
    from matplotlib.figure import Figure

    unit = result["unit"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=unit.replace("_", " "))
    axes.plot(range(1, len(curve.losses) + 1), curve.losses, color="0.8", linewidth=0.8, label="a training step")
    steps, values = [step for step, _ in curve.validation], [value for _, value in curve.validation]
    axes.plot(steps, values, marker=".", label="validation")
    for number, (name, value) in enumerate((result["baselines"] | result.get("earlier_models", {})).items()):
        if value < top:
            axes.axhline(value, linestyle=":", color=f"C{number + 1}", label=name)
    axes.axhline(result["figures"][unit], color="black", label="the model, held out")
    axes.set_ylim(0, top)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
