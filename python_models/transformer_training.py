"""How the transformer is trained: optimisers, schedule, the loop with its budget, and the curve."""

from __future__ import annotations

import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from python_models.standard_library_text import BLOCK, Packed

if TYPE_CHECKING:
    from python_models.transformer import Transformer

Progress = Callable[[dict], None] | None

RATES = {"matrices": 0.02, "others": 3e-3, "ngrams": 1e-2}  # of Muon; of AdamW
WARM_UP, COOL_DOWN = 0.02, 0.6  # shares of the budget
LENGTHS = ((0.5, 256), (0.8, 512), (math.inf, BLOCK))  # of rows: until which share of the budget, how long
ROWS = 4  # of BLOCK bytes in a batch
VALIDATIONS = 10  # how often while training


class Training:
    """A model, its optimisers and the text that it reads: what a step changes.

    Args:
        model: what is trained.
        matrices: those of its parameters that Muon updates (Jordan et al. 2024); AdamW updates the others.
        embeddings: those with the rate of n-grams, of which each is seen in few batches.
        blocks: batches of (ROWS, BLOCK).
        loss: the mean of -ln p over a batch.
    """

    def __init__(
        self,
        model: Transformer,
        matrices: list[nn.Parameter],
        embeddings: list[nn.Parameter],
        blocks: Iterator[Packed],
        loss: Callable[[Packed], Tensor],
    ) -> None:
        self.model, self.blocks, self.loss = model, blocks, loss
        taken = {id(parameter) for parameter in matrices + embeddings}
        others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        groups = [{"params": others, "lr": RATES["others"]}]
        if embeddings:
            groups.append({"params": embeddings, "lr": RATES["ngrams"]})
        self.optimisers = [
            torch.optim.Muon(matrices, lr=RATES["matrices"], momentum=0.95, weight_decay=0.0),
            torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True),
        ]
        self.groups = [group for optimiser in self.optimisers for group in optimiser.param_groups]
        self.rates = [group["lr"] for group in self.groups]

    def step(self, spent: float, length: int | None = None) -> float:
        """One step of the optimisers, where this share of the budget is spent; the loss in bits per byte.

        Rates warm up, stay, and fall to zero in a straight line. Rows (or ``length``) are short at first: they are
        cheaper, and there is enough to learn from them.
        """
        factor = min(1.0, (spent + 1e-3) / WARM_UP) * min(1.0, (1 - spent) / COOL_DOWN)
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate * factor
        longest = next(least for until, least in LENGTHS if spent < until)
        loss = self.loss(next(self.blocks).cut(min(length or longest, self.model.config.context)))
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        return loss.item() / math.log(2)


class Curve(NamedTuple):
    """What training reports: a number for each step, and now and then one of text that is not trained on."""

    losses: list[float]  # bits per byte
    validation: list[tuple[int, float]]  # after how many steps, bits per byte
    seconds: float
    interrupted: bool


class Learner(Protocol):
    """What learns in steps: :class:`Training`, or that of another model."""

    def step(self, spent: float) -> float:
        """One step, where this share of the budget is spent; the loss."""
        ...


def train(
    training: Learner,
    validate: Callable[[], float],
    steps: int | None,
    minutes: float | None,
    progress: Progress = None,
) -> Curve:
    """Trains for a number of steps, or else of minutes; Ctrl-C ends it with what is learned so far."""
    losses: list[float] = []
    seen: list[tuple[int, float]] = []
    started = time.perf_counter()
    interrupted = False

    def spent() -> float:
        if steps is not None:
            return len(losses) / steps if steps > 0 else 1.0
        assert minutes is not None
        return (time.perf_counter() - started) / (60 * minutes)

    try:
        while (share := spent()) < 1:
            losses.append(training.step(share))
            report: dict[str, Any] = {"step": len(losses), "loss": statistics.fmean(losses[-20:])}
            share = min(spent(), 1.0)
            if share * VALIDATIONS >= len(seen) + 1:
                seen.append((len(losses), validate()))
                report["validation"] = seen[-1][1]
            if progress is not None:
                left = (time.perf_counter() - started) * (1 - share) / share
                progress(report | {"steps": round(len(losses) / share), "seconds_left": left, "spent": share})
    except KeyboardInterrupt:
        interrupted = True
        print(f"Interrupted after {len(losses)} steps; evaluating and writing what is learned so far.")
    return Curve(losses, seen, time.perf_counter() - started, interrupted)


def draw_curve(curve: Curve, held_out: float, others: dict[str, float], path: pathlib.Path) -> None:
    """A picture of bits per byte against bytes read, with lines for the held-out figure and those of compressors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="million bytes read", ylabel="bits per byte", ylim=(0, 4))
    million = ROWS * BLOCK / 1e6
    read = [(step + 1) * million for step in range(len(curve.losses))]
    axes.plot(read, curve.losses, color="0.8", linewidth=0.8, label="a training step")
    read_then = [step * million for step, _ in curve.validation]
    axes.plot(read_then, [bits for _, bits in curve.validation], marker=".", label="validation")
    for number, (name, bits) in enumerate(others.items()):
        if "each file" not in name:
            axes.axhline(bits, linestyle=":", color=f"C{number + 1}", label=name)
    axes.axhline(held_out, color="black", label="the model, held out")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
