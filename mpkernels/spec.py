"""The registry of op specs: what tests, ``validate``, ``bench``, ``info`` and the docs' tables iterate over.

Every op folder ``mpkernels/<family>/<op>/`` has a module ``spec.py`` with a tuple ``SPECS`` of :class:`OpSpec`.
:func:`all_specs` finds them by looking, so that adding an op changes no list.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import mpkernels

Arguments = dict[str, Any]  # keyword arguments of a public function
MakeArguments = Callable[[torch.dtype, torch.device, torch.Generator], Arguments]


@dataclass(frozen=True)
class Case:
    """One input of an op, made anew (and the same) for every dtype and device."""

    name: str
    make: MakeArguments  # draws on the CPU from the generator, in float32 or wider, and converts
    second_order: bool = False  # small and smooth enough for gradcheck (and gradgradcheck, where the op promises it)
    large: bool = False  # too many programs for interpreters and fibres
    flips: int = 0  # elements a tensor that rounding may put on the other side of a threshold (never in float64)

    def arguments(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Arguments:
        """The arguments, with values that depend on the case's name alone."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        return self.make(dtype, torch.device(device), generator)


@dataclass(frozen=True)
class BadInput:
    """Arguments that must be refused, and how."""

    name: str
    make: MakeArguments
    error: type[Exception]
    message: str  # a regular expression that the message matches: it names the argument

    def arguments(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Arguments:
        """The arguments to refuse."""
        return self.make(dtype, torch.device(device), torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Cost:
    """What an op must do at least: floating-point operations, and bytes read and written once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Workload:
    """A size that ``bench`` and ``profile`` measure; ``samples`` is what a time is divided by."""

    name: str
    make: MakeArguments
    samples: int
    devices: tuple[str, ...] = ("cpu", "cuda")
    eager: bool = True  # whether the plain-torch baseline runs this one
    backward: bool = True

    def arguments(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Arguments:
        """The arguments, the same in every run."""
        return self.make(dtype, torch.device(device), torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class TritonKernel:
    """One specialisation of a Triton kernel, for the compile gates (no GPU needed)."""

    name: str
    function: Any  # the triton.jit function
    signature: Mapping[str, str]  # argument -> "*fp32", "i64", ...; constexprs left out
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    divisible: tuple[str, ...] = ()  # numbers that are multiples of 16, as strides mostly are: Triton specialises on it
    architectures: tuple[int, ...] = ()  # those whose GPUs launch it, where tiles differ: 90 for sm_90; () for all


_ALL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class OpSpec:
    """Everything that the tools know of one public function."""

    name: str
    family: str
    op: str  # the torch op behind it: mpkernels::<op>
    function: Callable[..., tuple[torch.Tensor, ...]]  # takes the arguments of a case, and backend=
    formula: str  # one line, for tables
    differentiable: tuple[str, ...]  # arguments with a gradient
    outputs: tuple[str, ...]
    cases: tuple[Case, ...]
    bad_inputs: tuple[BadInput, ...]
    workloads: tuple[Workload, ...]
    eager: Callable[..., tuple[torch.Tensor, ...]]  # vectorised plain torch as a user writes it: bench's baseline
    cost: Callable[[Arguments, bool], Cost]  # (arguments, backward?) -> cost of that pass alone
    triton_kernels: Callable[[], tuple[TritonKernel, ...]] = tuple
    fastest_on_cuda: str = "cuda"  # measured; decides for CUDA tensors where nothing is named
    trained: tuple[str, ...] = ()  # arguments that bench takes gradients of; the first two differentiable ones if none
    second_order: bool = True  # whether gradients are differentiable again, and forward mode exists
    batched: bool = True  # whether torch.func.vmap over the first dimension makes sense
    demo: str | None = None  # module of python_models with `fit(...)`, run by `mpkernels demo`
    demo_name: str | None = None  # what it is called there, if not as the op
    dtypes: Mapping[str, tuple[torch.dtype, ...]] = field(
        default_factory=lambda: (
            {"reference": _ALL, "cpu": _ALL, "triton": _ALL, "cuda": _ALL} | {"fibres": (torch.float32, torch.float64)}
        )
    )

    @property
    def demo_title(self) -> str:
        """What its demonstration is called."""
        return self.demo_name or self.name

    def case(self, name: str) -> Case:
        """The case of that name."""
        return next(case for case in self.cases if case.name == name)

    def backend_dtypes(self, backend: str, device: str) -> tuple[torch.dtype, ...]:
        """Dtypes to test; Triton's interpreter computes bfloat16 wrongly, so it is left out there."""
        found = self.dtypes.get(backend, ())
        return tuple(d for d in found if not (backend == "triton" and device == "cpu" and d == torch.bfloat16))


def _op_modules(leaf: str) -> list[str]:
    """Names of all modules mpkernels.<family>.<op>.<leaf>."""
    found = []
    for family in pkgutil.iter_modules(mpkernels.__path__, "mpkernels."):
        if not family.ispkg:
            continue
        for op in pkgutil.iter_modules(importlib.import_module(family.name).__path__, family.name + "."):
            if op.ispkg and importlib.util.find_spec(f"{op.name}.{leaf}") is not None:
                found.append(f"{op.name}.{leaf}")
    return sorted(found)


@functools.cache
def all_specs() -> tuple[OpSpec, ...]:
    """The specs of every op in the package, in order of family and name."""
    modules = [importlib.import_module(name) for name in _op_modules("spec")]
    return tuple(spec for module in modules for spec in module.SPECS)


def find(name: str) -> OpSpec:
    """The spec of one op.

    Raises:
        ValueError: no op has that name; the message lists those that exist.
    """
    for spec in all_specs():
        if spec.name == name:
            return spec
    raise ValueError(f"op: expected one of {', '.join(spec.name for spec in all_specs())}, got {name!r}")
