"""Finds nvcc: named in the environment, on PATH, or in the wheels that NVIDIA publishes on PyPI.

This file imports the standard library alone, so that a build can run it before the package exists:

    python mpkernels/profiling/toolchain.py     # or, once installed, python -m mpkernels.profiling.toolchain

It prints ``key=value`` lines (lists are separated by semicolons, as CMake writes them), for example

    nvcc=.../site-packages/nvidia/cu13/bin/nvcc
    source=wheels
    version=13.0.88
    architectures=75;80;86;90;100
    root=.../site-packages/nvidia/cu13
    compile_flags=
    link_flags=-L.../site-packages/nvidia/cu13/lib

and exits with status 1, and what to install on standard error, where there is no nvcc.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

REQUIREMENTS = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)

# What each wheel adds to nvidia/cu13/, to name the one that is missing: nvcc's own wheel does not pin the others.
_WHEEL_PARTS = {
    "nvvm/bin/cicc": "nvidia-nvvm",
    "include/crt/host_config.h": "nvidia-cuda-crt",
    "include/cuda_runtime.h": "nvidia-cuda-runtime",
    "include/cccl/cub/cub.cuh": "nvidia-cuda-cccl",
}

_REMEDY = (
    "install the wheels with `pip install -r requirements/nvcc.txt` in a clone, that is"
    f" `pip install {' '.join(REQUIREMENTS)}`, or a CUDA toolkit with nvcc on PATH"
)


class ToolchainError(RuntimeError):
    """A compiler or tool is missing or does not run; the message names it and says how to get it."""


@dataclass(frozen=True)
class Nvcc:
    """An nvcc that runs on this machine."""

    path: Path
    source: str  # where it was found: "CUDACXX", "CUDA_HOME", "PATH" or "wheels"
    version: str  # "13.0.88"
    architectures: tuple[int, ...]  # (75, 80, ..., 90, 100, ...): those that it compiles for
    root: Path  # the toolkit: include/, lib/ or lib64/, nvvm/
    compile_flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()

    def describe(self) -> str:
        """The ``key=value`` lines that running this file prints."""
        values = {
            "nvcc": str(self.path),
            "source": self.source,
            "version": self.version,
            "architectures": ";".join(map(str, self.architectures)),
            "root": str(self.root),
            "compile_flags": ";".join(self.compile_flags),
            "link_flags": ";".join(self.link_flags),
        }
        return "\n".join(f"{key}={value}" for key, value in values.items())


def find_nvcc(
    environment: Mapping[str, str] | None = None, packages: Iterable[str | Path] | None = None
) -> Nvcc | None:
    """Finds nvcc; the first of these that exists: ``CUDACXX``, ``CUDA_HOME``/bin, PATH, PyPI wheels.

    Args:
        environment: the variables to read; by default this process's.
        packages: folders of installed packages in which to look for wheels; by default ``sys.path``.

    Returns:
        The compiler, or None where there is none (:func:`require_nvcc` raises instead).

    Raises:
        ToolchainError: CUDACXX names no file, the nvcc that was found does not run, or the wheels are incomplete.
    """
    environment = os.environ if environment is None else environment
    found = _from_environment(environment)
    if found is None:
        found = _from_wheels(sys.path if packages is None else packages)
    if found is None:
        return None
    path, source = found
    return _inspect(path, source)


def require_nvcc(environment: Mapping[str, str] | None = None, packages: Iterable[str | Path] | None = None) -> Nvcc:
    """As :func:`find_nvcc`, for callers that cannot go on without one.

    Raises:
        ToolchainError: there is no nvcc; the message says what to install. Also what :func:`find_nvcc` raises.
    """
    nvcc = find_nvcc(environment, packages)
    if nvcc is None:
        raise ToolchainError(
            "nvcc, the CUDA compiler, is missing: not in CUDACXX, CUDA_HOME/bin, on PATH, nor as PyPI wheels in this"
            f" Python ({sys.prefix}); {_REMEDY}"
        )
    return nvcc


def _from_environment(environment: Mapping[str, str]) -> tuple[Path, str] | None:
    search = environment.get("PATH", os.defpath)
    named = environment.get("CUDACXX")
    if named:
        path = shutil.which(named, path=search)
        if path is None:
            raise ToolchainError(f"CUDACXX={named}: no such program; unset it, or name an nvcc; {_REMEDY}")
        return Path(path), "CUDACXX"
    home = environment.get("CUDA_HOME")  # often set for the runtime alone, so a home without nvcc is no error
    if home:
        path = shutil.which("nvcc", path=str(Path(home) / "bin"))
        if path is not None:
            return Path(path), "CUDA_HOME"
    path = shutil.which("nvcc", path=search)
    return None if path is None else (Path(path), "PATH")


def _from_wheels(packages: Iterable[str | Path]) -> tuple[Path, str] | None:
    candidates = [path for folder in packages for path in Path(folder).glob("nvidia/cu[0-9]*/bin/nvcc")]
    if not candidates:
        return None
    path = max(candidates, key=lambda nvcc: int(re.sub(r"\D", "", nvcc.parents[1].name)))
    root = path.parents[1]
    missing = [wheel for part, wheel in _WHEEL_PARTS.items() if not (root / part).exists()]
    if missing:
        raise ToolchainError(f"{path} is installed without {', '.join(missing)}; {_REMEDY}")
    return path, "wheels"


def _inspect(path: Path, source: str) -> Nvcc:
    version = re.search(r"\bV(\d+(?:\.\d+)+)", _run(path, "--version"))
    if version is None:
        raise ToolchainError(f"{path} (from {source}) is no nvcc: `--version` names no version; {_REMEDY}")
    architectures = sorted({int(number) for number in re.findall(r"compute_(\d+)\b", _run(path, "--list-gpu-arch"))})
    root = _toolkit(path)
    return Nvcc(path, source, version[1], tuple(architectures), root, (), _link_flags(root))


def _toolkit(path: Path) -> Path:
    """The toolkit's folder as nvcc itself sees it: on PATH there may be a link or a script that calls the real one."""
    here = re.search(r"^#\$ _HERE_=(.+)$", _run(path, "--dryrun", "-c", "-x", "cu", os.devnull), re.MULTILINE)
    return (Path(here[1].strip()) if here else path.resolve().parent).parent


def _link_flags(root: Path) -> tuple[str, ...]:
    """Wheels put the runtime into lib/, where nvcc, which adds lib64/, does not look."""
    has_runtime = any((root / "lib" / name).exists() for name in ("libcudart_static.a", "libcudart.so"))
    return (f"-L{root / 'lib'}",) if has_runtime and not (root / "lib64").exists() else ()


def _run(path: Path, *arguments: str) -> str:
    try:
        done = subprocess.run([str(path), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{path} does not run: {error}; {_REMEDY}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise ToolchainError(f"`{path} {' '.join(arguments)}` failed with status {done.returncode}: {said}; {_REMEDY}")
    return done.stdout + done.stderr


def main() -> int:
    """Prints the compiler's facts as ``key=value`` lines; returns the exit status."""
    try:
        print(require_nvcc().describe())
    except ToolchainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
