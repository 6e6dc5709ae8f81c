"""COLMAP's sparse models, binary or text: https://colmap.github.io/format.html."""

from __future__ import annotations

import pathlib
import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

MODELS = {  # number in binary files: name, number of parameters
    0: ("SIMPLE_PINHOLE", 3),
    1: ("PINHOLE", 4),
    2: ("SIMPLE_RADIAL", 4),
    3: ("RADIAL", 5),
    4: ("OPENCV", 8),
}
FOLDERS = ("sparse/0", "sparse", ".")
PARTS = ("cameras", "images", "points3D")


@dataclass(frozen=True)
class Lens:
    """What COLMAP calls a camera: several views may share it."""

    width: int
    height: int
    pinhole: tuple[float, float, float, float]  # fx, fy, cx, cy in pixels
    distortion: tuple[float, float, float, float]  # k1, k2, p1, p2


@dataclass(frozen=True)
class View:
    """One photograph and its pose."""

    name: str
    camera_id: int
    world_to_camera: np.ndarray  # (4, 4)


def find(folder: pathlib.Path) -> pathlib.Path | None:
    """The folder of the model in a scene's folder, or None.

    Raises:
        FileNotFoundError: there is a model without one of its parts.
    """
    for name in FOLDERS:
        place = folder / name
        found = [part for part in PARTS if _file(place, part) is not None]
        if found:
            if missing := [part for part in PARTS if part not in found]:
                files = " and ".join(f"{part}.bin (or .txt)" for part in missing)
                raise FileNotFoundError(f"data: a COLMAP model is incomplete: {place} lacks {files}")
            return place
    return None


def _file(model: pathlib.Path, part: str) -> pathlib.Path | None:
    return next((path for ending in (".bin", ".txt") if (path := model / (part + ending)).is_file()), None)


class _Binary:
    """Reads little-endian values one after the other; a file that ends too early is named."""

    def __init__(self, path: pathlib.Path, file: BinaryIO) -> None:
        self.path, self.file = path, file

    def bytes(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) < count:
            raise ValueError(f"{self.path}: the file ends too early: expected {count} bytes more, got {len(data)}")
        return data

    def values(self, layout: str) -> tuple:
        return struct.unpack("<" + layout, self.bytes(struct.calcsize("<" + layout)))

    def text(self) -> str:
        read = bytearray()
        while (byte := self.bytes(1)) != b"\0":
            read += byte
        return read.decode()


def _lines(path: pathlib.Path) -> list[str]:
    """The lines that are no comments. Empty lines count: a view without points has one."""
    try:
        return [line for line in path.read_text().splitlines() if not line.startswith("#")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text file ({error})") from error


def _lens(path: pathlib.Path, model: str, width: int, height: int, parameters: tuple[float, ...]) -> Lens:
    counts = dict(MODELS.values())
    if model not in counts:
        raise ValueError(f"{path}: expected a camera model of {', '.join(counts)}, got {model}; undistort it by COLMAP")
    if len(parameters) != counts[model]:
        raise ValueError(f"{path}: expected {counts[model]} parameters of {model}, got {len(parameters)}")
    if model in ("PINHOLE", "OPENCV"):
        pinhole, rest = parameters[:4], parameters[4:]
    else:
        focal, cx, cy = parameters[:3]
        pinhole, rest = (focal, focal, cx, cy), parameters[3:]
    k1, k2, p1, p2 = (*rest, 0.0, 0.0, 0.0, 0.0)[:4]
    return Lens(width, height, (pinhole[0], pinhole[1], pinhole[2], pinhole[3]), (k1, k2, p1, p2))


def _view(path: pathlib.Path, quaternion: tuple, translation: tuple, camera_id: int, name: str) -> View:
    w, x, y, z = np.array(quaternion) / max(np.linalg.norm(quaternion), 1e-12)
    if not np.isfinite([w, x, y, z, *translation]).all() or w * w + x * x + y * y + z * z < 0.5:
        raise ValueError(f"{path}: expected a rotation and a translation of {name!r}, got {quaternion} {translation}")
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, 3] = translation
    return View(name, camera_id, matrix)


def _fields(path: pathlib.Path, line: str, least: int) -> list[str]:
    fields = line.split()
    if len(fields) < least:
        raise ValueError(f"{path}: expected {least} values or more in a line, got {line!r}")
    return fields


def read_cameras(model: pathlib.Path) -> dict[int, Lens]:
    """The lenses of a model, by their numbers."""
    path = _file(model, "cameras")
    assert path is not None
    lenses = {}
    if path.suffix == ".bin":
        with path.open("rb") as file:
            binary = _Binary(path, file)
            for _ in range(binary.values("Q")[0]):
                number, kind, width, height = binary.values("iiQQ")
                if kind not in MODELS:
                    known = ", ".join(name for name, _ in MODELS.values())
                    raise ValueError(
                        f"{path}: expected a camera model of {known}, got number {kind}; undistort it by COLMAP"
                    )
                name, count = MODELS[kind]
                lenses[number] = _lens(path, name, width, height, binary.values(f"{count}d"))
        return lenses
    for line in filter(str.strip, _lines(path)):
        number, name, width, height, *parameters = _fields(path, line, 5)
        try:
            lenses[int(number)] = _lens(path, name, int(width), int(height), tuple(map(float, parameters)))
        except ValueError as error:
            raise error if str(path) in str(error) else ValueError(f"{path}: {error} in {line!r}") from error
    return lenses


def read_images(model: pathlib.Path) -> list[View]:
    """The views of a model."""
    path = _file(model, "images")
    assert path is not None
    views = []
    if path.suffix == ".bin":
        with path.open("rb") as file:
            binary = _Binary(path, file)
            for _ in range(binary.values("Q")[0]):
                _, *pose, camera_id = binary.values("i7di")
                name = binary.text()
                binary.bytes(24 * binary.values("Q")[0])  # where it saw which point
                views.append(_view(path, tuple(pose[:4]), tuple(pose[4:]), camera_id, name))
        return views
    lines = _lines(path)
    while lines and not lines[-1].strip():
        lines.pop()  # so that a file may end with empty lines
    for line in lines[::2]:  # the line after it lists points
        fields = _fields(path, line, 10)
        try:
            pose, camera_id = tuple(map(float, fields[1:8])), int(fields[8])
        except ValueError as error:
            raise ValueError(f"{path}: {error} in {line!r}") from error
        views.append(_view(path, pose[:4], pose[4:], camera_id, " ".join(fields[9:])))
    return views


def read_points(model: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """The points of a model: positions (points, 3) float64 and colours (points, 3) uint8."""
    path = _file(model, "points3D")
    assert path is not None
    positions, colours = [], []
    if path.suffix == ".bin":
        with path.open("rb") as file:
            binary = _Binary(path, file)
            for _ in range(binary.values("Q")[0]):
                _, x, y, z, red, green, blue, _, views = binary.values("Q3d3BdQ")
                binary.bytes(8 * views)
                positions.append((x, y, z))
                colours.append((red, green, blue))
    else:
        for line in filter(str.strip, _lines(path)):
            fields = _fields(path, line, 7)
            try:
                positions.append(tuple(map(float, fields[1:4])))
                colours.append(tuple(map(int, fields[4:7])))
            except ValueError as error:
                raise ValueError(f"{path}: {error} in {line!r}") from error
    return np.array(positions, np.float64).reshape(-1, 3), np.array(colours, np.uint8).reshape(-1, 3)
