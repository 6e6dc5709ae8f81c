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
    parts: list[list[Tensor]] = [[], [], []]
    for picture in photographs():
        width = picture.shape[2]
        columns = (0, round(width * TRAIN), round(width * VALID), width)
        for part, begin, end in zip(parts, columns[:-1], columns[1:], strict=True):
            part.append(picture[:, :, begin:end])
    generator = torch.Generator().manual_seed(seed)
    share = torch.tensor([float(part.shape[1] * part.shape[2]) for part in parts[0]])

    def batches() -> Iterator[Tensor]:
        while True:
            patches = []
            for i in torch.multinomial(share, batch, replacement=True, generator=generator).tolist():
                at = [int(torch.randint(n - PATCH + 1, (), generator=generator)) for n in parts[0][i].shape[1:]]
                patch = parts[0][i][:, at[0] : at[0] + PATCH, at[1] : at[1] + PATCH]
                patches.append(patch.flip(2) if torch.rand((), generator=generator) < 0.5 else patch)
            yield torch.stack(patches) / 127.5 - 1

    valid, test = (torch.cat([tiles(picture) for picture in part]) for part in parts[1:])
    counts = torch.stack([torch.cat([p[c].flatten() for p in parts[0]]).bincount(minlength=256) for c in range(3)])
    bits = -torch.log2((counts + 0.5) / (counts + 0.5).sum(dim=1, keepdim=True))  # (3, levels)
    independent = torch.stack([bits[c][test[:, c].long()].mean() for c in range(3)]).mean().item()
    baselines = {"uniform": 8.0, "independent pixels": independent, "PNG": png_bits(parts[2])}
    return Pictures(batches(), valid / 127.5 - 1, test / 127.5 - 1, baselines)


def tiles(picture: Tensor) -> Tensor:
    """(3, H, W) to the patches that lie in it side by side: (N, 3, PATCH, PATCH)."""
    cut = picture.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
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
