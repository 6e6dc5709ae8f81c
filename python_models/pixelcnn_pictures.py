"""Pictures for the PixelCNN: binary digits, and patches of photographs that wheels ship."""

from __future__ import annotations

import importlib.util
import io
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from python_models import digits

DATA = ("digits", "photographs")
PATCH = 16  # side of a patch of a photograph
PHOTOGRAPHS = {  # wheel, folder in it, files
    "scikit-image": ("skimage", "data", "astronaut.png coffee.png chelsea.png rocket.jpg motorcycle_left.png"),
    "scikit-learn": ("sklearn", "datasets/images", "china.jpg flower.jpg"),
}
TRAIN, VALID = 0.7, 0.8  # until which share of a photograph's columns they go; the rest is the test


class Pictures(NamedTuple):
    """What a model learns from and is judged by: pixels (N, colors, side, side) in [-1, 1]."""

    train: Iterator[Tensor]  # batches, without end
    valid: Tensor
    test: Tensor
    baselines: dict[str, float]  # of the test: nats of a picture, or bits per dimension


def load(data: str, batch: int, seed: int) -> Pictures:
    """Digits or photographs."""
    return load_digits(batch, seed) if data == "digits" else load_photographs(batch, seed)


def load_digits(batch: int, seed: int) -> Pictures:
    """Binary digits, which are drawn anew from their intensities each time that they are trained on."""
    parts = digits.load_digits()
    valid, test = (2 * digits.binarise(part)[:, None] - 1 for part in (parts.valid, parts.test))  # as other models do
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Tensor]:
        while True:
            for chosen in torch.randperm(len(parts.train), generator=generator).split(batch):
                yield 2 * digits.binarise(parts.train[chosen], generator)[:, None] - 1

    independent = digits.independent_nats(parts.train / 255, (test[:, 0] + 1) / 2)
    return Pictures(batches(), valid, test, {"uniform": digits.UNIFORM, "independent pixels": independent})


def photographs() -> list[Tensor]:
    """The photographs of two wheels at half their size, (3, H, W) uint8: smaller ones have more to tell a pixel."""
    from PIL import Image

    found = []
    for wheel, (package, folder, names) in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)  # finds the folder without an import
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"data: expected the photographs of {wheel}; `pip install {wheel}`")
        for name in names.split():
            with Image.open(pathlib.Path(spec.submodule_search_locations[0]) / folder / name) as file:
                found.append(torch.from_numpy(np.array(file.convert("RGB").reduce(2))).permute(2, 0, 1))
    return found


def load_photographs(batch: int, seed: int) -> Pictures:
    """Patches of photographs: columns to the left are for training, those to the right for the test.

    Training patches begin anywhere and half of them are mirrored; those of the test lie side by side.
    """
    parts = split_photographs()
    batches = (patches / 127.5 - 1 for patches in random_patches(parts[0], PATCH, batch, seed))
    valid, test = (torch.cat([tiles(picture) for picture in part]) for part in parts[1:])
    return Pictures(batches, valid / 127.5 - 1, test / 127.5 - 1, photograph_baselines(parts[0], parts[2], test))


def split_photographs() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What of each photograph is to train on, for validation and for the test: (3, H, W) uint8 each."""
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for picture in photographs():
        width = picture.shape[2]
        columns = (0, round(width * TRAIN), round(width * VALID), width)
        for part, begin, end in zip(parts, columns[:-1], columns[1:], strict=True):
            part.append(picture[:, :, begin:end])
    return parts


def random_patches(pictures: list[Tensor], side: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Patches (batch, 3, side, side) of (3, H, W) pictures, without end; half of them are mirrored."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.tensor([float(picture.shape[1] * picture.shape[2]) for picture in pictures])
    while True:
        patches = []
        for i in torch.multinomial(share, batch, replacement=True, generator=generator).tolist():
            at = [int(torch.randint(n - side + 1, (), generator=generator)) for n in pictures[i].shape[1:]]
            patch = pictures[i][:, at[0] : at[0] + side, at[1] : at[1] + side]
            patches.append(patch.flip(2) if torch.rand((), generator=generator) < 0.5 else patch)
        yield torch.stack(patches)


def photograph_baselines(train: list[Tensor], held_out: list[Tensor], patches: Tensor) -> dict[str, float]:
    """Bits per dimension of held-out pictures by what knows little of them; ``patches`` of them are (N, 3, H, W)."""
    counts = torch.stack([torch.cat([p[c].flatten() for p in train]).bincount(minlength=256) for c in range(3)])
    bits = -torch.log2((counts + 0.5) / (counts + 0.5).sum(dim=1, keepdim=True))  # (3, levels)
    independent = torch.stack([bits[c][patches[:, c].long()].mean() for c in range(3)]).mean().item()
    return {"uniform": 8.0, "independent pixels": independent, "PNG": png_bits(held_out)}


def tiles(picture: Tensor, side: int = PATCH, step: int | None = None) -> Tensor:
    """(3, H, W) to the patches that lie in it side by side, or every ``step`` pixels: (N, 3, side, side)."""
    step = side if step is None else step
    if min(picture.shape[1:]) < side:
        return picture.new_empty((0, 3, side, side))
    cut = picture.unfold(1, side, step).unfold(2, side, step)
    return cut.permute(1, 2, 0, 3, 4).flatten(0, 1)


def png_bits(pictures: list[Tensor]) -> float:
    """Bits per dimension of whole (3, H, W) pictures as PNG files; patches of them would take more."""
    from PIL import Image

    size = 0
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(file, "png")
        size += 8 * len(file.getvalue())
    return size / sum(picture.numel() for picture in pictures)
