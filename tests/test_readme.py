"""The README says what the code does: its tables are generated, its example and the docstrings' run."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mpkernels

ROOT = Path(__file__).resolve().parents[1]
SPLATTING = ("rasterize", "rasterization", "project_gaussians", "spherical_harmonics", "intersect_tiles", "ssim")
MODULES = [
    *("mpkernels.backends", "mpkernels.testing", "mpkernels.volume.composite.api"),
    *(f"mpkernels.splatting.{op}.api" for op in (*SPLATTING, "quat_scale_to_covar")),
]


def test_tables_are_generated():
    done = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_drop_in_example_is_the_same_function():
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:3]
    before, after = (block.split("```")[0] for block in blocks)
    generator = torch.Generator().manual_seed(0)
    edges = torch.cumsum(torch.rand(5, 9, generator=generator), -1)
    names = {
        "torch": torch,
        "sigmas": torch.rand(5, 8, generator=generator),
        "rgbs": torch.rand(5, 8, 3, generator=generator),
        "t_starts": edges[:, :-1],
        "t_ends": edges[:, 1:],
        "background": torch.rand(3, generator=generator),
    }
    first, second = dict(names), dict(names)
    exec(before, first)
    exec(after, second)
    for name in ("colors", "depth", "weights"):
        torch.testing.assert_close(first[name], second[name])


def test_the_gsplat_example_runs():
    (block,) = [b for b in (ROOT / "README.md").read_text().split("```python\n")[1:] if "compat.gsplat" in b]
    names: dict = {}
    exec(block.split("```")[0], names)
    assert names["colors"].shape == (1, 200, 300, 3)
    assert names["means"].grad.abs().sum() > 0


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    found = doctest.testmod(importlib.import_module(module), extraglobs={"mpkernels": mpkernels, "torch": torch})
    assert found.attempted > 0
    assert found.failed == 0
