"""Attributes of digits, measured on their pictures, and ways to have more digits: for styleflow.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from python_models.digits import Digits

MEASURED = ("slant", "thickness", "breadth")  # attributes that are numbers, in the order of their columns


def measure(pictures: Tensor) -> Tensor:
    """Slant, thickness and breadth of strokes, (B, 3), on pictures (B, H, W) of ink in [0, 1].

    Slant is covariance(x, y) / variance(y) of the ink, how far a stroke that goes up a pixel leans to the right.
    Thickness is the area of the ink over half of the length of its edge (its total variation), in pixels. Breadth is
    the standard deviation of x that is left without the slant, in pixels.
    """
    height, width = pictures.shape[1:]
    ink = pictures + 1e-6  # a blank picture has attributes too
    share = ink / ink.sum(dim=(1, 2), keepdim=True)
    y = torch.arange(height, dtype=ink.dtype).flip(0).view(-1, 1)  # upwards
    x = torch.arange(width, dtype=ink.dtype)
    y = y - (share * y).sum(dim=(1, 2), keepdim=True)
    x = x - (share * x).sum(dim=(1, 2), keepdim=True)
    across, down = (share * x * y).sum(dim=(1, 2)), (share * y.square()).sum(dim=(1, 2))
    slant = across / down
    breadth = ((share * x.square()).sum(dim=(1, 2)) - slant * across).clamp(min=0).sqrt()
    padded = F.pad(pictures, (0, 1, 0, 1))
    right, below = padded[:, :-1, 1:] - pictures, padded[:, 1:, :-1] - pictures
    edge = (right.square() + below.square() + 1e-12).sqrt().sum(dim=(1, 2))
    return torch.stack([slant, 2 * pictures.sum(dim=(1, 2)) / (edge + 1e-3), breadth], dim=1)


def warped(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture (B, H, W) slanted, turned, stretched and moved a little, by chance."""
    strength = torch.tensor([0.15, 0.08, 0.1, 0.1, 0.06, 0.06])
    shear, turn, wide, high, right, down = (torch.randn(len(pictures), 6, generator=generator) * strength).unbind(1)
    a, b, c = wide.exp() * torch.cos(turn), shear - torch.sin(turn), torch.sin(turn)
    rows = [torch.stack([a, b, right], dim=1), torch.stack([c, high.exp() * torch.cos(turn), down], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), [len(pictures), 1, *pictures.shape[1:]], align_corners=False)
    return F.grid_sample(pictures[:, None], grid, align_corners=False)[:, 0]


def warped_batches(
    digits: Digits, labels: Digits, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Training digits (size, H, W) in [0, 1], warped, and which they are, without end."""
    while True:
        for chosen in torch.randperm(len(digits.train), generator=generator).split(size):
            yield warped(digits.train[chosen] / 255, generator), labels.train[chosen]


class Judge:
    """Says which digit a picture shows, by the nearest of many training digits, warped ones too."""

    def __init__(self, digits: Digits, labels: Digits, seed: int, copies: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        plain = digits.train / 255
        self.pictures = torch.cat([plain, *(warped(plain, generator) for _ in range(copies - 1))]).flatten(1)
        self.labels = labels.train.repeat(copies)

    def __call__(self, pictures: Tensor) -> Tensor:
        """(B, H, W) in [0, 1] to (B,)."""
        parts = pictures.flatten(1).split(250)
        return torch.cat([self.labels[torch.cdist(part, self.pictures).argmin(dim=1)] for part in parts])
