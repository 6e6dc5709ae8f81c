"""The walk "Adding an op" of CONTRIBUTING.md, followed to the letter in a copy of the repository.

The op's family is built alone, for the instruction set of this machine and for fibres, so that the test takes seconds.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpkernels import library
from mpkernels.profiling import static
from mpkernels.profiling.toolchain import require_nvcc

ROOT = Path(__file__).resolve().parents[1]
OP = "scaled_softplus"
_FILE = re.compile(r"^`(?P<path>[\w./]+)`:\n\n```\w+\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
# what a surrounding test run, or a git hook, may have set for itself
_FOREIGN = ("GIT_", "MPKERNELS_", "PYTHONPATH", "PYTEST_", "TRITON_INTERPRET", "LD_PRELOAD")


def walk() -> dict[str, str]:
    """The files of the walk: path -> text."""
    return {match["path"]: match["text"] for match in _FILE.finditer((ROOT / "CONTRIBUTING.md").read_text())}


def run(command, folder: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    environment["PYTHONPATH"] = str(folder)  # in front of an editable install of the original
    done = subprocess.run(
        command, cwd=folder, env=environment | variables, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the working tree, committed to a git repository of its own, with the files of the walk."""
    copy = tmp_path / "mpkernels"
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # not what was deleted but is still tracked
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    run(["git", "init", "--quiet"], copy)
    run(["git", "add", "--all"], copy)
    author = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    run(["git", *author, "commit", "--quiet", "--no-verify", "--message", "a copy"], copy)
    for path, text in walk().items():
        assert not (copy / path).exists(), path
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_text(text)
    return copy


def build(copy: Path, folder: Path) -> None:
    run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        copy,
        MPKERNELS_BUILD="require",
        MPKERNELS_BUILD_DIR=str(folder),
        MPKERNELS_FAMILIES="toy",
        MPKERNELS_TARGETS=f"_host mpkernels_cpu_{library.instruction_set() or 'baseline'} mpkernels_fibres",
        CUDACXX=str(folder / "no nvcc"),  # nvcc has a test of its own
    )


def test_the_op_builds_and_passes(copy, tmp_path):
    """One test: in several, each of several pytest processes would build."""
    build(copy, tmp_path / "build")

    backends = ("reference", "cpu", "fibres")
    options = [word for backend in backends for word in ("--backend", backend)]
    output = run([sys.executable, "-m", "mpkernels", "validate", OP, *options, "--json"], copy)
    validated = json.loads(output)
    assert validated["ok"], output
    assert not validated["not_run"], output
    for backend in backends:
        rows = [row for row in validated["rows"] if (row["op"], row["backend"]) == (OP, backend)]
        assert all(row["cases"] == row["of"] > 0 for row in rows), output
        assert len(rows) == (2 if backend == "fibres" else 4), output  # dtypes

    pytest_quietly = [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider"]
    output = run([*pytest_quietly, "tests/toy", "--doctest-modules", f"mpkernels/toy/{OP}/api.py"], copy)
    passed = re.search(r"(\d+) passed", output)
    assert passed, output
    assert int(passed[1]) >= 150, output
    assert "skipped" not in output, output

    found = run([sys.executable, "-c", "import mpkernels.toy; print(mpkernels.toy.__file__)"], copy).strip()
    assert Path(found) == copy / "mpkernels" / "toy" / "__init__.py", "another installation was tested"
    status = run(["git", "status", "--porcelain", "--untracked-files=all"], copy).splitlines()
    assert sorted(status) == sorted(f"?? {path}" for path in walk()), "more than new files"


def test_nvcc_compiles_it_without_spills(copy):
    kernels = static.compile_cuda(copy / "csrc" / "toy" / f"{OP}.cu", 80, require_nvcc(), copy)
    assert len(kernels) == 8  # forward and backward, in four dtypes
    assert not any(kernel.spill_bytes for kernel in kernels)


def test_its_style_is_ours(copy):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    files = walk()
    for name, *arguments in (
        ("ruff", "check"),
        ("ruff", "format", "--check"),
        ("clang-format", "--dry-run", "--Werror"),
    ):
        tool = shutil.which(name, path=path)
        assert tool, f"{name} is missing: `make test` installs it"
        run([tool, *arguments, *(file for file in files if file.endswith(".py") == (name == "ruff"))], copy)
