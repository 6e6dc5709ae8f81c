"""Rung 5: every GPU kernel compiles for every architecture, spills nothing, and is in the recorded table.

Triton compiles nothing in a process with TRITON_INTERPRET=1, so each compilation has a process of its own.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpkernels.profiling import resources, static
from mpkernels.profiling.resources import KernelResources, Report
from mpkernels.profiling.toolchain import ToolchainError, require_nvcc

REPOSITORY = Path(__file__).resolve().parents[2]


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH")]))
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def nvcc():
    try:
        return require_nvcc()
    except ToolchainError as error:
        pytest.fail(str(error))  # no skip: `make test` installs it


@pytest.fixture(scope="module")
def compiled(nvcc, tmp_path_factory) -> Report:
    file = tmp_path_factory.mktemp("static") / "kernels.json"
    done = run_python("-m", "mpkernels.profiling.static", "--changed", "--json", str(file))
    assert file.exists(), f"exit status {done.returncode}\n{done.stderr}"
    report = resources.from_json(file.read_text())
    assert done.returncode == (1 if report.problems() else 0), done.stderr
    return report


@pytest.fixture(scope="module")
def recorded() -> Report:
    return resources.read_table()


def test_everything_compiles(compiled):
    assert not compiled.failures, "\n".join(compiled.problems())


def test_every_triton_kernel_for_every_architecture(compiled):
    kernels, failures = static.triton_kernels()
    assert not failures
    expected = {
        (kernel.name, f"sm_{arch}") for _, kernel in kernels for arch in kernel.architectures or static.ARCHITECTURES
    }
    assert expected
    assert {(kernel.kernel, kernel.arch) for kernel in compiled.kernels if kernel.backend == "triton"} == expected


def test_every_cuda_source_for_every_architecture(compiled, nvcc):
    sources = {path.relative_to(REPOSITORY).as_posix() for path in static.cuda_sources(REPOSITORY)}
    assert sources
    known = [arch for arch in static.ARCHITECTURES if arch in nvcc.architectures]
    assert known
    by_arch = {
        arch: {(k.source, k.kernel) for k in compiled.kernels if k.arch == f"sm_{arch}" and k.backend == "cuda"}
        for arch in known
    }
    for arch in known:
        assert {source for source, _ in by_arch[arch]} == sources
        assert by_arch[arch] == by_arch[known[0]], "an architecture lacks kernels that another has"


def test_no_spills(compiled):
    assert not compiled.spilling, "\n".join(compiled.problems())


def test_recorded_table_is_fresh(compiled, recorded):
    stale = resources.differences(compiled, recorded)
    assert not stale, f"{resources.TABLE.name} is stale: run `{resources.REFRESH}`\n" + "\n".join(stale)
    assert len(recorded.kernels) >= len(compiled.kernels)


def test_table_for_the_terminal_names_every_kernel(recorded):
    from rich.console import Console

    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 (closed with the console)
    console.print(resources.kernel_table())
    text = console.export_text()
    assert all(kernel.kernel.split("::")[-1] in text for kernel in recorded.kernels)


_SPILLING = """
#include <cuda_runtime.h>

namespace mpkernels {

// 160 live values a thread at 64 registers a thread: 1024 threads share 65,536 registers.
template <int N>
__global__ void __launch_bounds__(1024) spilling_kernel(const float* __restrict__ x, float* __restrict__ y) {
  float live[N];
#pragma unroll
  for (int i = 0; i < N; ++i) live[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) live[i] = live[i] * live[(i * 7 + 5) % N] + live[(i * 31 + 3) % N];
#pragma unroll
  for (int i = 0; i < N; ++i) y[i * 1024 + threadIdx.x] = live[i];
}

__global__ void __launch_bounds__(8 * 32) modest_kernel(const float* x, float* y) {
  __shared__ float tile[256];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[255 - threadIdx.x];
}

void launch(const float* x, float* y) {
  spilling_kernel<160><<<1, 1024>>>(x, y);
  modest_kernel<<<1, 256>>>(x, y);
}

}  // namespace mpkernels
"""


def compile_sources(root: Path, nvcc, **sources: str) -> Report:
    folder = root / "csrc" / "demo"
    folder.mkdir(parents=True)
    for name, text in sources.items():
        (folder / f"{name}.cu").write_text(text)
    jobs = static.cuda_jobs(static.cuda_sources(root), nvcc, root)
    found, failures = static.run_jobs(jobs)
    return Report(nvcc.version, "none", found, failures)


def test_a_spilling_cuda_kernel_is_named(tmp_path, nvcc):
    report = compile_sources(tmp_path, nvcc, spill=_SPILLING)
    assert not report.failures
    by_name = {kernel.kernel: kernel for kernel in report.kernels if kernel.arch == "sm_90"}
    assert by_name.keys() == {"mpkernels::spilling_kernel<160>", "mpkernels::modest_kernel"}
    spilling, modest = by_name["mpkernels::spilling_kernel<160>"], by_name["mpkernels::modest_kernel"]
    assert (spilling.registers, spilling.threads_per_block) == (64, 1024)
    assert spilling.spill_bytes > 0 < spilling.stack_bytes
    assert (modest.shared_bytes, modest.spill_bytes, modest.threads_per_block) == (1024, 0, 256)
    assert (modest.family, modest.source) == ("demo", "csrc/demo/spill.cu")
    assert {kernel.kernel for kernel in report.spilling} == {spilling.kernel}
    assert all("spilling_kernel<160> (cuda, sm_" in problem and "spills" in problem for problem in report.problems())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("__global__ void f() { undefined_name(); }", "undefined_name"),
        ("void f() { host_only_name(); }", "host_only_name"),
    ],
    ids=["in device code", "in host code"],
)
def test_a_cuda_source_that_does_not_compile_is_named(tmp_path, nvcc, text, reason):
    report = compile_sources(tmp_path, nvcc, broken=text)
    assert report.failures
    assert report.failures[0].kernel == "csrc/demo/broken.cu"
    assert reason in report.problems()[0]


def test_fibres_are_no_cuda_sources(tmp_path):
    for family in ("fibres", "volume"):
        (tmp_path / "csrc" / family).mkdir(parents=True)
        (tmp_path / "csrc" / family / "op.cu").touch()
    assert static.cuda_sources(tmp_path) == [tmp_path / "csrc" / "volume" / "op.cu"]


_TRITON_MODULE = """
import sys
from pathlib import Path

import triton
import triton.language as tl

from mpkernels.profiling import resources, static
from mpkernels.spec import TritonKernel


@triton.jit
def good(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.cumsum(tl.load(x + i, i < n), 0), i < n)


@triton.jit
def spilling(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i[:, None] * BLOCK + i[None, :])
    b = tl.load(y + i[:, None] * BLOCK + i[None, :])
    tl.store(y + i[:, None] * BLOCK + i[None, :], tl.dot(a, b) + tl.dot(b, a) * a)


@triton.jit
def broken(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), undefined_name)


pointers = {"x": "*fp32", "y": "*fp32"}
kernels = [
    TritonKernel("good", good, pointers | {"n": "i64"}, {"BLOCK": 256}, num_warps=8),
    TritonKernel("spilling", spilling, pointers, {"BLOCK": 64}, num_warps=1),
    TritonKernel("broken", broken, {"x": "*fp32"}, {"BLOCK": 64}),
    TritonKernel("untyped", good, pointers, {"BLOCK": 64, "M": 3}),
]
static.ARCHITECTURES = (90,)
found, failures = static.run_jobs(static.triton_jobs(("demo", kernel) for kernel in kernels))
Path(sys.argv[1]).write_text(resources.to_json(resources.Report("none", "none", found, failures)))
"""


def test_triton_kernels_that_fail_are_named(tmp_path):
    module, file = tmp_path / "kernels.py", tmp_path / "kernels.json"
    module.write_text(_TRITON_MODULE)
    done = run_python(str(module), str(file))
    assert done.returncode == 0, done.stderr
    report = resources.from_json(file.read_text())
    assert [failure.kernel for failure in report.failures] == ["broken", "untyped"]
    assert "undefined_name" in report.failures[0].reason
    assert "arguments without a type: ['n'], unknown arguments: ['M']" in report.failures[1].reason
    by_name = {kernel.kernel: kernel for kernel in report.kernels}
    assert by_name.keys() == {"good", "spilling"}
    assert (by_name["good"].spill_bytes, by_name["good"].threads_per_block) == (0, 256)
    assert by_name["good"].registers > 0 < by_name["good"].shared_bytes
    assert [kernel.kernel for kernel in report.spilling] == ["spilling"]
    assert sorted(problem.split()[0] for problem in report.problems()) == ["broken", "spilling", "untyped"]


def test_interpreted_triton_is_refused():
    done = run_python("-m", "mpkernels.profiling.static", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr


def test_no_nvcc_is_an_error_that_says_what_to_install(tmp_path):
    done = run_python("-m", "mpkernels.profiling.static", CUDACXX=str(tmp_path / "nvcc"))
    assert done.returncode == 2
    assert "requirements/nvcc.txt" in done.stderr


_PTXAS_LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fPf' for 'sm_90'
ptxas info    : Function properties for _Z1fPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for _Z6calleef
    32 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 48 bytes cumulative stack size, 1184 bytes smem, 368 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1gPf' for 'sm_90'
ptxas info    : Function properties for _Z1gPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, 360 bytes cmem[0]
"""


def test_ptxas_log():
    assert static.parse_ptxas(_PTXAS_LOG) == {
        "_Z1fPf": {"registers": 40, "shared": 1184, "spills": 24, "stack": 48},
        "_Z1gPf": {"registers": 8, "shared": 0, "spills": 0, "stack": 0},
    }


def test_launch_bounds():
    ptx = ".visible .entry f(\n.param .u64 f_0\n)\n.maxntid 16, 8, 2\n.minnctapersm 2\n{\n}\n.entry g()\n{\n}\n"
    assert static.launch_bounds(ptx) == {"f": 256}


def test_names_keep_their_arguments_only_where_they_must():
    names = static._demangle(["_Z1fPf", "_Z1gPf", "_Z1gPd", "_ZN12_GLOBAL__N_11hIfLi3ELb1EEEvPT_"])
    assert list(names.values()) == ["f", "g(float*)", "g(double*)", "(anonymous namespace)::h<float, 3, true>"]


_KERNEL = KernelResources("f<3>", "cuda", "volume", "csrc/volume/op.cu", "sm_90", 32, 0, 0, 0, 256)


def test_json_round_trip():
    failure = resources.Failure("g", "sm_80", 'line "1"\nline 2')
    report = Report("13.0.88", "3.7.0", (_KERNEL,), (failure,), {"csrc/volume/op.cu sm_90": "0123"})
    assert resources.from_json(resources.to_json(report)) == report
    assert resources.from_json(resources.to_json(Report("1", "2", ()))) == Report("1", "2", ())


def test_what_is_recorded_as_it_is_does_not_compile_again(tmp_path, nvcc):
    folder = tmp_path / "csrc" / "demo"
    folder.mkdir(parents=True)
    (folder / "op.cu").write_text("__global__ void f() {}\n")

    def jobs():
        return static.cuda_jobs(static.cuda_sources(tmp_path), nvcc, tmp_path)

    kernels = tuple(
        dataclasses.replace(_KERNEL, source="csrc/demo/op.cu", arch=f"sm_{arch}") for arch in static.ARCHITECTURES
    )
    recorded = Report("1", "2", kernels, fingerprints={job.title: job.fingerprint for job in jobs()})
    known = static.unchanged(jobs(), recorded)
    assert known == {
        f"csrc/demo/op.cu {kernel.arch}": [kernel] for kernel in kernels if kernel.arch != f"sm_{static.ALWAYS}"
    }
    (folder / "op.cuh").write_text("// a header of the family\n")
    assert static.unchanged(jobs(), recorded) == {}


def test_a_stale_table_is_described():
    fresh = Report("13.0.88", "3.7.0", (_KERNEL, dataclasses.replace(_KERNEL, kernel="added")))
    then = (dataclasses.replace(_KERNEL, registers=40), dataclasses.replace(_KERNEL, kernel="gone"))
    assert resources.differences(fresh, Report("13.0.88", "3.7.0", then)) == [
        "csrc/volume/op.cu, added, sm_90: compiled, but not in the table",
        "csrc/volume/op.cu, f<3>, sm_90: registers 40 -> 32",
        "csrc/volume/op.cu, gone, sm_90: in the table, but no longer compiled",
    ]
    of_another_compiler = resources.differences(fresh, Report("13.1.80", "3.7.0", then))
    assert not any("registers" in line for line in of_another_compiler)
    assert len(of_another_compiler) == 2
    assert resources.differences(fresh, fresh) == []


def test_a_missing_table_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m mpkernels.profiling.static --write"):
        resources.read_table(tmp_path / "kernels.json")
