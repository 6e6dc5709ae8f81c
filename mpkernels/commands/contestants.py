"""What ``mpkernels bench`` and the pytest-benchmark suite time: our backends, eager torch, and compiled eager torch.

Two passes. ``forward`` runs without gradients. ``forward+backward`` runs the op and ``torch.autograd.grad`` for the
usual training set: gradients of the first two differentiable arguments (for compositing: densities and values;
positions are fixed), from fixed gradients of the first three outputs (values, opacity and depth: what a loss reads;
not the weights).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpkernels import backends, library
from mpkernels.spec import Arguments, Cost, OpSpec, Workload

FORWARD, TRAINING = "forward", "forward+backward"
EAGER, COMPILED = "eager torch", "torch.compile"
REAL = ("cpu", "triton", "cuda")  # not the reference, and nothing that is interpreted

Run = Callable[[], object]


def default_backend(spec: OpSpec, device: str) -> str:
    """What a call without ``backend=`` runs on."""
    return backends.choose(spec.op, device, None)


def real_backends(spec: OpSpec, device: str) -> list[str]:
    """The default backend, then every other one that is worth timing on a device."""
    found = [default_backend(spec, device)]
    for backend in REAL:
        interpreted = backend == "triton" and library.triton_interpreted()
        if backend not in found and not interpreted and backends.why_not(spec.op, backend, device) is None:
            found.append(backend)
    return found


def passes(workload: Workload) -> tuple[str, ...]:
    """The passes that a workload is timed in."""
    return (FORWARD, TRAINING) if workload.backward else (FORWARD,)


def cost(spec: OpSpec, arguments: Arguments, which: str) -> Cost:
    """What a pass must do at least; ``forward+backward`` is the sum of both."""
    forward = spec.cost(arguments, False)
    if which == FORWARD:
        return forward
    backward = spec.cost(arguments, True)
    return Cost(forward.flops + backward.flops, forward.bytes + backward.bytes)


def compiled(spec: OpSpec) -> Callable[..., Sequence[Tensor]]:
    """The plain-torch baseline under ``torch.compile``, compiled anew."""
    torch.compiler.reset()
    return torch.compile(spec.eager, dynamic=False)


def ours(spec: OpSpec, backend: str) -> Callable[..., Sequence[Tensor]]:
    """One of our backends as a function of the arguments alone."""

    def function(**arguments):
        return spec.function(**arguments, backend=backend)

    return function


def one_pass(spec: OpSpec, function: Callable[..., Sequence[Tensor]], arguments: Arguments, which: str) -> Run:
    """A function without arguments that runs one pass, as a training or rendering script would."""
    if which == FORWARD:

        def forward() -> object:
            with torch.no_grad():
                return function(**arguments)

        return forward

    leaves = {
        name: arguments[name].detach().requires_grad_()
        for name in spec.trained or spec.differentiable[:2]
        if isinstance(arguments.get(name), Tensor)
    }
    arguments = arguments | leaves
    inputs = list(leaves.values())
    with torch.no_grad():
        shapes = [torch.empty_like(x) for x in spec.eager(**arguments)[:3]]
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.rand(x.shape, generator=generator).to(x.device, x.dtype) for x in shapes]

    def training() -> object:
        outputs = function(**arguments)[:3]
        return torch.autograd.grad(outputs, inputs, seeds)

    return training


def first_call(run: Run) -> str | None:
    """Runs a contestant once (this compiles it); None, or in one line why it cannot take part."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run()
    except Exception as error:  # a peer that does not run is a result, not a crash
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None
