"""The error of an implementation against float64, and the bound that it must stay within.

The bound comes from data: ``error(kernel, float64) <= 2 error(reference in the same dtype, float64) + band``, where the
band is 8 roundings of the largest number in the result (a reference that happens to be exact must not fail a kernel
that rounds). Errors are the largest absolute difference over the tensor. No wider type judges float64 itself: there the
bound is 4096 roundings of the larger of 1 and the largest number, about 1e-12. Integers must be equal.

Where an op has thresholds (a culled Gaussian, the least alpha that is drawn), rounding decides what lies on one: its
spec may allow a number of elements a tensor, its flips, to exceed the bound. In float64 none may.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpkernels.spec import Arguments, Case, OpSpec

ROUNDINGS = 8
ROUNDINGS_FLOAT64 = 4096


@dataclass(frozen=True)
class Comparison:
    """One tensor of an implementation against float64."""

    name: str  # of the output, or "grad <argument>"
    error: float
    bound: float
    problem: str | None = None  # a wrong shape or dtype, or a NaN, in words

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound (and no NaN appeared where float64 has none)."""
        return self.problem is None and self.error <= self.bound

    def __str__(self) -> str:
        text = f"{self.name}: error {self.error:.3g}, bound {self.bound:.3g}"
        return f"{text} ({self.problem})" if self.problem else text


def compare(name: str, got: Tensor, reference: Tensor, gold: Tensor, scale: float = 0.0, flips: int = 0) -> Comparison:
    """Compares ``got`` with ``gold`` (float64), allowed twice the error of ``reference`` (same dtype) and a band.

    ``flips`` is how many elements may be farther away. ``scale`` is the size of the terms that a result is the
    difference of, where that may be far above the result (1 - opacity of an opaque ray): the band is of roundings of
    the larger of both.
    """
    if got.shape != gold.shape:
        return Comparison(name, float("inf"), 0.0, f"expected shape {tuple(gold.shape)}, got {tuple(got.shape)}")
    if got.dtype != reference.dtype:
        return Comparison(name, float("inf"), 0.0, f"expected {reference.dtype}, got {got.dtype}")
    if not got.dtype.is_floating_point:
        return Comparison(name, _largest((got.detach().cpu().long() - gold.detach().cpu().long()).double(), flips), 0.0)
    wide = got.detach().to("cpu", torch.float64)
    gold = gold.detach().to("cpu", torch.float64)
    low = reference.detach().to("cpu", torch.float64)
    if got.dtype == torch.float64:
        band = ROUNDINGS_FLOAT64 * torch.finfo(torch.float64).eps * max(_largest(gold), 1.0)
    else:
        band = ROUNDINGS * torch.finfo(got.dtype).eps * max(_largest(gold), scale, torch.finfo(got.dtype).tiny)
    bound = 2 * _largest((low - gold).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), flips) + band
    different = wide.isfinite() != gold.isfinite()
    if different.any():
        index = tuple(different.nonzero()[0].tolist())
        return Comparison(
            name, float("inf"), bound, f"{wide[index].item()} at {index}, float64 gives {gold[index].item()}"
        )
    return Comparison(name, _largest((wide - gold).nan_to_num(nan=0.0), flips), bound)


def _largest(x: Tensor, passed_over: int = 0) -> float:
    """The largest magnitude, ``passed_over`` larger ones left out."""
    x = x[x.isfinite()].abs()
    if x.numel() <= passed_over:
        return 0.0
    return float(x.max() if passed_over == 0 else x.flatten().topk(passed_over + 1).values[-1])


def upcast(arguments: Arguments, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Arguments:
    """The same arguments with floating-point tensors in another dtype."""

    def convert(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().to(device, dtype if x.is_floating_point() else x.dtype)

    return {name: convert(x) for name, x in arguments.items()}


def gradients(
    function: Callable[..., Sequence[Tensor]], arguments: Arguments, differentiable: Sequence[str], seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Outputs of ``function``, and gradients for fixed random gradients of all its floating-point outputs."""
    leaves = {
        name: arguments[name].detach().requires_grad_()
        for name in differentiable
        if isinstance(arguments.get(name), Tensor)
    }
    outputs = tuple(function(**(arguments | leaves)))
    generator = torch.Generator().manual_seed(seed)
    seeds = [
        (torch.rand(x.shape, generator=generator, dtype=torch.float64) + 0.25).to(x.device, x.dtype) for x in outputs
    ]
    pairs = [(x, g) for x, g in zip(outputs, seeds, strict=True) if x.requires_grad]
    if not pairs or not leaves:
        return outputs, {}
    found = torch.autograd.grad([x for x, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True)
    return outputs, {
        name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), found, strict=True)
    }


def check_case(
    spec: OpSpec,
    case: Case,
    *,
    backend: str | None = None,
    implementation: Callable[..., Sequence[Tensor]] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backward: bool = True,
) -> list[Comparison]:
    """Runs one case on a backend (or on a function of your own) and compares outputs and gradients with float64.

    Args:
        spec: the op, from :func:`mpkernels.spec.find`.
        case: one of ``spec.cases``.
        backend: which of ours to check. Not with ``implementation``.
        implementation: a function that takes the arguments of the case by name and returns the outputs in order.
        dtype, device: of the input.
        backward: whether to compare gradients too.
    """
    arguments = case.arguments(dtype, device)
    differentiable = spec.differentiable if backward else ()

    def ours(**arguments):
        return spec.function(**arguments, backend=backend)

    def reference(**arguments):
        return spec.function(**arguments, backend="reference")

    got, got_gradients = gradients(implementation or ours, arguments, differentiable)
    low, low_gradients = gradients(reference, arguments, differentiable)
    gold, gold_gradients = gradients(reference, upcast(arguments), differentiable)
    if len(got) != len(gold):
        return [Comparison("outputs", float("inf"), 0.0, f"expected {len(gold)} outputs, got {len(got)}")]
    flips = 0 if dtype == torch.float64 else case.flips
    found = [compare(*row, flips=flips) for row in zip(spec.outputs, got, low, gold, strict=True)]
    for name, wanted in gold_gradients.items():
        got_gradient = got_gradients.get(name, torch.zeros(()))
        found.append(compare(f"grad {name}", got_gradient, low_gradients[name], wanted, flips=flips))
    return found
