"""Names that can be imported, and say when they are called that they are not supported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def unsupported(name: str, what: str) -> Callable[..., NoReturn]:
    """A function of gsplat that raises NotImplementedError; ``what`` is the feature that is missing."""

    def function(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name}: {what} is not supported by mpkernels.compat.gsplat")

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"Raises NotImplementedError: {what} is not supported."
    return function


def check_unused(what: str, **arguments: Any) -> None:
    """Raises NotImplementedError that names the first argument that is neither None nor False."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name}: {what} is not supported by mpkernels.compat.gsplat")


def check_camera_model(camera_model: str) -> None:
    """Raises NotImplementedError for the camera models of gsplat that are not supported, ValueError for others."""
    if camera_model in ("fisheye", "ftheta"):
        raise NotImplementedError(
            f"camera_model: {camera_model!r} is not supported by mpkernels.compat.gsplat, only 'pinhole' and 'ortho'"
        )
    if camera_model not in ("pinhole", "ortho"):
        raise ValueError(f"camera_model: expected 'pinhole' or 'ortho', got {camera_model!r}")
