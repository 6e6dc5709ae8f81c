"""The torch.library namespaces of the package, and the loading of its compiled libraries.

An op has one schema and one fake (shape) function, declared here in Python, and is implemented in
one torch namespace a backend:

==========================  ====================================  =============================
namespace                   dispatch key                          implemented by
==========================  ====================================  =============================
``mpkernels::<op>``         CPU                                   ``csrc/<family>/<op>.cpp``
``mpkernels::<op>``         CUDA                                  ``csrc/<family>/<op>.cu``
``mpkernels_triton::<op>``  CUDA (CPU under Triton's interpreter) ``<op>/triton.py``
``mpkernels_fibres::<op>``  CPU (tests: CUDA kernels on fibres)   ``csrc/<family>/<op>.cu``
==========================  ====================================  =============================

The C++ libraries use torch's stable ABI, so one binary serves torch 2.11 and later. The CPU library
is compiled once for each instruction set, and :func:`load` picks the best that this machine runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch

NAMESPACES = ("mpkernels", "mpkernels_triton", "mpkernels_fibres")
LIBRARY_FOLDER = Path(__file__).parent / "_libraries"

# Best first. The features are those that the compiler flags of csrc/CMakeLists.txt assume.
INSTRUCTION_SETS: dict[str, frozenset[str]] = {
    "avx512": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "baseline": frozenset(),
}

_definitions = {name: torch.library.Library(name, "FRAGMENT") for name in NAMESPACES}
_implementations: list[torch.library.Library] = []
_loaded: dict[str, str | None] = {}  # library -> None, or the reason why it is not loaded


def define(signature: str, fake: Callable) -> None:
    """Declares an op in every namespace, with its fake (shape) function.

    Args:
        signature: ``name(Tensor x, ...) -> Tensor``, in torch's schema language.
        fake: takes the op's arguments, returns empty tensors of the right shapes and dtypes.
    """
    name = signature[: signature.index("(")]
    for namespace in NAMESPACES:
        _definitions[namespace].define(signature, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=_definitions[namespace])


def implement_triton(name: str, module: str, function: str) -> None:
    """Registers ``module.function`` as the Triton implementation of an op; it is imported at the first call."""

    def launch(*args):
        return getattr(importlib.import_module(module), function)(*args)

    launch.__name__ = f"triton_{name}"
    library = torch.library.Library("mpkernels_triton", "IMPL")
    for key in ("CUDA", "CPU") if triton_interpreted() else ("CUDA",):
        library.impl(name, launch, key)
    _implementations.append(library)


def triton_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True")


def has_kernel(namespace: str, name: str, key: str) -> bool:
    """Whether ``namespace::name`` has an implementation for the dispatch key "CPU" or "CUDA"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key)


def host_module():
    """The compiled module of host facts (``mpkernels._host``), or None where it is not built."""
    if importlib.util.find_spec("mpkernels._host") is None:
        return None
    return importlib.import_module("mpkernels._host")


def instruction_set() -> str | None:
    """The instruction set of the CPU library to load: ``MPKERNELS_CPU_ISA``, or the best that runs here."""
    host = host_module()
    built = [name for name in INSTRUCTION_SETS if (LIBRARY_FOLDER / f"mpkernels_cpu_{name}.so").exists()]
    if host is None or not built:
        return None
    features = set(host.cpu_features())
    runnable = [name for name in built if INSTRUCTION_SETS[name] <= features]
    asked = os.environ.get("MPKERNELS_CPU_ISA")
    if asked is None:
        return runnable[0] if runnable else None
    if asked not in runnable:
        raise RuntimeError(
            f"MPKERNELS_CPU_ISA={asked}: expected one of {runnable} (built, and runnable on this processor)"
        )
    return asked


def load() -> None:
    """Loads the compiled libraries that this machine has; called once, when the package is imported."""
    missing = (
        "is not built: install a C++17 compiler, then `pip install --no-build-isolation -e .` in a clone"
        " (`make` does both steps)"
    )
    isa = instruction_set()
    _load("cpu", LIBRARY_FOLDER / f"mpkernels_cpu_{isa}.so", f"the C++ library {missing}")
    _load(
        "fibres",
        Path(os.environ.get("MPKERNELS_FIBRES_LIBRARY", LIBRARY_FOLDER / "mpkernels_fibres.so")),
        f"the fibre library (the CUDA kernels on the CPU, for tests) {missing}",
    )
    if torch.version.cuda is None:
        _loaded["cuda"] = f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"
    elif not torch.cuda.is_available():
        _loaded["cuda"] = "no CUDA device is visible to torch"
    else:
        _load(
            "cuda",
            LIBRARY_FOLDER / "mpkernels_cuda.so",
            "the CUDA library is not built: put nvcc on PATH, then `pip install --no-build-isolation -e .` in a clone",
        )


def _load(library: str, path: Path, missing: str) -> None:
    if not path.exists():
        _loaded[library] = missing
        return
    try:
        torch.ops.load_library(str(path))
        _loaded[library] = None
    except OSError as error:  # a library of another machine or torch: run on the reference, and say why
        _loaded[library] = f"{path.name} does not load: {error}; build it again with `pip install -e .`"


def why_not_loaded(library: str) -> str | None:
    """None if the compiled library "cpu", "cuda" or "fibres" is loaded, else the reason, with the remedy."""
    return _loaded.get(library, "the package is still being imported")
