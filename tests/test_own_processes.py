"""Tests that need a process of their own: what they switch on is read when Python, Triton or the libraries load.

Each runs pytest again on the op tests of one backend, and passes on what it printed.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpkernels import library

ROOT = Path(__file__).resolve().parents[1]
OPS = ("tests/volume", "tests/splatting", "tests/attention", "tests/convolution", "tests/flows")
CORE = "(error_within_bound and not float64) or stopped or closed_form or leaks"


def run_pytest(*arguments: str, least: int, **environment: str) -> None:
    """Runs pytest in a new process; fails with its output, or where fewer than ``least`` tests ran."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    output = run.stdout[-6000:] + run.stderr[-2000:]
    assert run.returncode == 0, output
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, output
    assert int(passed[1]) >= least, output
    print(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "tests", ["error_within_bound or random or refused", "not (error_within_bound or random or refused)"]
)
def test_triton_under_its_interpreter(tests):
    options = ("-m", "triton_interpreted", "-W", "ignore::RuntimeWarning")
    run_pytest("tests", *options, "-k", tests, least=50, TRITON_INTERPRET="1")


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets(isa):
    if platform.machine() not in ("x86_64", "AMD64") and isa != "baseline":
        return  # not built there: other processors have the baseline alone
    assert (library.LIBRARY_FOLDER / f"mpkernels_cpu_{isa}.so").exists()
    run_pytest(*OPS, "-k", f"TestCpu and ({CORE})", least=60, MPKERNELS_CPU_ISA=isa)


@pytest.mark.parametrize("order", ["reverse", "random:1"])
def test_fibres_in_another_order(order):
    """A barrier that one order of threads hides shows in another."""
    run_pytest(*OPS, "-k", f"TestFibres and ({CORE})", least=50, MPKERNELS_FIBRES_ORDER=order)


def test_fibres_under_sanitizers():
    """AddressSanitizer sees torch's allocations too: an access past a tensor's end fails with the thread named."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler, "a C++ compiler is needed"
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    run_pytest(
        *OPS,
        "-k",
        f"TestFibres and ({CORE})",
        "-s",
        least=50,
        LD_PRELOAD=" ".join(runtimes),
        ASAN_OPTIONS="detect_leaks=0",
        MPKERNELS_FIBRES_LIBRARY=str(library.LIBRARY_FOLDER / "mpkernels_fibres_sanitized.so"),
    )
