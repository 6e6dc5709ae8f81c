"""The PixelCNN: what its outputs may depend on, both ways of sampling, likelihoods, its pictures and its command."""

import json
import math
import sys

import pytest
import torch

from python_models import digits, pixelcnn, pixelcnn_pictures, pixelcnn_sampling
from python_models.pixelcnn import Config, PixelCNN
from python_models.pixelcnn_pictures import Pictures
from python_models.pixelcnn_sampling import sample_cached, sample_naive, uniform_numbers

TINY = {"width": 6, "layers": 2, "hidden": 24, "first_kernel": 5}
MODELS = {
    "digits": {**TINY, "side": 6},
    "photographs": {**TINY, "side": 4, "colors": 3, "mixture": 2, "places": False, "first_kernel": 3},
}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only wait for each other where tensors are as small as here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(data, **changes):
    """A model whose every part has an influence: new ones have outputs of zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PixelCNN(Config(**MODELS[data] | changes)).double().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def reached(model):
    """Which values (row) each output depends on (column), in the order in which they are drawn."""
    colors, side = model.config.colors, model.config.side
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, colors, side, side, generator=generator, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: model(x)[0].abs().sum(dim=1))(x)[:, :, :, 0]
    order = jacobian.permute(1, 2, 0, 4, 5, 3)  # rows, columns, colours of outputs, then of inputs
    return order.reshape(colors * side * side, -1) != 0


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("data", pixelcnn.DATA)
def test_outputs_depend_on_earlier_values_alone(data, backend):
    model = tiny(data)
    forward = model.forward
    model.forward = lambda x: forward(x, backend)
    depends = reached(model)
    assert not depends.triu().any()
    assert depends.sum() > 0.3 * depends.numel()


def test_each_colour_sees_those_before_it_at_its_own_pixel():
    depends = reached(tiny("photographs", width=24))
    pixels = depends.unflatten(0, (-1, 3)).unflatten(2, (-1, 3))
    own = pixels[5, :, 5]
    assert torch.equal(own, torch.ones(3, 3, dtype=torch.bool).tril(-1))
    assert pixels[5, :, 4].all()  # and every colour of the pixel to the left
    assert torch.equal(depends, torch.ones(48, 48, dtype=torch.bool).tril(-1))


def test_nothing_is_hidden_in_a_blind_spot():
    """With as many layers as the picture is wide, every output depends on every value before it."""
    model = tiny("digits", layers=5, first_kernel=3)
    assert torch.equal(reached(model), torch.ones(36, 36, dtype=torch.bool).tril(-1))


@pytest.mark.parametrize("data", pixelcnn.DATA)
def test_cached_samples_are_the_naive_ones(data):
    for changes in ({}, {"kernel": 5, "layers": 1}, {"layers": 0, "places": True}):
        model = tiny(data, **changes)
        uniform = uniform_numbers(model.config, 3, 1, torch.float64)
        naive, cached = sample_naive(model, uniform), sample_cached(model, uniform)
        assert torch.equal(naive, cached)
        assert 0.3 < naive.std() < 1.1
        other = sample_cached(model, uniform_numbers(model.config, 3, 2, torch.float64))
        assert not torch.equal(cached, other)


def test_samples_have_the_frequencies_of_the_model():
    """Of a picture of two values: p(x) of log_prob is how often it is drawn."""
    model = tiny("digits", side=2, layers=1, first_kernel=3)
    drawn = sample_cached(model, uniform_numbers(model.config, 4000, 3, torch.float64))
    numbers = ((drawn.flatten(1) > 0).long() * 2 ** torch.arange(4)).sum(dim=1)
    every = torch.tensor([[(n >> i & 1) * 2.0 - 1 for i in range(4)] for n in range(16)], dtype=torch.float64)
    share = model.log_prob(every.view(16, 1, 2, 2)).exp().detach()
    assert share.sum().item() == pytest.approx(1, abs=1e-9)
    error = numbers.bincount(minlength=16) / 4000 - share
    assert (error.abs() < 5 * (share * (1 - share) / 4000).sqrt() + 1e-3).all()


def test_levels_of_a_mixture_are_all_there_is():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(1, 1, 9, 1, 1, generator=generator, dtype=torch.float64)
    outputs[0, 0, 6] = -9  # below the least scale
    levels = torch.arange(256, dtype=torch.float64).view(-1, 1, 1, 1) / 127.5 - 1
    log_share = pixelcnn.log_mixture(levels, outputs.expand(256, 1, 9, 1, 1))
    assert log_share.exp().sum().item() == pytest.approx(1, abs=1e-9)
    scales = torch.tensor([1e-4, 1.0, 300.0], dtype=torch.float64).log().clamp(min=pixelcnn.LEAST_LOG_SCALE)
    for log_scale in scales.tolist():
        outputs = torch.tensor([0.0, 0.3, log_scale], dtype=torch.float64, requires_grad=True)
        log_share = pixelcnn.log_mixture(levels, outputs.view(1, 1, 3, 1, 1).expand(256, 1, 3, 1, 1))
        (gradient,) = torch.autograd.grad(log_share.sum(), outputs)
        assert log_share.isfinite().all()
        assert gradient.isfinite().all()
        assert log_share.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_draws_of_a_mixture_have_its_shares():
    outputs = torch.tensor([[0.0, 1.0, -0.5, 0.9, -2.5, -3.0]], dtype=torch.float64)
    uniform = torch.rand(20000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = pixelcnn.draw(outputs.expand(20000, 6), uniform)
    counts = ((drawn + 1) * 127.5).round().long().bincount(minlength=256) / 20000
    levels = torch.arange(256, dtype=torch.float64).view(-1, 1, 1, 1) / 127.5 - 1
    share = pixelcnn.log_mixture(levels, outputs.view(1, 1, 6, 1, 1).expand(256, 1, 6, 1, 1)).exp().flatten()
    assert (counts - share).abs().max() < 0.008
    assert share[255] > 5 * share[254]  # what lies beyond the last level counts as the last level


def test_photographs_are_cut_into_patches():
    pictures = pixelcnn_pictures.load_photographs(5, 0)
    again = pixelcnn_pictures.load_photographs(5, 0)
    first = next(pictures.train)
    assert first.shape == (5, 3, pixelcnn.PATCH, pixelcnn.PATCH)
    assert torch.equal(first, next(again.train))
    assert not torch.equal(first, next(pictures.train))
    assert len(pictures.test) > 200
    for part in (first, pictures.valid, pictures.test):
        assert -1 <= part.min() < 0 < part.max() <= 1
        levels = (part + 1) * 127.5
        torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert pictures.baselines["uniform"] == 8
    assert 3 < pictures.baselines["PNG"] < pictures.baselines["independent pixels"] < 8


def test_tiles_are_the_picture():
    picture = torch.arange(3 * 33 * 50).view(3, 33, 50)
    cut = pixelcnn_pictures.tiles(picture)
    assert cut.shape == (2 * 3, 3, 16, 16)
    assert torch.equal(cut[4], picture[:, 16:32, 16:32])


def test_digits_are_drawn_anew():
    pictures = pixelcnn_pictures.load_digits(8, 0)
    first = next(pictures.train)
    assert first.shape == (8, 1, digits.SIDE, digits.SIDE)
    assert set(first.unique().tolist()) == {-1.0, 1.0}
    assert pictures.baselines["uniform"] == pytest.approx(784 * math.log(2))
    assert 180 < pictures.baselines["independent pixels"] < 230


@pytest.fixture
def stripes():
    """Pictures of stripes: what is above says it all."""

    def make(colors, side, binary):
        generator = torch.Generator().manual_seed(0)

        def batches():
            while True:
                columns = torch.rand(16, colors, 1, side, generator=generator)
                columns = (columns < 0.5).float() if binary else (columns * 255).round() / 255
                yield 2 * columns.expand(16, colors, side, side).contiguous() - 1

        train = batches()
        return Pictures(train, next(train), next(train), {"uniform": 8.0, "independent pixels": 4.0})

    return make


@pytest.mark.parametrize("data", pixelcnn.DATA)
def test_fit_learns_and_writes(data, stripes, tmp_path):
    sizes = MODELS[data] | ({"mixture": 3} if data == "photographs" else {"dropout": 0.1})
    pictures = stripes(sizes.get("colors", 1), sizes["side"], data == "digits")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "report.json").write_text(json.dumps({"figures": {"nats": 87.5}}))
    reports, output = [], tmp_path / "pixelcnn"
    result = pixelcnn.fit(
        data,
        steps=40,
        pictures=pictures,
        learning_rate=1e-2,
        samples=5,
        output=output,
        others=tmp_path,
        progress=reports.append,
        **sizes,
    )
    unit = result["unit"]
    first = 36 * math.log(2) if data == "digits" else result["loss"]["first"]
    assert result["loss"]["first"] == pytest.approx(first, rel=1e-5)
    assert result["figures"][unit] < 0.95 * first
    assert result["earlier_models"] == ({"made": 87.5} if data == "digits" else {})
    assert [report["step"] for report in reports] == list(range(1, 41))
    written = json.loads((output / "report.json").read_text())
    assert written["figures"] == result["figures"]
    for picture in written["pictures"]:
        assert (output / picture["file"]).read_bytes().startswith(b"\x89PNG")
    model = pixelcnn.load_model(output)
    assert pixelcnn.held_out(model, pictures.test) == result["figures"][unit]
    found = pixelcnn_sampling.compare_sampling(model, 2, repeats=1)
    assert found["equal_share"] > 0.9
    assert found["naive_over_cached"] > 0


def test_best_weights_are_kept(stripes):
    """A rate that spoils what was learned: the figure is that of the best validation."""
    result = pixelcnn.fit(
        "digits", steps=20, learning_rate=3.0, pictures=stripes(1, 6, True), samples=0, output=None, **MODELS["digits"]
    )
    assert result["figures"]["nats_validation"] == pytest.approx(
        min(nats for _, nats in result["validation"]), rel=1e-5
    )


def test_interrupted_training_is_evaluated(stripes, capsys):
    def progress(report):
        if report["step"] == 2:
            raise KeyboardInterrupt

    sizes = MODELS["digits"]
    result = pixelcnn.fit("digits", steps=9, pictures=stripes(1, 6, True), output=None, progress=progress, **sizes)
    assert result["steps_done"] == 2
    assert result["interrupted"]
    assert "Interrupted after 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "faces"}, "data: .*'photographs'.*'faces'"),
        ({"steps": -1}, "steps: .*at least 0, got -1"),
        ({"minutes": 1.0, "steps": 3}, "minutes: .*no steps.*steps=3"),
        ({"batch": 0}, "batch: .*at least 1, got 0"),
        ({"samples": -1}, "samples: .*at least 0, got -1"),
        ({"data": "photographs", "width": 32}, "width: .*multiple of 3 colours, got 32"),
        ({"kernel": 4}, "kernel: .*odd.*got 4"),
        ({"first_kernel": 1}, "first_kernel: .*at least 3, got 1"),
        ({"colors": 2}, "colors: .*1 or 3, got 2"),
        ({"dropout": 1.0}, "dropout: .*got 1.0"),
        ({"depth": 3}, "depth: .*one of .*layers"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        pixelcnn.fit(**{"output": None, "steps": 0} | arguments)


def test_command_line(monkeypatch, capsys, stripes, tmp_path):
    sizes = {"digits": (1, 6, True), "photographs": (3, 4, False)}
    monkeypatch.setattr(pixelcnn, "load", lambda data, *_: stripes(*sizes[data]))
    monkeypatch.setattr(
        pixelcnn, "SETTINGS", {data: (MODELS[data], pixelcnn.SETTINGS[data][1]) for data in pixelcnn.DATA}
    )
    command = ["pixelcnn", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "2", "--samples", "2"])
    pixelcnn.main()
    printed = capsys.readouterr().out
    for part in ("bits per dimension", "nats", "independent pixels", "PixelCNN++ 2.92", "81.45", "samples.png"):
        assert part in printed
    monkeypatch.setattr(sys, "argv", [*command, "--compare-sampling", "--data", "digits"])
    pixelcnn.main()
    assert "naive over cached" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["pixelcnn", "--compare-sampling", "--output", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        pixelcnn.main()
    assert "model.pt" in capsys.readouterr().err
