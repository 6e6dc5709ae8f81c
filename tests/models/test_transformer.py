"""The transformer: what its logits may depend on, its cache, its accounting of bits, its text and its command."""

import bz2
import dataclasses
import functools
import gzip
import json
import lzma
import math
import sys

import pytest
import torch

from python_models import standard_library_text, transformer
from python_models.standard_library_text import START, Packed, Text, evaluation_rows, training_blocks
from python_models.transformer import Config, Setting, Transformer

TINY = Config(width=16, layers=2, heads=2, context=64, ngrams=(2, 3), ngram_slots=32, ngram_width=4)
WORDS = b"def class return import self None True for in while lambda yield ".split()


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only wait for each other where tensors are as small as here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(seed=0, **changes):
    """A model whose every part has an influence: new ones have layers that add nothing, and a head of zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(dataclasses.replace(TINY, **changes))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def packed(*rows):
    """Rows that are lists of documents."""
    tokens = [[token for document in row for token in (START, *document)] for row in rows]
    numbers = [[i for i, document in enumerate(row) for _ in range(len(document) + 1)] for row in rows]
    tokens = torch.tensor(tokens)
    return Packed(tokens, torch.full_like(tokens, -1), torch.tensor(numbers, dtype=torch.int32))


def prose(size, seed):
    generator = torch.Generator().manual_seed(seed)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (size,), generator=generator)]
    return b" ".join(words)[:size]


@pytest.fixture
def text():
    """Files of words, small enough for a test and large enough for a batch."""
    train = [(f"{i}.py", prose(1500, i)) for i in range(5)]
    return Text(train, [("validation.py", prose(700, 8))], [("a.py", prose(1500, 9)), ("b.py", prose(40, 10))])


@pytest.fixture
def tiny_fit(monkeypatch, text):
    """fit() of a tiny model on tiny text."""
    monkeypatch.setattr(transformer, "Config", functools.partial(Config, ngram_slots=32, ngram_width=4))
    monkeypatch.setattr(transformer, "PROMPTS", ("def ",))
    monkeypatch.setattr(transformer, "ROWS", 1)
    monkeypatch.setattr(transformer, "SAMPLE_BYTES", 30)

    def fit(**arguments):
        arguments = {"width": 16, "layers": 1, "heads": 2, "precision": "float32", "text": text} | arguments
        return transformer.fit(**{"output": None} | arguments)

    return fit


@pytest.mark.parametrize("positions", transformer.POSITIONS)
@pytest.mark.parametrize("attention", transformer.ATTENTIONS)
def test_logits_depend_on_earlier_bytes_of_their_document_alone(positions, attention):
    model, row = tiny(positions=positions), packed([b"def f", b"import math", b"abc"])
    embedded = []

    def keep(_, __, output):
        output.retain_grad()
        embedded.append(output)

    model.bytes.register_forward_hook(keep)
    asked = 10  # of the second document, whose tokens are 6 to 17
    model(row, attention)[0, asked].square().sum().backward()
    reached = embedded[0].grad[0].abs().sum(dim=1) > 0
    assert reached.nonzero().flatten().tolist() == list(range(6, asked + 1))


@pytest.mark.parametrize("positions", transformer.POSITIONS)
def test_ngrams_and_positions_end_where_a_document_begins(positions):
    model = tiny(positions=positions)
    documents = [b"def f", b"import math", b"abc"]
    with torch.no_grad():
        together = model(packed(documents))[0]
        alone = torch.cat([model(packed([document]))[0] for document in documents])
        other = model(packed([b"xyz f", *documents[1:]]))[0]
    torch.testing.assert_close(together, alone)
    assert torch.equal(together[6:], other[6:])
    assert not torch.equal(together[:6], other[:6])


def test_positions_and_ngrams_matter():
    """The tests above can fail: without the first bytes, what follows is read otherwise."""
    for positions in transformer.POSITIONS:
        model = tiny(positions=positions, ngrams=())
        with torch.no_grad():
            logits = model(packed([b"ab" * 8]))[0]
        assert (logits[4] - logits[6]).abs().max() > 1e-4, positions
    rows = packed([b"xab"], [b"yab"])
    embedded = tiny(ngrams=(3,)).embed(rows.tokens, rows.offset)
    assert not torch.equal(embedded[0, 3], embedded[1, 3])
    embedded = tiny(ngrams=(2,)).embed(rows.tokens, rows.offset)
    assert torch.equal(embedded[0, 3], embedded[1, 3])


@pytest.mark.parametrize("positions", transformer.POSITIONS)
@torch.no_grad()
def test_cache_gives_the_logits_of_the_whole(positions):
    model, row = tiny(positions=positions), packed([b"while True: pass"])
    whole = model(row)
    cache = transformer.Cache(model.config, 1, model.head.weight)
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    parts = [model.read(part, cache) for part in row.tokens.split([6, 1, 1, 3, 1, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@torch.no_grad()
def test_generation_is_what_the_whole_model_says(monkeypatch):
    model = tiny()
    written = model.generate(b"def ", 20, temperature=0)
    for i in range(len(written)):
        logits = model(packed([b"def " + written[:i]]))[0, -1]
        assert logits[written[i]] > logits.max() - 1e-4
    assert model.generate(b"def ", 30, seed=3) == model.generate(b"def ", 30, seed=3)
    assert model.generate(b"def ", 30, seed=3) != model.generate(b"def ", 30, seed=4)
    long = model.generate(prose(100, 0), 80)  # beyond the context of 64, twice
    assert len(long) == 80
    with pytest.raises(ValueError, match=r"top_p.*got 0.8 and 0"):
        model.generate(b"", 1, top_p=0)


def test_draw_keeps_the_likeliest():
    share = torch.zeros(256)
    share[[7, 9, 200]] = torch.tensor([0.5, 0.3, 0.2])
    generator = torch.Generator().manual_seed(0)

    def drawn(top_p, temperature=1.0):
        return [transformer.draw(share.log(), temperature, top_p, generator) for _ in range(300)]

    assert set(drawn(0.4)) == {7}
    assert set(drawn(0.6)) == {7, 9}
    assert drawn(1.0).count(200) == pytest.approx(60, abs=30)
    assert set(drawn(1.0, temperature=0)) == {7}


def test_bits_of_a_known_distribution():
    """A model that says p(a) = 1/2 and p(b) = p(c) = 1/4, whatever came before."""
    model = tiny()
    model.forward = lambda rows, *_: (
        torch.where(torch.arange(256) == ord("a"), math.log(0.5), math.log(0.25)).expand(*rows.tokens.shape, 256)
        - 1e4 * ((torch.arange(256) < ord("a")) | (torch.arange(256) > ord("c")))
    )
    files = [("1", b"abac" * 20), ("2", b"a"), ("3", b"bc" * 33)]
    bits = 80 * 1.5 + 1 + 66 * 2
    for window, stride in ((64, 32), (64, 64), (16, 5)):
        rows = evaluation_rows(files, window, stride)
        got = transformer.bits_per_byte(model, rows, Setting(precision="float32"))
        assert got == pytest.approx(bits / 147, rel=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 8), (16, 3)])
def test_every_byte_is_evaluated_once_with_enough_context(window, stride):
    files = [(str(size), bytes(range(100, 100 + size))) for size in (1, 4, 7, 8, 9, 12, 13, 40)]
    rows = evaluation_rows(files, window, stride)
    assert sorted(rows.targets[rows.targets >= 0].tolist()) == sorted(b for _, content in files for b in content)
    assert (rows.document.diff(dim=1) >= 0).all()
    context = rows.offset + 1  # tokens that a target is predicted from
    target_is = rows.targets - 100  # how far it is in its file
    expected = torch.minimum(target_is + 1, torch.tensor(window - stride + 1))
    assert (context >= expected)[rows.targets >= 0].all()
    follows = rows.targets[rows.targets >= 0] == rows.tokens[rows.targets >= 0] + 1
    assert (follows | (rows.tokens[rows.targets >= 0] == START)).all()


def test_training_blocks_are_the_text_once_an_epoch_and_the_same_for_a_seed(text):
    blocks, again, other = (training_blocks(text.train, 2, seed) for seed in (0, 0, 1))
    first = next(blocks)
    assert first.tokens.shape == (2, standard_library_text.BLOCK)
    assert all(torch.equal(x, y) for x, y in zip(first, next(again), strict=True))
    assert not torch.equal(first.tokens, next(other).tokens)
    second = next(blocks)
    tokens, targets, document = (torch.cat(parts) for parts in zip(first, second, strict=True))
    assert (document.diff(dim=1) >= 0).all()
    inside = document[:, 1:] == document[:, :-1]
    assert torch.equal(targets[:, :-1][inside], tokens[:, 1:][inside])
    assert (targets[:, :-1][~inside] == -1).all()
    assert (tokens[:, 1:][~inside] == START).all()
    everything = b"|".join(content for _, content in text.train)
    for row in tokens:
        for piece in "".join(chr(t) for t in row.tolist()).split(chr(START)):
            assert piece.encode("latin1") in everything
    cut = first.cut(256)
    assert cut.tokens.shape == (8, 256)
    assert torch.equal(cut.tokens.reshape(2, -1), first.tokens)
    with pytest.raises(ValueError, match=r"files.*at least.*got"):
        next(training_blocks(text.held_out, 2, 0))


def test_files_are_split_by_name_and_tables_left_out(tmp_path):
    names = [f"module_{i}.py" for i in range(200)]
    for name in [*names, "test/x.py", "package/tests/x.py", "encodings/x.py", "package/inner.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f"name = {name!r}\n")
    (tmp_path / "empty.py").touch()
    text = standard_library_text.load(tmp_path)
    parts = [[name for name, _ in part] for part in text]
    assert sorted(name for part in parts for name in part) == sorted([*names, "package/inner.py"])
    assert 3 <= len(text.held_out) <= 20
    assert len(text.validation) < len(text.train) / 10
    assert all(standard_library_text.part_of(name) == "held_out" for name in parts[2])
    assert standard_library_text.load(tmp_path) == text
    with pytest.raises(FileNotFoundError, match=r"folder.*found none"):
        standard_library_text.load(tmp_path / "test")


def test_the_standard_library_is_there():
    text = standard_library_text.load()
    assert standard_library_text.total_bytes(text.train) > 4_000_000
    assert 0.02 < standard_library_text.total_bytes(text.held_out) / standard_library_text.total_bytes(text.train) < 0.1
    everything = [name for part in text for name, _ in part]
    assert "json/decoder.py" in everything
    assert len(everything) == len(set(everything))
    assert not any(name.startswith(("test/", "site-packages/")) for name in everything)


def test_figures_of_compressors(text):
    figures = standard_library_text.compressed_bits_per_byte(text)
    one, two = (content for _, content in text.held_out)
    size = len(one + two) / 8
    assert figures["gzip, one stream"] == len(gzip.compress(one + two, 9)) / size
    assert figures["bz2, one stream"] == len(bz2.compress(one + two, 9)) / size
    assert figures["xz, one stream"] == len(lzma.compress(one + two, preset=9 | lzma.PRESET_EXTREME)) / size
    assert figures["bz2, each file"] == (len(bz2.compress(one, 9)) + len(bz2.compress(two, 9))) / size
    known = Text([*text.train, ("same.py", one)], text.validation, text.held_out)
    after = standard_library_text.compressed_bits_per_byte(known)["xz, after the training files"]
    assert after < figures["xz, after the training files"] / 2 < figures["xz, one stream"] / 2


def test_sdpa_learns_the_same(text, monkeypatch):
    monkeypatch.setattr(transformer, "ROWS", 1)
    found = transformer.compare(TINY, text, Setting(precision="float32"), 0, steps=5)
    assert found["largest_difference_of_losses"] < 1e-3
    assert found["sdpa_seconds_over_mpkernels"] > 0
    wrong = transformer.Visible.attention
    monkeypatch.setattr(
        transformer.Visible, "attention", lambda self, q, k, v: wrong(self, q, k, v) * (1.5 if self.mask else 1)
    )
    found = transformer.compare(TINY, text, Setting(precision="float32"), 0, steps=5)
    assert found["largest_difference_of_losses"] > 1e-3


def test_fit_learns_and_writes(tiny_fit, tmp_path):
    reports = []
    result = tiny_fit(steps=12, output=tmp_path, progress=reports.append)
    assert result["figures"]["bits_per_byte"] < 7.7
    assert result["loss"]["first"] == pytest.approx(8, abs=1e-4)  # every byte is as likely as any other at first
    assert result["steps_done"] == 12
    assert not result["interrupted"]
    assert [report["step"] for report in reports] == list(range(1, 13))
    assert reports[-1]["spent"] == 1
    assert reports[-1]["steps"] == 12
    assert any("validation" in report for report in reports)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["figures"] == result["figures"]
    assert "xz, one stream" in written["compressors_bits_per_byte"]
    assert (tmp_path / written["pictures"][0]["file"]).read_bytes().startswith(b"\x89PNG")
    assert "after 'def '" in (tmp_path / "samples.txt").read_text()
    model = transformer.load_model(tmp_path)
    assert model.generate(b"def ", 30, seed=0).decode(errors="replace") == result["samples"]["def "]
    again = tiny_fit(steps=12)
    assert again["figures"]["bits_per_byte"] == result["figures"]["bits_per_byte"]


def test_interrupted_training_is_evaluated(tiny_fit, capsys):
    def progress(report):
        if report["step"] == 2:
            raise KeyboardInterrupt

    result = tiny_fit(steps=9, progress=progress)
    assert result["steps_done"] == 2
    assert result["interrupted"]
    assert result["figures"]["bits_per_byte"] < 8
    assert "Interrupted after 2 steps" in capsys.readouterr().out


def test_minutes_end_the_training(tiny_fit):
    result = tiny_fit(minutes=0.01)
    assert result["timings"]["train_seconds"] < 5
    assert result["steps_done"] >= 1
    assert tiny_fit(steps=0)["figures"]["bits_per_byte"] == pytest.approx(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps: .*at least 0, got -1"),
        ({"minutes": 0.0}, "minutes: .*positive.*got 0.0"),
        ({"minutes": 1.0, "steps": 3}, "minutes: .*no steps.*steps=3"),
        ({"width": 9}, "width: .*2 heads, got 9"),
        ({"positions": "absolute"}, "positions: .*'learned'.*'absolute'"),
        ({"attention": "flash"}, "attention: .*'sdpa'.*'flash'"),
        ({"precision": "int8"}, "precision: .*'float32'.*'int8'"),
        ({"device": "tpu"}, "device: .*'cpu'.*'tpu'"),
    ],
)
def test_bad_settings_are_named(tiny_fit, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_fit(**arguments)


def test_command_line(monkeypatch, capsys, tiny_fit, text, tmp_path):
    monkeypatch.setattr(standard_library_text, "load", lambda: text)
    sizes = ["--width", "16", "--layers", "1", "--heads", "2", "--no-ngrams", "--precision", "float32"]
    command = ["transformer", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "2", "--attention", "sdpa", *sizes])
    transformer.main()
    printed = capsys.readouterr().out
    for part in ("bits_per_byte", "xz, one stream", "largest_difference_of_losses", "times as long", "by xz"):
        assert part in printed
    monkeypatch.setattr(sys, "argv", [*command, "--prompt", "def ", "--bytes", "9"])
    transformer.main()
    assert capsys.readouterr().out.startswith("def ")
    monkeypatch.setattr(sys, "argv", ["transformer", "--output", str(tmp_path / "none"), "--prompt", ""])
    with pytest.raises(SystemExit):
        transformer.main()
    assert "model.pt" in capsys.readouterr().err
