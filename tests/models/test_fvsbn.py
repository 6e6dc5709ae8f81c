"""The sigmoid belief network: its order, its probabilities, the training that it shares with NADE, and its command."""

import itertools
import json
import math
import sys

import pytest
import torch

from python_models import digit_training, fvsbn
from python_models.digits import Digits
from python_models.fvsbn import Fvsbn


@pytest.fixture
def data():
    """Bars instead of digits, one in each picture, in one of four places."""
    pictures = torch.zeros(60, 28, 28, dtype=torch.uint8)
    for i in range(60):
        pictures[i, 4:24, 4 + 5 * (i % 4) : 7 + 5 * (i % 4)] = 255
    return Digits(pictures[:40], pictures[40:50], pictures[50:])


def small(pixels=5, seed=0):
    model = Fvsbn(torch.full((pixels,), 0.4))
    torch.nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(seed))
    return model


def test_probabilities_sum_to_one():
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=5)))
    assert small().log_prob(every).exp().sum().item() == pytest.approx(1, rel=1e-5)


def test_a_pixel_depends_on_those_before_it_alone():
    x = torch.rand(1, 9, generator=torch.Generator().manual_seed(1))
    slopes = torch.func.jacrev(lambda x: small(9)(x)[0])(x)[:, 0]  # (logit, input)
    seen = torch.ones(9, 9).tril(-1) > 0
    assert torch.equal(slopes[~seen], torch.zeros(45))
    assert (slopes[seen] != 0).all()


def test_samples_have_the_probabilities_that_are_said():
    model = small(3)
    drawn = model.sample(4000, seed=0)
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    shares = (drawn[:, None] == every).all(-1).double().mean(0)
    likely = model.log_prob(every).exp().detach()
    assert ((shares - likely).abs() < 4 * (likely * (1 - likely) / 4000).sqrt()).all()


def test_training_digits_are_moved_by_a_pixel_at_most(data):
    picture = torch.zeros(1, 28, 28, dtype=torch.uint8)
    picture[0, 10, 20] = 255
    stream = digit_training.batches(picture, 4, shift=1.0, seed=0)
    places = {tuple((next(stream).view(28, 28) > 0).nonzero()[0].tolist()) for _ in range(80)}
    assert places == set(itertools.product((9, 10, 11), (19, 20, 21)))
    still = digit_training.batches(data.train, 40, shift=0.0, seed=0)
    assert next(still).mean().item() == pytest.approx((data.train / 255).mean().item())


def test_it_learns(data, tmp_path):
    result = fvsbn.fit(steps=25, output=tmp_path, data=data)
    assert result["figures"]["nats"] < 0.9 * result["baselines"]["independent pixels"] < result["baselines"]["uniform"]
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(result))
    for picture in result["pictures"]:
        assert (tmp_path / picture["file"]).stat().st_size > 0
    model = Fvsbn(torch.full((784,), 0.5))
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    held_out = digit_training.mean_nats(model, (data.test / 255).flatten(1), None)
    assert held_out == pytest.approx(result["figures"]["nats"])


def test_the_command(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digit_training, "load_digits", lambda: data)
    monkeypatch.setattr(sys, "argv", ["fvsbn", "--steps", "2", "--output", str(tmp_path)])
    fvsbn.main()
    assert "97.45" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["fvsbn", "--steps", "-1"])
    with pytest.raises(SystemExit):
        fvsbn.main()
    assert "steps: expected" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_learned(data, tmp_path):
    def stop(report):
        if report["step"] == 2:
            raise KeyboardInterrupt

    result = fvsbn.fit(minutes=5.0, output=tmp_path, data=data, progress=stop)
    assert result["interrupted"]
    assert result["steps_done"] == 2
    assert math.isfinite(result["figures"]["nats"])
    assert (tmp_path / "samples.png").exists()
