"""The masked autoencoder: what its outputs may depend on, its mixture, and its command."""

import itertools
import json
import sys

import pytest
import torch

from python_models import digit_training, made
from python_models.digits import Digits, binarise, independent_nats, load_digits, save_grid
from python_models.made import Made


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only wait for each other where tensors are as small as here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data():
    """Bars instead of digits, one in each picture, in one of four places."""
    pictures = torch.zeros(60, 28, 28, dtype=torch.uint8)
    for i in range(60):
        pictures[i, 4:24, 4 + 5 * (i % 4) : 7 + 5 * (i % 4)] = 255
    return Digits(pictures[:40], pictures[40:50], pictures[50:])


def small(pixels=6, hidden=16, **settings):
    """A model whose every part has an influence."""
    model = Made(torch.full((pixels,), 0.4), hidden, **settings).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return model.eval()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_pixel_depends_on_those_before_it_alone(backend):
    model = small(9, 40, orders=3, members=4)
    x = torch.rand(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for member in range(4):
        slopes = torch.autograd.functional.jacobian(lambda x, m=member: model.logits(x[None], m, backend)[0], x)
        place = model.degrees[member, :9]
        before = place[:, None] > place[None, :]
        assert not slopes[~before].any()
        assert (slopes[before] != 0).all()


def test_hidden_units_matter_and_pass_on_what_comes_before_alone():
    """The same without the direct weights, which alone would give every slope of the test above."""
    model = small(5, 60, orders=2, members=2)
    torch.nn.init.zeros_(model.direct)
    x = torch.rand(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for member in range(2):
        slopes = torch.autograd.functional.jacobian(lambda x, m=member: model.logits(x[None], m)[0], x)
        place = model.degrees[member, :5]
        assert torch.equal(slopes != 0, place[:, None] > place[None, :])


def test_probabilities_sum_to_one_in_the_mixture_and_in_every_member():
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)), dtype=torch.float64)
    model = small(orders=2, members=3)
    assert model.log_prob(every).exp().sum().item() == pytest.approx(1)
    model.train()
    found = [model.log_prob(every) for _ in range(4)]
    for each in found:
        assert each.exp().sum().item() == pytest.approx(1)
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[3])


def test_samples_have_the_frequencies_of_the_model():
    model = small(pixels=3, orders=2, members=2)
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)
    drawn = model.sample(4000, seed=0)
    assert torch.equal(drawn, model.sample(4000, seed=0))
    number = (drawn @ torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)).long()
    share = torch.bincount(number, minlength=8) / 4000
    torch.testing.assert_close(share.double(), model.log_prob(every).exp().detach(), atol=0.03, rtol=0)


def test_the_first_order_is_the_natural_one_and_others_are_permutations():
    degrees = small(7, orders=3, members=5).degrees[:, :7]
    assert degrees[0].tolist() == degrees[3].tolist() == list(range(7))
    assert all(sorted(row.tolist()) == list(range(7)) for row in degrees)
    assert len({tuple(row.tolist()) for row in degrees}) == 3


def test_it_learns_and_reports_the_natural_order_beside(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Made, "sample", lambda _, count, *__: torch.zeros(count, 784))  # test_the_command draws
    result = made.fit(steps=25, hidden=20, members=2, orders=2, output=tmp_path / "made", data=data)
    assert result["figures"]["nats"] < 0.9 * result["baselines"]["independent pixels"]
    natural = json.loads((tmp_path / "made_natural" / "report.json").read_text())
    assert natural["figures"]["nats"] < 0.9 * natural["baselines"]["independent pixels"]
    assert result["earlier_models"] == {"made_natural": natural["figures"]["nats"]}
    written = {path.name for path in (tmp_path / "made").iterdir()}
    assert written == {"model.pt", "report.json", "curve.png", "samples.png"}


def test_the_command(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digit_training, "load_digits", lambda: data)
    monkeypatch.setattr(made, "MEMBERS", 1)
    output = ["--output", str(tmp_path / "made"), "--orders", "1", "--members", "1"]
    monkeypatch.setattr(sys, "argv", ["made", "--steps", "1", "--hidden", "4", *output])
    made.main()
    printed = capsys.readouterr().out
    assert "543.4" in printed
    assert "88.40" in printed
    monkeypatch.setattr(sys, "argv", ["made", "--orders", "9"])
    with pytest.raises(SystemExit):
        made.main()
    assert "orders: expected at most one for each of 8 members, got 9" in capsys.readouterr().err


def test_digits_are_split_evenly_and_drawn_the_same_for_a_seed():
    parts = load_digits()
    assert [tuple(part.shape) for part in parts] == [(4000, 28, 28), (500, 28, 28), (500, 28, 28)]
    everything = {picture.numpy().tobytes() for part in parts for picture in part}
    assert len(everything) > 4990  # no digit is in two parts
    drawn = binarise(parts.test)
    assert torch.equal(drawn, binarise(parts.test, seed=0))
    assert not torch.equal(drawn, binarise(parts.test, seed=1))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn.mean().item() == pytest.approx(parts.test.float().mean().item() / 255, abs=2e-3)
    assert independent_nats(parts.train / 255, drawn) == pytest.approx(207, abs=2)
    half = torch.full((4, 28, 28), 0.5)
    assert independent_nats(half, drawn) == pytest.approx(543.43, abs=0.01)


def test_a_grid_of_pictures(tmp_path):
    from PIL import Image

    pictures = torch.zeros(5, 1, 4, 6)
    pictures[3] = 1
    save_grid(pictures, tmp_path / "new" / "grid.png", columns=3, zoom=2, gap=1)
    picture = Image.open(tmp_path / "new" / "grid.png")
    assert picture.size == (1 + 3 * 13, 1 + 2 * 9)
    assert picture.getpixel((2, 11)) == 255  # the fourth picture begins the second row
    assert picture.getpixel((2, 2)) == 0
    assert picture.getpixel((0, 0)) == 128
    save_grid(torch.rand(2, 3, 4, 4), tmp_path / "colour.png")
    assert Image.open(tmp_path / "colour.png").mode == "RGB"
    with pytest.raises(ValueError, match=r"pictures: .*got \(2, 4, 4\)"):
        save_grid(torch.rand(2, 4, 4), tmp_path / "grid.png")
