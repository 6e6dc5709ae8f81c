"""Attributes to codes: what is measured on pictures, exact likelihoods, edits, figures and the command."""

import json
import math
import sys

import pytest
import torch

from python_models import digit_attributes, styleflow
from python_models.digit_attributes import Judge
from python_models.digits import Digits
from python_models.styleflow import Attributes, Config, Regression, StyleFlow

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"code": 6, "hidden": 12, "layers": 2, "bins": 4, "units": 24}


@pytest.fixture
def slanted(bars):
    """Bars that are slanted and stretched."""
    digits, labels = bars(12)
    generator = torch.Generator().manual_seed(0)
    return Digits(*((digit_attributes.warped(part / 255, generator) * 255).to(torch.uint8) for part in digits)), labels


@pytest.fixture
def model(shaken):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shaken(StyleFlow(Config(**SIZES), 5), torch.randn(20, 6), torch.randn(20, 5), std=0.3)


def test_measures_of_strokes():
    def stroke(slant, width):
        y, x = torch.meshgrid(torch.arange(20.0), torch.arange(40.0), indexing="ij")
        distance = (x - 20 + slant * (y - 9.5)).abs()  # y counts downwards
        return (width / 2 + 0.5 - distance).clamp(0, 1)

    pictures = torch.stack([stroke(slant, width) for slant, width in ((0, 3), (0.5, 3), (-0.5, 3), (0, 5))])
    slant, thickness, breadth = digit_attributes.measure(pictures).unbind(1)
    torch.testing.assert_close(slant, torch.tensor([0, 0.5, -0.5, 0]), atol=0.01, rtol=0)
    assert thickness[0].item() == pytest.approx(3, rel=0.15)
    assert thickness[3].item() == pytest.approx(5, rel=0.15)
    assert breadth[0].item() == pytest.approx(3 / math.sqrt(12), rel=0.15)
    assert breadth[1].item() == pytest.approx(breadth[0].item(), rel=0.15)
    assert digit_attributes.measure(torch.zeros(1, 5, 5)).isfinite().all()


def test_log_determinants_are_those_of_the_jacobian(model):
    generator = torch.Generator().manual_seed(1)
    code = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    context = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda w: model.transform(w, context)[0], code).view(6, 6)
    z, log_abs_det = model.transform(code, context)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(log_abs_det[0], expected, atol=1e-8, rtol=1e-9)
    normal = -0.5 * (z.square() + math.log(2 * math.pi)).sum()
    torch.testing.assert_close(model.log_prob(code, context)[0], normal + expected, atol=1e-8, rtol=1e-9)


def test_an_edit_that_asks_for_nothing_changes_nothing(model):
    generator = torch.Generator().manual_seed(1)
    code = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    before, after = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(model.edit(code, before, before), code, atol=1e-8, rtol=0)
    edited = model.edit(code, before, after)
    assert ((edited - code).abs() > 1e-3).any(dim=1).all()
    torch.testing.assert_close(model.edit(edited, after, before), code, atol=1e-5, rtol=0)


def test_regression_finds_a_straight_line():
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(500, 2, generator=generator, dtype=torch.float64)
    code = context @ weight + 1 + 0.1 * noise
    found = Regression(code, context)
    step = torch.tensor([[1.0, 0, 0]], dtype=torch.float64)
    edited = found.edit(code[:1], context[:1], context[:1] + step)
    torch.testing.assert_close(edited, code[:1] + weight[:1], atol=0.03, rtol=0)
    entropy = 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.1))
    assert -found.log_prob(code, context).mean().item() == pytest.approx(entropy, abs=0.1)
    alone = Regression(code, context[:, :0])
    assert -alone.log_prob(code, context[:, :0]).mean().item() > entropy + 1


def test_attributes_are_numbers_and_one_of_ten():
    context = Attributes(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([4])).context()
    assert context.tolist() == [[1, 2, 3, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]]


def test_the_judge_knows_training_digits(slanted):
    digits, labels = slanted
    judge = Judge(digits, labels, 0, copies=2)
    assert torch.equal(judge(digits.train / 255), labels.train)


def test_fit_learns_edits_and_writes(slanted, tmp_path):
    digits, labels = slanted
    result = styleflow.fit(
        steps=40, batch=20, learning_rate=1e-2, samples=3, output=tmp_path, digits=digits, labels=labels, **SIZES
    )
    figures = result["figures"]
    assert figures["nats"] < result["loss"]["first"] - 0.5
    assert set(result["baselines"]) == {
        "a Gaussian",
        "a linear regression on the attributes",
        "the same flow, not told the attributes",
    }
    assert result["baselines"]["a linear regression on the attributes"] < result["baselines"]["a Gaussian"]
    assert {f"{start}{name}_moved" for start in ("", "linear_") for name in digit_attributes.MEASURED} < set(figures)
    assert 0 <= figures["class_kept"] <= 1
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["figures"] == figures
    assert len(written["pictures"]) == 4
    for picture in written["pictures"]:
        assert (tmp_path / picture["file"]).read_bytes().startswith(b"\x89PNG")
    flow, autoencoder, standard = styleflow.load_model(tmp_path)
    world = styleflow.World(autoencoder, standard, digits, labels)
    code, attributes = world.describe(digits.test / 255, labels.test)
    with torch.no_grad():
        nats = -flow.log_prob(code, attributes.context()).double().mean().item()
    assert nats == pytest.approx(figures["nats"], rel=1e-4)
    with pytest.raises(FileNotFoundError, match=r"output: .*train first"):
        styleflow.load_model(tmp_path / "none")


def test_interrupted_training_is_evaluated(slanted, capsys):
    def progress(report):
        if report["step"] == 2:
            raise KeyboardInterrupt

    digits, labels = slanted
    result = styleflow.fit(
        steps=9, batch=20, output=None, digits=digits, labels=labels, progress=progress, samples=1, **SIZES
    )
    assert result["interrupted"]
    assert (result["autoencoder_steps_done"], result["steps_done"]) == (2, 0)
    assert "Interrupted after 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bins": 1}, "bins: .*at least 2, got 1"),
        ({"code": 1}, "code: .*at least 2, got 1"),
        ({"steps": 2.5}, "steps: .*2.5"),
        ({"temperature": -0.1}, "temperature: .*-0.1"),
        ({"classes": 4}, "classes: .*one of .*units"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        styleflow.fit(**{"output": None, "steps": 0} | arguments)


def test_command_line(monkeypatch, capsys, slanted, tmp_path):
    monkeypatch.setattr(styleflow, "load_digits", lambda: slanted[0])
    monkeypatch.setattr(styleflow, "load_labels", lambda: slanted[1])
    sizes = [part for name, value in SIZES.items() for part in (f"--{name}", str(value))]
    command = ["styleflow", "--output", str(tmp_path), "--steps", "2", "--samples", "2", "--batch", "20"]
    monkeypatch.setattr(sys, "argv", [*command, *sizes])
    styleflow.main()
    printed = " ".join(capsys.readouterr().out.split())  # lines are cut anywhere
    for part in ("nats", "slant moved", "linear class kept", "not told the attributes", "edits.png"):
        assert part in printed
