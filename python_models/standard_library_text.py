"""Real text that every machine has: the sources of Python's standard library, in rows of packed documents.

A document is a file. Packages that are no library code are left out (tests, IDLE's and lib2to3's test data), and so are
tables written by programs (encodings, pydoc_data). The hash of a file's name says whether it is trained on, so that the
split is the same on every machine and does not change when a file is added. Beside it: what compressors make of it.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import pathlib
import sys
import sysconfig
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

START = 256  # the token before a document's first byte
BLOCK = 1024  # bytes of a row of training text; earlier in training it is cut into shorter rows
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda text: gzip.compress(text, 9, mtime=0),
    "bz2": lambda text: bz2.compress(text, 9),
    "xz": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
}


class Packed(NamedTuple):
    """Rows of documents, one after the other, and what is to be read in them."""

    tokens: Tensor  # (rows, length) int64: bytes, or START
    targets: Tensor  # (rows, length) int64: the byte that follows, or -1 where nothing is to be predicted
    document: Tensor  # (rows, length) int32: which document of its row a token belongs to, ascending

    @property
    def offset(self) -> Tensor:
        """(rows, length): how far a token is from the first of its document in this row."""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)
        first = torch.ones_like(self.document, dtype=torch.bool)
        first[:, 1:] = self.document[:, 1:] != self.document[:, :-1]
        return place - torch.where(first, place, 0).cummax(dim=1).values

    def cut(self, length: int) -> Packed:
        """The same text in rows of this length."""
        return Packed(*(part.reshape(-1, length) for part in self))


class Text(NamedTuple):
    """Files, each with its name and its bytes."""

    train: list[tuple[str, bytes]]
    validation: list[tuple[str, bytes]]  # for choosing settings and for the curve; neither trained on nor held out
    held_out: list[tuple[str, bytes]]

    @property
    def name(self) -> str:
        """Which text it is, and of what size."""
        count, size = len(self.held_out), total_bytes(self.held_out)
        version = ".".join(map(str, sys.version_info[:3]))
        return (
            f"standard library of Python {version}: {len(self.train)} files of {total_bytes(self.train):,} bytes "
            f"to train on, {count} of {size:,} bytes held out"
        )


def total_bytes(files: list[tuple[str, bytes]]) -> int:
    """Bytes of all files together."""
    return sum(len(content) for _, content in files)


def part_of(name: str) -> str:
    """Which part of the text a file belongs to: "held_out" (5 %), "validation" (2.5 %) or "train", by its hash."""
    number = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 40
    return "held_out" if number % 20 == 0 else "validation" if number == 1 else "train"


def load(folder: pathlib.Path | None = None) -> Text:
    """The text, split by file.

    Args:
        folder: whose .py files are read, with those of its folders; None: the standard library of this Python.

    Raises:
        FileNotFoundError: ``folder`` has no files for one of the parts.
    """
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"] if folder is None else folder)
    parts: dict[str, list[tuple[str, bytes]]] = {"train": [], "validation": [], "held_out": []}
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if LEFT_OUT.isdisjoint(inside.parts[:-1]) and path.stat().st_size > 0:
            parts[part_of(inside.as_posix())].append((inside.as_posix(), path.read_bytes()))
    for part, files in parts.items():
        if not files:
            raise FileNotFoundError(f"folder: expected Python files in {str(folder)!r}, found none for {part!r}")
    return Text(**parts)


def compressed_bits_per_byte(text: Text) -> dict[str, float]:
    """Bits a byte of the held-out files for gzip -9, bz2 -9 and xz -9e: as one stream, and each file by itself.

    "xz, after the training files" is the stream of all files, less that of those that are not held out: an xz that has
    read what a model was trained on. Its dictionary of 64 MiB holds all of it.
    """
    files = [content for _, content in text.held_out]
    size = sum(map(len, files))
    figures = {}
    for name, compress in COMPRESSORS.items():
        figures[f"{name}, one stream"] = 8 * len(compress(b"".join(files))) / size
        figures[f"{name}, each file"] = 8 * sum(len(compress(content)) for content in files) / size
    known = b"".join(content for _, content in text.train + text.validation)
    after = len(COMPRESSORS["xz"](known + b"".join(files))) - len(COMPRESSORS["xz"](known))
    return figures | {"xz, after the training files": 8 * after / size}


def training_blocks(files: list[tuple[str, bytes]], rows: int, seed: int) -> Iterator[Packed]:
    """Batches of (rows, BLOCK), for ever: each epoch packs the files in a new order and reads all blocks in another."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = [files[i][1] for i in torch.randperm(len(files), generator=generator)]
        stream = torch.frombuffer(bytearray(b"".join(b"\0" + content for content in order)), dtype=torch.uint8).long()
        sizes = torch.tensor([len(content) + 1 for content in order])
        stream[sizes.cumsum(0) - sizes] = START
        document = torch.arange(len(order), dtype=torch.int32).repeat_interleave(sizes)
        shift = int(torch.randint(BLOCK, (1,), generator=generator))
        count = (len(stream) - 1 - shift) // BLOCK
        if count < rows:
            raise ValueError(f"files: expected at least {(rows + 1) * BLOCK} bytes to train on, got {len(stream)}")
        end = shift + count * BLOCK
        targets = torch.where(stream == START, -1, stream)
        parts = (stream[shift:end], targets[shift + 1 : end + 1], document[shift:end])
        epoch = Packed(*parts).cut(BLOCK)
        for chosen in torch.randperm(count, generator=generator)[: count // rows * rows].view(-1, rows):
            yield Packed(*(part[chosen] for part in epoch))


def evaluation_rows(files: list[tuple[str, bytes]], window: int, stride: int) -> Packed:
    """Every byte of the files as a target, once: windows of each file, packed into rows.

    A window begins ``stride`` bytes after the one before, and its targets are the bytes that no window had before: but
    for a file's beginning they have at least ``window - stride`` bytes of context. Short windows share a row.
    """
    rows: list[list[tuple[Tensor, Tensor]]] = []
    room: list[int] = []
    for _, content in files:
        tokens = torch.tensor([START, *content])
        for begin in range(0, max(len(content) - (window - stride), 1), stride):
            read, targets = tokens[begin : begin + window], tokens[begin + 1 : begin + 1 + window].clone()
            read = read[: len(targets)]
            if begin > 0:
                targets[: window - stride] = -1
            fits = next((i for i, free in enumerate(room) if free >= len(read)), None)
            if fits is None:
                fits = len(rows)
                rows.append([])
                room.append(window)
            rows[fits].append((read, targets))
            room[fits] -= len(read)
    packed = Packed(
        torch.full((len(rows), window), START),
        torch.full((len(rows), window), -1),
        torch.zeros((len(rows), window), dtype=torch.int32),
    )
    for row, pieces in enumerate(rows):
        place = 0
        for number, (read, targets) in enumerate(pieces):
            here = slice(place, place + len(read))
            packed.tokens[row, here], packed.targets[row, here], packed.document[row, here] = read, targets, number
            place += len(read)
        packed.document[row, place:] = len(pieces)
    return packed
