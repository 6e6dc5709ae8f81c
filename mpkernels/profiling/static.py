"""Static resources of the compiled GPU kernels: registers, shared memory, spills. No GPU is needed.

    python -m mpkernels.profiling.static            # compile every kernel, print the table
    python -m mpkernels.profiling.static --write    # ... and record it in mpkernels/profiling/kernels.json
    python -m mpkernels.profiling.static --changed  # compile what is not recorded as it is, and all for sm_90

compiles every Triton kernel of every spec and every ``csrc/<family>/*.cu`` for sm_80, sm_90 and sm_100 (those that
the compilers know). Exit status: 0; 1 where a kernel does not compile or spills, with its name; 2 where a compiler
is missing. Triton keeps its usual cache (``TRITON_CACHE_DIR``) and what nvcc reported is kept in ``build/gates``, so a
second run compiles only what changed.

The record holds a fingerprint of each compilation: of the sources, the settings and the compilers. With ``--changed``,
as in the tests, one that has the recorded fingerprint is taken from the record instead of compiled, except for sm_90.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpkernels.profiling.resources import (
    ABOUT,
    TABLE,
    Failure,
    KernelResources,
    Report,
    kernel_table,
    order,
    read_table,
    to_json,
)
from mpkernels.profiling.toolchain import Nvcc, ToolchainError, require_nvcc

if TYPE_CHECKING:
    from mpkernels.spec import TritonKernel

ARCHITECTURES = (80, 90, 100)  # A100, H100, B200
ALWAYS = 90  # also what is recorded compiles for this one
WORKERS = 2

_ROOT = Path(__file__).resolve().parents[2]

# The stable ABI of torch 2.11 (see csrc/), as the CUDA library is built.
_NVCC_FLAGS = ("-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xcompiler=-fPIC")

_NVCC_TIMEOUT_S = 300

Progress = Callable[[str, int, int], None]  # (what has finished, jobs finished, all jobs)


class CompileError(RuntimeError):
    """A kernel does not compile; the message is the compiler's."""


@dataclass(frozen=True)
class _Job:
    name: str  # the source (CUDA), the kernel (Triton)
    arch: str
    fingerprint: str
    compile: Callable[[], Sequence[KernelResources]]

    @property
    def title(self) -> str:
        return f"{self.name} {self.arch}"


def compile_all(root: Path | None = None, progress: Progress | None = None, recorded: Report | None = None) -> Report:
    """Compiles every Triton and CUDA kernel of the repository for every architecture.

    Args:
        root: the repository, for ``csrc``; by default the one that this package is in.
        progress: called with (what has finished, jobs finished, all jobs) after each compilation.
        recorded: a report whose resources are taken where a compilation has the same fingerprint there (and is not
            for ``ALWAYS``).

    Returns:
        The resources; what does not compile is among the report's failures.

    Raises:
        ToolchainError: nvcc or Triton is missing, Triton is interpreting, or ``root`` has no ``csrc`` folder.
    """
    root = _ROOT if root is None else root
    if not (root / "csrc").is_dir():
        raise ToolchainError(f"{root} has no folder csrc/: the CUDA sources are in a clone of the repository")
    triton_version = _require_triton()
    nvcc = require_nvcc()
    kernels, failures = triton_kernels()
    jobs = cuda_jobs(cuda_sources(root), nvcc, root) + triton_jobs(kernels)
    known = unchanged(jobs, recorded) if recorded is not None else {}
    found, failed = run_jobs([job for job in jobs if job.title not in known], progress)
    found = (*found, *(kernel for kernels in known.values() for kernel in kernels))
    return Report(
        nvcc.version,
        triton_version,
        tuple(sorted(found, key=order)),
        (*failures, *failed),
        {job.title: job.fingerprint for job in jobs},
    )


def unchanged(jobs: Iterable[_Job], recorded: Report) -> dict[str, list[KernelResources]]:
    """What a report knows of compilations that would be the same now, by their titles; none for ``ALWAYS``."""
    rows: dict[str, list[KernelResources]] = {}
    for kernel in recorded.kernels:
        name = kernel.source if kernel.backend == "cuda" else kernel.kernel
        rows.setdefault(f"{name} {kernel.arch}", []).append(kernel)
    return {
        job.title: rows[job.title]
        for job in jobs
        if job.arch != f"sm_{ALWAYS}" and job.title in rows and recorded.fingerprints.get(job.title) == job.fingerprint
    }


def run_jobs(
    jobs: Sequence[_Job], progress: Progress | None = None
) -> tuple[tuple[KernelResources, ...], tuple[Failure, ...]]:
    """Compiles in ``WORKERS`` threads; returns what was compiled, in a stable order, and what failed."""
    found: list[KernelResources] = []
    failures: list[Failure] = []
    with ThreadPoolExecutor(WORKERS) as pool:
        running = {pool.submit(job.compile): job for job in jobs}
        for finished, future in enumerate(as_completed(running), start=1):
            job = running[future]
            try:
                found.extend(future.result())
            except CompileError as error:
                failures.append(Failure(job.name, job.arch, str(error)))
            if progress is not None:
                progress(job.title, finished, len(jobs))
    return tuple(sorted(found, key=order)), tuple(sorted(failures, key=lambda f: (f.kernel, f.arch)))


def cuda_sources(root: Path) -> list[Path]:
    """The CUDA sources of every family: ``csrc/<family>/*.cu``, without the fibres that run them on a CPU."""
    return sorted(path for path in (root / "csrc").glob("*/*.cu") if path.parent.name != "fibres")


def cuda_jobs(sources: Iterable[Path], nvcc: Nvcc, root: Path) -> list[_Job]:
    """A compilation for each source and each of ``ARCHITECTURES`` that this nvcc knows, one of them with host code."""
    known = [arch for arch in ARCHITECTURES if arch in nvcc.architectures]
    return [
        _Job(
            _relative(source, root),
            f"sm_{arch}",
            _fingerprint(source, root, nvcc, _settings(arch, nvcc, host=False)),
            functools.partial(compile_cuda, source, arch, nvcc, root, host=arch == known[0]),
        )
        for source in sources
        for arch in known
    ]


def _settings(arch: int, nvcc: Nvcc, *, host: bool) -> list[str]:
    target = [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c" if host else "--cubin"]
    return [*_NVCC_FLAGS, *nvcc.compile_flags, "-Xptxas=-v", *target]


def compile_cuda(source: Path, arch: int, nvcc: Nvcc, root: Path, *, host: bool = True) -> list[KernelResources]:
    """Compiles one CUDA source.

    Args:
        source: a ``.cu`` file; the folder it is in is the family.
        arch: 90 for sm_90.
        nvcc: the compiler.
        root: the repository; ``csrc`` in it is on the include path, as torch's headers are.
        host: whether to compile the host code as well, the same for every architecture and the slower half.

    Returns:
        One entry for each kernel in it, template instances each for themselves.

    Raises:
        CompileError: nvcc refuses it; the message is nvcc's.
    """
    settings = _settings(arch, nvcc, host=host)
    kept = root / "build" / "gates" / f"{_fingerprint(source, root, nvcc, settings)}.json"
    if kept.exists():
        used, bounds = json.loads(kept.read_text())
    else:
        used, bounds = _run_nvcc(source, root, nvcc, settings)
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps([used, bounds]))
        partial.replace(kept)
    names = _demangle(list(used))
    return [
        KernelResources(
            kernel=names[mangled],
            backend="cuda",
            family=source.parent.name,
            source=_relative(source, root),
            arch=f"sm_{arch}",
            registers=resources["registers"],
            shared_bytes=resources["shared"],
            spill_bytes=resources["spills"],
            stack_bytes=resources["stack"],
            threads_per_block=bounds.get(mangled),
        )
        for mangled, resources in used.items()
    ]


def _run_nvcc(source: Path, root: Path, nvcc: Nvcc, settings: Sequence[str]) -> tuple[dict, dict]:
    with tempfile.TemporaryDirectory(prefix="mpkernels-static-") as folder:
        command = [
            str(nvcc.path),
            *settings,
            *(f"-I{path}" for path in _includes(root)),
            "--keep",
            "--keep-dir",
            folder,
        ]
        command += [str(source), "-o", str(Path(folder) / "out")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_NVCC_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise CompileError(f"nvcc has not finished after {_NVCC_TIMEOUT_S} s") from error
        if done.returncode != 0:
            raise CompileError((done.stderr + done.stdout).strip())
        bounds = {}
        for ptx in Path(folder).glob("*.ptx"):
            bounds |= launch_bounds(ptx.read_text())
    return parse_ptxas(done.stderr + done.stdout), bounds


def _fingerprint(source: Path, root: Path, nvcc: Nvcc, settings: Sequence[str]) -> str:
    """Of all that a compilation depends on: the compiler, torch, the settings, the family's and the common sources."""
    import torch

    hasher = hashlib.sha256(repr([nvcc.version, torch.__version__, list(settings), source.name]).encode())
    for folder in (source.parent, root / "csrc" / "common"):
        for path in sorted(folder.glob("*")):
            if path.suffix in (".cu", ".cuh", ".h"):
                hasher.update(path.name.encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()[:16]


def _includes(root: Path) -> list[Path]:
    import torch

    headers = Path(torch.__file__).parent / "include"
    return [root / "csrc", headers, headers / "torch" / "csrc" / "api" / "include"]


def parse_ptxas(log: str) -> dict[str, dict[str, int]]:
    """The resources that ``ptxas -v`` reports: mangled kernel name -> registers, shared, spills, stack.

    Spills of functions that a kernel calls (those that were not inlined) count as the kernel's.
    """
    found: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}  # what comes before the first kernel is dropped
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(.+)' for 'sm_\w+'", line):
            current = found.setdefault(match[1], {"registers": 0, "shared": 0, "spills": 0, "stack": 0})
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            frame, stores, loads = map(int, match.groups())
            current["stack"] = current.get("stack", 0) + frame
            current["spills"] = current.get("spills", 0) + stores + loads
        elif match := re.search(r"Used (\d+) registers", line):
            current["registers"] = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current["shared"] = int(shared[1]) if shared else 0
    return found


def launch_bounds(ptx: str) -> dict[str, int]:
    """``__launch_bounds__`` of the kernels in a PTX file: mangled name -> threads a block."""
    found = {}
    for match in re.finditer(r"\.entry\s+(\w+)\s*\([^)]*\)([^{]*)\{", ptx):
        bound = re.search(r"\.maxntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", match[2])
        if bound:
            x, y, z = (int(size or 1) for size in bound.groups())
            found[match[1]] = x * y * z
    return found


def _demangle(mangled: Sequence[str]) -> dict[str, str]:
    """Mangled -> readable names, without ``void`` and the arguments, except where overloads need them."""
    if not mangled:
        return {}
    try:
        done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ToolchainError(f"c++filt does not run: {error}; install binutils") from error
    full = [name.removeprefix("void ") for name in done.stdout.splitlines()]
    short = [_without_arguments(name) for name in full]
    return {m: s if short.count(s) == 1 else f for m, s, f in zip(mangled, short, full, strict=True)}


def _without_arguments(name: str) -> str:
    """``f<int (*)(int)>(float*)`` -> ``f<int (*)(int)>``: drops the last balanced parentheses."""
    if not name.endswith(")"):
        return name
    depth = 0
    for at in range(len(name) - 1, -1, -1):
        depth += (name[at] == ")") - (name[at] == "(")
        if depth == 0:
            return name[:at] or name
    return name


def _require_triton() -> str:
    try:
        import triton
    except ImportError as error:
        raise ToolchainError(f"Triton does not import: {error}; install it with `pip install triton`") from error
    if triton.knobs.runtime.interpret:
        raise ToolchainError("TRITON_INTERPRET=1 is set, under which Triton compiles nothing: unset it")
    return triton.__version__


def triton_kernels() -> tuple[list[tuple[str, TritonKernel]], tuple[Failure, ...]]:
    """The Triton kernels of all specs as (family, kernel), each name once; and the specs that cannot name theirs."""
    from mpkernels.spec import all_specs

    found: dict[str, tuple[str, TritonKernel]] = {}
    failures = []
    for spec in all_specs():
        try:
            kernels = spec.triton_kernels()
        except Exception as error:  # whatever importing the op's kernels raises is reported under the op's name
            failures.append(Failure(f"the Triton kernels of {spec.name}", "all", f"{type(error).__name__}: {error}"))
            continue
        for kernel in kernels:
            found.setdefault(kernel.name, (spec.family, kernel))
    return list(found.values()), tuple(failures)


def triton_jobs(kernels: Iterable[tuple[str, TritonKernel]]) -> list[_Job]:
    """A compilation for each (family, kernel) and each of ``ARCHITECTURES`` that launches it."""
    return [
        _Job(
            kernel.name,
            f"sm_{arch}",
            _triton_fingerprint(kernel, arch),
            functools.partial(compile_triton, kernel, family, arch),
        )
        for family, kernel in kernels
        for arch in ARCHITECTURES
        if not kernel.architectures or arch in kernel.architectures
    ]


def _triton_fingerprint(kernel: TritonKernel, arch: int) -> str:
    """Of all that a compilation depends on: Triton, the kernel and what it calls, the specialisation."""
    import triton

    about = [triton.__version__, kernel.function.cache_key, arch, kernel.num_warps, kernel.num_stages]
    about += [sorted(kernel.signature.items()), sorted(kernel.constexprs.items(), key=str), sorted(kernel.divisible)]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def compile_triton(kernel: TritonKernel, family: str, arch: int) -> list[KernelResources]:
    """Compiles one Triton kernel to a cubin, with pointers aligned to 16 bytes as torch allocates them.

    Args:
        kernel: the specialisation.
        family: the op's family, for the table.
        arch: 90 for sm_90.

    Returns:
        A list of one entry.

    Raises:
        CompileError: Triton or its ptxas refuses it; the message is theirs.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel.function
    unknown = [name for name in function.arg_names if name not in kernel.signature and name not in kernel.constexprs]
    surplus = [name for name in (*kernel.signature, *kernel.constexprs) if name not in function.arg_names]
    if unknown or surplus:
        raise CompileError(f"the spec's signature: arguments without a type: {unknown}, unknown arguments: {surplus}")
    signature = {name: kernel.signature.get(name, "constexpr") for name in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in kernel.divisible
    }
    try:
        compiled = triton.compile(
            ASTSource(function, signature, dict(kernel.constexprs), aligned),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": kernel.num_warps, "num_stages": kernel.num_stages},
        )
    except Exception as error:  # Triton raises many kinds: of its frontend, of MLIR, of ptxas
        raise CompileError(f"{type(error).__name__}: {error}") from error
    used = _cubin_resources(compiled.asm["cubin"])
    return [
        KernelResources(
            kernel=kernel.name,
            backend="triton",
            family=family,
            source=_relative(Path(function.fn.__code__.co_filename), _ROOT),
            arch=f"sm_{arch}",
            registers=used["REG"],
            shared_bytes=max(compiled.metadata.shared, used["SHARED"]),
            spill_bytes=used["STACK"] + used["LOCAL"],
            stack_bytes=used["STACK"] + used["LOCAL"],
            threads_per_block=32 * kernel.num_warps,
        )
    ]


def _cubin_resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of a cubin, the most over its functions, by the cuobjdump in Triton's package."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True)
    usage = [dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)) for line in done.stdout.splitlines()]
    usage = [line for line in usage if len(line) == 4]
    if done.returncode != 0 or not usage:
        raise CompileError(f"{tool} --dump-resource-usage reports nothing: {(done.stderr or done.stdout).strip()}")
    return {name: max(int(line[name]) for line in usage) for name in ("REG", "STACK", "SHARED", "LOCAL")}


def _relative(path: Path, root: Path) -> str:
    """A path as the table names it: from the repository on, or the file's name where it is outside."""
    path = path.resolve()
    return path.relative_to(root.resolve()).as_posix() if path.is_relative_to(root.resolve()) else path.name


def _compile_with_progress(recorded: Report | None) -> Report:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        return compile_all(
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
            recorded=recorded,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles everything, prints the table and what is wrong; returns the exit status."""
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="python -m mpkernels.profiling.static", description=ABOUT)
    parser.add_argument("--write", action="store_true", help=f"record the table in {TABLE.name} (if all compiles)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was compiled, and what failed, to FILE")
    parser.add_argument(
        "--changed", action="store_true", help=f"compile what is not in {TABLE.name}, and for sm_{ALWAYS}"
    )
    options = parser.parse_args(arguments)
    try:
        report = _compile_with_progress(read_table() if options.changed and TABLE.exists() else None)
    except ToolchainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 160).print(kernel_table(report))
    if options.json is not None:
        options.json.write_text(to_json(report))
    if options.write and not report.failures:
        TABLE.write_text(to_json(report))
        print(f"wrote {os.path.relpath(TABLE)}: {len(report.kernels)} entries")
    problems = report.problems()
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
