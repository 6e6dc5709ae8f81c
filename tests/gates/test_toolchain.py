"""Finding nvcc: fake layouts for every place it may be in, and the message where it is nowhere."""

import subprocess
import sys
from pathlib import Path

import pytest

from mpkernels.profiling import toolchain
from mpkernels.profiling.toolchain import REQUIREMENTS, ToolchainError, find_nvcc, require_nvcc

REPOSITORY = Path(__file__).resolve().parents[2]

_FAKE_NVCC = """#!/bin/sh
here=$(cd "$(dirname "$0")" && pwd)
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.7" ;;
  --list-gpu-arch) printf 'compute_90\\ncompute_80\\ncompute_100\\n' ;;
  --dryrun) echo "#$ _HERE_=$here" >&2 ;;
  *) exit 9 ;;
esac
"""


def make_nvcc(folder: Path, release: str = "13.0", script: str = _FAKE_NVCC) -> Path:
    folder.mkdir(parents=True)
    path = folder / "nvcc"
    path.write_text(script.replace("{release}", release))
    path.chmod(0o755)
    return path


def make_wheels(packages: Path, name: str = "cu13", release: str = "13.0") -> Path:
    path = make_nvcc(packages / "nvidia" / name / "bin", release)
    for part in (*toolchain._WHEEL_PARTS, "lib/libcudart_static.a"):
        file = path.parents[1] / part
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return path


def test_on_path(tmp_path):
    path = make_nvcc(tmp_path / "bin")
    nvcc = find_nvcc({"PATH": str(path.parent)}, [])
    assert nvcc is not None
    assert (nvcc.path, nvcc.source, nvcc.version) == (path, "PATH", "13.0.7")
    assert nvcc.architectures == (80, 90, 100)
    assert nvcc.root == tmp_path
    assert nvcc.compile_flags == nvcc.link_flags == ()


def test_a_link_on_path_leads_to_the_toolkit(tmp_path):
    real = make_nvcc(tmp_path / "toolkit" / "bin")
    script = make_nvcc(tmp_path / "bin", script=f'#!/bin/sh\nexec "{real}" "$@"\n')
    nvcc = require_nvcc({"PATH": str(script.parent)}, [])
    assert nvcc.path == script
    assert nvcc.root == tmp_path / "toolkit"


def test_cuda_home_before_path(tmp_path):
    home = make_nvcc(tmp_path / "home" / "bin", "12.9")
    other = make_nvcc(tmp_path / "bin", "13.0")
    nvcc = require_nvcc({"CUDA_HOME": str(tmp_path / "home"), "PATH": str(other.parent)}, [])
    assert (nvcc.path, nvcc.source, nvcc.version) == (home, "CUDA_HOME", "12.9.7")


def test_cuda_home_of_a_runtime_alone_is_passed_over(tmp_path):
    path = make_nvcc(tmp_path / "bin")
    nvcc = require_nvcc({"CUDA_HOME": str(tmp_path / "home"), "PATH": str(path.parent)}, [])
    assert nvcc.source == "PATH"


def test_cudacxx_before_everything(tmp_path):
    named = make_nvcc(tmp_path / "named", "13.1")
    home = make_nvcc(tmp_path / "home" / "bin")
    environment = {"CUDACXX": str(named), "CUDA_HOME": str(tmp_path / "home"), "PATH": str(home.parent)}
    nvcc = require_nvcc(environment, [])
    assert (nvcc.path, nvcc.source) == (named, "CUDACXX")


def test_cudacxx_that_does_not_exist_never_falls_back(tmp_path):
    path = make_nvcc(tmp_path / "bin")
    with pytest.raises(ToolchainError, match=r"CUDACXX=.*nowhere.*no such program"):
        find_nvcc({"CUDACXX": str(tmp_path / "nowhere"), "PATH": str(path.parent)}, [])


def test_wheels_newest_first_and_after_path(tmp_path):
    make_wheels(tmp_path / "packages", "cu9", "9.2")
    path = make_wheels(tmp_path / "packages")
    nvcc = require_nvcc({"PATH": ""}, [tmp_path / "absent", tmp_path / "packages"])
    assert (nvcc.path, nvcc.source) == (path, "wheels")
    assert nvcc.link_flags == (f"-L{path.parents[1] / 'lib'}",)  # nvcc looks in lib64, which wheels do not have
    on_path = make_nvcc(tmp_path / "bin")
    assert require_nvcc({"PATH": str(on_path.parent)}, [tmp_path / "packages"]).source == "PATH"


@pytest.mark.parametrize(("part", "wheel"), toolchain._WHEEL_PARTS.items())
def test_incomplete_wheels_name_what_is_missing(tmp_path, part, wheel):
    path = make_wheels(tmp_path)
    (path.parents[1] / part).unlink()
    with pytest.raises(ToolchainError, match=rf"without {wheel}; .*pip install -r requirements/nvcc.txt"):
        find_nvcc({"PATH": ""}, [tmp_path])


def test_nvcc_that_does_not_run(tmp_path):
    path = make_nvcc(tmp_path / "bin", script="#!/bin/sh\necho no licence >&2; exit 3\n")
    with pytest.raises(ToolchainError, match=r"--version` failed with status 3: no licence"):
        find_nvcc({"PATH": str(path.parent)}, [])


def test_something_else_named_nvcc(tmp_path):
    path = make_nvcc(tmp_path / "bin", script="#!/bin/sh\necho hello\n")
    with pytest.raises(ToolchainError, match="names no version"):
        find_nvcc({"PATH": str(path.parent)}, [])


def test_none_says_what_to_install(tmp_path):
    assert find_nvcc({"PATH": str(tmp_path)}, [tmp_path]) is None
    with pytest.raises(ToolchainError, match="nvcc, the CUDA compiler, is missing") as raised:
        require_nvcc({"PATH": str(tmp_path)}, [tmp_path])
    assert "requirements/nvcc.txt" in str(raised.value)
    assert all(requirement in str(raised.value) for requirement in REQUIREMENTS)


def test_requirements_file_is_the_same_list():
    lines = (REPOSITORY / "requirements" / "nvcc.txt").read_text().splitlines()
    assert tuple(line for line in lines if line and not line.startswith("#")) == REQUIREMENTS


def run_as_a_file(path: str) -> subprocess.CompletedProcess:
    """As a build does: without site-packages, so that an import of torch or of the package would fail."""
    command = [sys.executable, "-S", str(Path(toolchain.__file__))]
    return subprocess.run(command, env={"PATH": path}, capture_output=True, text=True)


def test_runs_as_a_file_without_the_package(tmp_path):
    path = make_nvcc(tmp_path / "bin")
    done = run_as_a_file(f"{path.parent}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    values = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert values == {
        "nvcc": str(path),
        "source": "PATH",
        "version": "13.0.7",
        "architectures": "80;90;100",
        "root": str(tmp_path),
        "compile_flags": "",
        "link_flags": "",
    }


def test_runs_as_a_file_where_there_is_none(tmp_path):
    done = run_as_a_file(str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error: nvcc, the CUDA compiler, is missing" in done.stderr
