"""NICE: its halves, scales and settings; what is true of all flows is in test_flow_training.py."""

import pytest
import torch

from python_models import nice


def small(**sizes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nice.Nice(nice.Config(4, 8, dropout=0.0, **sizes), torch.zeros(16), torch.full((16,), 0.25))


def test_couplings_change_no_volume():
    model = small(couplings=3)
    torch.nn.init.normal_(model.flow.transform[3].network.last.weight)
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    z, log_abs_det = model.flow.transform(x)
    torch.testing.assert_close(log_abs_det, torch.full((5,), 16 * torch.tensor(4.0).log().item()))
    assert not torch.allclose(z, model.flow.transform[1](x.flatten(1))[0])


@pytest.mark.parametrize("couplings", [1, 2])
def test_even_and_odd_places_take_turns(couplings):
    """The first coupling moves the odd places, the second the even ones; then everything is scaled."""
    model = small(couplings=couplings)
    for i in range(couplings):
        torch.nn.init.normal_(model.flow.transform[3 + i].network.last.weight)
    with torch.no_grad():
        model.flow.transform[3 + couplings].log_scale.fill_(torch.tensor(2.0).log())
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    still = 8 * x.flatten(1)[:, [*range(0, 16, 2), *range(1, 16, 2)]]
    moved = ((model.latent(x) - still).abs() > 1e-4)[0]
    assert moved.tolist() == [couplings == 2] * 8 + [True] * 8


def test_places_of_levels():
    levels = torch.zeros(100, 1, 1, 3, dtype=torch.uint8)
    levels[:50, :, :, 1] = 255
    levels[0, :, :, 2] = 255
    center, deviation = nice.places(levels)
    assert center[0] == center[2] == pytest.approx(0.5 / 256 - 0.5)
    assert deviation[1] == pytest.approx(0.5, rel=0.02)
    assert 1e-3 < deviation[0] < deviation[2] < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prior": "cauchy"}, "prior: .*'logistic'.*'cauchy'"),
        ({"dropout": 1.0}, "dropout: .*got 1.0"),
        ({"couplings": 0}, "couplings: .*at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        nice.fit(**{"output": None, "steps": 0} | arguments)
