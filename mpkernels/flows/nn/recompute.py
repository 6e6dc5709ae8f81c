"""A chain of transforms whose activations are rebuilt in backward, from the outputs, through the inverses.

Forward runs without recording anything and keeps the outputs and a few states between steps. Backward walks back: it
rebuilds a step's inputs from its outputs, differentiates that step alone, and forgets it. So the most that lives at a
time is the graph of one step, whatever their number.

Which states are kept (:class:`Plan`): the inputs of steps that lose them, and either every k-th state, or those where
rebuilding was measured to drift: the first pass of a chain, and every 100th after it, keeps all states, rebuilds them
beside that, and records where the rebuilt state has gone further than ``drift_limit`` from the kept one.
Its gradients are those at the kept states. A kept state is where rebuilding starts again, free of what had drifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from mpkernels.flows.nn.base import (
    Rebuilt,
    Transform,
    add,
    gradients_at,
    no_log_abs_det,
    rebuild_by_inverse,
    rebuilding,
    run,
)

MEASURED_AGAIN = 100  # passes from one measurement of the drift to the next


class Step(NamedTuple):
    """A transform of a chain, and its direction."""

    transform: nn.Module
    inverse: bool

    def loses_input(self) -> bool:
        """Whether the inputs have to be kept."""
        return getattr(self.transform, "loses_input", False)

    def rebuild(self, outputs: Tensor, context: Any) -> Rebuilt:
        """From outputs to inputs."""
        if isinstance(self.transform, Transform):
            return self.transform.rebuild(outputs, context, self.inverse)
        return rebuild_by_inverse(self.transform, outputs, context, self.inverse)


class Plan:
    """Which states of a chain are kept; learns from the drift where it is not told."""

    def __init__(self, every: int | None, drift_limit: float):
        self.every = every
        self.drift_limit = drift_limit
        self.passes = 0
        self.kept: tuple[bool, ...] = ()
        self.drifts: tuple[float, ...] = ()

    def next_pass(self, steps: Sequence[Step]) -> tuple[tuple[bool, ...], bool]:
        """(for each step whether its inputs are kept, whether this pass measures the drift)."""
        number = len(steps)
        if self.every is not None:
            at = [(number - i) % self.every == 0 and i > 0 for i in range(number)]
            return tuple(kept or step.loses_input() for kept, step in zip(at, steps, strict=True)), False
        if len(self.kept) != number:
            self.passes = 0
        measures = self.passes % MEASURED_AGAIN == 0
        self.passes += 1
        return ((True,) * number if measures else self.kept), measures

    def learn(self, kept: Sequence[bool], drifts: Sequence[float]) -> None:
        """Takes in what a measuring pass found."""
        self.kept, self.drifts = tuple(kept), tuple(drifts)


class _TensorOfContext:
    """Stands in a context for a tensor, which comes as an argument."""


class _Job(NamedTuple):
    """What does not change from forward to backward."""

    steps: Sequence[Step]
    plan: Plan
    parameters: list[list[nn.Parameter]]  # of each step
    leaves: list  # of the context, _TensorOfContext for a tensor
    form: Any
    tensors: int  # number of tensors in the context

    def context(self, tensors: Sequence[Tensor]) -> Any:
        """The context with the given tensors in it."""
        these = iter(tensors)
        return pytree.tree_unflatten([next(these) if x is _TensorOfContext else x for x in self.leaves], self.form)


@torch.compiler.disable
def chain(steps: Sequence[Step], plan: Plan, inputs: Tensor, context: Any) -> tuple[Tensor, Tensor]:
    """Runs ``steps`` one after another; (outputs, log_abs_det), differentiable once."""
    leaves, form = pytree.tree_flatten(context)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    leaves = [_TensorOfContext if isinstance(x, Tensor) else x for x in leaves]
    parameters = [[p for p in step.transform.parameters() if p.requires_grad] for step in steps]
    different = {id(p): p for of_step in parameters for p in of_step}
    for step in steps:
        _refuse_batch_norm(step.transform)
    job = _Job(steps, plan, parameters, leaves, form, len(tensors))
    return _Recompute.apply(job, inputs, *tensors, *different.values())  # pyright: ignore[reportReturnType]


def _refuse_batch_norm(transform: nn.Module) -> None:
    for module in transform.modules():
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
            raise ValueError(
                f"memory: expected 'store' for a network with {type(module).__name__} in training, whose running "
                "statistics a second run would change again, got 'recompute'"
            )


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, job, inputs, *others):
        device = inputs.device
        context = job.context(others[: job.tensors])
        keep, ctx.measures = job.plan.next_pass(job.steps)
        ctx.job, ctx.kept_at, ctx.random_states = job, [], []
        ctx.autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        kept = []
        state, total = inputs, no_log_abs_det(inputs)
        before = _random_state(device)
        for i, step in enumerate(job.steps):
            if keep[i]:
                kept.append(state)
                ctx.kept_at.append(i)
            state, log_abs_det = run(step.transform, state, context, step.inverse)
            total = total + log_abs_det
            after = _random_state(device)
            drew = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            ctx.random_states.append(before if drew else None)
            before = after if drew else before
        # parameters are saved so that autograd sees when one was changed before backward
        ctx.save_for_backward(state, *kept, *others)
        return state, total

    @staticmethod
    def backward(ctx, *gradients):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "memory: gradients of gradients (create_graph=True) need Sequential(memory='store'), got 'recompute'"
            )
        job, number = ctx.job, len(ctx.kept_at)
        grad_state, grad_log_abs_det = gradients
        outputs, *saved = ctx.saved_tensors
        kept = dict(zip(ctx.kept_at, saved[:number], strict=True))
        others = saved[number:]
        needs = ctx.needs_input_grad[2:]
        tensors = [x.detach().requires_grad_(n) for x, n in zip(others[: job.tensors], needs, strict=False)]
        context = job.context(tensors)
        wanted = [x for x in tensors if x.requires_grad]
        found: dict[int, Tensor | None] = {}
        drift = _Drift(job, outputs) if ctx.measures else None

        for i in reversed(range(len(job.steps))):
            step = job.steps[i]
            with _without_hooks(job.parameters[i]), _conditions(outputs.device, ctx.random_states[i], ctx.autocast):
                if i in kept:
                    inputs = kept[i]
                    grad_state, of_others = gradients_at(
                        step.transform, inputs, context, step.inverse, grad_state, grad_log_abs_det,
                        [*wanted, *job.parameters[i]],
                    )  # fmt: skip
                else:
                    inputs, of_step = step.rebuild(outputs, context)
                    grad_state, of_others = of_step(grad_state, grad_log_abs_det, [*wanted, *job.parameters[i]])
                    del of_step
            if drift is not None:
                with _conditions(outputs.device, ctx.random_states[i], ctx.autocast), torch.no_grad():
                    drift.measure(i, inputs, context)
            for x, g in zip([*wanted, *job.parameters[i]], of_others, strict=True):
                found[id(x)] = add(found.get(id(x)), g)
            outputs = inputs

        if drift is not None:
            job.plan.learn(drift.keep, drift.found)
        originals = [*tensors, *others[job.tensors :]]
        return None, grad_state, *(found.get(id(x)) if n else None for x, n in zip(originals, needs, strict=True))


class _Drift:
    """Rebuilds the states of a pass that kept them all, and says which of them have to be kept in later passes."""

    def __init__(self, job: _Job, outputs: Tensor):
        self.steps, self.limit = job.steps, job.plan.drift_limit
        self.state = outputs
        self.keep = [False] * len(job.steps)
        self.found = [0.0] * len(job.steps)

    def measure(self, i: int, inputs: Tensor, context: Any) -> None:
        """Goes back over step ``i``, whose inputs were ``inputs``."""
        step = self.steps[i]
        if not step.loses_input():
            self.state, _ = run(step.transform, self.state, context, not step.inverse)
            if inputs.numel():
                furthest, largest = torch.stack([(self.state - inputs).abs().amax(), inputs.abs().amax()]).tolist()
                self.found[i] = furthest / largest if largest > 0 else furthest
        if step.loses_input() or not self.found[i] <= self.limit:  # a NaN is kept too
            self.keep[i] = True
            self.state = inputs


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    if device.type == "cuda":
        return torch.get_rng_state(), torch.cuda.get_rng_state(device)
    return (torch.get_rng_state(),)


def _set_random_state(device: torch.device, state: Sequence[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def _without_hooks(parameters: Sequence[Tensor]):
    """Parameters' hooks see the gradient that the chain returns, not the parts that it is made of."""
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    try:
        for registered, _ in hooks:
            registered.clear()
        yield
    finally:
        for registered, own in hooks:
            registered.update(own)


@contextmanager
def _conditions(device: torch.device, random_state: Sequence[Tensor] | None, autocast: tuple[bool, torch.dtype]):
    """The random numbers and the autocast that a step had in forward."""
    now = _random_state(device) if random_state is not None else ()
    outer, rebuilding.active = rebuilding.active, True
    try:
        if random_state is not None:
            _set_random_state(device, random_state)
        # without autocast's cache: what it keeps from a run without gradients would stop those of a later one
        with torch.autocast(device.type, enabled=autocast[0], dtype=autocast[1], cache_enabled=False):
            yield
    finally:
        rebuilding.active = outer
        if random_state is not None:
            _set_random_state(device, now)
