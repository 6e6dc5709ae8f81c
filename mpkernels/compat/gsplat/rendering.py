"""gsplat.rendering: rasterization."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mpkernels.compat.gsplat.cuda._wrapper import FThetaCameraDistortionParameters, RollingShutterType
from mpkernels.compat.gsplat.unsupported import check_camera_model, check_unused, unsupported

rasterization_2dgs = unsupported("rasterization_2dgs", "rendering of 2D Gaussians")
rasterization_2dgs_inria_wrapper = unsupported("rasterization_2dgs_inria_wrapper", "Inria's 2D rasterizer")
rasterization_inria_wrapper = unsupported("rasterization_inria_wrapper", "Inria's rasterizer")


def rasterization(
    means: Tensor,
    quats: Tensor | None,
    scales: Tensor | None,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    packed: bool = True,
    tile_size: int = 16,
    backgrounds: Tensor | None = None,
    render_mode: Literal["RGB", "D", "ED", "RGB+D", "RGB+ED"] = "RGB",
    sparse_grad: bool = False,
    absgrad: bool = False,
    rasterize_mode: Literal["classic", "antialiased"] = "classic",
    channel_chunk: int = 32,
    distributed: bool = False,
    camera_model: Literal["pinhole", "ortho", "fisheye", "ftheta"] = "pinhole",
    segmented: bool = False,
    covars: Tensor | None = None,
    with_ut: bool = False,
    with_eval3d: bool = False,
    radial_coeffs: Tensor | None = None,
    tangential_coeffs: Tensor | None = None,
    thin_prism_coeffs: Tensor | None = None,
    ftheta_coeffs: FThetaCameraDistortionParameters | None = None,
    rolling_shutter: RollingShutterType = RollingShutterType.GLOBAL,
    viewmats_rs: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict]:
    """Renders Gaussians in cameras: :func:`mpkernels.splatting.rasterization`, with gsplat 1.5.3's arguments alone.

    ``channel_chunk`` and ``segmented`` change speed in gsplat, and nothing here.

    Raises:
        NotImplementedError: an argument that asks for what is not supported; the message names it.
        TypeError, ValueError: as :func:`mpkernels.splatting.rasterization`.
    """
    from mpkernels import splatting

    check_camera_model(camera_model)
    check_unused("a sparse gradient", sparse_grad=sparse_grad)
    check_unused("rendering on several GPUs", distributed=distributed)
    check_unused("the unscented transform (3DGUT)", with_ut=with_ut, with_eval3d=with_eval3d)
    check_unused(
        "lens distortion",
        radial_coeffs=radial_coeffs,
        tangential_coeffs=tangential_coeffs,
        thin_prism_coeffs=thin_prism_coeffs,
        ftheta_coeffs=ftheta_coeffs,
    )
    if getattr(rolling_shutter, "name", rolling_shutter) != "GLOBAL":  # gsplat's own enumeration will do
        check_unused("a rolling shutter", rolling_shutter=rolling_shutter)
    check_unused("a rolling shutter", viewmats_rs=viewmats_rs)
    if covars is not None:
        quats = scales = None  # gsplat takes covars where both are given
    return splatting.rasterization(
        means,
        quats,
        scales,
        opacities,
        colors,
        viewmats,
        Ks,
        width,
        height,
        near_plane=near_plane,
        far_plane=far_plane,
        radius_clip=radius_clip,
        eps2d=eps2d,
        sh_degree=sh_degree,
        packed=packed,
        tile_size=tile_size,
        backgrounds=backgrounds,
        render_mode=render_mode,
        absgrad=absgrad,
        rasterize_mode=rasterize_mode,
        camera_model=camera_model,
        covars=covars,
    )
