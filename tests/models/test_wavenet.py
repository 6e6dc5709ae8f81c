"""The WaveNet: what its logits may depend on, generation, its accounting of bits, its sound files and its command."""

import json
import math
import pathlib
import subprocess
import sys
import wave
from typing import Any

import pytest
import torch

from mpkernels.convolution import mulaw_encode, wavenet_generate
from python_models import speech, wavenet
from python_models.speech import Speech, Utterance
from python_models.wavenet import CLASSES, SILENCE, Config, WaveNet

SIZES: dict[str, Any] = {"residual": 8, "gate": 8, "skip": 8, "hidden": 8, "cycle": 3, "cycles": 2}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only wait for each other where tensors are as small as here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**changes):
    """A model whose every part has an influence: new ones have outputs of zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WaveNet(Config(**SIZES | changes)).double().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def noise(size, seed=0):
    return torch.randint(CLASSES, (size,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def sound():
    """Utterances of a hum with noise: what comes next can be told from what was."""

    def hum(seed, size):
        generator = torch.Generator().manual_seed(seed)
        phase = 0.3 * torch.arange(size) + 6 * torch.rand(1, generator=generator)
        return Utterance(f"{seed}.wav", 0.5 * torch.sin(phase) + 0.02 * torch.randn(size, generator=generator))

    return Speech([hum(i, 900) for i in range(4)], [hum(7, 400)], [hum(8, 500), hum(9, 300)], 8000)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kernel", [2, 3])
def test_logits_depend_on_earlier_samples_alone(kernel, backend):
    model, asked = tiny(kernel=kernel), 40
    reach = model.config.receptive_field
    table = torch.nn.functional.embedding
    embedded = []

    def keep(classes, weight):
        embedded.append(table(classes, weight).detach().requires_grad_())
        return embedded[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wavenet.F, "embedding", keep)
        logits, _ = model(noise(50)[None], None, backend)
    logits[0, asked].square().sum().backward()
    reached = embedded[0].grad[0].abs().sum(dim=1) > 0
    assert reached.nonzero().flatten().tolist() == list(range(asked - reach + 1, asked + 1))


@torch.no_grad()
def test_generation_is_what_the_whole_network_says():
    model, prompt = tiny(), noise(12)
    drawn = model.generate(40, prompt=prompt, temperature=0)
    assert torch.equal(drawn[:12], prompt)
    logits, _ = model(torch.cat([torch.tensor([SILENCE]), drawn[:-1]])[None])
    assert torch.equal(logits[0, 12:].argmax(dim=1), drawn[12:])
    found = wavenet_generate(model.weights(), 0, prompt=drawn[None], initial=SILENCE, return_logits=True).logits
    assert found is not None
    torch.testing.assert_close(found[0].T, logits[0])
    first = model.generate(30, seed=3)
    assert torch.equal(first, model.generate(30, seed=3))
    assert not torch.equal(first, model.generate(30, seed=4))
    assert len(model.generate(0)) == 0


@torch.no_grad()
def test_generation_has_the_frequencies_of_the_network():
    model = tiny()
    model.out.mul_(3)
    probability = model(torch.tensor([[SILENCE]]))[0][0, 0].softmax(dim=0)
    firsts = torch.cat([model.generate(1, seed=seed) for seed in range(400)])
    likely = probability.topk(8).indices
    share = torch.isin(firsts, likely).double().mean().item()
    expected = probability[likely].sum().item()
    assert 0.1 < expected < 0.95
    assert share == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / 400))


def test_bits_are_the_same_in_pieces(monkeypatch):
    model, classes = tiny(), noise(70)
    whole = model.bits(classes)
    logits, _ = model(torch.cat([torch.tensor([SILENCE]), classes[:-1]])[None])
    expected = -logits[0].log_softmax(dim=1)[torch.arange(70), classes] / math.log(2)
    torch.testing.assert_close(whole, expected.detach())
    monkeypatch.setattr(wavenet, "PIECE", 9)
    torch.testing.assert_close(model.bits(classes), whole)
    model.out.data.zero_()
    model.out_bias.data.zero_()
    torch.testing.assert_close(model.bits(classes), torch.full((70,), 8.0, dtype=torch.float64))
    assert len(model.bits(classes[:0])) == 0


def test_loss_is_of_every_sample_but_the_first():
    model, classes = tiny(), noise(30)
    logits, _ = model(classes[None, :-1])
    expected = -logits[0].log_softmax(dim=1)[torch.arange(29), classes[1:]].mean()
    torch.testing.assert_close(model.loss(classes[None]), expected)


def test_pieces_are_the_recordings_once_a_round():
    recordings = [torch.arange(100), torch.arange(100, 240)]
    batches = wavenet.pieces(recordings, 2, 10, 0)
    rows = torch.cat([next(batches) for _ in range(11)])
    assert rows.shape == (22, 11)
    steps = rows.diff(dim=1)
    assert (
        (steps == 1) | ((rows[:, :-1] == 99) & (rows[:, 1:] == 100)) | ((rows[:, :-1] == 239) & (rows[:, 1:] == 0))
    ).all()
    assert rows[:, :-1].unique().numel() == 220  # no sample twice
    assert not torch.equal(next(batches), rows[:2])
    with pytest.raises(ValueError, match=r"audio: .*at least 31 samples.*got 20"):
        next(wavenet.pieces([torch.arange(20)], 2, 10, 0))


def test_baselines_know_what_they_should():
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 2, (20000,), generator=generator)
    classes = (100 + 2 * steps).cumsum(dim=0) % 3  # the last sample says which two can follow
    found = wavenet.Baselines([classes[:15000]]).bits([classes[15000:]])
    assert found["uniform"] == 8
    assert found["independent samples"] == pytest.approx(math.log2(3), abs=0.02)
    assert found["first order"] == pytest.approx(1, abs=0.02)
    hum = mulaw_encode(0.5 * torch.sin(0.3 * torch.arange(20000.0)) + 0.01 * torch.randn(20000, generator=generator))
    found = wavenet.Baselines([hum[:15000]]).bits([hum[15000:]])
    order = [found[name] for name in ("linear prediction of order 16", "first order", "independent samples")]
    assert order == sorted(order)
    assert order[0] < order[1] - 0.3


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_files_of_all_widths_are_read(tmp_path, width):
    values = torch.tensor([-0.5, 0.0, 0.25, 0.5])
    integers = (values.double() * 2 ** (8 * width - 1)).long() + (128 if width == 1 else 0)
    frames = b"".join(int(i).to_bytes(width, "little", signed=width > 1) for i in integers for _ in (0, 1))
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((2, width, 8000, 0, "NONE", ""))
        file.writeframes(frames)
    torch.testing.assert_close(speech.read_wav(tmp_path / "a.wav"), values)


def test_written_files_are_read_again(tmp_path):
    sound = 2 * torch.rand(99) - 1
    speech.write_wav(tmp_path / "a.wav", sound, 8000)
    torch.testing.assert_close(speech.read_wav(tmp_path / "a.wav"), sound, atol=1e-4, rtol=0)
    (tmp_path / "b.wav").write_bytes(b"RIFF no sound")
    with pytest.raises(ValueError, match=r"audio: .*WAV.*b.wav"):
        speech.read_wav(tmp_path / "b.wav")


@pytest.mark.parametrize(("old", "new"), [(16000, 8000), (44100, 8000), (8000, 16000), (8000, 11025), (8000, 8000)])
def test_resampling_keeps_a_tone_and_its_length(old, new):
    def tone(hertz, rate):
        return torch.sin(2 * math.pi * hertz * torch.arange(rate // 4, dtype=torch.float64) / rate)

    inner = slice(200, -200)
    got = speech.resample(tone(700, old), old, new)
    assert len(got) == -(-(old // 4) * new // old)
    expected = torch.sin(2 * math.pi * 700 * torch.arange(len(got), dtype=torch.float64) / new)
    torch.testing.assert_close(got[inner], expected[inner], atol=1e-4, rtol=0)
    if new < old:  # what the new rate cannot carry is gone, not folded down
        assert speech.resample(tone(0.7 * new, old), old, new)[inner].abs().max() < 1e-3


def test_folders_are_split_by_name_and_files_in_time(tmp_path):
    for i in range(60):
        folder = tmp_path / ("inner" if i % 2 else "silence" if i == 10 else ".")
        folder.mkdir(exist_ok=True)
        speech.write_wav(folder / f"{i}.wav", torch.full((20,), i / 100), 8000)
    found = speech.load(tmp_path)
    names = [utterance.name for part in found[:3] for utterance in part]
    assert len(names) == len(set(names)) == 59
    assert len(found.train) > 45
    assert all(speech.part_of(utterance.name) == "test" for utterance in found.test)
    one = speech.load(tmp_path / "3.wav" if (tmp_path / "3.wav").exists() else tmp_path / "2.wav")
    assert [len(part[0].sound) for part in one[:3]] == [18, 1, 1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"audio: .*WAV.*empty"):
        speech.load(tmp_path / "empty")


def test_missing_speech_is_fetched_or_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(speech, "IN_PACKAGE", pathlib.Path("usr/share/no/such/folder"))
    monkeypatch.setattr(speech.shutil, "which", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"audio: .*apt-get install asterisk-core-sounds-en-wav.*--audio"):
        speech.asterisk()
    monkeypatch.setattr(speech.shutil, "which", lambda name: name)

    def no_network(command, **_):
        raise subprocess.CalledProcessError(100, command, stderr="E: Unable to locate package")

    monkeypatch.setattr(speech.subprocess, "run", no_network)
    with pytest.raises(FileNotFoundError, match=r"apt-get update.*Unable to locate package"):
        speech.asterisk()

    def fetch(command, cwd=None, **_):
        if "download" in command:
            pathlib.Path(cwd or ".", "package.deb").touch()
        else:
            folder = pathlib.Path(command[-1]) / speech.IN_PACKAGE
            folder.mkdir(parents=True)
            speech.write_wav(folder / "hello.wav", torch.zeros(9), 8000)

    monkeypatch.setattr(speech.subprocess, "run", fetch)
    folder = speech.asterisk()
    assert (folder / "hello.wav").is_file()
    monkeypatch.setattr(speech.subprocess, "run", no_network)
    assert speech.asterisk() == folder  # it is there now


def test_fit_learns_and_writes(sound, tmp_path):
    reports = []
    result = wavenet.fit(
        steps=25,
        batch=4,
        length=128,
        sound=sound,
        output=tmp_path,
        seconds=0.02,
        learning_rate=2e-2,
        progress=reports.append,
        **SIZES,
    )
    assert result["loss"]["first"] == pytest.approx(8, abs=1e-4)  # every class is as likely as any other at first
    assert result["figures"]["bits_per_sample"] < 7.6
    assert [report["step"] for report in reports] == list(range(1, 26))
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["figures"] == result["figures"]
    assert len(written["pictures"]) == 2
    for picture in written["pictures"]:
        assert (tmp_path / picture["file"]).read_bytes().startswith(b"\x89PNG")
    assert len(speech.read_wav(tmp_path / "generated.wav")) == 160
    model = wavenet.load_model(tmp_path)
    tests = wavenet.encode(sound.test)
    assert wavenet.bits_per_sample(model, tests) == result["figures"]["bits_per_sample"]


def test_interrupted_training_is_evaluated(sound, capsys):
    def progress(report):
        if report["step"] == 2:
            raise KeyboardInterrupt

    result = wavenet.fit(steps=9, batch=2, length=64, seconds=0.0, sound=sound, output=None, progress=progress, **SIZES)
    assert result["steps_done"] == 2
    assert result["interrupted"]
    assert "Interrupted after 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps: .*at least 0, got -1"),
        ({"minutes": 0.0}, "minutes: .*positive.*got 0.0"),
        ({"batch": 0}, "batch: .*at least 1, got 0"),
        ({"length": 0}, "length: .*at least 1, got 0"),
        ({"seconds": -1.0}, "seconds: .*0 or more, got -1.0"),
        ({"residual": 0}, "residual: .*at least 1, got 0"),
        ({"cycle": 40}, "cycle: .*at most 16, got 40"),
        ({"depth": 3}, "depth: .*one of .*residual"),
    ],
)
def test_bad_settings_are_named(arguments, message, sound):
    with pytest.raises(ValueError, match=message):
        wavenet.fit(**{"output": None, "sound": sound, **arguments})


def test_command_line(monkeypatch, capsys, tmp_path, sound):
    for i, utterance in enumerate([*sound.train, *sound.valid, *sound.test]):
        speech.write_wav(tmp_path / f"{i}.wav", utterance.sound, 8000)
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    command = ["wavenet", "--output", str(tmp_path / "out")]
    training = ["--audio", str(tmp_path), "--steps", "2", "--batch", "2", "--length", "64", "--seconds", "0.02"]
    monkeypatch.setattr(sys, "argv", [*command, *training, *sizes])
    wavenet.main()
    printed = capsys.readouterr().out
    for part in ("bits per sample", "linear prediction", "first order", "independent samples", "spectrogram.png"):
        assert part in printed
    monkeypatch.setattr(sys, "argv", [*command, "--generate", "0.01"])
    wavenet.main()
    assert len(speech.read_wav(tmp_path / "out" / "generated.wav")) == 80
    monkeypatch.setattr(sys, "argv", ["wavenet", "--output", str(tmp_path / "none"), "--generate", "1"])
    with pytest.raises(SystemExit):
        wavenet.main()
    assert "model.pt" in capsys.readouterr().err
