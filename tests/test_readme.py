"""The README says what the code does: its tables are generated, its example and the docstrings' run."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import mpkernels

ROOT = Path(__file__).resolve().parents[1]
MODULES = [  # all that have examples
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "mpkernels").rglob("*.py"))
    if ">>> " in path.read_text()
]


def test_tables_are_generated():
    done = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def examples(document):
    return [block.split("```")[0] for block in (ROOT / document).read_text().split("```python\n")[1:]]


def test_the_drop_in_example_is_the_same_function():
    before, after = examples("README.md")[:2]
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
    (block,) = [block for block in examples("README.md") if "compat.gsplat" in block]
    names: dict = {}
    exec(block, names)
    assert names["colors"].shape == (1, 200, 300, 3)
    assert names["means"].grad.abs().sum() > 0


def test_the_attention_example_runs():
    (block,) = [block for block in examples("README.md") if "mpkernels.attention" in block]
    names: dict = {}
    exec(block, names)
    assert names["out"].shape == (2, 8, 300, 64)
    assert names["bias"].grad.abs().sum() > 0
    q, k, v = names["query"], names["key"], names["value"]
    torch.testing.assert_close(names["same"], scaled_dot_product_attention(q, k, v, is_causal=True))
    torch.testing.assert_close(names["last"], scaled_dot_product_attention(q[:, :, -1:], k, v))


def test_the_example_of_attention_md_runs():
    (block,) = examples("docs/attention.md")
    names: dict = {}
    exec(block, names)
    visible = names["ids"] == names["ids"][:, None]
    distance = torch.arange(1000)[:, None] - torch.arange(1000)
    visible &= (distance >= 0) & (distance <= 256)
    wanted = scaled_dot_product_attention(names["query"], names["key"], names["value"], attn_mask=visible)
    torch.testing.assert_close(names["out"], wanted)
    assert names["slope"].grad.abs().sum() > 0


def test_the_convolution_example_runs():
    (block,) = [block for block in examples("README.md") if "mpkernels.convolution" in block]
    names: dict = {}
    exec(block, names)
    padded = torch.nn.functional.pad(names["x"], (512, 0))
    wanted = torch.nn.functional.conv1d(padded, names["weight"], dilation=512)
    torch.testing.assert_close(names["whole"], wanted, atol=1e-4, rtol=1e-4)
    assert names["pictures"].shape == (2, 48, 16, 16)
    assert (names["made"][:, 0] == 0).all()


def test_the_examples_of_convolution_md_run():
    first, second, third = examples("docs/convolution.md")
    names: dict = {}
    exec(first, names)
    assert names["layer"].skip.shape == (1, 128, 16000)
    assert names["pixels"].shape == (8, 96, 32, 32)
    names = {}
    exec(second, names)
    torch.testing.assert_close(names["step"], names["more"][:, :, 0])
    exec(third, names)


def test_the_flows_examples_run():
    (block,) = [block for block in examples("README.md") if "mpkernels.flows" in block]
    names: dict = {}
    exec(block, names)
    torch.testing.assert_close(names["y"][:, :24], names["x"][:, :24])
    raw = names["h"].chunk(2, 1)[1]
    wanted = torch.nn.functional.logsigmoid(raw + 2).flatten(1).sum(1)
    torch.testing.assert_close(names["log_abs_det"], wanted)
    assert all(p.grad is not None for p in names["flow"].parameters())


def test_the_examples_of_flows_md_run():
    names: dict = {}
    for block in examples("docs/flows.md"):
        exec(block, names)
    assert names["samples"].shape == (10, 2)


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    torch.manual_seed(0)  # the bounds of an example are those of most numbers
    found = doctest.testmod(importlib.import_module(module), extraglobs={"mpkernels": mpkernels, "torch": torch})
    assert found.attempted > 0
    assert found.failed == 0
