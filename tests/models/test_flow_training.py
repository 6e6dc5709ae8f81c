"""What flows of pictures share, and what NICE, RealNVP and Glow promise: exact log-determinants, training, files."""

import json
import math
import sys

import pytest
import torch

from python_models import digit_training, flow_training, glow, nice, realnvp
from python_models.flow_networks import ConvNet, Mlp, ResNet
from python_models.flow_training import FlowData

SIZES = {
    "nice": {"hidden": 12, "couplings": 3, "dropout": 0.1},
    "realnvp": {"levels": 2, "hidden": 6},
    "glow": {"levels": 2, "depth": 2, "hidden": 6},
}
MODULES = {"nice": nice, "realnvp": realnvp, "glow": glow}
PICTURES = {"nice": (1, 6), "realnvp": (3, 4), "glow": (3, 8)}  # colours, side


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only wait for each other where tensors are as small as here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stripes(name):
    """Pictures of stripes: what is above says it all."""
    colors, side = PICTURES[name]
    generator = torch.Generator().manual_seed(0)

    def batches():
        while True:
            columns = torch.randint(256, (20, colors, 1, side), generator=generator)
            yield (columns.expand(20, colors, side, side).to(torch.uint8),)

    train = batches()
    return FlowData(train, next(train), next(train), {"uniform": 8.0}, "stripes")


def fit(name, **options):
    given = {"pictures" if name != "nice" else "data": stripes(name)}
    return MODULES[name].fit(**SIZES[name] | given | {"output": None, "samples": 4} | options)


def tiny(name):
    """A model in float64, whose every part has an influence: new couplings are near the identity."""
    colors, side = PICTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "nice":
            model = nice.Nice(nice.Config(side, 12, couplings=3), *nice.places(next(stripes(name).train)[0]))
        elif name == "realnvp":
            model = realnvp.RealNvp(realnvp.Config(colors, side, levels=2, hidden=6))
        else:
            model = glow.Glow(glow.Config(colors, side, levels=2, depth=1, hidden=6))
        x = flow_training.dequantize(torch.randint(256, (4, colors, side, side)), torch.Generator().manual_seed(0))
        model.train().log_prob(x)
        for parameter in model.parameters():
            with torch.no_grad():
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.double().eval(), x.double()


@pytest.mark.parametrize("name", MODULES)
def test_log_determinants_are_those_of_the_jacobian(name):
    model, x = tiny(name)
    one = x[:1]
    jacobian = torch.autograd.functional.jacobian(model.latent, one)
    jacobian = jacobian.view(one.numel(), one.numel())
    expected = torch.linalg.slogdet(jacobian).logabsdet
    z, log_abs_det = model.flow.transform(one)
    torch.testing.assert_close(log_abs_det[0], expected, atol=1e-8, rtol=1e-9)
    back, inverse = model.flow.transform.inverse(z)
    torch.testing.assert_close(back, one, atol=1e-8, rtol=0)
    torch.testing.assert_close(inverse[0], -expected, atol=1e-8, rtol=1e-9)
    prior = -z - 2 * torch.nn.functional.softplus(-z) if name == "nice" else -(z**2) / 2 - math.log(2 * math.pi) / 2
    torch.testing.assert_close(model.log_prob(one)[0], prior.sum() + expected, atol=1e-8, rtol=1e-9)


@pytest.mark.parametrize("name", MODULES)
def test_samples_and_latents_have_the_shape_of_pictures(name):
    model, x = tiny(name)
    torch.testing.assert_close(model.pictures(model.latent(x)), x, atol=1e-8, rtol=0)
    torch.manual_seed(1)
    drawn = model.sample(5, temperature=0.5)
    assert drawn.shape == (5, *x.shape[1:])
    assert drawn.isfinite().all()
    cold = model.sample(2, temperature=0.0)
    torch.testing.assert_close(cold[0], cold[1])


@pytest.mark.parametrize("name", MODULES)
def test_fit_learns_and_writes(name, tmp_path):
    (tmp_path / "pixelcnn" / "photographs").mkdir(parents=True)
    report = {"figures": {"bits_per_dimension": 4.5}}
    (tmp_path / "pixelcnn" / "photographs" / "report.json").write_text(json.dumps(report))
    reports, output = [], tmp_path / name
    others = {} if name == "nice" else {"others": tmp_path}
    result = fit(name, steps=25, learning_rate=1e-2, output=output, progress=reports.append, **others)
    assert result["figures"]["bits_per_dimension"] < result["loss"]["first"] - 0.1
    values = PICTURES[name][0] * PICTURES[name][1] ** 2
    expected = values * (math.log(256) - math.log(2) * result["figures"]["bits_per_dimension"])
    assert result["figures"]["log_likelihood"] == pytest.approx(expected)
    assert result["earlier_models"] == ({} if name == "nice" else {"pixelcnn/photographs": 4.5})
    assert [report["step"] for report in reports] == list(range(1, 26))
    written = json.loads((output / "report.json").read_text())
    assert written["figures"] == result["figures"]
    assert [picture["file"] for picture in written["pictures"]] == ["curve.png", "samples.png", "interpolations.png"]
    for picture in written["pictures"]:
        assert (output / picture["file"]).read_bytes().startswith(b"\x89PNG")
    model = MODULES[name].load_model(output)
    test = stripes(name)
    next(test.train)
    again = flow_training.mean_log_prob(model, test.test, flow_training.of_model)
    assert again == pytest.approx(result["figures"]["log_likelihood"], rel=1e-4)
    with pytest.raises(FileNotFoundError, match=r"output: .*train first"):
        MODULES[name].load_model(tmp_path)


def test_the_same_seed_gives_the_same_figures():
    first, second, other = (fit("glow", steps=3, seed=seed)["figures"] for seed in (1, 1, 2))
    assert first == second != other


def test_best_weights_are_kept():
    """A rate that spoils what was learned: the figure is that of the best validation."""
    result = fit("realnvp", steps=12, learning_rate=0.5)
    assert result["figures"]["bits_per_dimension_validation"] == pytest.approx(
        min(bits for _, bits in result["validation"]), rel=1e-5
    )


@pytest.mark.parametrize("name", MODULES)
def test_interrupted_training_is_evaluated(name, capsys):
    def progress(report):
        if report["step"] == 2:
            raise KeyboardInterrupt

    result = fit(name, steps=9, progress=progress)
    assert result["steps_done"] == 2
    assert result["interrupted"]
    assert "Interrupted after 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps: .*at least 0, got -1"),
        ({"minutes": 1.0, "steps": 3}, "minutes: .*no steps.*steps=3"),
        ({"hidden": 0}, "hidden: .*at least 1, got 0"),
        ({"batch": 0}, "batch: .*at least 1, got 0"),
        ({"samples": -1}, "samples: .*at least 1, got -1"),
    ],
)
def test_bad_settings_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(name, **{"steps": 0} | arguments)


@pytest.mark.parametrize("name", MODULES)
def test_command_line(name, monkeypatch, capsys, tmp_path):
    module, data = MODULES[name], stripes(name)
    monkeypatch.setattr(module, "digit_data", lambda *_: data)
    monkeypatch.setattr(module, "photograph_data", lambda *_: data, raising=False)
    sizes = [word for key, value in SIZES[name].items() for word in (f"--{key}", str(value))]
    command = [name, *sizes, "--samples", "2", "--output", str(tmp_path / name)]
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "2"])
    module.main()
    printed = capsys.readouterr().out
    for part in ("bits per dimension", "log likelihood", "uniform", "NICE", "samples.png", "interpolations.png"):
        assert part in printed
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "-1"])
    with pytest.raises(SystemExit):
        module.main()
    assert "steps: expected" in capsys.readouterr().err


def test_dequantized_levels_come_back():
    levels = torch.arange(256).repeat(50)
    x = flow_training.dequantize(levels, torch.Generator().manual_seed(0))
    assert -0.5 <= x.min() < x.max() < 0.5
    assert torch.equal(flow_training.quantize(x), levels)
    assert x.mean().abs() < 1e-3
    beyond = flow_training.quantize(torch.tensor([-3.0, 7.0, math.nan, math.inf]))
    assert beyond[:2].tolist() == [0, 255]
    assert (beyond >= 0).all()
    assert (beyond <= 255).all()


def test_bits_per_dimension():
    """A density of 1 on the interval of length 1 says nothing of a level; one of 256 / m says it is one of m."""
    assert flow_training.bits_per_dimension(torch.zeros(2), 10).tolist() == [8, 8]
    few = torch.tensor(7 * math.log(256 / 4), dtype=torch.float64)
    assert flow_training.bits_per_dimension(few, 7).item() == pytest.approx(2)


def test_bits_of_independent_pixels():
    train = torch.zeros(90, 2, dtype=torch.uint8)
    train[:45, 1] = 255
    bits = flow_training.independent_bits(train, train)
    assert 0.5 < bits < 1.1  # 0 of the first pixel, 1 of the second, and the share of the histogram of all
    assert flow_training.independent_bits(train, torch.full((1, 2), 7)) > 8


def test_data_of_photographs_and_digits():
    data = flow_training.photograph_data(3, 0, 32)
    first = next(data.train)[0]
    assert first.shape == (3, 3, 32, 32)
    assert first.dtype == data.test[0].dtype == torch.uint8
    assert len(data.valid[0]) >= 40
    assert len(data.test[0]) >= 150
    assert data.baselines["PNG"] < data.baselines["independent pixels"] < 8
    with pytest.raises(ValueError, match=r"side: .*got 400"):
        flow_training.photograph_data(3, 0, 400)
    data = flow_training.digit_data(5, 0)
    assert next(data.train)[0].shape == (5, 1, 28, 28)
    assert 1.5 < data.baselines["independent pixels"] < 2


def test_what_belongs_to_a_digit_stays_with_it():
    pictures = torch.arange(30, dtype=torch.uint8).view(-1, 1, 1).expand(30, 28, 28)
    generator = torch.Generator().manual_seed(0)
    moved, labels = next(digit_training.moved_batches(pictures, 12, 0.5, generator, torch.arange(30)))
    assert torch.equal(moved[:, 14, 14].long(), labels)


@pytest.mark.parametrize("network", [Mlp(3, 5, 8, context=2), ConvNet(3, 5, 8, context=2), ResNet(3, 5, 8, context=2)])
def test_networks_begin_with_zeros_and_use_the_context(network):
    shape = (2, 3) if isinstance(network, Mlp) else (2, 3, 4, 4)
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(shape, generator=generator), torch.randn(2, 2, generator=generator)
    assert torch.equal(network(x, context), torch.zeros(2, 5, *shape[2:]))
    torch.nn.init.normal_(network.last.weight, generator=generator)
    found, other = network(x, context), network(x, context + 1)
    assert not torch.allclose(found, other)
    if not isinstance(network, Mlp):
        torch.testing.assert_close(network(x, context[:, :, None, None].expand(2, 2, 4, 4)), found)
        with pytest.raises(ValueError, match="context: expected a tensor"):
            network(x)
