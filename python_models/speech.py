"""Recorded speech for models of sound: the spoken prompts of Asterisk, or a folder of your own.

Debian's package asterisk-core-sounds-en-wav has 558 utterances of one speaker, Allison Smith (CC BY-SA 3.0): 25 minutes
at 8,000 samples a second. Where it is not installed, it is fetched with `apt-get download` (18 MB; no root needed) into
the user's cache folder. No two of its files share a run of 64 equal samples of sound, so that what is held out was
never heard, though words of it may be spoken elsewhere.

Files are WAV of 8, 16, 24 or 32 bits (PCM); channels are averaged, and the rate is changed to the one asked for, by a
sinc under a window of Hann.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import pathlib
import shutil
import subprocess
import sys
import wave
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PACKAGE = "asterisk-core-sounds-en-wav"
IN_PACKAGE = pathlib.Path("usr/share/asterisk/sounds/en_US_f_Allison")
RATE = 8000  # samples a second
ZEROS = 24  # zero crossings of the resampling filter to either side


class Utterance(NamedTuple):
    """A file: its name, and its sound (samples,) in [-1, 1]."""

    name: str
    sound: Tensor


class Speech(NamedTuple):
    """Utterances in three parts, and how many samples make a second."""

    train: list[Utterance]
    valid: list[Utterance]
    test: list[Utterance]
    rate: int


def load(audio: pathlib.Path | None = None, rate: int = RATE) -> Speech:
    """Utterances, split by their names: about 5 % for validation, 5 % for the test. A single file is split in time.

    Args:
        audio: a WAV file or a folder of them (and folders in it); None: the prompts of Asterisk.
        rate: samples a second.

    Raises:
        FileNotFoundError: there is no sound; the message says how to get some.
        ValueError: a file is no WAV that is understood.
    """
    folder = asterisk() if audio is None else pathlib.Path(audio)
    if folder.is_file():
        sound = read_wav(folder, rate)
        if sound.numel() < 20:
            raise ValueError(f"audio: expected a recording, got {sound.numel()} samples in {str(folder)!r}")
        cuts = (0, round(0.9 * len(sound)), round(0.95 * len(sound)), len(sound))
        train, valid, test = ([Utterance(folder.name, sound[a:b])] for a, b in itertools.pairwise(cuts))
        return Speech(train, valid, test, rate)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".wav" and "silence" not in path.parts)
    if not files:
        raise FileNotFoundError(f"audio: expected a WAV file or a folder of them, found none in {str(folder)!r}")
    split: dict[str, list[Utterance]] = {"train": [], "valid": [], "test": []}
    for path in files:
        name = path.relative_to(folder).as_posix()
        if (sound := read_wav(path, rate)).numel() > 0:
            split[part_of(name)].append(Utterance(name, sound))
    for name in ("valid", "test"):  # of few files
        if not split[name] and len(split["train"]) > 1:
            split[name].append(split["train"].pop())
    if not all(split.values()):
        raise ValueError(
            f"audio: expected at least 3 files in a folder, or one file, got {len(files)} in {str(folder)!r}"
        )
    return Speech(**split, rate=rate)


def part_of(name: str) -> str:
    """Which part a file belongs to, by a hash of its name: the same on every machine."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 20
    return {0: "test", 1: "valid"}.get(number, "train")


def asterisk() -> pathlib.Path:
    """The folder of Asterisk's spoken prompts: installed, or fetched before, or fetched now.

    Raises:
        FileNotFoundError: it is not there and cannot be fetched.
    """
    installed = pathlib.Path("/") / IN_PACKAGE
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "mpkernels" / PACKAGE
    for folder in (installed, cache / IN_PACKAGE):
        if folder.is_dir() and any(folder.glob("*.wav")):
            return folder
    advice = (
        f"audio: expected recorded speech; `apt-get install {PACKAGE}` (Debian, Ubuntu; 18 MB; after `apt-get update` "
        f"where it is not found), or give your own WAV files with --audio"
    )
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise FileNotFoundError(advice)
    print(f"Fetching {PACKAGE} (18 MB of spoken prompts, CC BY-SA 3.0) into {cache}.", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=cache, check=True, capture_output=True, text=True)
        archive = max(cache.glob("*.deb"), key=lambda path: path.stat().st_mtime)
        unpacked = cache / f"unpacking-{os.getpid()}"
        subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True, capture_output=True, text=True)
        os.replace(unpacked / "usr", cache / "usr")
        shutil.rmtree(unpacked)
        archive.unlink()
    except (subprocess.CalledProcessError, OSError, ValueError) as error:
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise FileNotFoundError(f"{advice}. `apt-get download` said: {told[-1] if told else 'nothing'}") from error
    return cache / IN_PACKAGE


def read_wav(path: pathlib.Path, rate: int = RATE) -> Tensor:
    """(samples,) float32 in [-1, 1], of one channel and of this rate."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, found = file.getnchannels(), file.getsampwidth(), file.getframerate()
            content = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"audio: expected a WAV file of integers (PCM), got {str(path)!r}: {error}") from error
    sound = _integers(np.frombuffer(content, np.uint8), width)
    sound = sound[: len(sound) // channels * channels].reshape(-1, channels).mean(axis=1)
    return resample(torch.from_numpy(sound), found, rate).float()


def _integers(content: np.ndarray, width: int) -> np.ndarray:
    """Samples of ``width`` bytes, float64 in [-1, 1)."""
    if width == 1:  # unsigned, of all widths this one alone
        return content.astype(np.float64) / 128 - 1
    content = content[: len(content) // width * width].reshape(-1, width)
    wide = np.zeros((len(content), 4), np.uint8)
    wide[:, 4 - width :] = content  # the highest bytes of a 32-bit integer
    return wide.view("<i4")[:, 0] / 2.0**31


def write_wav(path: pathlib.Path, sound: Tensor, rate: int) -> None:
    """Writes (samples,) in [-1, 1] as 16-bit PCM."""
    samples = (sound.detach().double().clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def resample(sound: Tensor, old: int, new: int) -> Tensor:
    """Changes the rate of (samples,) by a windowed sinc that lets pass what both rates can carry.

    With old / new = p / q in lowest terms, output q n + j is the input around p n + j p / q weighed by a filter that
    depends on j alone: q filters, each a convolution of stride p.
    """
    common = math.gcd(old, new)
    p, q = old // common, new // common
    if p == q:
        return sound
    cutoff = min(1.0, q / p)  # as a share of the old one's
    reach = math.ceil(ZEROS / cutoff)
    at = torch.arange(-reach, reach + p + 1, dtype=torch.float64)  # of inputs, from the first of p
    distance = at - (torch.arange(q, dtype=torch.float64) * p / q)[:, None]  # (q, taps)
    window = torch.cos((distance * (math.pi / 2 / (reach + 1))).clamp(-math.pi / 2, math.pi / 2)) ** 2
    filters = cutoff * torch.sinc(distance * cutoff) * window
    count = -(-len(sound) * q // p)
    groups = -(-count // q)
    padded = torch.nn.functional.pad(sound.double(), (reach, reach + p + p))[None, None]
    return torch.nn.functional.conv1d(padded, filters[:, None], stride=p)[0, :, :groups].T.reshape(-1)[:count]
