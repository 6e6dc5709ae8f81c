"""Builds the compiled libraries by CMake and Ninja. Everything else about the package stands in pyproject.toml.

Without a C++ compiler, CMake or an importable torch the package still installs, and runs on the reference backend;
`mpkernels info` says what is missing. MPKERNELS_BUILD=require turns that warning into an error. While working on one
family, MPKERNELS_FAMILIES and MPKERNELS_TARGETS (lists with spaces) build its sources alone, and these libraries alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cuda_compiler() -> list[str]:
    """CMake's settings for nvcc, empty where there is none (see mpkernels/profiling/toolchain.py)."""
    script = ROOT / "mpkernels" / "profiling" / "toolchain.py"
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    facts = dict(line.split("=", 1) for line in found.stdout.splitlines() if "=" in line)
    if found.returncode or not facts.get("nvcc"):
        return []
    flags = " ".join([*facts["compile_flags"].split(";"), *facts["link_flags"].split(";")]).strip()
    return [f"-DCMAKE_CUDA_COMPILER={facts['nvcc']}"] + ([f"-DCMAKE_CUDA_FLAGS={flags}"] if flags else [])


class CMakeBuild(build_ext):
    """Runs CMake once for all libraries."""

    def run(self) -> None:
        try:
            self.build_libraries()
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("MPKERNELS_BUILD") == "require":
                raise
            self.warn(f"the compiled libraries are left out, the package runs on its references alone: {error}")

    def build_libraries(self) -> None:
        """Configures and builds; raises RuntimeError with the remedy where something is missing."""
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake is not on PATH: `pip install cmake ninja`")
        try:
            import pybind11
            import torch
        except ImportError as error:
            raise RuntimeError(
                f"{error}: install torch and pybind11 first, then use `pip install --no-build-isolation`"
            ) from error
        output = (
            ROOT / "mpkernels" if self.inplace or self.editable_mode else Path(self.build_lib).resolve() / "mpkernels"
        )
        build = Path(os.environ.get("MPKERNELS_BUILD_DIR", ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"))
        build.mkdir(parents=True, exist_ok=True)
        settings = [
            f"-DTORCH_ROOT={torch.__path__[0]}",
            f"-DPYBIND11={pybind11.get_include()}",
            f"-DPYTHON_INCLUDES={sysconfig.get_path('include')}",
            f"-DPYTHON_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
            f"-DOUTPUT={output}",
            f"-DFAMILIES={os.environ.get('MPKERNELS_FAMILIES', '*').replace(' ', ';')}",
            *cuda_compiler(),
        ]
        targets = os.environ.get("MPKERNELS_TARGETS", "all").split()
        if shutil.which("ninja"):
            settings.append("-GNinja")
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), *settings], check=True)
        parallel = ["--parallel", str(os.cpu_count() or 2)]
        subprocess.run([cmake, "--build", str(build), *parallel, "--target", *targets], check=True)


setup(ext_modules=[Extension("mpkernels._host", sources=[])], cmdclass={"build_ext": CMakeBuild})
