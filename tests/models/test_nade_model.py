"""The neural autoregressive distribution estimator as a model: its order, and its command."""

import itertools
import json
import sys

import pytest
import torch

from python_models import digit_training, nade
from python_models.digits import Digits
from python_models.nade import Nade


@pytest.fixture
def data():
    """Bars instead of digits, one in each picture, in one of four places."""
    pictures = torch.zeros(60, 28, 28, dtype=torch.uint8)
    for i in range(60):
        pictures[i, 4:24, 4 + 5 * (i % 4) : 7 + 5 * (i % 4)] = 255
    return Digits(pictures[:40], pictures[40:50], pictures[50:])


def small(pixels, hidden=6):
    model = Nade(torch.full((pixels,), 0.4), hidden).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return model


def test_probabilities_sum_to_one():
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)), dtype=torch.float64)
    assert small(6).log_prob(every).exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_pixel_depends_on_those_before_it_alone(backend):
    """The slope of log p by the bias b_d is x_d - sigmoid(logit_d): what is its slope by x_e?"""
    model = small(8)

    def residuals(x):
        (found,) = torch.autograd.grad(model.log_prob(x, backend).sum(), model.out_bias, create_graph=True)
        return found

    x = torch.rand(1, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.functional.jacobian(residuals, x)
    assert isinstance(found, torch.Tensor)
    slopes = found[:, 0]  # (d, e)
    assert torch.equal(slopes.triu(), torch.eye(8, dtype=torch.float64))
    assert (slopes[torch.ones(8, 8).tril(-1) > 0] != 0).all()


def test_it_learns_and_reports_the_belief_network_beside(data, tmp_path):
    result = nade.fit(steps=25, hidden=20, output=tmp_path / "nade", data=data)
    assert result["figures"]["nats"] < result["baselines"]["independent pixels"]
    report = json.loads((tmp_path / "fvsbn" / "report.json").read_text())
    assert result["earlier_models"] == {"fvsbn": report["figures"]["nats"]}
    assert json.loads((tmp_path / "nade" / "report.json").read_text()) == json.loads(json.dumps(result))
    assert {path.name for path in (tmp_path / "nade").iterdir()} == {
        "model.pt",
        "report.json",
        "curve.png",
        "samples.png",
    }


def test_the_command(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digit_training, "load_digits", lambda: data)
    monkeypatch.setattr(sys, "argv", ["nade", "--steps", "1", "--hidden", "4", "--output", str(tmp_path / "nade")])
    nade.main()
    assert "88.33" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["nade", "--hidden", "0"])
    with pytest.raises(SystemExit):
        nade.main()
    assert "hidden: expected" in capsys.readouterr().err
