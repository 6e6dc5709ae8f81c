"""The class-conditional flow: exact likelihoods given the class, its classifier, its pictures and its command."""

import json
import math
import sys

import pytest
import torch

from mpkernels.flows import nn as flows
from python_models import conditional_flow
from python_models.conditional_flow import ConditionalFlow, Config
from python_models.conditional_training import Beside, Bounded, Logit, Places
from python_models.flow_training import mean_log_prob

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"side": 8, "classes": 4, "levels": 2, "depth": 1, "hidden": 6}


@pytest.fixture
def model(shaken):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.rand(8, 1, 8, 8) - 0.5
        return shaken(ConditionalFlow(Config(**SIZES)), x, torch.arange(8) % 4)


def pictures(number=3):
    x = torch.rand(number, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return 0.98 * x - 0.49


def test_log_determinants_are_those_of_the_jacobian(model):
    x, label = pictures(1), torch.tensor([2])
    jacobian = torch.autograd.functional.jacobian(lambda x: model.latents(x, label)[0], x).view(64, 64)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    z, log_abs_det = model.latents(x, label)
    torch.testing.assert_close(log_abs_det[0], expected, atol=1e-8, rtol=1e-9)
    normal = -0.5 * (z.square() + math.log(2 * math.pi)).sum()
    torch.testing.assert_close(model.log_prob(x, label)[0], normal + expected, atol=1e-8, rtol=1e-9)


def test_latents_give_the_picture_back_with_its_own_class_alone(model):
    x, label = pictures(), torch.tensor([0, 1, 3])
    z, _ = model.latents(x, label)
    torch.testing.assert_close(model.pictures(z, label), x, atol=1e-9, rtol=0)
    assert (model.pictures(z, (label + 1) % 4) - x).abs().mean() > 1e-3


def test_every_class_has_a_density_of_its_own(model):
    x = pictures()
    found = model.log_prob_of_classes(x)
    for label in range(4):
        torch.testing.assert_close(found[:, label], model.log_prob(x, torch.full((3,), label)))
    assert (found.diff(dim=1).abs() > 1e-3).all()
    with pytest.raises(ValueError, match=r"label: .*None"):
        model.log_prob(x)


def test_logits_are_a_density_on_the_interval():
    x = torch.tensor([[-0.5, -0.499, 0.0, 0.3, 0.499999]], dtype=torch.float64)
    logit = Logit()
    y, log_abs_det = logit(x)
    jacobian = torch.autograd.functional.jacobian(lambda x: logit(x)[0], x)[0, :, 0]
    torch.testing.assert_close(log_abs_det[0], torch.linalg.slogdet(jacobian).logabsdet)
    back, inverse = logit.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse, -log_abs_det)
    assert logit(torch.tensor([[-0.5, 0.5]]))[0].isfinite().all()


def test_places_have_parameters_of_their_own():
    x = torch.randn(50, 1, 2, 3, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7.0).view(2, 3)
    layer = Places(flows.ActNorm(6)).train()
    y, log_abs_det = layer(x)
    torch.testing.assert_close(y.std(dim=0, correction=0), torch.ones(1, 2, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(layer.inverse(y)[0], x)
    torch.testing.assert_close(layer.inverse(y)[1], -log_abs_det)


def test_networks_see_bounded_inputs():
    seen = torch.tensor([-1e6, -0.01, 0.0, 0.01, 1e6])
    found = Bounded(torch.nn.Identity(), bound=3.0)(seen)
    torch.testing.assert_close(found, torch.tensor([-3, -0.01, 0, 0.01, 3]), atol=1e-6, rtol=0)
    told = Bounded(conditional_flow.ConvNet(1, 1, 4, context=2))
    assert told(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2)).shape == (1, 1, 2, 2)


def test_both_flows_learn_and_one_is_judged():
    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor(2.0))

        def log_prob(self, x, context=None):
            return self.value * x

    both = Beside(Constant(), Constant())
    with torch.no_grad():
        both.untold.value.fill_(50.0)
    x = torch.tensor([3.0])
    found = both.train().log_prob(x, x)
    assert found.item() == 6
    found.sum().backward()
    assert both.told.value.grad.item() == both.untold.value.grad.item() == 3
    assert both.eval().log_prob(x, x).item() == 6


def test_fit_learns_and_writes(bars, tmp_path):
    digits, labels = bars(8)
    reports = []
    result = conditional_flow.fit(
        steps=30,
        batch=20,
        learning_rate=1e-2,
        samples=3,
        output=tmp_path,
        progress=reports.append,
        digits=digits,
        labels=labels,
        **SIZES,
    )
    figures = result["figures"]
    assert figures["bits_per_dimension"] < result["loss"]["first"] - 0.2
    assert figures["nats"] == pytest.approx(64 * math.log(2) * figures["bits_per_dimension"])
    assert figures["accuracy"] > 0.5  # of four classes
    assert figures["nats"] != figures["nats_not_told"]
    assert figures["accuracy_of_nearest_neighbours"] == 1
    assert set(result["baselines"]) == {"independent pixels", "independent pixels of the class"}
    assert all(4 < bits < 8 for bits in result["baselines"].values())
    assert [report["step"] for report in reports] == list(range(1, 31))
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["figures"] == figures
    assert {picture["file"] for picture in written["pictures"]} == {"curve.png", "samples.png", "styles.png"}
    for picture in written["pictures"]:
        assert (tmp_path / picture["file"]).read_bytes().startswith(b"\x89PNG")
    data = conditional_flow.load(20, 0, digits, labels)
    again = mean_log_prob(conditional_flow.load_model(tmp_path), data.test, lambda m, x, label: m.log_prob(x, label))
    assert 64 * math.log(256) - again == pytest.approx(figures["nats"], rel=1e-5)
    with pytest.raises(FileNotFoundError, match=r"output: .*train first"):
        conditional_flow.load_model(tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps: .*at least 0, got -1"),
        ({"batch": 0}, "batch: .*at least 1, got 0"),
        ({"samples": 0}, "samples: .*at least 1, got 0"),
        ({"temperature": -1.0}, "temperature: .*got -1"),
        ({"levels": 3, "side": 28}, "levels: .*divides 28, got 3"),
        ({"depth": 0}, "depth: .*at least 1, got 0"),
        ({"width": 3}, "width: .*one of .*depth"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        conditional_flow.fit(**{"output": None, "steps": 0} | arguments)


def test_command_line(monkeypatch, capsys, bars, tmp_path):
    digits, labels = bars(8)
    monkeypatch.setattr(conditional_flow, "load_digits", lambda: digits)
    monkeypatch.setattr(conditional_flow, "load_labels", lambda: labels)
    sizes = [part for name, value in SIZES.items() for part in (f"--{name}", str(value))]
    command = ["conditional_flow", "--output", str(tmp_path), "--steps", "2", "--samples", "2", "--batch", "10"]
    monkeypatch.setattr(sys, "argv", [*command, *sizes])
    conditional_flow.main()
    printed = " ".join(capsys.readouterr().out.split())  # lines are cut anywhere
    for part in ("bits per dimension", "accuracy", "nats not told", "independent pixels of the class", "styles.png"):
        assert part in printed
    monkeypatch.setattr(sys, "argv", [*command, "--depth", "0"])
    with pytest.raises(SystemExit):
        conditional_flow.main()
    assert "depth: " in capsys.readouterr().err
