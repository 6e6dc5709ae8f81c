"""Super-resolution by a flow: exact likelihoods given the low one, samples, figures, pictures and its command."""

import json
import math
import sys

import pytest
import torch

from python_models import srflow
from python_models.flow_training import FlowData, mean_log_prob
from python_models.srflow import Config, SRFlow

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"side": 8, "levels": 2, "depth": 1, "hidden": 6, "features": 4, "blocks": 1}


def patches(number, seed=0):
    """Levels of smooth patches, which have a little noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, 3, 3, 3, generator=generator) * 200
    smooth = torch.nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear", align_corners=True)
    return (smooth + 30 * torch.rand(smooth.shape, generator=generator)).to(torch.uint8)


def pairs(number, seed=0):
    found = patches(number, seed)
    return found, srflow.lower(found)


@pytest.fixture
def model(shaken):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        truth, low = pairs(8)
        return shaken(SRFlow(Config(**SIZES)), truth / 256 - 0.5, low)


def test_log_determinants_are_those_of_the_jacobian(model):
    truth, low = pairs(1)
    x, features = truth.double() / 256 - 0.5, model.context(low).detach()
    bicubic = srflow.bicubic(low, torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: model.transform(x - bicubic, features)[0], x).view(192, 192)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    z, log_abs_det = model.transform(x - bicubic, features)
    torch.testing.assert_close(log_abs_det[0], expected, atol=1e-8, rtol=1e-9)
    normal = -0.5 * (z.square() + math.log(2 * math.pi)).sum()
    torch.testing.assert_close(model.log_prob(x, low)[0], normal + expected, atol=1e-8, rtol=1e-9)
    back, _ = model.transform.inverse(z, features)
    torch.testing.assert_close(back + bicubic, x, atol=1e-9, rtol=0)


def test_every_part_sees_the_low_resolution(model):
    truth, low = pairs(2)
    x = truth.double() / 256 - 0.5
    features = model.context(low).detach().requires_grad_()
    z, log_abs_det = model.transform(x - srflow.bicubic(low, torch.float64), features)
    (gradient,) = torch.autograd.grad(z.square().sum() + log_abs_det.sum(), features)
    assert (gradient != 0).all()
    model.zero_grad()
    model.log_prob(x, low).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_samples_depend_on_temperature_and_seed(model):
    _, low = pairs(2)

    def drawn(temperature, seed):
        with torch.no_grad():
            return model.sample(low, temperature, torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(0.0, 1), drawn(0.0, 2))
    assert torch.equal(drawn(0.5, 1), drawn(0.5, 1))
    assert not torch.equal(drawn(0.5, 1), drawn(0.5, 2))
    near, far = ((drawn(t, 3) - drawn(0.0, 3)).abs().mean() for t in (0.1, 0.8))
    assert 0 < 2 * near < far


def test_resolutions_and_ratios():
    flat = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(srflow.lower(flat), flat[:, :, :2, :2])
    assert torch.equal(srflow.as_levels(srflow.bicubic(srflow.lower(flat))), flat.float())
    assert srflow.psnr(flat, flat) == math.inf
    assert srflow.psnr(flat + 5, flat) == pytest.approx(20 * math.log10(255 / 5))
    blocks = torch.arange(4, dtype=torch.uint8).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    large = blocks.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert torch.equal(srflow.lower(large), blocks)


def test_the_baseline_is_a_density():
    """Bits of values that have the distribution: its entropy."""
    scale = torch.full((3, 4, 4), 0.05)
    low = torch.full((200, 3, 2, 2), 128, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(200, 3, 8, 8, generator=generator) - 0.5
    values = srflow.bicubic(low) - 0.05 * uniform.sign() * torch.log1p(-2 * uniform.abs())
    levels = ((values + 0.5) * 256).clamp(0, 255).to(torch.uint8)
    found = srflow.laplace_bits(levels, scale)
    assert found == pytest.approx(8 + math.log2(2 * math.e * 0.05), abs=0.05)


@pytest.fixture
def data():
    def batches():
        seed = 10
        while True:
            yield pairs(16, seed)
            seed += 1

    return FlowData(batches(), pairs(20, 1), pairs(24, 2), {"uniform": 8.0}, "smooth patches")


def test_fit_learns_and_writes(data, tmp_path):
    result = srflow.fit(steps=30, learning_rate=1e-2, samples=3, output=tmp_path, data=data, **SIZES)
    figures = result["figures"]
    assert figures["bits_per_dimension"] < result["loss"]["first"]
    assert figures["bits_per_dimension"] < 6.3
    assert figures["psnr_nearest"] < figures["psnr_bicubic"]
    assert figures["psnr_sample"] < figures["psnr_mean_of_samples"]
    assert figures["psnr_sample"] < figures["psnr_temperature_0"]
    assert 1 < figures["diversity"] < 30
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["figures"] == figures
    for picture in written["pictures"]:
        assert (tmp_path / picture["file"]).read_bytes().startswith(b"\x89PNG")
    model = srflow.load_model(tmp_path)
    again = mean_log_prob(model, data.test, lambda m, x, low: m.log_prob(x, low))
    assert again == pytest.approx(figures["log_likelihood"], rel=1e-4)


def test_photographs_come_with_their_low_resolution():
    data = srflow.load(3, 0, 32)
    for truth, low in (next(data.train), data.valid, data.test):
        assert truth.shape[1:] == (3, 32, 32)
        assert torch.equal(low, srflow.lower(truth))
    assert len(data.test[0]) > 100
    assert data.baselines["a Laplace distribution around bicubic"] < data.baselines["independent pixels"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": 3}, "levels: .*1 or 2.*got 3"),
        ({"side": 30}, "side: .*multiple of 4, got 30"),
        ({"blocks": -1}, "blocks: .*at least 0, got -1"),
        ({"samples": 0}, "samples: .*at least 1, got 0"),
        ({"minutes": 1.0, "steps": 3}, "minutes: .*steps=3"),
        ({"temperature": float("nan")}, "temperature: .*got nan"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        srflow.fit(**{"output": None} | ({} if "minutes" in arguments else {"steps": 0}) | arguments)


def test_command_line(monkeypatch, capsys, data, tmp_path):
    monkeypatch.setattr(srflow, "load", lambda *_: data)
    sizes = [part for name, value in SIZES.items() for part in (f"--{name}", str(value))]
    command = ["srflow", "--output", str(tmp_path), "--steps", "2", "--samples", "2"]
    monkeypatch.setattr(sys, "argv", [*command, *sizes])
    srflow.main()
    printed = " ".join(capsys.readouterr().out.split())  # lines are cut anywhere
    for part in ("bits per dimension", "psnr bicubic", "diversity", "super_resolution.png"):
        assert part in printed
