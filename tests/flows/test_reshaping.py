"""What lies between the levels of a flow, and the layouts of parameters."""

import doctest
from typing import Any

import pytest
import torch

from mpkernels.flows import layouts, reshaping, split, split_parameters, squeeze, unsqueeze

LIST: Any = [1]
REAL: Any = 2.0


def test_squeeze_has_the_order_channels_rows_columns():
    x = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    found = squeeze(x)
    assert found.shape == (2, 12, 2, 3)
    for c in range(3):
        for row in range(2):
            for column in range(2):
                assert torch.equal(found[:, 4 * c + 2 * row + column], x[:, c, row::2, column::2])


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_unsqueeze_undoes_squeeze(factor):
    x = torch.randn(2, 5, 6, 12)
    assert torch.equal(unsqueeze(squeeze(x, factor), factor), x)
    assert squeeze(torch.zeros(0, 5, 6, 12), factor).shape[0] == 0


def test_split_halves_the_channels_in_place():
    x = torch.randn(2, 6, 3)
    on, out = split(x)
    assert torch.equal(torch.cat([on, out], 1), x)
    assert on.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: squeeze(torch.zeros(1, 2, 3, 4)), ValueError, "x.*factor 2.*3, 4"),
        (lambda: squeeze(torch.zeros(2, 3, 4)), ValueError, r"x.*\(B, C, H, W\)"),
        (lambda: squeeze(LIST), TypeError, "x.*Tensor.*list"),
        (lambda: squeeze(torch.zeros(1, 2, 4, 4), REAL), TypeError, "factor.*integer.*float"),
        (lambda: unsqueeze(torch.zeros(1, 8, 4, 4), 0), ValueError, "factor.*1.*0"),
        (lambda: unsqueeze(torch.zeros(1, 6, 4, 4)), ValueError, "x.*channels.*4.*6"),
        (lambda: split(torch.zeros(2, 5)), ValueError, "x.*even C.*5"),
        (lambda: split(torch.zeros(2)), ValueError, "x.*even C"),
        (lambda: split_parameters(torch.zeros(2, 5), "shift_scale"), ValueError, "h.*2 P.*5"),
        (lambda: split_parameters(torch.zeros(2, 4), "st"), ValueError, "layout.*'shift_scale'.*'st'"),
        (
            lambda: split_parameters(torch.zeros(2, 4, dtype=torch.int32), "shift_scale"),
            TypeError,
            "h.*floating.*int32",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_layouts_are_views():
    h = torch.arange(6.0)[None, :, None]
    wanted = {
        "shift_scale": ([3, 4, 5], [0, 1, 2]),
        "scale_shift": ([0, 1, 2], [3, 4, 5]),
        "shift_scale_interleaved": ([1, 3, 5], [0, 2, 4]),
        "scale_shift_interleaved": ([0, 2, 4], [1, 3, 5]),
    }
    assert wanted.keys() == layouts.LAYOUTS.keys()
    for layout, (raw, shift) in wanted.items():
        found = split_parameters(h, layout)
        assert [p.flatten().tolist() for p in found] == [raw, shift]
        assert all(p.untyped_storage().data_ptr() == h.untyped_storage().data_ptr() for p in found)


def test_examples():
    for module in (reshaping, layouts):
        found = doctest.testmod(module)
        assert found.attempted > 0
        assert not found.failed
