"""Which backends exist on this machine, and how one is chosen for a call.

The choice, first match wins: the ``backend=`` argument of the call, the innermost
:func:`use_backend` context, the environment variable ``MPKERNELS_BACKEND``, the device of the tensors.
A backend that is named explicitly never falls back: it runs, or it raises :class:`BackendError`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch

from mpkernels import library

BACKENDS = ("reference", "cpu", "triton", "cuda", "fibres")
DEVICES = ("cpu", "cuda")

_NAMESPACE = {"cpu": "mpkernels", "cuda": "mpkernels", "triton": "mpkernels_triton", "fibres": "mpkernels_fibres"}
_DISPATCH_KEY = {"cpu": "CPU", "cuda": "CUDA"}

_fastest_on_cuda: dict[str, str] = {}  # op -> "cuda" or "triton", from the op's spec
_reasons: dict[tuple[str, str, str], str | None] = {}
_chosen: dict[tuple[str, str, str | None], str] = {}


class BackendError(RuntimeError):
    """A backend was asked for that cannot run here; the message says what is missing and how to get it."""


def _checked(backend: str | None, source: str) -> str | None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
    return backend


_environment = _checked(os.environ.get("MPKERNELS_BACKEND") or None, "MPKERNELS_BACKEND")
_contexts: list[str | None] = []


@contextlib.contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Runs every op inside the ``with`` block on one backend, unless the call itself names another.

    Args:
        backend: "reference", "cpu", "triton", "cuda", or None to choose by device again.

    Example:
        >>> import torch, mpkernels
        >>> with mpkernels.use_backend("reference"):
        ...     out = mpkernels.composite(torch.ones(2, 4), torch.ones(2, 4, 3), torch.zeros(2, 4), torch.ones(2, 4))
        >>> out.values.shape
        torch.Size([2, 3])
    """
    _contexts.append(_checked(backend, "use_backend"))
    try:
        yield
    finally:
        _contexts.pop()


def prefer_on_cuda(op: str, backend: str) -> None:
    """Records which backend was measured as the faster one for an op on CUDA tensors."""
    _fastest_on_cuda[op] = backend


def why_not(op: str, backend: str, device: str) -> str | None:
    """None if ``backend`` can run ``op`` on tensors of a device type ("cpu" or "cuda"), else the reason."""
    key = (op, backend, device)
    if key not in _reasons:
        _reasons[key] = _why_not(op, backend, device)
    return _reasons[key]


def _why_not(op: str, backend: str, device: str) -> str | None:
    if backend == "reference":
        return None
    if device not in DEVICES:
        return f"tensors on {device!r} are served by the reference alone"
    if backend in ("cpu", "fibres") and device != "cpu":
        return f"it runs on CPU tensors, got tensors on {device!r}"
    if backend == "cuda" and device != "cuda":
        return f"it runs on CUDA tensors, got tensors on {device!r}"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: `pip install triton`"
        if device == "cpu" and not library.triton_interpreted():
            return "on CPU tensors it needs Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
        if device == "cuda" and library.triton_interpreted():
            return "TRITON_INTERPRET=1 is set: unset it to run on the GPU"
    else:
        reason = library.why_not_loaded(backend)
        if reason is not None:
            return reason
    if not library.has_kernel(_NAMESPACE[backend], op, _DISPATCH_KEY[device]):
        return f"the op {op!r} has no {backend} implementation"
    return None


def choose(op: str, device: str, backend: str | None) -> str:
    """The backend that runs ``op`` on tensors of a device type; ``backend`` is the call's own argument.

    Raises:
        ValueError: the name is not a backend's.
        BackendError: the named backend cannot run here.
    """
    asked = backend if backend is not None else (_contexts[-1] if _contexts else _environment)
    key = (op, device, asked)
    found = _chosen.get(key)
    if found is None:
        found = _choose(op, device, _checked(asked, "backend"))
        _chosen[key] = found
    return found


def _choose(op: str, device: str, asked: str | None) -> str:
    if asked is not None:
        reason = why_not(op, asked, device)
        if reason is not None:
            raise BackendError(f"backend {asked!r} cannot run {op}: {reason}")
        return asked
    if device == "cuda":
        fastest = _fastest_on_cuda.get(op, "cuda")
        candidates = (fastest, "triton" if fastest == "cuda" else "cuda")
    else:
        candidates = ("cpu",)
    for candidate in candidates:
        if why_not(op, candidate, device) is None:
            return candidate
    return "reference"


# What torch.compiler.assume_constant_result does, without importing the compiler with the package: the choice asks
# torch's dispatcher, which torch.compile cannot trace, and does not change while a program runs.
_choose._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def forget_choices() -> None:
    """Drops what was cached of the machine's state (used by tests that change the environment)."""
    _reasons.clear()
    _chosen.clear()


def call(backend: str, op: str):
    """The torch op that implements ``op`` on a backend other than the reference."""
    return getattr(getattr(torch.ops, _NAMESPACE[backend]), op).default
