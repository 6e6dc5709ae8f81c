"""The temporal convolutional network: what it may see, its states, its data and its command."""

import json
import sys
import xml.etree.ElementTree as ElementTree
import zipfile

import pytest
import torch

from python_models import chorales, tcn
from python_models.chorales import KEYS, Chorales, Note, fingerprint, piano_roll, read_notes
from python_models.tcn import Config, Tcn

TINY = Config(width=16, levels=2, kernel=2, dropout=0.3)

SCORE = """<score-partwise>
  <part id="P1">
    <measure number="0"><attributes><divisions>2</divisions></attributes>
      <note><pitch><step>C</step><octave>4</octave></pitch><duration>2</duration></note></measure>
    <measure number="1">
      <note><pitch><step>F</step><alter>1</alter><octave>4</octave></pitch><duration>1</duration></note>
      <note><rest/><duration>1</duration></note>
      <note><grace/><pitch><step>B</step><octave>4</octave></pitch></note>
      <note><pitch><step>G</step><octave>4</octave></pitch><duration>4</duration></note>
      <note><chord/><pitch><step>B</step><alter>-1</alter><octave>4</octave></pitch><duration>4</duration></note>
      <backup><duration>4</duration></backup>
      <forward><duration>2</duration></forward>
      <note><pitch><step>E</step><octave>3</octave></pitch><duration>2</duration></note></measure>
  </part>
  <part id="P2">
    <measure number="0"><attributes><divisions>1</divisions>
      <transpose><chromatic>-2</chromatic></transpose></attributes>
      <note><pitch><step>A</step><octave>3</octave></pitch><duration>4</duration></note></measure>
  </part>
</score-partwise>"""


@pytest.fixture
def data():
    """Scales, up and down again, from different keys."""
    walk = [0, 2, 4, 5, 7, 9, 11, 12, 11, 9, 7, 5, 4, 2] * 3
    rolls = []
    for first in range(30, 42):
        roll = torch.zeros(len(walk), KEYS)
        roll[torch.arange(len(walk)), torch.tensor(walk) + first] = 1
        rolls.append(roll)
    return Chorales(rolls[:8], rolls[8:10], rolls[10:])


def tiny():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tcn(TINY)
        torch.nn.init.normal_(model.head.weight)
    return model.double().eval()


def frames(count, length):
    return torch.rand(count, KEYS, length, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_frame_depends_on_those_before_it_alone():
    """Logits after frame t, by frame s: exactly 0 for s > t, and for what lies before the receptive field."""
    model, x = tiny(), frames(1, 12)
    slopes = torch.func.jacrev(lambda x: model(x)[0].sum(0))(x)[:, 0].abs().sum(1)  # (t, s)
    behind = torch.arange(12)[:, None] - torch.arange(12)
    seen = (behind >= 0) & (behind < 1 + 2 * (1 + 2))
    assert torch.equal(slopes[~seen], torch.zeros(int((~seen).sum()), dtype=torch.float64))
    assert (slopes[seen] > 0).all()


def test_parts_read_with_states_equal_the_whole():
    model, x = tiny(), frames(2, 15)
    found, states = [], None
    for part in x.split([1, 1, 6, 2, 5], dim=2):
        logits, states = model.read(part, states)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, 2), model(x), rtol=1e-12, atol=1e-12)


def test_what_fills_up_a_batch_costs_nothing(data):
    model = tiny().float()
    mixed = [data.train[0], data.train[1][:20], data.train[2][:2]]
    each = [tcn.held_out(model, [chorale]) * (len(chorale) - 1) for chorale in mixed]
    predicted = sum(len(chorale) - 1 for chorale in mixed)
    assert tcn.held_out(model, mixed) == pytest.approx(sum(each) / predicted, rel=1e-5)


def test_transposed():
    roll = torch.zeros(2, KEYS)
    roll[0, 10] = roll[1, 87] = 1
    assert tcn.transpose(roll, 3).nonzero().tolist() == [[0, 13]]
    assert tcn.transpose(roll, -3).nonzero().tolist() == [[0, 7], [1, 84]]
    assert torch.equal(tcn.transpose(roll, 0), roll)


def test_baselines_in_closed_form():
    """One key that sounds in every second frame: its own past says everything, and its frequency nothing."""
    roll = torch.zeros(401, KEYS)
    roll[::2, 40] = 1
    found = tcn.baselines([roll], [roll])
    assert found["uniform"] == pytest.approx(60.997, abs=1e-3)
    assert found["independent keys"] == pytest.approx(0.6931 + 87 * 0.5 / 401, abs=0.02)
    assert found["each key from itself"] < 0.02


def test_notes_of_a_score():
    notes = read_notes(ElementTree.fromstring(SCORE))
    assert [(float(start), float(end), midi) for start, end, midi in notes] == [
        (0, 1, 60),
        (1, 1.5, 66),
        (2, 4, 67),
        (2, 4, 70),
        (3, 4, 52),
        (0, 4, 55),
    ]
    sounding = [{int(key) + chorales.LOWEST for key in row.nonzero()[:, 0]} for row in piano_roll(notes)]
    assert sounding == [{60, 55}, {66, 55}, {67, 70, 55}, {67, 70, 52, 55}]


def test_copies_in_other_keys_are_known():
    notes = read_notes(ElementTree.fromstring(SCORE))
    higher = [Note(start + 2, end + 2, midi + 5) for start, end, midi in notes]
    assert fingerprint(piano_roll(notes)) == fingerprint(piano_roll(higher))
    assert fingerprint(piano_roll(notes)) != fingerprint(piano_roll(notes[:-1]))


def test_scores_are_found_in_the_wheel(tmp_path, monkeypatch):
    folder = tmp_path / "music21" / "corpus" / "bach"
    folder.mkdir(parents=True)
    (tmp_path / "music21" / "__init__.py").touch()
    for number in range(3):
        notes = "".join(
            f"<note><pitch><step>{'CDEFGAB'[(i * (number + 1)) % 7]}</step><octave>4</octave></pitch>"
            "<duration>1</duration></note>"
            for i in range(20)
        )
        with zipfile.ZipFile(folder / f"bwv{number}.mxl", "w") as archive:
            archive.writestr("META-INF/container.xml", "<container/>")
            archive.writestr("score.xml", f"<score-partwise><part><measure>{notes}</measure></part></score-partwise>")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "music21", raising=False)
    found = chorales.load_chorales()
    assert sum(len(part) for part in found) == 3
    assert all(roll.shape == (20, KEYS) for part in found for roll in part)
    assert "music21" not in sys.modules
    monkeypatch.setattr(chorales.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install music21"):
        chorales.load_chorales()


def test_it_learns(data, tmp_path):
    result = tcn.fit(steps=60, width=32, levels=2, dropout=0.0, output=tmp_path, data=data)
    assert result["figures"]["nats_a_frame"] < result["baselines"]["each key from itself"]
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(result))
    for picture in result["pictures"]:
        assert (tmp_path / picture["file"]).stat().st_size > 0
    model = tcn.load_model(tmp_path)
    assert tcn.held_out(model, data.test) == pytest.approx(result["figures"]["nats_a_frame"])
    written = model.write(data.test[0][:5], 7, seed=1)
    assert written.shape == (12, KEYS)
    assert torch.equal(written, model.write(data.test[0][:5], 7, seed=1))


def test_the_command(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tcn, "load_chorales", lambda: data)
    monkeypatch.setattr(sys, "argv", ["tcn", "--steps", "1", "--width", "4", "--output", str(tmp_path)])
    tcn.main()
    assert "8.10" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["tcn", "--dropout", "1"])
    with pytest.raises(SystemExit):
        tcn.main()
    assert "dropout: expected" in capsys.readouterr().err
    with pytest.raises(ValueError, match="kernels: expected one of"):
        tcn.fit(output=None, data=data, kernels=3)
    with pytest.raises(FileNotFoundError, match="output: expected"):
        tcn.load_model(tmp_path / "elsewhere")
