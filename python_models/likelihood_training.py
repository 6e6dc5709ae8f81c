"""How models of likelihood are trained: AdamW, an average of the weights, and the best of them on validation data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

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
