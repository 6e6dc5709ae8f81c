"""PLY files of Gaussians: the layout that viewers read, exact round trips, and errors that say what is wrong."""

import math
import os
import struct
import sys
import warnings

import numpy as np
import plyfile
import pytest
import torch

from mpkernels.splatting.ply import load_ply, save_ply

HEADER = (
    b"ply\nformat binary_little_endian 1.0\nelement vertex 2\n"
    + b"".join(
        f"property float {name}\n".encode()
        for name in [
            *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"),
            *(f"f_rest_{i}" for i in range(9)),
            *("opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
        ]
    )
    + b"end_header\n"
)


def gaussians(n=5, k=4, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = {
        "means": (n, 3), "scales": (n, 3), "quats": (n, 4), "opacities": (n,), "sh0": (n, 1, 3), "shN": (n, k - 1, 3)
    }  # fmt: skip
    return {name: torch.randn(shape, generator=rng, dtype=dtype) for name, shape in shapes.items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == torch.float32
        assert got[name].is_contiguous()
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize(("n", "k"), [(5, 16), (1, 1), (0, 4), (123, 9), (10_000, 4)])
def test_round_trip(tmp_path, n, k):
    splats = gaussians(n, k)
    save_ply(tmp_path / "splats.ply", **splats)
    assert_same(load_ply(tmp_path / "splats.ply"), splats)
    assert [path.name for path in tmp_path.iterdir()] == ["splats.ply"]


def test_layout(tmp_path):
    """Byte for byte: channel-major f_rest, normals of 0, wxyz, little endian."""
    splats = gaussians(2)
    save_ply(tmp_path / "a.ply", **splats)
    rows = b""
    for i in range(2):
        numbers = [*splats["means"][i].tolist(), 0, 0, 0, *splats["sh0"][i, 0].tolist()]
        numbers += [splats["shN"][i, coefficient, channel].item() for channel in range(3) for coefficient in range(3)]
        numbers += [splats["opacities"][i].item(), *splats["scales"][i].tolist(), *splats["quats"][i].tolist()]
        rows += struct.pack("<26f", *numbers)
    assert (tmp_path / "a.ply").read_bytes() == HEADER + rows


def test_what_training_holds_is_written(tmp_path):
    splats = gaussians(4, dtype=torch.float64)
    params = torch.nn.ParameterDict(splats)
    params["opacities"] = torch.nn.Parameter(splats["opacities"][:, None])
    save_ply(str(tmp_path / "a.ply"), **params)
    assert_same(load_ply(str(tmp_path / "a.ply")), {name: value.float() for name, value in splats.items()})
    without = {name: value for name, value in splats.items() if name != "shN"}
    save_ply(tmp_path / "b.ply", **without)
    assert load_ply(tmp_path / "b.ply")["shN"].shape == (4, 0, 3)


@pytest.mark.parametrize(("text", "order"), [(True, "="), (False, ">"), (False, "<")])
def test_other_encodings_orders_and_properties(tmp_path, text, order):
    splats = gaussians(3)
    names = ["opacity", *(f"rot_{i}" for i in range(4)), *(f"scale_{i}" for i in range(3))]
    names += [*(f"f_rest_{i}" for i in reversed(range(9))), "f_dc_2", "f_dc_1", "f_dc_0", "z", "y", "x"]
    columns = {"opacity": splats["opacities"]}
    columns |= {f"rot_{i}": splats["quats"][:, i] for i in range(4)}
    columns |= {f"scale_{i}": splats["scales"][:, i] for i in range(3)}
    columns |= {f"f_dc_{i}": splats["sh0"][:, 0, i] for i in range(3)}
    columns |= {f"f_rest_{i}": splats["shN"][:, i % 3, i // 3] for i in range(9)}
    columns |= {name: splats["means"][:, i] for i, name in enumerate("xyz")}
    rows = np.zeros(3, [("label", "u1"), *((name, "f8" if name == "x" else "f4") for name in names)])
    for name, column in columns.items():
        rows[name] = column.numpy()
    elements = [
        plyfile.PlyElement.describe(np.zeros(2, [("version", "i4")]), "extra"),
        plyfile.PlyElement.describe(rows, "vertex"),
    ]
    plyfile.PlyData(elements, text=text, byte_order=order).write(str(tmp_path / "a.ply"))
    got = load_ply(tmp_path / "a.ply")
    for name, value in splats.items():
        torch.testing.assert_close(got[name], value)


def test_rows_that_are_not_finite_are_left_out(tmp_path):
    splats = gaussians(9)
    for i, value in enumerate(splats.values()):
        value.view(9, -1)[i + 1, -1] = [math.nan, math.inf, -math.inf][i % 3]
    with pytest.warns(UserWarning, match=r"6 of 9 Gaussians are left out.*not finite") as record:
        save_ply(tmp_path / "a.ply", **splats)
    assert record[0].filename == __file__
    assert_same(load_ply(tmp_path / "a.ply"), {name: value[[0, 7, 8]] for name, value in splats.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_ply(tmp_path / "a.ply", **gaussians(2))


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.ply"
    save_ply(path, **gaussians(3))
    before = path.read_bytes()

    def fails(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        save_ply(path, **gaussians(4))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"means": torch.zeros(5)}, ValueError, r"means.*\(5, 3\).*\(5,\)"),
        ({"means": [1.0]}, TypeError, "means.*Tensor.*list"),
        ({"scales": torch.zeros(4, 3)}, ValueError, r"scales.*\(5, 3\).*\(4, 3\)"),
        ({"quats": torch.zeros(5, 3)}, ValueError, r"quats.*\(5, 4\).*\(5, 3\)"),
        ({"opacities": torch.zeros(5, 2)}, ValueError, r"opacities.*\(5,\) or \(5, 1\).*\(5, 2\)"),
        ({"opacities": torch.zeros(5, dtype=torch.int32)}, TypeError, "opacities.*floating.*int32"),
        ({"sh0": torch.zeros(5, 3)}, ValueError, r"sh0.*\(5, 1, 3\).*\(5, 3\)"),
        ({"shN": torch.zeros(5, 9)}, ValueError, r"shN.*\(5, K - 1, 3\).*\(5, 9\)"),
        ({"shN": torch.zeros(5, 4, 3)}, ValueError, r"shN.*0, 3, 8, 15.*\(5, 4, 3\)"),
    ],
)
def test_bad_tensors(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        save_ply(tmp_path / "a.ply", **gaussians() | changes)
    assert not list(tmp_path.iterdir())


def point_cloud(path, names, **kinds):
    rows = np.zeros(3, [(name, kinds.get(name, "f4")) for name in names])
    plyfile.PlyData([plyfile.PlyElement.describe(rows, "vertex")]).write(str(path))


class TestBadFiles:
    complete = ("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2",
                "rot_0", "rot_1", "rot_2", "rot_3")  # fmt: skip

    @pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n\xff\xfe", b"obj\nv 1 2 3\n", b"ply\nformat binary"])
    def test_no_ply(self, tmp_path, content):
        (tmp_path / "a.ply").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.ply: expected a PLY file"):
            load_ply(tmp_path / "a.ply")

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            load_ply(tmp_path / "a.ply")

    def test_ends_early(self, tmp_path):
        save_ply(tmp_path / "a.ply", **gaussians())
        (tmp_path / "a.ply").write_bytes((tmp_path / "a.ply").read_bytes()[:-7])
        with pytest.raises(ValueError, match=r"a\.ply: expected a PLY file.*cannot be read"):
            load_ply(tmp_path / "a.ply")

    def test_no_vertices(self, tmp_path):
        element = plyfile.PlyElement.describe(np.zeros(2, [("x", "f4")]), "face")
        plyfile.PlyData([element]).write(str(tmp_path / "a.ply"))
        with pytest.raises(ValueError, match=r"'vertex'.*\['face'\]"):
            load_ply(tmp_path / "a.ply")

    def test_point_cloud(self, tmp_path):
        point_cloud(tmp_path / "a.ply", ["x", "y", "z", "red", "green", "blue"])
        with pytest.raises(ValueError, match=r"a point cloud without Gaussians.*blue.*missing f_dc_0.*opacity.*rot_3"):
            load_ply(tmp_path / "a.ply")

    def test_compressed(self, tmp_path):
        point_cloud(tmp_path / "a.ply", ["packed_position", "packed_rotation", "packed_scale", "packed_color"])
        with pytest.raises(ValueError, match=r"a compressed PLY file, which is not read here"):
            load_ply(tmp_path / "a.ply")

    def test_missing_properties_are_named(self, tmp_path):
        point_cloud(tmp_path / "a.ply", [name for name in self.complete if name not in ("scale_2", "rot_0")])
        with pytest.raises(ValueError, match=r"missing scale_2, rot_0$"):
            load_ply(tmp_path / "a.ply")

    @pytest.mark.parametrize("count", [1, 3, 10, 12])
    def test_wrong_number_of_coefficients(self, tmp_path, count):
        point_cloud(tmp_path / "a.ply", [*self.complete, *(f"f_rest_{i}" for i in range(count))])
        with pytest.raises(ValueError, match=rf"f_rest_\*.*0, 9, 24, 45.*got {count}"):
            load_ply(tmp_path / "a.ply")

    def test_hole_in_the_coefficients(self, tmp_path):
        point_cloud(tmp_path / "a.ply", [*self.complete, *(f"f_rest_{i}" for i in range(10) if i != 4)])
        with pytest.raises(ValueError, match=r"f_rest_0 to f_rest_8, missing f_rest_4"):
            load_ply(tmp_path / "a.ply")


def test_without_plyfile(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plyfile", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install plyfile"):
        save_ply(tmp_path / "a.ply", **gaussians())
    with pytest.raises(ModuleNotFoundError, match=r"mpkernels\[splatting\]"):
        load_ply(tmp_path / "a.ply")
