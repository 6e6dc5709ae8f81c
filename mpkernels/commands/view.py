"""``mpkernels view``: Gaussians of a .ply file in the browser, by viser, rendered here by our own rasterizer."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpkernels import backends, splatting
from mpkernels.commands import terminal

LONGEST = 1280  # pixels of the longer side of a picture at rest
COARSE = 3  # while a camera moves pictures are so many times smaller
IDLE = 0.02  # seconds between two looks at the cameras


def load(path: Path) -> dict[str, Tensor]:
    """The Gaussians of a .ply file, ready for rasterization.

    Raises:
        UsageError: there is no such file, or it holds no Gaussians.
    """
    if not path.is_file():
        raise terminal.UsageError("FILE", f"expected a .ply file, there is none: {path}")
    try:
        found = splatting.load_ply(path)
    except ValueError as error:
        raise terminal.UsageError("FILE", str(error)) from error
    except ModuleNotFoundError as error:
        raise terminal.UsageError("FILE", f"needs {error.name}: pip install {error.name}") from error
    return {
        "means": found["means"],
        "quats": found["quats"],
        "scales": found["scales"].exp(),
        "opacities": torch.sigmoid(found["opacities"]),
        "colors": torch.cat([found["sh0"], found["shN"]], dim=1),
    }


def world_to_camera(wxyz: np.ndarray, position: np.ndarray) -> Tensor:
    """A viewmat (4, 4) from a camera's rotation (a unit quaternion, camera to world, OpenCV axes) and position."""
    w, x, y, z = np.asarray(wxyz, np.float64) / np.linalg.norm(wxyz)
    to_world = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    matrix = np.eye(4)
    matrix[:3, :3] = to_world.T
    matrix[:3, 3] = -to_world.T @ np.asarray(position, np.float64)
    return torch.from_numpy(matrix).float()


@torch.no_grad()
def render(
    gaussians: dict[str, Tensor],
    viewmat: Tensor,
    fov: float,
    aspect: float,
    longest: int,
    background: tuple[float, float, float] = (0.0, 0.0, 0.0),
    backend: str | None = None,
) -> np.ndarray:
    """A picture (height, width, 3) uint8 whose longer side has `longest` pixels.

    Args:
        gaussians: of :func:`load`.
        viewmat: (4, 4), world to camera.
        fov: vertical, in radians.
        aspect: width over height.
        longest: at least 1.
        background: colour behind everything, each in [0, 1].
        backend: of :func:`mpkernels.splatting.rasterization`.
    """
    width = longest if aspect >= 1 else max(round(longest * aspect), 1)
    height = longest if aspect < 1 else max(round(longest / aspect), 1)
    focal = 0.5 * height / math.tan(0.5 * fov)
    device = gaussians["means"].device
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], device=device)
    degree = math.isqrt(gaussians["colors"].shape[1]) - 1
    colours, _, _ = splatting.rasterization(
        *(gaussians[name] for name in ("means", "quats", "scales", "opacities", "colors")),
        viewmats=viewmat[None].to(device),
        Ks=K[None],
        width=width,
        height=height,
        sh_degree=degree,
        backgrounds=torch.tensor([background], device=device),
        packed=False,
        backend=backend,
    )
    return (colours[0].clamp(0, 1) * 255).round().byte().cpu().numpy()


class Viewer:
    """Renders what each client's camera sees: coarsely while it moves, then once in full.

    Args:
        server: a viser.ViserServer, or what behaves like one.
        gaussians: of :func:`load`.
        longest: pixels of the longer side of a picture at rest.
        backend: of :func:`mpkernels.splatting.rasterization`.
    """

    def __init__(
        self, server: Any, gaussians: dict[str, Tensor], *, longest: int = LONGEST, backend: str | None = None
    ) -> None:
        self.server, self.gaussians, self.longest, self.backend = server, gaussians, longest, backend
        self._seen: dict[int, tuple[Any, int]] = {}  # client -> the camera last rendered, and the size
        means = gaussians["means"]
        if len(means):
            middle = means.median(dim=0).values
            reach = (means - middle).norm(dim=-1).median().item()
            self.start = (middle.tolist(), max(3 * reach, 1e-3))
        else:
            self.start = ([0.0, 0.0, 0.0], 1.0)
        server.on_client_connect(self._connect)

    def _connect(self, client: Any) -> None:
        """A new client looks at the middle of the Gaussians."""
        centre, distance = self.start
        client.camera.position = np.array(centre) + np.array([0.0, -0.3 * distance, -distance])
        client.camera.look_at = np.array(centre)
        client.camera.up_direction = np.array([0.0, -1.0, 0.0])  # OpenCV's y points down

    def update(self) -> bool:
        """Renders for every client whose picture is out of date; returns whether there was one."""
        clients = self.server.get_clients()
        self._seen = {number: seen for number, seen in self._seen.items() if number in clients}
        busy = False
        for number, client in clients.items():
            with contextlib.suppress(AssertionError):  # viser's, before the browser has said where its camera is
                camera = client.camera
                pose = (*map(float, camera.wxyz), *map(float, camera.position), float(camera.fov), float(camera.aspect))
                before, size = self._seen.get(number, (None, 0))
                if before == pose and size == self.longest:
                    continue
                longest = self.longest if before == pose else max(self.longest // COARSE, 1)
                viewmat = world_to_camera(np.array(pose[:4]), np.array(pose[4:7]))
                picture = render(self.gaussians, viewmat, pose[7], pose[8], longest, backend=self.backend)
                client.scene.set_background_image(picture, format="jpeg")
                self._seen[number] = (pose, longest)
                busy = True
        return busy

    def run(self, stop: threading.Event) -> None:
        """:meth:`update` again and again, until `stop` is set."""
        while not stop.is_set():
            if not self.update():
                time.sleep(IDLE)


def _viser() -> Any:
    try:
        return importlib.import_module("viser")
    except ModuleNotFoundError as error:
        if error.name != "viser":
            raise
        raise terminal.UsageError("view", "needs viser, which is not installed: pip install viser") from error


def run(path: Path, *, port: int, backend: str | None, device: str | None, stop: threading.Event | None = None) -> int:
    """Serves a file until Ctrl-C (or `stop`); returns the exit status."""
    if not 0 < port < 65536:
        raise terminal.UsageError("--port", f"expected a number from 1 to 65535, got {port}")
    if backend is not None:
        terminal.choices("--backend", [backend], backends.BACKENDS)
    gaussians = load(path)
    viser = _viser()
    if device is not None:
        gaussians = {name: value.to(device) for name, value in gaussians.items()}
    server = viser.ViserServer(port=port)
    sys.stderr.write(f"{path}: {len(gaussians['means'])} Gaussians at http://localhost:{port} (Ctrl-C ends)\n")
    viewer = Viewer(server, gaussians, backend=backend)
    stop = stop or threading.Event()
    failed: list[Exception] = []

    def loop() -> None:
        try:
            viewer.run(stop)
        except Exception as error:  # the main thread says it
            failed.append(error)
            stop.set()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        while not stop.wait(0.2):
            pass
    except KeyboardInterrupt:
        stop.set()
    thread.join(timeout=10)
    server.stop()
    if failed and isinstance(failed[0], backends.BackendError):
        sys.stderr.write(f"mpkernels: --backend: {failed[0]}\n")
        return terminal.WRONG
    if failed:
        raise failed[0]
    return terminal.OK
