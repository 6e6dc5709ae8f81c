"""Files of trained Gaussians, in the PLY layout of Kerbl et al. 2023 that viewers read."""

from __future__ import annotations

import io
import math
import os
import uuid
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpkernels import checks

_POSITION = ("x", "y", "z")
_NORMAL = ("nx", "ny", "nz")  # always 0, and not read: viewers want them to be there
_DC = ("f_dc_0", "f_dc_1", "f_dc_2")
_SCALE = ("scale_0", "scale_1", "scale_2")
_ROTATION = ("rot_0", "rot_1", "rot_2", "rot_3")
_REQUIRED = (*_POSITION, *_DC, "opacity", *_SCALE, *_ROTATION)
_BLOCK = 4096  # rows read at a time: what the cache holds


def save_ply(
    path: str | os.PathLike[str],
    *,
    means: Tensor,
    scales: Tensor,
    quats: Tensor,
    opacities: Tensor,
    sh0: Tensor,
    shN: Tensor | None = None,
) -> None:
    """Writes Gaussians, as they are trained, to a binary PLY file in the layout of Kerbl et al. 2023.

    The properties, all float32: x, y, z, nx, ny, nz (0), f_dc_0..2, f_rest_* (all coefficients of red, then of green,
    then of blue), opacity (logit), scale_0..2 (logarithms), rot_0..3 (wxyz). A row with a number that is not finite is
    left out, with a warning. The file appears under its name when it is complete.

    Args:
        path: where to write; a file there is replaced.
        means: (N, 3).
        scales: (N, 3), logarithms of standard deviations.
        quats: (N, 4), wxyz, of any length.
        opacities: (N,) or (N, 1), logits.
        sh0: (N, 1, 3), the spherical harmonics' coefficients of degree 0.
        shN: (N, K - 1, 3), those of higher degrees; K is a square. Default: none.

    Raises:
        TypeError, ValueError: a tensor of another dtype or shape; nothing is written.
        ModuleNotFoundError: plyfile is not installed.

    Example:
        >>> import torch
        >>> from mpkernels.splatting.ply import load_ply, save_ply
        >>> save_ply("/tmp/one.ply", means=torch.zeros(1, 3), scales=torch.zeros(1, 3), quats=torch.ones(1, 4),
        ...          opacities=torch.zeros(1), sh0=torch.zeros(1, 1, 3), shN=torch.zeros(1, 15, 3))
        >>> load_ply("/tmp/one.ply")["shN"].shape
        torch.Size([1, 15, 3])
    """
    write_whole(path, encode(means=means, scales=scales, quats=quats, opacities=opacities, sh0=sh0, shN=shN))


def load_ply(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads Gaussians from a PLY file (binary or ASCII) in the layout of Kerbl et al. 2023: see :func:`save_ply`.

    Args:
        path: a file of :func:`save_ply`, of gsplat, or of another trainer of this layout.

    Returns:
        float32 tensors as they are trained, of the names that :func:`save_ply` takes: means (N, 3), scales (N, 3) as
        logarithms, quats (N, 4) wxyz, opacities (N,) as logits, sh0 (N, 1, 3), shN (N, K - 1, 3).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no PLY file, ends early, or lacks properties of Gaussians; the message names them.
        ModuleNotFoundError: plyfile is not installed.
    """
    plyfile = _plyfile()
    try:
        data = plyfile.PlyData.read(os.fspath(path))
    except (plyfile.PlyParseError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a PLY file, got one that cannot be read: {error}") from error
    elements = {element.name: element for element in data.elements}
    if "vertex" not in elements:
        raise ValueError(f"{path}: expected the element 'vertex' in it, got {sorted(elements) or 'none'}")
    vertex = elements["vertex"]
    present = {p.name for p in vertex.properties if not isinstance(p, plyfile.PlyListProperty)}
    missing = [name for name in _REQUIRED if name not in present]
    if missing:
        kind = ""
        if {"packed_position", "packed_rotation"} <= present:
            kind = "a compressed PLY file, which is not read here, "
        elif set(_POSITION) <= present and not {"opacity", *_SCALE, *_ROTATION} & present:
            kind = "a point cloud without Gaussians "
        raise ValueError(
            f"{path}: expected the properties of Gaussians, got {kind}with {', '.join(sorted(present)) or 'none'}; "
            f"missing {', '.join(missing)}"
        )
    count = sum(name.startswith("f_rest_") for name in present)
    rest = [f"f_rest_{i}" for i in range(count)]
    if not set(rest) <= present:
        raise ValueError(
            f"{path}: expected f_rest_0 to f_rest_{count - 1}, missing {', '.join(sorted(set(rest) - present))}"
        )
    if count % 3 or math.isqrt(count // 3 + 1) ** 2 != count // 3 + 1:
        raise ValueError(
            f"{path}: expected 3 (K - 1) properties f_rest_*, with K = (degree + 1)^2: 0, 9, 24, 45, ...; got {count}"
        )

    names = [*_REQUIRED, *rest]
    matrix = np.empty((vertex.count, len(names)), np.float32)
    for begin in range(0, vertex.count, _BLOCK):
        block = vertex.data[begin : begin + _BLOCK]
        for column, name in enumerate(names):
            matrix[begin : begin + _BLOCK, column] = block[name]
    widths = [3, 3, 1, 3, 4, count]
    means, sh0, opacities, scales, quats, shn = torch.from_numpy(matrix).split(widths, dim=1)
    return {
        "means": means.clone(),
        "scales": scales.clone(),
        "quats": quats.clone(),
        "opacities": opacities[:, 0].clone(),
        "sh0": sh0[:, None].clone(),
        "shN": shn.reshape(len(shn), 3, count // 3).mT.contiguous(),
    }


def encode(
    *, means: Tensor, scales: Tensor, quats: Tensor, opacities: Tensor, sh0: Tensor, shN: Tensor | None = None
) -> bytes:
    """The bytes of the file that :func:`save_ply` writes; the warning names the caller's caller."""
    plyfile = _plyfile()
    _check(means=means, scales=scales, quats=quats, opacities=opacities, sh0=sh0, shN=shN)
    n = len(means)
    rest = means.new_zeros(n, 0) if shN is None else shN.mT.reshape(n, 3 * shN.shape[1])
    parts = [means, torch.zeros_like(means), sh0[:, 0], rest, opacities.reshape(n, 1), scales, quats]
    matrix = torch.cat([part.detach().to("cpu", torch.float32) for part in parts], dim=1)
    finite = matrix.isfinite().all(dim=1)
    if not finite.all():
        dropped = n - int(finite.sum())
        warnings.warn(f"{dropped} of {n} Gaussians are left out: they hold numbers that are not finite", stacklevel=3)
        matrix = matrix[finite]
    rests = [f"f_rest_{i}" for i in range(rest.shape[1])]
    names = [*_POSITION, *_NORMAL, *_DC, *rests, "opacity", *_SCALE, *_ROTATION]
    rows = np.empty(len(matrix), [(name, "<f4") for name in names])
    rows.view("<f4").reshape(matrix.shape)[:] = matrix.numpy()
    stream = io.BytesIO()
    plyfile.PlyData([plyfile.PlyElement.describe(rows, "vertex")], byte_order="<").write(stream)
    return stream.getvalue()


def _check(*, means: Tensor, scales: Tensor, quats: Tensor, opacities: Tensor, sh0: Tensor, shN: Tensor | None) -> None:
    """Raises TypeError or ValueError that names the first tensor of another dtype or shape."""
    checks.floating("means", means)
    n = len(means) if means.dim() else 0
    shapes = {
        "means": (means, [(n, 3)]),
        "scales": (scales, [(n, 3)]),
        "quats": (quats, [(n, 4)]),
        "opacities": (opacities, [(n,), (n, 1)]),
        "sh0": (sh0, [(n, 1, 3)]),
    }
    for name, (value, expected) in shapes.items():
        checks.floating(name, value)
        if value.shape not in expected:
            described = " or ".join(map(str, expected))
            raise ValueError(f"{name}: expected shape {described} (N is {n} by means), got {tuple(value.shape)}")
    if shN is None:
        return
    checks.floating("shN", shN)
    k = shN.shape[1] + 1 if shN.dim() == 3 else 0
    if k == 0 or shN.shape != (n, k - 1, 3) or math.isqrt(k) ** 2 != k:
        raise ValueError(
            f"shN: expected shape ({n}, K - 1, 3) with K = (degree + 1)^2, so K - 1 = 0, 3, 8, 15, ...; "
            f"got {tuple(shN.shape)}"
        )


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that appears at ``path`` when it is complete, or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _plyfile():
    try:
        import plyfile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'PLY files need plyfile: pip install plyfile, or pip install "mpkernels[splatting]"', name="plyfile"
        ) from error
    return plyfile
