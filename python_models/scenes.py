"""Photographs with known cameras, read from a folder: instant-ngp, NeRF-synthetic or COLMAP.

Cameras have OpenCV axes (x right, y down, z forward); the centre of the first pixel is (0.5, 0.5). Lens distortion is
taken out of the pictures once, here, so that everything after sees pinhole cameras alone. The model is OpenCV's
(Brown, "Decentering distortion of lenses", 1966): with (x, y) on the plane z = 1 and r^2 = x^2 + y^2, the lens shows

    x' = x (1 + k1 r^2 + k2 r^4) + 2 p1 x y + p2 (r^2 + 2 x^2)
    y' = y (1 + k1 r^2 + k2 r^4) + p1 (r^2 + 2 y^2) + 2 p2 x y
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from python_models import colmap

HELD_OUT_EVERY = 8  # the usual choice: views 0, 8, 16, ... in order of their names
NGP_SCALE = 0.33  # instant-ngp multiplies positions by this; there a box has the side aabb_scale
SYNTHETIC_HALF_SIDE = 1.3  # of the box of the NeRF-synthetic scenes, as Kerbl et al. 2023 take it
ENDINGS = ("", ".png", ".jpg", ".jpeg", ".JPG", ".PNG", ".webp")


@dataclass(frozen=True)
class Camera:
    """One camera as its file describes it: sizes in pixels, with distortion, and its pose in OpenCV axes."""

    path: pathlib.Path
    camera_to_world: np.ndarray  # (4, 4)
    fx: float
    fy: float
    cx: float
    cy: float
    distortion: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # k1, k2, p1, p2
    size: tuple[float, float] | None = None  # width, height to which the intrinsics belong; None: the picture's
    held_out: bool | None = None  # None: by its number


@dataclass(frozen=True)
class Scene:
    """Photographs, their pinhole cameras, and where in the world to look for what they show."""

    names: list[str]
    images: list[Tensor]  # (height, width, 3) uint8
    masks: list[Tensor | None]  # (height, width) bool, False where the lens showed nothing; None: everything is seen
    viewmats: Tensor  # (views, 4, 4) float32, world to camera
    Ks: Tensor  # (views, 3, 3) float32
    train: list[int]  # numbers of the views to train on
    held_out: list[int]
    box: Tensor  # (2, 3) lowest and highest corner
    background: Tensor  # (3,) of the pictures where nothing is: white where they had an alpha channel, else black
    points: Tensor | None = None  # (points, 3)
    point_colours: Tensor | None = None  # (points, 3) in [0, 1]

    @property
    def positions(self) -> Tensor:
        """Centres of the cameras, (views, 3)."""
        return -(self.viewmats[:, :3, :3].mT @ self.viewmats[:, :3, 3:])[..., 0]

    @property
    def centre(self) -> Tensor:
        """The mean of the cameras' positions, (3,)."""
        return self.positions.mean(dim=0)

    @property
    def scale(self) -> float:
        """1.1 times the largest distance of a camera from their centre: what learning rates of positions are per."""
        distance = (self.positions - self.centre).norm(dim=-1).max().item()
        return 1.1 * distance if distance > 0 else 1.0

    def __len__(self) -> int:
        return len(self.names)


def load_scene(folder: str | pathlib.Path, *, downscale: int = 1) -> Scene:
    """Read a scene.

    Args:
        folder: it holds ``transforms.json`` (instant-ngp's layout), or ``transforms_train.json`` (NeRF-synthetic;
            ``transforms_test.json``, or ``transforms_val.json``, is held out), or a COLMAP reconstruction in
            ``sparse/0``, ``sparse`` or the folder itself (.bin or .txt) with its photographs in ``images``. Cameras
            in NeRF's files have OpenGL's axes. Without a split of its own every eighth view is held out.
        downscale: pictures are averaged over squares of so many pixels. COLMAP folders may hold ``images_N`` instead.

    Raises:
        ValueError: `downscale` is no positive integer, or a file says something that cannot be; it is named.
        FileNotFoundError: a file is missing; it is named.
    """
    if isinstance(downscale, bool) or not isinstance(downscale, int) or downscale < 1:
        raise ValueError(f"downscale: expected an integer of at least 1, got {downscale!r}")
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data: expected a folder, got {str(folder)!r}")
    points = colours = None
    box: Tensor | None = None
    if (folder / "transforms.json").is_file():
        cameras, box = _instant_ngp(folder / "transforms.json")
    elif (folder / "transforms_train.json").is_file():
        cameras, box = _nerf_synthetic(folder)
    elif (model := colmap.find(folder)) is not None:
        cameras, points, colours, downscale = _colmap(folder, model, downscale)
    else:
        raise FileNotFoundError(
            f"data: expected transforms.json, transforms_train.json, or a COLMAP model (cameras, images and points3D "
            f"as .bin or .txt, in sparse/0 or sparse), got {str(folder)!r} with none of them"
        )
    return _assemble(cameras, box, points, colours, downscale)


def _assemble(
    cameras: list[Camera], box: Tensor | None, points: Tensor | None, colours: Tensor | None, downscale: int
) -> Scene:
    """Pictures read, shrunk and undistorted; poses inverted; views in order of their names."""
    cameras = sorted(cameras, key=lambda camera: str(camera.path))
    images: list[Tensor] = []
    masks: list[Tensor | None] = []
    intrinsics = []
    has_alpha = False
    for camera in cameras:
        image, alpha = _picture(camera.path)
        has_alpha |= alpha
        matrix = _intrinsics(camera, width=image.shape[1], height=image.shape[0])
        image = _shrink(image, downscale, camera.path)
        matrix[:2] /= downscale
        image, mask = undistort(image, matrix, camera.distortion)
        images.append(image)
        masks.append(mask)
        intrinsics.append(matrix)
    poses = torch.from_numpy(np.stack([camera.camera_to_world for camera in cameras]))  # float64
    held_out = [
        number
        for number, camera in enumerate(cameras)
        if camera.held_out or (camera.held_out is None and number % HELD_OUT_EVERY == 0)
    ]
    train = [i for i in range(len(cameras)) if i not in held_out]
    if not train:
        raise ValueError(f"data: expected two views or more (every eighth is held out), got {len(cameras)}")
    return Scene(
        names=[camera.path.name for camera in cameras],
        images=images,
        masks=masks,
        viewmats=torch.linalg.inv(poses).float(),
        Ks=torch.stack(intrinsics).float(),
        train=train,
        held_out=held_out,
        box=_box_around(poses) if box is None else box,
        background=torch.ones(3) if has_alpha else torch.zeros(3),
        points=points,
        point_colours=colours,
    )


def _box_around(poses: Tensor) -> Tensor:
    """A cube around the point nearest to all optical axes, as far as the farthest camera: (2, 3)."""
    position, forward = poses[:, :3, 3], functional.normalize(poses[:, :3, 2], dim=-1)
    across = torch.eye(3, dtype=poses.dtype) - forward[:, :, None] * forward[:, None, :]
    # a little of the mean position keeps parallel axes, whose nearest point is a line or a plane, from being singular
    weight = 1e-3 * torch.eye(3, dtype=poses.dtype)
    right_side = (across @ position[:, :, None]).mean(dim=0)[:, 0] + weight @ position.mean(dim=0)
    centre = torch.linalg.solve(across.mean(dim=0) + weight, right_side)
    half = (position - centre).norm(dim=-1).max().clamp_min(1e-3)
    return torch.stack([centre - half, centre + half]).float()


def _picture(path: pathlib.Path) -> tuple[Tensor, bool]:
    """A picture (height, width, 3) uint8, on white where it has an alpha channel, and whether it has one."""
    if not path.is_file():
        raise FileNotFoundError(f"data: a photograph is missing: {path}")
    try:
        with Image.open(path) as opened:
            alpha = "A" in opened.getbands() or "transparency" in opened.info
            pixels = np.array(opened.convert("RGBA" if alpha else "RGB"))
    except OSError as error:
        raise ValueError(f"{path}: expected a picture that pillow reads ({error})") from error
    if not alpha:
        return torch.from_numpy(pixels), False
    share = pixels[..., 3:].astype(np.float32) / 255
    return torch.from_numpy((pixels[..., :3] * share + 255 * (1 - share)).round().astype(np.uint8)), True


def _shrink(image: Tensor, factor: int, path: pathlib.Path) -> Tensor:
    """Averages over squares of factor x factor pixels, dropping what is left over at the right and the bottom."""
    if factor == 1:
        return image
    height, width = image.shape[0] // factor, image.shape[1] // factor
    if height == 0 or width == 0:
        size = f"{image.shape[1]}x{image.shape[0]}"
        raise ValueError(f"downscale: expected at most the picture's size, {size} of {path}, got {factor}")
    blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return blocks.float().mean(dim=(1, 3)).round().byte()


def _intrinsics(camera: Camera, *, width: int, height: int) -> Tensor:
    """K (3, 3) in float64, for a picture of this size: a file's intrinsics may belong to a larger one."""
    across, down = 1.0, 1.0
    if camera.size is not None:
        across, down = width / camera.size[0], height / camera.size[1]
        if abs(across / down - 1) > 0.02:
            said = f"{camera.size[0]:g}x{camera.size[1]:g}"
            raise ValueError(f"{camera.path}: expected the shape of its camera, {said} pixels, got {width}x{height}")
    values = (camera.fx * across, camera.fy * down, camera.cx * across, camera.cy * down)
    if not all(math.isfinite(value) for value in values) or values[0] <= 0 or values[1] <= 0:
        raise ValueError(f"{camera.path}: expected positive focal lengths and a finite centre, got {values}")
    fx, fy, cx, cy = values
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)


def distort(x: Tensor, y: Tensor, distortion: tuple[float, float, float, float]) -> tuple[Tensor, Tensor]:
    """Where the lens shows the point (x, y) of the plane z = 1: the formula at the head of this module."""
    k1, k2, p1, p2 = distortion
    square = x * x + y * y
    radial = 1 + square * (k1 + square * k2)
    return (
        x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x),
        y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y,
    )


def _fold(distortion: tuple[float, float, float, float]) -> float:
    """The square of the radius at which r (1 + k1 r^2 + k2 r^4) stops growing; nothing is seen beyond it."""
    k1, k2 = distortion[:2]
    roots = np.roots([5 * k2, 3 * k1, 1.0]) if k1 or k2 else np.array([])
    real = [root.real for root in np.atleast_1d(roots) if abs(root.imag) < 1e-12 and root.real > 0]
    return min(real, default=math.inf)


def undistort(image: Tensor, K: Tensor, distortion: tuple[float, float, float, float]) -> tuple[Tensor, Tensor | None]:
    """The picture (height, width, 3) that a pinhole camera of the same K takes, and which of its pixels are seen.

    A pixel is the bilinear mean at the place where the lens shows it; it is seen if that place is inside the picture.
    """
    if not any(distortion):
        return image, None
    height, width = image.shape[:2]
    fx, fy, cx, cy = (K[i, j].item() for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    y, x = torch.meshgrid(
        (torch.arange(height, dtype=torch.float64) + 0.5 - cy) / fy,
        (torch.arange(width, dtype=torch.float64) + 0.5 - cx) / fx,
        indexing="ij",
    )
    x_shown, y_shown = distort(x, y, distortion)
    column, row = fx * x_shown + cx, fy * y_shown + cy  # edges of the picture are 0 and width, 0 and height
    seen = (column >= 0) & (column <= width) & (row >= 0) & (row <= height) & (x * x + y * y < _fold(distortion))
    grid = torch.stack([2 * column / width - 1, 2 * row / height - 1], dim=-1)[None].nan_to_num(0.0)
    pixels = image.permute(2, 0, 1)[None].double()
    sampled = functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    remapped = sampled[0].permute(1, 2, 0).round().clamp(0, 255).byte()
    return torch.where(seen[..., None], remapped, 0), None if bool(seen.all()) else seen


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("frames"), list) or not found["frames"]:
        raise ValueError(f"{path}: expected an object with a list 'frames' that is not empty")
    return found


def _number(path: pathlib.Path, where: str, settings: dict[str, Any], name: str, default: float | None = None) -> float:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{path}: expected a number {name!r} in {where}, got {value!r}")
    return float(value)


def _frames(path: pathlib.Path, described: dict[str, Any]) -> Iterator[Camera]:
    """The cameras of one transforms file; what a frame says of its camera goes before what the file says."""
    for number, frame in enumerate(described["frames"]):
        where = f"frames[{number}]"
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise ValueError(f"{path}: expected a text 'file_path' in {where}")
        try:
            matrix = np.array(frame["transform_matrix"], dtype=np.float64)
        except (KeyError, TypeError, ValueError):
            matrix = np.zeros(0)
        if matrix.shape == (3, 4):
            matrix = np.vstack([matrix, [0, 0, 0, 1]])
        if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:3, :3])) < 1e-6:
            raise ValueError(f"{path}: expected an invertible 4x4 matrix 'transform_matrix' in {where}")
        settings = {**described, **frame}
        picture = _with_ending(path.parent / frame["file_path"])
        if "w" in settings and "h" in settings:
            size = (_number(path, where, settings, "w"), _number(path, where, settings, "h"))
        else:
            size = _size_of(picture)
        if "fl_x" in settings:
            fx = _number(path, where, settings, "fl_x")
        else:
            fx = 0.5 * size[0] / math.tan(0.5 * _number(path, where, settings, "camera_angle_x"))
        if "fl_y" not in settings and "camera_angle_y" in settings:
            fy = 0.5 * size[1] / math.tan(0.5 * _number(path, where, settings, "camera_angle_y"))
        else:
            fy = _number(path, where, settings, "fl_y", fx)
        k1, k2, p1, p2 = (_number(path, where, settings, name, 0.0) for name in ("k1", "k2", "p1", "p2"))
        for name in ("k3", "k4", "is_fisheye"):
            if settings.get(name):
                raise ValueError(f"{path}: expected a lens with k1, k2, p1, p2 alone, got {name} {settings[name]!r}")
        yield Camera(
            picture,
            matrix @ np.diag([1.0, -1.0, -1.0, 1.0]),  # OpenGL's camera looks along -z, its y is up
            fx,
            fy,
            _number(path, where, settings, "cx", size[0] / 2),
            _number(path, where, settings, "cy", size[1] / 2),
            (k1, k2, p1, p2),
            size,
        )


def _with_ending(path: pathlib.Path) -> pathlib.Path:
    """The picture: NeRF-synthetic leaves the ending out."""
    for ending in ENDINGS:
        if (found := path.with_name(path.name + ending)).is_file():
            return found
    raise FileNotFoundError(f"data: a photograph is missing: {path} (also with .png and .jpg added)")


def _size_of(path: pathlib.Path) -> tuple[int, int]:
    try:
        with Image.open(path) as opened:
            return opened.size
    except OSError as error:
        raise ValueError(f"{path}: expected a picture that pillow reads ({error})") from error


def _cube(half: float) -> Tensor:
    return torch.tensor([[-half] * 3, [half] * 3])


def _instant_ngp(path: pathlib.Path) -> tuple[list[Camera], Tensor | None]:
    described = _read_json(path)
    box = None
    if "aabb_scale" in described:
        # instant-ngp's box has its centre at (1/2, 1/2, 1/2) of the scaled positions, and the world's origin too
        half = 0.5 * _number(path, "the file", described, "aabb_scale") / NGP_SCALE
        if half <= 0:
            raise ValueError(f"{path}: expected a positive 'aabb_scale', got {described['aabb_scale']!r}")
        box = _cube(half)
    elif "fl_x" not in described and "fl_x" not in described["frames"][0]:
        box = _cube(SYNTHETIC_HALF_SIDE)
    return list(_frames(path, described)), box


def _nerf_synthetic(folder: pathlib.Path) -> tuple[list[Camera], Tensor]:
    cameras = []
    train = folder / "transforms_train.json"
    others = [path for part in ("test", "val") if (path := folder / f"transforms_{part}.json").is_file()]
    for path, held_out in ((train, False if others else None), *((path, True) for path in others[:1])):
        found = _frames(path, _read_json(path))
        cameras += [Camera(**{**vars(camera), "held_out": held_out}) for camera in found]
    return cameras, _cube(SYNTHETIC_HALF_SIDE)


def _colmap(
    folder: pathlib.Path, model: pathlib.Path, downscale: int
) -> tuple[list[Camera], Tensor | None, Tensor | None, int]:
    """Cameras, points, colours, and by how much the pictures on the disk are still to be shrunk."""
    lenses, views = colmap.read_cameras(model), colmap.read_images(model)
    small = folder / f"images_{downscale}"
    pictures, left = (small, 1) if downscale > 1 and small.is_dir() else (folder / "images", downscale)
    if not pictures.is_dir():
        raise FileNotFoundError(f"data: the folder of photographs is missing: {pictures}")
    cameras = []
    for view in views:
        if view.camera_id not in lenses:
            raise ValueError(f"{model}: the view {view.name!r} names the camera {view.camera_id}, which is not there")
        lens = lenses[view.camera_id]
        cameras.append(
            Camera(
                pictures / view.name,
                np.linalg.inv(view.world_to_camera),
                *lens.pinhole,
                lens.distortion,
                (lens.width, lens.height),
            )
        )
    if not cameras:
        raise ValueError(f"{model}: expected views, got none")
    positions, colours = colmap.read_points(model)
    if len(positions) == 0:
        return cameras, None, None, left
    return cameras, torch.from_numpy(positions).float(), torch.from_numpy(colours).float() / 255, left


def as_float(image: Tensor) -> Tensor:
    """A uint8 picture as float32 in [0, 1]."""
    return image.float() / 255


def project(points: Tensor, viewmat: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels (points, 2) and depths (points,) of world points (points, 3); meaningless where the depth is not > 0."""
    local = points @ viewmat[:3, :3].T + viewmat[:3, 3]
    on_plane = local @ K.T
    return on_plane[:, :2] / on_plane[:, 2:].clamp_min(1e-6), local[:, 2]


def random_points(
    scene: Scene, count: int, generator: torch.Generator, *, least_views: int = 3, near: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Points (count, 3) drawn evenly from the scene's box, and colours: means over the training views that see them.

    A point is drawn again unless `least_views` training views see it (all of them where there are fewer) from at
    least `near` times the scene's scale away; after a number of rounds the rest are taken as they come.
    """
    least = min(least_views, len(scene.train))
    kept: list[Tensor] = []
    colours: list[Tensor] = []
    missing = count
    for attempt in range(20):
        points = scene.box[0] + (scene.box[1] - scene.box[0]) * torch.rand(2 * count, 3, generator=generator)
        total, seen = torch.zeros(len(points), 3), torch.zeros(len(points))
        near_by = torch.zeros(len(points), dtype=torch.bool)
        for view in scene.train:
            pixels, depth = project(points, scene.viewmats[view], scene.Ks[view])
            height, width = scene.images[view].shape[:2]
            inside = (depth > 0) & (pixels >= 0).all(dim=-1) & (pixels < pixels.new_tensor([width, height])).all(dim=-1)
            near_by |= inside & (depth < near * scene.scale)
            column, row = pixels[inside].long().unbind(dim=-1)
            total[inside] += as_float(scene.images[view][row, column])
            seen += inside
        good = (seen >= least) & ~near_by
        if attempt == 19:
            good = torch.ones_like(good)
        found = good.nonzero()[:missing, 0]
        kept.append(points[found])
        colours.append(torch.where(seen[found, None] > 0, total[found] / seen[found, None].clamp_min(1), 0.5))
        missing -= len(found)
        if missing == 0:
            break
    return torch.cat(kept), torch.cat(colours)
