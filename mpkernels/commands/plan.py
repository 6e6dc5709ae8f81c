"""What ``mpkernels validate`` has to run: a row for every op, backend and dtype, and the holes between them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mpkernels import backends, library
from mpkernels.commands import machine, terminal
from mpkernels.commands.jobs import Finding, Job
from mpkernels.spec import Case, OpSpec, all_specs, find


@dataclass
class Row:
    """An op on a backend in a dtype: the worst of its cases, and all that failed."""

    op: str
    backend: str
    device: str
    dtype: str
    how: str  # "" or "interpreter"
    cases: list[str]
    backward: bool
    done: int = 0
    worst: Finding | None = None
    worst_case: str | None = None
    failures: list[tuple[str, Finding]] = field(default_factory=list)

    def add(self, case: str, findings: Sequence[Finding]) -> None:
        """Takes in what a case gave."""
        self.done += 1
        for finding in findings:
            if not finding.ok:
                self.failures.append((case, finding))
            if self.worst is None or finding.ratio > self.worst.ratio:
                self.worst, self.worst_case = finding, case

    def jobs(self) -> list[Job]:
        """What there is to run."""
        return [Job(self.op, self.backend, self.dtype, self.device, case, self.backward) for case in self.cases]

    def to_dict(self) -> dict:
        """For JSON."""
        worst = self.worst
        return {
            "op": self.op,
            "backend": self.backend,
            "device": self.device,
            "dtype": self.dtype,
            "interpreter": self.how == "interpreter",
            "sets_bound": self.backend == "reference",
            "cases": self.done,
            "of": len(self.cases),
            "error": worst.error if worst else None,
            "bound": worst.bound if worst else None,
            "ratio": worst.ratio if worst else None,
            "output": worst.output if worst else None,
            "case": self.worst_case,
            "ok": not self.failures,
            "failures": [
                {"case": case, "output": f.output, "error": f.error, "bound": f.bound, "problem": f.problem}
                for case, f in self.failures
            ],
        }


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    ops: Sequence[str] = ()
    backends: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    implementation: str | None = None
    cases: str = ""
    device: str | None = None
    backward: bool = True

    def restrictions(self) -> list[str]:
        """What was left out on request, so that a partial result never reads as a full one."""
        found = {
            "ops": ", ".join(self.ops),
            "backends": ", ".join(self.backends),
            "dtypes": ", ".join(self.dtypes),
            "device": self.device or "",
            "cases with": repr(self.cases) if self.cases else "",
            "gradients": "" if self.backward else "none",
        }
        return [f"{name} {value}" for name, value in found.items() if value]

    def specs(self) -> list[OpSpec]:
        """The ops, all if none is named."""
        known = [spec.name for spec in all_specs()]
        return [find(name) for name in terminal.choices("OPS", self.ops, known) or known]

    def devices(self) -> list[str]:
        """The device types, all that exist if none is named."""
        if self.device is None:
            return machine.devices()
        terminal.choices("--device", [self.device], backends.DEVICES)
        if self.device not in machine.devices():
            raise terminal.UsageError("--device", "no CUDA device is visible to torch")
        return [self.device]


def load_implementation(name: str) -> Callable:
    """The function ``module:function``; modules are found as by ``python -m``, in the current directory too."""
    argument = "--implementation"
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise terminal.UsageError(argument, f"expected module:function, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            message = f"no module {error.name!r} in the current directory or on PYTHONPATH"
        else:
            message = f"importing {module_name!r} failed: {error}"
        raise terminal.UsageError(argument, message) from error
    except Exception as error:
        message = f"importing {module_name!r} raised {type(error).__name__}: {error}"
        raise terminal.UsageError(argument, message) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            functions = [n for n, x in vars(found).items() if callable(x) and not n.startswith("_")]
            raise terminal.UsageError(
                argument, f"{module_name!r} has no {part!r}; it has {', '.join(functions) or 'no functions'}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise terminal.UsageError(argument, f"{name} is no function, but {type(found).__name__}")
    return found


def plan(request: Request) -> tuple[list[Row], list[dict]]:
    """The rows to fill, and the holes: what was asked for (or exists) and cannot run, with the reason."""
    asked = terminal.choices("--backend", request.backends, backends.BACKENDS)
    terminal.choices("--dtype", request.dtypes, list(terminal.DTYPES))
    rows: list[Row] = []
    holes: list[dict] = []
    for spec in request.specs():
        for backend in asked or backends.BACKENDS:
            reasons = {}
            for device in request.devices():
                how, reason = _way(spec, backend, device, bool(asked))
                if reason is None:
                    rows += _rows(request, spec, backend, device, how)
                else:
                    reasons[device] = reason
            if len(reasons) == len(request.devices()):
                reason = library.why_not_loaded("cuda") if backend == "cuda" else None
                holes.append({"op": spec.name, "backend": backend, "reason": reason or " / ".join(reasons.values())})
    if not rows and not any(hole["backend"] in asked for hole in holes):
        raise terminal.UsageError("--cases", f"no case of these ops and dtypes contains {request.cases!r}")
    return rows, holes


def _way(spec: OpSpec, backend: str, device: str, named: bool) -> tuple[str, str | None]:
    """How a backend can be run: in this process, or (Triton on the CPU) under the interpreter in another."""
    reason = backends.why_not(spec.op, backend, device)
    if backend != "triton" or device != "cpu":
        return "", reason
    if reason is None:
        return "interpreter", None
    if not named and "cuda" in machine.devices():
        return "", "it runs on the GPU"
    if importlib.util.find_spec("triton") is None:
        return "", reason
    if not library.has_kernel("mpkernels_triton", spec.op, "CUDA"):
        return "", f"the op {spec.op!r} has no triton implementation"
    return "interpreter", None


def _rows(request: Request, spec: OpSpec, backend: str, device: str, how: str) -> list[Row]:
    small = how == "interpreter" or backend == "fibres"
    cases = _cases(request, spec, small)
    names = [str(dtype).removeprefix("torch.") for dtype in spec.backend_dtypes(backend, device)]
    wanted = [name for name in names if name in request.dtypes or not request.dtypes]
    return [Row(spec.name, backend, device, d, how, cases, request.backward) for d in wanted if cases]


def _cases(request: Request, spec: OpSpec, small: bool) -> list[str]:
    def kept(case: Case) -> bool:
        return request.cases in case.name and not (small and case.large)

    return [case.name for case in spec.cases if kept(case)]


def plan_implementation(request: Request) -> list[Row]:
    """The rows of a user's function: float32 unless other dtypes are named."""
    if request.backends:
        raise terminal.UsageError("--backend", "not together with --implementation, which is checked instead of ours")
    specs = request.specs()
    if len(specs) != 1:
        raise terminal.UsageError("OPS", f"name the one op that --implementation implements, got {len(specs)}")
    dtypes = terminal.choices("--dtype", request.dtypes, list(terminal.DTYPES)) or ["float32"]
    cases = _cases(request, specs[0], False)
    if not cases:
        raise terminal.UsageError("--cases", f"no case of {specs[0].name} contains {request.cases!r}")
    device = request.devices()[-1]  # cuda, where there is one
    assert request.implementation is not None
    return [Row(specs[0].name, request.implementation, device, d, "", cases, request.backward) for d in dtypes]
