"""A photograph with its disparity as Gaussians: what :mod:`python_models.gaussian_splatting` fits by default.

The pair is rectified: the left camera stands at the origin, the right one `baseline` beside it, and

    x_right = x_left - disparity,   Z = baseline * focal / (disparity + doffs)

Every pixel of the left photograph becomes one Gaussian at its depth. What the left camera does not see is guessed from
its photograph alone: in the right view the surface behind each gap goes on into it, with the colours at its edge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from python_models.gaussian_splatting_basics import SH_BAND0
from python_models.plane_sweep import BASELINE, FOCAL, PRINCIPAL_POINT_SHIFT, StereoPair, shrink_pair

CENTRE = (311.193, 254.877)  # principal point of the left camera, pixels of the 741x500 photographs
FLATNESS = 0.1  # thickness of a Gaussian over its width: it is a disc that faces the camera
GUESS_RADIUS = 2  # pixels over which guessed colours are averaged


@dataclass(frozen=True)
class StereoCameras:
    """K (3, 3) and viewmat (4, 4) of both cameras, in pixels of pictures that are `scale` times smaller."""

    focal: float
    doffs: float
    Ks: Tensor  # (2, 3, 3), left and right
    viewmats: Tensor  # (2, 4, 4)

    @classmethod
    def at(cls, scale: int) -> StereoCameras:
        """The cameras of the Motorcycle pair at 1/scale of 741x500."""
        focal, doffs, (cx, cy) = FOCAL / scale, PRINCIPAL_POINT_SHIFT / scale, (x / scale for x in CENTRE)
        left = torch.tensor([[focal, 0, cx], [0, focal, cy], [0, 0, 1]])
        right = torch.tensor([[focal, 0, cx + doffs], [0, focal, cy], [0, 0, 1]])
        beside = torch.eye(4)
        beside[0, 3] = -BASELINE
        return cls(focal, doffs, torch.stack([left, right]), torch.stack([torch.eye(4), beside]))

    def depth(self, disparity: Tensor) -> Tensor:
        """Metres."""
        return BASELINE * self.focal / (disparity + self.doffs)

    def back_project(self, columns: Tensor, rows: Tensor, disparity: Tensor) -> Tensor:
        """World points (..., 3) of left pixels; the centre of the first one is (0.5, 0.5)."""
        depth, K = self.depth(disparity), self.Ks[0]
        return torch.stack(
            [(columns - K[0, 2]) * depth / self.focal, (rows - K[1, 2]) * depth / self.focal, depth], dim=-1
        )


def nearest_known(known: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the nearest known pixel, for each pixel of a (height, width) bool."""
    from scipy import ndimage

    found = ndimage.distance_transform_edt(~known.numpy(), return_distances=False, return_indices=True)
    rows, columns = torch.from_numpy(found).long()
    return rows, columns


def fill_disparity(disparity: Tensor) -> Tensor:
    """Unknown disparities (NaN) take the one of the nearest pixel that has one."""
    known = disparity.isfinite()
    if not known.any():
        raise ValueError("disparity: expected some that are known, got none")
    return disparity[nearest_known(known)]


def forward_warp(left: Tensor, disparity: Tensor) -> tuple[Tensor, Tensor]:
    """The right view (height, width, 3) of the left picture, and its disparity (height, width).

    Every left pixel goes to the right pixel nearest to x - disparity, the nearest surface wins; where none goes the
    picture is 0 and the disparity -1. Pixels of unknown disparity (NaN) go nowhere.
    """
    height, width = disparity.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    target = (columns - disparity).round()
    lands = (target >= 0) & (target < width)  # False for NaN
    place = (rows * width + target.nan_to_num(0)).long()[lands]
    value = disparity[lands]
    nearest = torch.full((height * width,), -1.0).scatter_reduce(0, place, value, "amax")
    # of several with the same disparity the last one wins: their numbers decide, not the order of writing
    number = torch.arange(height * width).reshape(height, width)[lands]
    winner = torch.full((height * width,), -1).scatter_reduce(
        0, place, torch.where(value == nearest[place], number, -1), "amax"
    )
    picture = torch.where(winner[:, None] >= 0, left.reshape(-1, 3)[winner.clamp_min(0)], 0.0)
    return picture.reshape(height, width, 3), nearest.reshape(height, width)


def warp_baseline(left: Tensor, disparity: Tensor) -> tuple[Tensor, Tensor]:
    """What the Gaussians are compared with: the left picture warped, holes filled by the nearest pixel; and the holes.

    The holes (height, width) are where the right camera sees what the left one does not, as far as disparity knows.
    """
    picture, found = forward_warp(left, disparity)
    return picture[nearest_known(found >= 0)], found < 0


def _guess_unseen(left: Tensor, disparity: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, columns (of the right view), disparities and colours of what shows in the right view's gaps."""
    picture, found = forward_warp(left, disparity)
    known, width = found >= 0, found.shape[1]
    columns = torch.arange(width).expand_as(found)
    before = torch.where(known, columns, -1).cummax(dim=1).values
    after = torch.where(known, columns, width).flip(1).cummin(dim=1).values.flip(1)
    at_before = torch.where(before >= 0, found.gather(1, before.clamp_min(0)), math.inf)
    at_after = torch.where(after < width, found.gather(1, after.clamp_max(width - 1)), math.inf)
    behind = torch.minimum(at_before, at_after)  # the farther end of the gap in this row
    source = torch.where(at_before <= at_after, before, after).clamp(0, width - 1)
    filled = picture.gather(1, source[..., None].expand_as(picture))
    size = 2 * GUESS_RADIUS + 1
    mean = functional.avg_pool2d(
        filled.permute(2, 0, 1)[None], size, stride=1, padding=GUESS_RADIUS, count_include_pad=False
    )[0].permute(1, 2, 0)
    gaps = ~known & behind.isfinite()
    rows, across = gaps.nonzero(as_tuple=True)
    return rows, across, behind[gaps], mean[gaps]


def surface_gaussians(
    pair: StereoPair, cameras: StereoCameras, *, width: float, opacity: float
) -> torch.nn.ParameterDict:
    """A Gaussian for each pixel of the left photograph, and for each pixel that the right camera alone sees.

    Args:
        pair: its left photograph and disparity alone are looked at.
        cameras: of these pictures.
        width: standard deviation of a Gaussian, in pixels.
        opacity: of each.
    """
    disparity = fill_disparity(pair.disparity)
    rows, columns = torch.meshgrid(torch.arange(disparity.shape[0]), torch.arange(disparity.shape[1]), indexing="ij")
    gap_rows, gap_columns, gap_disparity, gap_colours = _guess_unseen(pair.left, disparity)
    every_row = torch.cat([rows.flatten(), gap_rows]) + 0.5
    every_disparity = torch.cat([disparity.flatten(), gap_disparity])
    every_column = torch.cat([columns.flatten() + 0.5, gap_columns + 0.5 + gap_disparity])
    means = cameras.back_project(every_column, every_row, every_disparity)
    size = width * means[:, 2:] / cameras.focal
    made = {
        "means": means,
        "scales": (size * torch.tensor([1.0, 1.0, FLATNESS])).log(),
        "quats": torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(len(means), 1),
        "opacities": torch.logit(torch.full((len(means),), opacity)),
        "sh0": ((torch.cat([pair.left.reshape(-1, 3), gap_colours]) - 0.5) / SH_BAND0)[:, None, :],
        "shN": torch.zeros(len(means), 0, 3),
    }
    return torch.nn.ParameterDict({name: torch.nn.Parameter(value) for name, value in made.items()})


def at_scale(pair: StereoPair, scale: int) -> StereoPair:
    """The pair at 1/scale of its resolution."""
    return pair if scale == 1 else shrink_pair(pair, scale)
