"""``mpkernels view`` with a stand-in for viser: what a client's camera sees is what it is sent."""

import sys
import threading
import types

import numpy as np
import pytest
import torch

from mpkernels import splatting
from mpkernels.commands import terminal, view


@pytest.fixture
def file(tmp_path):
    """Two Gaussians: a red one at the origin, a green one to its right (OpenCV's x)."""
    red_green = torch.tensor([[[0.5, -0.5, -0.5]], [[-0.5, 0.5, -0.5]]]) / 0.28209479177387814
    splatting.save_ply(
        tmp_path / "two.ply",
        means=torch.tensor([[0.0, 0, 0], [1, 0, 0]]),
        scales=torch.full((2, 3), 0.15).log(),
        quats=torch.tensor([[1.0, 0, 0, 0]]).repeat(2, 1),
        opacities=torch.full((2,), 6.0),
        sh0=red_green,
        shN=torch.zeros(2, 3, 3),
    )
    return tmp_path / "two.ply"


class Camera:
    def __init__(self):
        self.wxyz = np.array([1.0, 0, 0, 0])
        self.position = np.array([0.0, 0, -4])
        self.fov, self.aspect = 1.0, 2.0
        self.look_at = self.up_direction = None


class Client:
    def __init__(self):
        self.camera, self.scene, self.pictures = Camera(), self, []

    def set_background_image(self, picture, format):
        assert format == "jpeg"
        self.pictures.append(picture)


MADE = []


class Server:
    def __init__(self, port=None):
        self.port, self.clients, self.stopped = port, {}, False
        MADE.append(self)

    def on_client_connect(self, callback):
        self.connect = callback

    def get_clients(self):
        return dict(self.clients)

    def stop(self):
        self.stopped = True


def centre_of(picture, channel):
    """Row and column of the middle of a colour's pixels."""
    rows, columns = np.nonzero((picture[..., channel] > 150) & (picture.sum(axis=-1) < 400))
    return rows.mean() + 0.5, columns.mean() + 0.5


def test_a_picture_is_what_the_camera_sees(file):
    gaussians = view.load(file)
    viewmat = view.world_to_camera(np.array([1.0, 0, 0, 0]), np.array([0.0, 0, -4]))
    picture = view.render(gaussians, viewmat, fov=1.0, aspect=2.0, longest=100)
    assert picture.shape == (50, 100, 3)
    assert picture.dtype == np.uint8
    focal = 25 / np.tan(0.5)
    assert centre_of(picture, 0) == pytest.approx((25, 50), abs=0.3)
    assert centre_of(picture, 1) == pytest.approx((25, 50 + focal / 4), abs=0.5)
    assert view.render(gaussians, viewmat, fov=1.0, aspect=0.5, longest=100).shape == (100, 50, 3)


def test_a_turned_camera():
    """A quarter turn about y: the camera at -x looks along +x; its x is the world's -z."""
    half = np.sqrt(0.5)
    viewmat = view.world_to_camera(np.array([half, 0, half, 0]), np.array([-3.0, 0, 0]))
    assert torch.allclose(viewmat @ torch.tensor([0.0, 0, 0, 1]), torch.tensor([0.0, 0, 3, 1]), atol=1e-6)
    assert torch.allclose(viewmat @ torch.tensor([0.0, 0, -1, 1]), torch.tensor([1.0, 0, 3, 1]), atol=1e-6)


def test_coarse_while_moving_then_in_full_then_nothing(file):
    server = Server()
    viewer = view.Viewer(server, view.load(file), longest=60)
    client = Client()
    server.clients[0] = client
    assert viewer.update()
    assert viewer.update()
    assert not viewer.update()
    assert [picture.shape for picture in client.pictures] == [(10, 20, 3), (30, 60, 3)]
    client.camera.position = np.array([0.5, 0, -4])
    assert viewer.update()
    assert client.pictures[-1].shape == (10, 20, 3)
    server.clients.clear()
    assert not viewer.update()


def test_new_clients_look_at_the_gaussians(file):
    server = Server()
    view.Viewer(server, view.load(file))
    client = Client()
    server.connect(client)
    means = view.load(file)["means"]
    assert client.camera.look_at.tolist() == means.median(dim=0).values.tolist()
    assert client.camera.position[2] < 0
    assert client.camera.up_direction.tolist() == [0, -1, 0]


@pytest.fixture
def viser(monkeypatch):
    MADE.clear()
    module = types.ModuleType("viser")
    module.ViserServer = Server
    monkeypatch.setitem(sys.modules, "viser", module)


def test_serving_until_it_is_stopped(file, viser, capsys):
    client, stop = Client(), threading.Event()

    def set_background_image(picture, format):
        client.pictures.append(picture)
        if len(client.pictures) == 2:
            stop.set()

    client.set_background_image = set_background_image
    before = Server.on_client_connect

    def connect_at_once(self, callback):
        before(self, callback)
        self.clients[3] = client

    Server.on_client_connect = connect_at_once
    try:
        assert view.run(file, port=9000, backend=None, device=None, stop=stop) == terminal.OK
    finally:
        Server.on_client_connect = before
    (server,) = MADE
    assert (server.port, server.stopped) == (9000, True)
    assert len(client.pictures) == 2
    assert "2 Gaussians at http://localhost:9000" in capsys.readouterr().err


def test_a_camera_that_is_not_known_yet_is_left_alone(file):
    server = Server()
    viewer = view.Viewer(server, view.load(file), longest=20)

    class NotYet(Client):
        @property
        def camera(self):
            raise AssertionError  # as viser's does

        @camera.setter
        def camera(self, value):
            pass

    server.clients[0] = NotYet()
    assert not viewer.update()


def test_without_viser_the_error_says_how_to_get_it(run, file, monkeypatch):
    monkeypatch.setitem(sys.modules, "viser", None)
    result = run("view", str(file))
    assert result.exit_code == 2
    assert "pip install viser" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["view", "nowhere.ply"], "FILE: expected a .ply file, there is none: nowhere.ply"),
        (["view", "text.ply"], "FILE: text.ply: expected a PLY file"),
        (["view", "nowhere.ply", "--port", "0"], "--port: expected a number from 1 to 65535, got 0"),
        (["view", "nowhere.ply", "--backend", "cudnn"], "--backend: expected one of"),
        (["view", "nowhere.ply", "--device", "tpu"], "--device: expected one of"),
    ],
)
def test_bad_usage_is_one_line(run, tmp_path, viser, arguments, message):
    (tmp_path / "text.ply").write_text("text")
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
