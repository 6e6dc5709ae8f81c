"""Bach's chorales as piano rolls, a frame a quarter note: from the scores in the wheel of music21.

The wheel (some 115 MB installed, of which the scores of Bach are 3 MB) has about 400 chorales as compressed MusicXML.
Only those files are read, in a few seconds; music21 itself, and what it depends on, is not imported.

A frame holds the keys that sound when a quarter note begins, as in Boulanger-Lewandowski et al. 2012 ("Modeling
temporal dependencies in high-dimensional sequences"), whose 382 chorales and split are others: figures are near to
theirs, not comparable digit by digit. Repeats are not played out; scores that are copies of each other, transposed or
not, count once. They are split after a fixed shuffle.
"""

from __future__ import annotations

import importlib.util
import pathlib
import xml.etree.ElementTree as ElementTree
import zipfile
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

KEYS = 88
LOWEST = 21  # the MIDI number of the first key: A0
SHORTEST = 16  # frames: shorter scores are fragments
_STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}


class Chorales(NamedTuple):
    """Three parts of the chorales; each a list of (frames, 88) float32, 1 for a key that sounds."""

    train: list[Tensor]
    valid: list[Tensor]
    test: list[Tensor]


class Note(NamedTuple):
    """When a key sounds, in quarter notes from the beginning of the score."""

    start: Fraction
    end: Fraction
    midi: int


def load_chorales() -> Chorales:
    """All chorales: 70 of 100 to train on, 15 for validation, 15 for the test, always the same.

    Raises:
        FileNotFoundError: music21 is not installed (`pip install music21`; of it only files are read).
    """
    found = importlib.util.find_spec("music21")  # finds the folder without an import
    places = [] if found is None else [pathlib.Path(folder) for folder in found.submodule_search_locations or ()]
    paths = sorted(path for place in places for path in (place / "corpus" / "bach").glob("*.mxl"))
    if not paths:
        raise FileNotFoundError("chorales: expected the scores of music21, found none; `pip install music21`")
    rolls, seen = [], set()
    for path in paths:
        roll = piano_roll(read_notes(score_of(path)))
        key = fingerprint(roll)
        if len(roll) >= SHORTEST and key not in seen:
            seen.add(key)
            rolls.append(roll)
    order = torch.randperm(len(rolls), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = [rolls[i] for i in order]
    first, second = round(0.7 * len(mixed)), round(0.85 * len(mixed))
    return Chorales(mixed[:first], mixed[first:second], mixed[second:])


def score_of(path: pathlib.Path) -> ElementTree.Element:
    """The MusicXML in a compressed score."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.startswith("META-INF")]
        scores = [name for name in names if name.endswith((".xml", ".musicxml"))]
        return ElementTree.fromstring(archive.read(scores[0]))


def read_notes(score: ElementTree.Element) -> list[Note]:
    """The notes of all parts of a score (MusicXML, "score-partwise"): grace notes and rests are none."""
    notes: list[Note] = []
    for part in score.findall("part"):
        divisions, transposed, start = 1, 0, Fraction(0)
        for measure in part.findall("measure"):
            now = last = farthest = start  # time in quarter notes; where the last note began; how far the measure goes
            for element in measure:
                if element.tag == "attributes":
                    divisions = int(element.findtext("divisions") or divisions)
                    if (change := element.find("transpose")) is not None:
                        octaves = int(change.findtext("octave-change") or 0)
                        transposed = int(change.findtext("chromatic") or 0) + 12 * octaves
                    continue
                length = Fraction(int(element.findtext("duration") or 0), divisions)
                if element.tag == "backup":
                    now -= length
                elif element.tag == "forward":
                    now += length
                elif element.tag == "note" and length > 0:
                    if element.find("chord") is None:
                        last, now = now, now + length
                    if (pitch := element.find("pitch")) is not None:
                        octave, step = int(pitch.findtext("octave") or 0), pitch.findtext("step") or "C"
                        midi = 12 * (octave + 1) + _STEPS[step] + round(float(pitch.findtext("alter") or 0))
                        notes.append(Note(last, last + length, midi + transposed))
                farthest = max(farthest, now)
            start = farthest
    return notes


def piano_roll(notes: list[Note]) -> Tensor:
    """(frames, 88): which keys sound when each quarter note begins, from the first frame with a note to the last."""
    frames = max((-(-note.end // 1) for note in notes), default=0)
    roll = torch.zeros(int(frames), KEYS)
    for start, end, midi in notes:
        key, first, last = midi - LOWEST, -(-start // 1), -(-end // 1)  # frames t with start <= t < end
        if 0 <= key < KEYS:
            roll[int(first) : int(last), key] = 1
    sounding = roll.any(1).nonzero()[:, 0]
    return roll[int(sounding[0]) : int(sounding[-1]) + 1] if len(sounding) else roll[:0]


def fingerprint(roll: Tensor) -> bytes:
    """Equal for scores that are copies of each other, transposed or not."""
    used = roll.any(0).nonzero()[:, 0]
    return roll[:, int(used[0]) : int(used[-1]) + 1].byte().numpy().tobytes() if len(used) else b""
