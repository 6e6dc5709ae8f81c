"""gsplat.exporter: files of Gaussians."""

from __future__ import annotations

import os
from typing import Literal

from torch import Tensor

from mpkernels.splatting import ply


def export_splats(
    means: Tensor,
    scales: Tensor,
    quats: Tensor,
    opacities: Tensor,
    sh0: Tensor,
    shN: Tensor,
    format: Literal["ply", "splat", "ply_compressed"] = "ply",
    save_to: str | os.PathLike[str] | None = None,
) -> bytes:
    """The bytes of a PLY file of Gaussians, also written to ``save_to``: see :func:`mpkernels.splatting.ply.save_ply`.

    The file has normals of 0 in it, which gsplat leaves out and Inria's viewer wants.

    Raises:
        NotImplementedError: a ``format`` of gsplat other than "ply".
        TypeError, ValueError, ModuleNotFoundError: as :func:`mpkernels.splatting.ply.save_ply`.
    """
    if format in ("splat", "ply_compressed"):
        raise NotImplementedError(f"format: {format!r} is not supported by mpkernels.compat.gsplat, only 'ply'")
    if format != "ply":
        raise ValueError(f"format: expected 'ply', got {format!r}")
    data = ply.encode(means=means, scales=scales, quats=quats, opacities=opacities, sh0=sh0, shN=shN)
    if save_to:
        ply.write_whole(save_to, data)
    return data
