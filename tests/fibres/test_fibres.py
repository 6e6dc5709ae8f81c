"""The executor that runs CUDA kernels on the CPU: right results, found mistakes, and reports that name the thread.

The kernels are in kernels.cuh and broken_kernels.cuh, what they are compared with is in program.cpp.
"""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpkernels.profiling import toolchain

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{CSRC}", f"-I{HERE}"]
COMPILER = os.environ.get("CXX", "c++")
ORDERS = ["forward", "reverse", "random:1", "random:2"]

# Where the message must come from: block, thread and some words.
FAULTS = {
    "exited_before_barrier": ("(0,0,0)", "(0,0,0)", r"divergent barrier.*__syncthreads.*thread \(40,0,0\) has exited"),
    "two_barriers": ("(0,0,0)", "(0,0,0)", r"divergent barrier.*thread \(32,0,0\) waits in __syncthreads"),
    "two_kinds_of_barrier": ("(0,0,0)", "(0,0,0)", r"divergent barrier.*\(0,1,0\) waits in __syncthreads_count"),
    "shuffle_from_exited": ("(0,0,0)", "(32,0,0)", r"deadlock.*waits in __shfl_xor_sync.*\(37,0,0\), which has exited"),
    "ballot_meets_barrier": ("(0,0,0)", "(0,0,0)", r"deadlock.*__ballot_sync.*lane 5.*which waits in __syncthreads"),
    "different_masks": ("(0,0,0)", "(0,0,0)", r"deadlock.*__syncwarp with mask 0xffffffff.*for lane 16"),
    "not_in_own_mask": ("(0,0,0)", "(16,0,0)", r"__shfl_sync with mask 0x0000ffff.*lane 16 is not in its own mask"),
    "reads_outside_mask": ("(0,0,0)", "(3,0,0)", r"lane 3 reads from lane 20, which is not in the mask"),
    "reads_missing_lane": ("(0,0,0)", "(0,3,0)", r"lane 12 reads from lane 20, which is not in the mask"),
    "bad_width": ("(0,0,0)", "(0,0,0)", r"width 12 is not a power of two"),
    "trap": ("(0,1,0)", "(3,0,0)", r"__trap was called"),
    "assertion": ("(0,0,0)", "(7,0,0)", r"assertion failed: int\(threadIdx.x\) < limit at .*broken_kernels.cuh:\d+"),
    "throws_standard": ("(1,0,0)", "(2,0,0)", r"the kernel threw an exception: no such thing"),
    "throws_other": ("(1,0,0)", "(2,0,0)", r"the kernel threw an exception that is no std::exception"),
    "unwinds_into_wait": ("(0,0,0)", "(40,0,0)", r"__trap was called"),
}
REFUSED = {
    "nested_launch": r"empty_kernel.*launches from kernels are not modelled",
    "barrier_outside_kernel": r"__syncthreads was called outside of a kernel",
    "too_many_threads": r"empty_kernel.*block \(32,33,1\): 1056 threads in a block, the most is 1024",
    "empty_grid": r"empty_kernel.*grid \(1,0,1\).*the grid is empty",
    "empty_block": r"empty_kernel.*block \(0,1,1\): the block is empty",
    "too_deep_block": r"empty_kernel.*a block is at most \(1024,1024,64\)",
    "too_much_dynamic_shared": r"empty_kernel.*232449 bytes of dynamic shared memory, the most is 232448",
    "most_dynamic_shared_is_fine": r"the launch was accepted",
}
# What a sanitizer reports, and where. The thread that completes a barrier, the last in forward order, goes on first.
SANITIZED = {
    "global_overrun": ("(1,0,0)", "(8,0,0)", r"AddressSanitizer: heap-buffer-overflow"),
    "dynamic_shared_overrun": ("(0,0,0)", "(31,0,0)", r"AddressSanitizer: heap-buffer-overflow"),
    "stack_overrun": ("(0,0,0)", "(3,0,0)", r"AddressSanitizer: stack-buffer-overflow"),
    "static_shared_overrun": ("(0,0,0)", "(30,0,0)", r"index 32 out of bounds for type 'float ?\[32\]'"),
    "signed_overflow": ("(0,0,0)", "(31,0,0)", r"signed integer overflow: .* cannot be represented in type 'int'"),
}
CHECKS = [
    "places", "shuffles_int", "shuffles_unsigned", "shuffles_long_long", "shuffles_float", "shuffles_double", "votes",
    "sub_masks", "exchange", "counting_barriers", "block_sum", "warp_scan", "dynamic_shared", "unwritten_shared",
    "atomics", "lock", "last_block", "vectors", "functions",
]  # fmt: skip


def build(name: str, *flags: str) -> Path:
    """The test program; kept in build/ as long as nothing that it is made of changes."""
    sources = sorted([*(CSRC / "fibres").glob("*"), CSRC / "common" / "launch.h", *HERE.glob("*.c*")])
    hasher = hashlib.sha256(repr([COMPILER, FLAGS, flags, name]).encode())
    for source in sources:
        hasher.update(source.read_bytes())
    result = CSRC.parent / "build" / "test-programs" / f"{name}-{hasher.hexdigest()[:16]}"
    if not result.exists():
        result.parent.mkdir(parents=True, exist_ok=True)
        partial = result.with_suffix(f".{os.getpid()}")
        command = [COMPILER, *FLAGS, *flags, str(HERE / "program.cpp"), "-o", str(partial), "-pthread", "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        partial.replace(result)
    return result


@pytest.fixture(scope="session")
def program() -> list[str]:
    return [str(build("program", "-O2"))]


@pytest.fixture(scope="session")
def ucontext_program() -> list[str]:
    return [str(build("ucontext_program", "-O1", "-DMPKERNELS_FIBRES_USE_UCONTEXT"))]


@pytest.fixture(scope="session")
def sanitized() -> list[str]:
    """A library that Python loads, which is how the tests of kernels use fibres."""
    flags = ["-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    library = build("sanitized.so", *flags)
    call = "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); "
    call += "sys.exit(library.run(*[argument.encode() for argument in sys.argv[2:]]))"
    return [sys.executable, "-c", call, str(library)]


def run(command: list[str], *arguments: str, order: str = "forward", threads: int = 1):
    environment = {**os.environ, "MPKERNELS_FIBRES_ORDER": order, "MPKERNELS_FIBRES_THREADS": str(threads)}
    environment.pop("MPKERNELS_FIBRES_STACK_KB", None)
    if command[0] == sys.executable:
        runtimes = [
            subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
            for name in ("libasan.so", "libubsan.so")
        ]
        environment["LD_PRELOAD"] = " ".join(runtimes)
        environment["ASAN_OPTIONS"] = "detect_leaks=0"  # Python's own
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, env=environment)


def assert_passes(done):
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"


def test_all_names_are_tested(program):
    listed = run(program, "list").stdout.split("\n")
    checks = {line.split()[1] for line in listed if line.startswith("check")}
    faults = {line.split()[1] for line in listed if line.startswith("fault")}
    assert checks == set(CHECKS)
    assert faults == set(FAULTS) | set(REFUSED) | set(SANITIZED)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CHECKS)
def test_results(program, name, order):
    assert_passes(run(program, "check", name, order=order))


@pytest.mark.parametrize("order", ORDERS)
def test_results_with_sanitizers(sanitized, order):
    assert_passes(run(sanitized, "check", "all", order=order))


@pytest.mark.parametrize("order", ORDERS)
def test_results_with_several_os_threads(program, order):
    assert_passes(run(program, "check", "all", order=order, threads=3))


@pytest.mark.parametrize("order", ORDERS)
def test_results_with_ucontext(ucontext_program, order):
    assert_passes(run(ucontext_program, "check", "all", order=order))


def test_order_shows_missing_barriers(program):
    results = {order: run(program, "races", order=order).stdout for order in ORDERS}
    assert results["forward"] == "missing_barrier=1 missing_syncwarp=0 last_block=9\n"
    assert results["reverse"] == "missing_barrier=0 missing_syncwarp=1 last_block=0\n"
    assert "missing_barrier=0 missing_syncwarp=0" in results["random:1"]
    assert "missing_barrier=0 missing_syncwarp=0" in results["random:2"]


def test_random_order_repeats(program):
    assert run(program, "races", order="random:7").stdout == run(program, "races", order="random:7").stdout


def expect_location(message, name, block, thread):
    found = re.search(r"mpkernels fibres: kernel (\w+), block (\S+), thread (\S+): ", message)
    assert found, message
    kernel = {"throws_standard": "throws", "throws_other": "throws"}.get(name, name)
    assert found.group(1) == f"{kernel}_kernel"
    assert found.group(2) == block
    assert found.group(3) == thread


@pytest.mark.parametrize("name", FAULTS)
def test_fault_names_kernel_block_and_thread(program, name):
    block, thread, words = FAULTS[name]
    done = run(program, "fault", name)
    assert done.returncode == 1, done.stderr  # thrown and caught, and kernels that ran after it were right
    expect_location(done.stdout, name, block, thread)
    assert re.search(words, done.stdout), done.stdout


@pytest.mark.parametrize("name", REFUSED)
def test_launch_is_refused(program, name):
    done = run(program, "fault", name)
    assert done.returncode == 1, done.stderr
    assert re.search(REFUSED[name], done.stdout), done.stdout


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threads", [1, 3])
def test_faults_are_found_in_any_order(program, order, threads):
    for name in FAULTS:
        done = run(program, "fault", name, order=order, threads=threads)
        assert done.returncode == 1, f"{name}: {done.stdout}{done.stderr}"
        assert "mpkernels fibres: kernel" in done.stdout


@pytest.mark.parametrize("name", [*FAULTS, *REFUSED])
def test_faults_leave_no_sanitizer_report(sanitized, name):
    done = run(sanitized, "fault", name)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""


def test_faults_with_ucontext(ucontext_program):
    for name in FAULTS:
        done = run(ucontext_program, "fault", name)
        assert done.returncode == 1, f"{name}: {done.stdout}{done.stderr}"


def test_dynamic_shared_overrun_is_found_without_sanitizer(program):
    done = run(program, "fault", "dynamic_shared_overrun")
    assert done.returncode == 1
    assert "kernel dynamic_shared_overrun_kernel, block (0,0,0): dynamic shared memory was written past" in done.stdout


@pytest.mark.parametrize("name", SANITIZED)
def test_sanitizer_report_names_thread(sanitized, name):
    block, thread, words = SANITIZED[name]
    done = run(sanitized, "fault", name)
    assert done.returncode != 0
    assert re.search(words, done.stderr), done.stderr
    expect_location(done.stderr, name, block, thread)


@pytest.mark.parametrize("order", ["sideways", "random:", "random:x"])
def test_unknown_order_is_refused(program, order):
    done = run(program, "check", "places", order=order)
    assert done.returncode == 1
    assert f"MPKERNELS_FIBRES_ORDER is '{order}', expected forward, reverse or random:SEED" in done.stdout


def test_speed(program, capsys):
    done = run(program, "speed")
    assert_passes(done)
    with capsys.disabled():
        print(f"\nfibres: {done.stdout.strip()}")
    assert float(re.search(r"switches_per_second=(\d+)", done.stdout).group(1)) > 1e6
    assert float(re.search(r"launch_of_256=([\d.]+)", done.stdout).group(1)) < 2000


def test_kernels_are_cuda(tmp_path):
    nvcc = toolchain.require_nvcc()  # of PATH, or of the wheels that `make test` installs
    command = [
        str(nvcc.path),
        *nvcc.compile_flags,
        "-std=c++17",
        "-arch=sm_90",
        "-c",
        "-I",
        str(CSRC),
        str(HERE / "kernels.cu"),
    ]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernels.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
