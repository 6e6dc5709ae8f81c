"""The flow conditioned on a flow: exact conditional likelihoods, what sees what, completions and its command."""

import json
import math
import sys

import pytest
import torch

from python_models import cflow
from python_models.cflow import CFlow, Config
from python_models.flow_training import mean_log_prob

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"height": 4, "width": 8, "depth": 2, "hidden": 6}


@pytest.fixture
def model(shaken):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lower, upper = torch.rand(8, 1, 4, 8) - 0.5, torch.randint(256, (8, 1, 4, 8))
        return shaken(CFlow(Config(**SIZES)), lower, upper)


def halves(number=1):
    generator = torch.Generator().manual_seed(1)
    return (0.98 * torch.rand(2, number, 1, 4, 8, generator=generator, dtype=torch.float64) - 0.49).unbind(0)


def test_log_determinants_are_those_of_the_jacobian(model):
    """Of both flows at once: the Jacobian of the pair is triangular in blocks."""
    lower, upper = halves()

    def latents(lower, upper):
        activations, _ = model.told.upper(upper)
        h = lower
        for number, layer in enumerate(model.told.flow_b):
            h, _ = layer(h, activations[number] if number > 0 else None)
        return h, activations[-1]

    parts = torch.autograd.functional.jacobian(latents, (lower, upper))
    jacobian = torch.cat([torch.cat([part.reshape(32, 32) for part in row], dim=1) for row in parts])
    assert (jacobian[32:, :32] == 0).all()  # nothing of the lower half goes into flow A
    assert (jacobian[:32, 32:] != 0).any()
    activations, of_upper = model.told.upper(upper)
    found = model.told.log_prob(lower, activations) + of_upper
    normal = sum(-0.5 * (z.square() + math.log(2 * math.pi)).sum() for z in latents(lower, upper))
    expected = torch.linalg.slogdet(jacobian).logabsdet + normal
    torch.testing.assert_close(found[0], expected, atol=1e-8, rtol=1e-9)


def test_every_coupling_of_b_sees_its_activation_of_a(model):
    lower, upper = halves()
    activations, _ = model.told.upper(upper)
    seen = [activation.detach().requires_grad_() for activation in activations]
    model.told.log_prob(lower, seen).sum().backward()
    assert seen[0].grad is None  # those of the first layers, which are no coupling
    assert all((activation.grad != 0).any() for activation in seen[1:])


def test_samples_are_the_way_back(model):
    lower, upper = halves(3)
    activations, _ = model.told.upper(upper)
    z = torch.randn(3, 4, 2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    h = model.told.sample(z, activations)
    assert h.shape == lower.shape
    for number, layer in enumerate(model.told.flow_b):
        h, _ = layer(h, activations[number] if number > 0 else None)
    torch.testing.assert_close(h, z, atol=1e-8, rtol=0)


def test_completions_depend_on_the_upper_half_and_the_seed(model):
    upper = torch.randint(256, (2, 1, 4, 8), generator=torch.Generator().manual_seed(3))
    found = model.complete(upper, 0.8, 1)
    assert torch.equal(found, model.complete(upper, 0.8, 1))
    assert not torch.equal(found, model.complete(upper, 0.8, 2))
    assert not torch.equal(found[:1], model.complete(upper.flip(0), 0.8, 1)[:1])
    assert found.min() >= -0.5
    assert found.max() <= 0.5


def test_all_three_flows_learn_from_one_loss(model):
    lower, _ = halves(2)
    upper = torch.randint(256, (2, 1, 4, 8), generator=torch.Generator().manual_seed(3))
    model.train().log_prob(lower, upper).sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert unused == []


def test_halves_are_the_picture():
    picture = torch.arange(2 * 6 * 4).view(2, 6, 4)
    lower, upper = cflow.halves(picture)
    assert torch.equal(torch.cat([upper, lower], dim=2)[:, 0], picture)


def test_fit_learns_and_writes(bars, tmp_path):
    digits, _ = bars(8)
    result = cflow.fit(
        steps=30, batch=20, learning_rate=1e-2, samples=3, output=tmp_path, digits=digits, seed=1, **SIZES
    )
    figures = result["figures"]
    assert figures["bits_per_dimension"] < result["loss"]["first"]
    assert figures["nats_that_the_upper_half_is_worth"] == pytest.approx(
        32 * math.log(2) * (figures["bits_per_dimension_not_told"] - figures["bits_per_dimension"])
    )
    assert figures["bits_per_dimension"] < figures["bits_per_dimension_told_another_half"]
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["figures"] == figures
    for picture in written["pictures"]:
        assert (tmp_path / picture["file"]).read_bytes().startswith(b"\x89PNG")
    data = cflow.load(20, 0, digits)
    again = mean_log_prob(cflow.load_model(tmp_path), data.test, lambda m, x, upper: m.log_prob(x, upper))
    assert again == pytest.approx(figures["log_likelihood"], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 7}, "height: .*even.*got 7"),
        ({"depth": 0}, "depth: .*at least 1, got 0"),
        ({"hidden": 1.5}, "hidden: .*integer.*1.5"),
        ({"levels": 2}, "levels: .*one of .*hidden"),
        ({"temperature": math.inf}, "temperature: .*inf"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        cflow.fit(**{"output": None, "steps": 0} | arguments)


def test_command_line(monkeypatch, capsys, bars, tmp_path):
    monkeypatch.setattr(cflow, "load_digits", lambda: bars(8)[0])
    sizes = [part for name, value in SIZES.items() for part in (f"--{name}", str(value))]
    command = ["cflow", "--output", str(tmp_path), "--steps", "2", "--samples", "2", "--batch", "10"]
    monkeypatch.setattr(sys, "argv", [*command, *sizes])
    cflow.main()
    printed = " ".join(capsys.readouterr().out.split())  # lines are cut anywhere
    for part in ("bits per dimension", "upper half is worth", "told another half", "completions.png"):
        assert part in printed
