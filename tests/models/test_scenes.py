"""Scenes read from tiny folders that the tests write: axes, intrinsics, distortion, splits, errors."""

import json
import math
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from python_models import colmap, scenes

WIDTH, HEIGHT = 12, 8


def look_at(position, target=(0, 0, 0)):
    """A camera-to-world matrix in OpenCV's axes."""
    forward = np.array(target, float) - position
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[:3] = np.stack([right, np.cross(forward, right), forward, np.array(position, float)], axis=1)
    return matrix


POSES = [look_at((3 * math.cos(a), 3 * math.sin(a), 0.5)) for a in np.linspace(0, 5, 9)]
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])


def write_picture(path, number=0, size=(WIDTH, HEIGHT), alpha=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if alpha is not None:
        pixels = np.concatenate([pixels, np.full((size[1], size[0], 1), alpha, np.uint8)], axis=-1)
    Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels)


def write_ngp(folder, frame_settings=(), **settings):
    described = {"fl_x": 10.0, "fl_y": 11.0, "cx": 6.5, "cy": 3.5, "w": WIDTH, "h": HEIGHT, "aabb_scale": 4} | settings
    frames = []
    for number, pose in enumerate(POSES):
        write_picture(folder / f"images/{number:02}.png", number)
        frame = {"file_path": f"images/{number:02}.png", "transform_matrix": (pose @ OPENGL).tolist()}
        frames.append(frame | dict(frame_settings))
    described = {name: value for name, value in described.items() if value is not None}
    (folder / "transforms.json").write_text(json.dumps(described | {"frames": frames}))


LENSES = {
    "SIMPLE_PINHOLE": (10, 6, 4),
    "PINHOLE": (10, 11, 6, 4),
    "SIMPLE_RADIAL": (10, 6, 4, 0.01),
    "RADIAL": (10, 6, 4, 0.01, 0.02),
    "OPENCV": (10, 11, 6, 4, 0.01, 0.02, 0.003, 0.004),
}
POINTS = [((0.5, -0.25, 1.0), (255, 0, 51)), ((1.0, 2.0, 3.0), (1, 2, 3))]


def quaternion(rotation):
    """w, x, y, z of a rotation by less than half a turn."""
    w = 0.5 * math.sqrt(1 + np.trace(rotation))
    x, y, z = (rotation[i, j] - rotation[j, i] for i, j in ((2, 1), (0, 2), (1, 0)))
    return [w, x / (4 * w), y / (4 * w), z / (4 * w)]


def write_colmap(folder, *, binary, model="PINHOLE", place="sparse/0", pictures="images"):
    target = folder / place
    target.mkdir(parents=True, exist_ok=True)
    lens = LENSES[model]
    poses = [np.linalg.inv(pose) for pose in POSES]
    for number in range(len(poses)):
        write_picture(folder / pictures / f"a b{number}.png", number)
    if binary:
        code = next(code for code, (name, _) in colmap.MODELS.items() if name == model)
        cameras = struct.pack("<QiiQQ", 1, 7, code, WIDTH, HEIGHT) + struct.pack(f"<{len(lens)}d", *lens)
        images = struct.pack("<Q", len(poses))
        for number, pose in enumerate(poses):
            images += struct.pack("<i7di", number, *quaternion(pose[:3, :3]), *pose[:3, 3], 7)
            images += f"a b{number}.png".encode() + b"\0" + struct.pack("<Qddq", 1, 0.5, 0.5, -1)
        points = struct.pack("<Q", len(POINTS))
        for position, colour in POINTS:
            points += struct.pack("<Q3d3BdQ", 1, *position, *colour, 0.1, 1) + struct.pack("<ii", 0, 0)
        for name, data in (("cameras", cameras), ("images", images), ("points3D", points)):
            (target / f"{name}.bin").write_bytes(data)
        return
    (target / "cameras.txt").write_text(f"# cameras\n7 {model} {WIDTH} {HEIGHT} {' '.join(map(str, lens))}\n")
    lines = ["# images"]
    for number, pose in enumerate(poses):
        values = [*quaternion(pose[:3, :3]), *pose[:3, 3]]
        lines += [
            f"{number} {' '.join(map(repr, map(float, values)))} 7 a b{number}.png",
            "" if number % 2 else "1 2 -1",
        ]
    (target / "images.txt").write_text("\n".join(lines) + "\n")
    rows = [f"{i} {' '.join(map(str, xyz))} {' '.join(map(str, rgb))} 0.1 0 0" for i, (xyz, rgb) in enumerate(POINTS)]
    (target / "points3D.txt").write_text("# points\n" + "\n".join(rows) + "\n")


def test_instant_ngp(tmp_path):
    write_ngp(tmp_path)
    scene = scenes.load_scene(tmp_path)
    assert scene.names == [f"{i:02}.png" for i in range(9)]
    assert (scene.train, scene.held_out) == ([1, 2, 3, 4, 5, 6, 7], [0, 8])
    assert torch.allclose(scene.viewmats.double(), torch.from_numpy(np.linalg.inv(POSES)), atol=1e-6)
    assert scene.Ks[3].tolist() == [[10, 0, 6.5], [0, 11, 3.5], [0, 0, 1]]
    assert torch.equal(scene.images[4], write_picture(tmp_path / "again.png", 4))
    assert scene.masks == [None] * 9
    assert torch.allclose(scene.box, torch.tensor([[-2 / 0.33] * 3, [2 / 0.33] * 3]))
    assert torch.equal(scene.background, torch.zeros(3))
    pixel, depth = scenes.project(torch.zeros(1, 3), scene.viewmats[2], scene.Ks[2])
    assert torch.allclose(pixel, torch.tensor([[6.5, 3.5]]), atol=1e-5)  # all cameras look at the origin
    assert depth.item() == pytest.approx(math.sqrt(9.25), abs=1e-5)


def test_scale_is_the_reach_of_the_cameras(tmp_path):
    write_ngp(tmp_path)
    scene = scenes.load_scene(tmp_path)
    positions = np.array([pose[:3, 3] for pose in POSES])
    assert np.allclose(scene.positions, positions, atol=1e-5)
    reach = np.linalg.norm(positions - positions.mean(axis=0), axis=-1).max()
    assert scene.scale == pytest.approx(1.1 * reach, rel=1e-5)


def test_a_frame_goes_before_the_file(tmp_path):
    write_ngp(tmp_path, frame_settings={"fl_x": 20.0, "cx": 5.0})
    assert scenes.load_scene(tmp_path).Ks[1].tolist() == [[20, 0, 5], [0, 11, 3.5], [0, 0, 1]]


def test_intrinsics_of_larger_pictures_and_downscale(tmp_path):
    write_ngp(tmp_path, w=2 * WIDTH, h=2 * HEIGHT)
    assert scenes.load_scene(tmp_path).Ks[0].tolist() == [[5, 0, 3.25], [0, 5.5, 1.75], [0, 0, 1]]
    scene = scenes.load_scene(tmp_path, downscale=3)
    full = write_picture(tmp_path / "again.png", 0)
    assert scene.images[0].shape == (2, 4, 3)  # 12x8 pixels: the last two rows are left over
    assert torch.equal(scene.images[0][1, 2], full[3:6, 6:9].float().mean(dim=(0, 1)).round().byte())
    assert torch.allclose(scene.Ks[0], torch.tensor([[5 / 3, 0, 3.25 / 3], [0, 5.5 / 3, 1.75 / 3], [0, 0, 1]]))


def test_without_a_box_the_cameras_say_where_to_look(tmp_path):
    write_ngp(tmp_path, aabb_scale=None)
    box = scenes.load_scene(tmp_path).box
    assert torch.allclose(box.mean(dim=0), torch.zeros(3), atol=1e-2)
    assert torch.allclose(box[1] - box[0], torch.full((3,), 2 * math.sqrt(9.25)), atol=2e-2)


def test_parallel_cameras_have_a_box():
    poses = torch.eye(4).double().repeat(3, 1, 1)
    poses[:, 0, 3] = torch.tensor([0.0, 1.0, 2.0])
    assert torch.isfinite(scenes._box_around(poses)).all()


def write_synthetic(folder, parts):
    for part in parts:
        frames = []
        for number in range(3):
            write_picture(folder / f"{part}/{part}_{number}.png", number, alpha=51)
            frames.append(
                {"file_path": f"./{part}/{part}_{number}", "transform_matrix": (POSES[number] @ OPENGL).tolist()}
            )
        described = {"camera_angle_x": 2 * math.atan(0.5), "frames": frames}
        (folder / f"transforms_{part}.json").write_text(json.dumps(described))


def test_nerf_synthetic(tmp_path):
    write_synthetic(tmp_path, ["train", "test", "val"])
    scene = scenes.load_scene(tmp_path)
    assert [(tmp_path / "test" / scene.names[i]).is_file() for i in scene.held_out] == [True] * 3
    assert len(scene) == 6
    assert [scene.images[i].shape for i in scene.held_out] == [(HEIGHT, WIDTH, 3)] * 3
    assert scene.Ks[0].tolist() == [[12, 0, 6], [0, 12, 4], [0, 0, 1]]
    assert torch.equal(scene.background, torch.ones(3))
    assert scene.box.tolist() == [[pytest.approx(-1.3)] * 3, [pytest.approx(1.3)] * 3]
    raw = torch.from_numpy(np.array(Image.open(tmp_path / "train/train_1.png")))
    assert torch.equal(scene.images[scene.train[1]], (raw[..., :3] * 0.2 + 255 * 0.8).round().byte())


def test_nerf_synthetic_without_a_test_file_holds_out_every_eighth(tmp_path):
    write_synthetic(tmp_path, ["train"])
    assert scenes.load_scene(tmp_path).held_out == [0]


@pytest.mark.parametrize("place", ["sparse/0", "sparse", "."])
@pytest.mark.parametrize("binary", [True, False])
def test_colmap(tmp_path, binary, place):
    write_colmap(tmp_path, binary=binary, place=place)
    scene = scenes.load_scene(tmp_path)
    assert scene.names == [f"a b{i}.png" for i in range(9)]
    assert scene.held_out == [0, 8]
    assert torch.allclose(scene.viewmats.double(), torch.from_numpy(np.linalg.inv(POSES)), atol=1e-6)
    assert scene.Ks[5].tolist() == [[10, 0, 6], [0, 11, 4], [0, 0, 1]]
    assert scene.points is not None
    assert scene.point_colours is not None
    assert scene.points.tolist() == [list(position) for position, _ in POINTS]
    assert torch.allclose(scene.point_colours * 255, torch.tensor([colour for _, colour in POINTS]).float())


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("model", LENSES)
def test_lenses_of_colmap(tmp_path, binary, model):
    write_colmap(tmp_path, binary=binary, model=model)
    lens = colmap.read_cameras(tmp_path / "sparse/0")[7]
    shared = model in ("PINHOLE", "OPENCV")
    assert lens.pinhole == ((10, 11, 6, 4) if shared else (10, 10, 6, 4))
    coefficients = LENSES[model][4 if shared else 3 :]
    assert lens.distortion == (*coefficients, 0.0, 0.0, 0.0, 0.0)[:4]


def test_colmap_takes_smaller_pictures_that_are_there(tmp_path):
    write_colmap(tmp_path, binary=True, pictures="images")
    for number in range(9):
        write_picture(tmp_path / f"images_2/a b{number}.png", number + 50, size=(WIDTH // 2, HEIGHT // 2))
    scene = scenes.load_scene(tmp_path, downscale=2)
    assert torch.equal(scene.images[0], write_picture(tmp_path / "again.png", 50, size=(WIDTH // 2, HEIGHT // 2)))
    assert scene.Ks[0].tolist() == [[5, 0, 3], [0, 5.5, 2], [0, 0, 1]]


def test_undistortion_puts_every_pixel_where_the_lens_showed_it():
    """What a lens shows of a smooth function on the plane z = 1 comes back as what a pinhole shows of it."""
    height, width = 60, 80
    K = torch.tensor([[70.0, 0, 41], [0, 72, 29], [0, 0, 1]], dtype=torch.float64)
    lens = (0.2, -0.05, 0.01, -0.015)

    def colour(x, y):
        return torch.stack([128 + 100 * torch.sin(3 * x + y), 128 + 100 * torch.cos(4 * y), 128 + 100 * x * y], dim=-1)

    row, column = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    x_shown, y_shown = (column.double() - 41) / 70, (row.double() - 29) / 72
    x, y = x_shown.clone(), y_shown.clone()
    for _ in range(50):  # the inverse of the lens, by iteration
        x_again, y_again = scenes.distort(x, y, lens)
        x, y = x + x_shown - x_again, y + y_shown - y_again
    image, mask = scenes.undistort(colour(x, y).round().byte(), K, lens)
    assert mask is not None
    assert 0.8 < mask.float().mean() < 1
    inner = torch.zeros_like(mask)
    inner[2:-2, 2:-2] = mask[2:-2, 2:-2]
    error = (image.double() - colour(x_shown, y_shown)).abs()
    assert error[inner].max() < 2.5
    unchanged = (colour(x, y) - colour(x_shown, y_shown)).abs()
    assert unchanged[inner].max() > 10  # the test can fail
    assert (image[~mask] == 0).all()


@pytest.mark.parametrize(
    ("coefficient", "moved"),
    [(0, (0.15625, 0.078125)), (1, (0.048828125, 0.0244140625)), (2, (0.25, 0.4375)), (3, (0.8125, 0.25))],
)
def test_the_lens_moves_a_point_as_computed_by_hand(coefficient, moved):
    lens = tuple(1.0 if i == coefficient else 0.0 for i in range(4))
    x, y = scenes.distort(torch.tensor(0.5), torch.tensor(0.25), lens)  # r^2 = 0.3125
    assert (x.item() - 0.5, y.item() - 0.25) == moved


def test_pixels_that_the_lens_put_outside_the_picture_are_masked():
    K = torch.tensor([[20.0, 0, 10], [0, 20, 5], [0, 0, 1]], dtype=torch.float64)
    _, mask = scenes.undistort(torch.zeros(10, 20, 3, dtype=torch.uint8), K, (0.5, 0.0, 0.0, 0.0))
    assert mask is not None
    for row in range(10):
        for column in range(20):
            x, y = (column + 0.5 - 10) / 20, (row + 0.5 - 5) / 20
            grown = 1 + 0.5 * (x * x + y * y)
            assert mask[row, column] == (abs(x * grown) <= 0.5 and abs(y * grown) <= 0.25)
    assert not mask.all()


def test_a_lens_that_folds_shows_nothing_beyond_its_fold():
    K = torch.tensor([[10.0, 0, 20], [0, 10, 20], [0, 0, 1]], dtype=torch.float64)
    image = torch.full((40, 40, 3), 200, dtype=torch.uint8)
    remapped, mask = scenes.undistort(image, K, (-0.2, 0.0, 0.0, 0.0))
    assert mask is not None
    row, column = torch.meshgrid(torch.arange(40) + 0.5, torch.arange(40) + 0.5, indexing="ij")
    radius = ((row - 20) ** 2 + (column - 20) ** 2).sqrt() / 10
    assert torch.equal(mask, radius < math.sqrt(1 / 0.6))
    assert (remapped[mask] == 200).all()


def test_distorted_scenes_have_masks(tmp_path):
    write_ngp(tmp_path, k1=0.3)
    assert all(mask is not None and not mask.all() for mask in scenes.load_scene(tmp_path).masks)


def test_random_points_are_in_the_box_and_in_view(tmp_path):
    write_ngp(tmp_path, aabb_scale=2)  # the cameras stand inside the box
    scene = scenes.load_scene(tmp_path)
    points, colours = scenes.random_points(scene, 500, torch.Generator().manual_seed(0))
    assert points.shape == colours.shape == (500, 3)
    assert ((points >= scene.box[0]) & (points <= scene.box[1])).all()
    seen = torch.zeros(500)
    for view in scene.train:
        pixel, depth = scenes.project(points, scene.viewmats[view], scene.Ks[view])
        inside = (depth > 0) & (pixel >= 0).all(dim=-1) & (pixel[:, 0] < WIDTH) & (pixel[:, 1] < HEIGHT)
        seen += inside
        assert (depth[inside] >= 0.1 * scene.scale).all()
    assert (seen >= 3).all()
    again, _ = scenes.random_points(scene, 500, torch.Generator().manual_seed(0))
    assert torch.equal(points, again)


def broken(folder, name):
    if name == "no folder":
        return folder / "nowhere"
    if name == "empty":
        return folder
    if name.startswith("colmap"):
        write_colmap(folder, binary=name.endswith("binary"))
        model = folder / "sparse/0"
        if name == "colmap incomplete":
            (model / "images.txt").unlink()
        elif name == "colmap fisheye":
            (model / "cameras.txt").write_text("7 FOV 12 8 1 2 3 4 5\n")
        elif name == "colmap fisheye binary":
            (model / "cameras.bin").write_bytes(struct.pack("<QiiQQ", 1, 7, 7, WIDTH, HEIGHT))
        elif name == "colmap parameters":
            (model / "cameras.txt").write_text("7 PINHOLE 12 8 1 2 3\n")
        elif name == "colmap words":
            (model / "cameras.txt").write_text("7 PINHOLE 12 8 one 2 3 4\n")
        elif name == "colmap other camera":
            (model / "cameras.txt").write_text("8 PINHOLE 12 8 1 2 3 4\n")
        elif name == "colmap cut binary":
            (model / "images.bin").write_bytes((model / "images.bin").read_bytes()[:-30])
        elif name == "colmap no pictures":
            (folder / "images").rename(folder / "photographs")
        return folder
    write_ngp(folder)
    path = folder / "transforms.json"
    described = json.loads(path.read_text())
    if name == "not json":
        path.write_text("{")
    elif name == "picture missing":
        (folder / "images/03.png").unlink()
    elif name == "not a picture":
        (folder / "images/03.png").write_bytes(b"x")
    elif name == "other shape":
        write_picture(folder / "images/03.png", size=(HEIGHT, WIDTH))
    else:
        if name == "no frames":
            described["frames"] = []
        elif name == "matrix":
            described["frames"][2]["transform_matrix"] = [[1, 2], [3, 4]]
        elif name == "focal length":
            described["fl_x"] = "long"
        elif name == "negative focal length":
            described["fl_x"] = -3
        elif name == "fisheye":
            described["is_fisheye"] = True
        elif name == "one view":
            described["frames"] = described["frames"][:1]
        path.write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("no folder", FileNotFoundError, "data: expected a folder, got .*nowhere"),
        ("empty", FileNotFoundError, "data: expected transforms.json, transforms_train.json, or a COLMAP model"),
        ("not json", ValueError, "transforms.json: expected JSON"),
        ("no frames", ValueError, "transforms.json: expected an object with a list 'frames' that is not empty"),
        ("matrix", ValueError, r"expected an invertible 4x4 matrix 'transform_matrix' in frames\[2\]"),
        ("focal length", ValueError, r"expected a number 'fl_x' in frames\[0\], got 'long'"),
        ("negative focal length", ValueError, "expected positive focal lengths and a finite centre"),
        ("fisheye", ValueError, "expected a lens with k1, k2, p1, p2 alone, got is_fisheye True"),
        ("one view", ValueError, r"data: expected two views or more .*, got 1"),
        ("picture missing", FileNotFoundError, "data: a photograph is missing: .*03.png"),
        ("not a picture", ValueError, "03.png: expected a picture that pillow reads"),
        ("other shape", ValueError, "03.png: expected the shape of its camera, 12x8 pixels, got 8x12"),
        ("colmap incomplete", FileNotFoundError, r"a COLMAP model is incomplete: .* lacks images.bin \(or .txt\)"),
        ("colmap fisheye", ValueError, "cameras.txt: expected a camera model of SIMPLE_PINHOLE, .*, got FOV"),
        ("colmap fisheye binary", ValueError, "cameras.bin: expected a camera model of .*, got number 7"),
        ("colmap parameters", ValueError, "cameras.txt: expected 4 parameters of PINHOLE, got 3"),
        ("colmap words", ValueError, "cameras.txt: could not convert .* 'one'"),
        ("colmap other camera", ValueError, "the view 'a b0.png' names the camera 7, which is not there"),
        ("colmap cut binary", ValueError, "images.bin: the file ends too early: expected .* bytes more"),
        ("colmap no pictures", FileNotFoundError, "data: the folder of photographs is missing: .*images"),
    ],
)
def test_errors_name_the_file_and_what_is_wrong(tmp_path, name, error, message):
    folder = broken(tmp_path, name)
    with pytest.raises(error, match=message):
        scenes.load_scene(folder)


@pytest.mark.parametrize("downscale", [0, 1.5, True])
def test_downscale_is_checked(tmp_path, downscale):
    write_ngp(tmp_path)
    with pytest.raises(ValueError, match=f"downscale: expected an integer of at least 1, got {downscale}"):
        scenes.load_scene(tmp_path, downscale=downscale)


def test_downscale_leaves_pixels(tmp_path):
    write_ngp(tmp_path)
    with pytest.raises(ValueError, match=r"downscale: expected at most the picture's size, 12x8 of .*, got 9"):
        scenes.load_scene(tmp_path, downscale=9)
