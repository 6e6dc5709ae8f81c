"""The CPU kernel of attention multiplies bfloat16 by whatever the processor has; each way gives right results.

Tiles of AMX are emulated here: everything but the instructions themselves runs, on any processor with AVX512-BF16. What
the processor lacks falls back to float32, where these tests still hold.
"""

import pytest
import torch

from mpkernels import library, masks, spec
from mpkernels.attention import attention
from mpkernels.testing.checking import check_case, gradients

UNITS = ("wide", "pairs", "emulated_tiles")
CASES = ("typical", "causal", "odd sizes", "across blocks", "grouped queries", "strided", "bias", "large")


@pytest.fixture(params=UNITS)
def unit(request, monkeypatch):
    monkeypatch.setenv("MPKERNELS_BFLOAT16", request.param)
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_error_within_bound(unit, name):
    op = spec.find("attention")
    for row in check_case(op, op.case(name), backend="cpu", dtype=torch.bfloat16):
        assert row.ok, f"{unit}: {row}"


def tensors(rows, keys, width):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, rows, width), (1, 2, keys, width), (1, 2, keys, width))
    return [torch.randn(*shape, generator=generator).bfloat16() for shape in shapes]


def test_repeats_are_bit_equal(unit):
    query, key, value = tensors(130, 130, 64)
    arguments = {"query": query, "key": key, "value": value, "mask": masks.causal()}

    def run(**arguments):
        return (attention(**arguments, backend="cpu"),)

    first, second = (gradients(run, arguments, ("query", "key", "value")) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize("poison", [(torch.nan, torch.inf), (None, torch.nan), (torch.inf, None)])
@pytest.mark.parametrize("visible", [33, 34, 63])
def test_hidden_keys_do_not_leak_through_pairs(unit, visible, poison):
    """Products take two keys at a time: the partner of the last visible one is hidden, and may be a NaN."""
    query, key, value = tensors(70, 130, 32)
    for x, number in zip((key, value), poison, strict=True):
        if number is not None:
            x[..., visible:, :] = number
    first = torch.zeros(70, dtype=torch.int32)
    mask = masks.intervals(first, first + visible)
    outputs, found = gradients(
        lambda **a: (attention(**a, mask=mask, backend="cpu"),),
        {"query": query, "key": key, "value": value},
        ("query", "key", "value"),
    )
    assert bool(outputs[0].isfinite().all())
    for name, x in found.items():
        assert bool(x.isfinite().all()), f"{unit}: {name}"
    assert not found["key"][..., visible:, :].any()


@pytest.mark.parametrize(("begin", "end"), [(5, 40), (67, 130), (1, 2)])
def test_intervals_that_begin_on_an_odd_key(unit, begin, end):
    query, key, value = tensors(70, 130, 32)
    first = torch.full((70,), begin, dtype=torch.int32)
    arguments = {"query": query, "key": key, "value": value}
    names = tuple(arguments)

    def run(mask, backend):
        return lambda **a: (attention(**a, mask=mask, backend=backend),)

    whole = masks.intervals(first, first + (end - begin))
    outputs, found = gradients(run(whole, "cpu"), arguments, names)
    alone = arguments | {name: arguments[name][..., begin:end, :] for name in ("key", "value")}
    wanted, wanted_gradients = gradients(run(None, "reference"), alone, names)
    torch.testing.assert_close(outputs[0], wanted[0], rtol=0.02, atol=0.02)
    for name, x in found.items():
        x = x if name == "query" else x[..., begin:end, :]
        torch.testing.assert_close(x, wanted_gradients[name], rtol=0.05, atol=0.05)


def test_the_units_are_not_the_same(monkeypatch):
    """Weights are rounded in pairs and tiles alone: were the switch dead, these tests would prove nothing."""
    host = library.host_module()
    if host is None or "avx512bf16" not in host.cpu_features() or library.instruction_set() != "avx512":
        return  # float32 on every path
    query, key, value = tensors(64, 64, 64)
    outputs = []
    for unit in ("wide", "pairs"):
        monkeypatch.setenv("MPKERNELS_BFLOAT16", unit)
        outputs.append(attention(query, key, value, backend="cpu"))
    assert not torch.equal(*outputs)
