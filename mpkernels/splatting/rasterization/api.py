"""gsplat's `rasterization`: projects, colours, intersects with tiles and draws. It has no kernel of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mpkernels import checks
from mpkernels.splatting.intersect_tiles import intersect_tiles
from mpkernels.splatting.project_gaussians import project_gaussians
from mpkernels.splatting.rasterize import rasterize
from mpkernels.splatting.spherical_harmonics import spherical_harmonics

RENDER_MODES = ("RGB", "D", "ED", "RGB+D", "RGB+ED")
RASTERIZE_MODES = ("classic", "antialiased")


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
    render_mode: str = "RGB",
    sparse_grad: bool = False,
    absgrad: bool = False,
    rasterize_mode: str = "classic",
    channel_chunk: int = 32,
    distributed: bool = False,
    camera_model: str = "pinhole",
    segmented: bool = False,
    covars: Tensor | None = None,
    with_ut: bool = False,
    with_eval3d: bool = False,
    radial_coeffs: Tensor | None = None,
    tangential_coeffs: Tensor | None = None,
    thin_prism_coeffs: Tensor | None = None,
    ftheta_coeffs: Any = None,
    rolling_shutter: Any = None,
    viewmats_rs: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Renders N Gaussians in C cameras: the signature, meaning and meta of gsplat 1.5.3's ``rasterization``.

    Kerbl et al. 2023, "3D Gaussian Splatting for Real-Time Radiance Field Rendering". All inputs may have batch
    dimensions (...) in front. Gradients go to means, quats, scales, covars, opacities, colors, backgrounds, viewmats
    and, unlike gsplat, Ks. They are exact for the image that was drawn, and the same bits in every run.

    A Gaussian that is not finite, lies behind the camera or off screen, or whose opacity is below 1/255, draws nothing
    and has gradient 0; a quaternion of zeros counts as no rotation.

    Args:
        means: centres, (..., N, 3). float32 or float64.
        quats: rotations as w, x, y, z of any length, (..., N, 4). Not used where ``covars`` are given.
        scales: standard deviations, (..., N, 3). Not used where ``covars`` are given.
        opacities: (..., N).
        colors: (..., N, D) or one set a camera (..., C, N, D) of any D >= 1; with ``sh_degree`` coefficients of
            spherical harmonics, (..., N, K, 3) or (..., C, N, K, 3).
        viewmats: world to camera, OpenCV axes (x right, y down, z forward), (..., C, 4, 4).
        Ks: intrinsics in pixels, (..., C, 3, 3).
        width: of the images, in pixels.
        height: of the images, in pixels.
        near_plane: Gaussians whose centre is nearer are left out.
        far_plane: Gaussians whose centre is farther are left out.
        radius_clip: Gaussians with both radii (in pixels) at most this are left out.
        eps2d: added to both variances on the screen, in square pixels.
        sh_degree: degree of spherical harmonics to evaluate, 0 to 4; None: colors are colors.
        packed: whether ``meta`` lists only what is seen (nnz rows) instead of (..., C, N). The image is the same.
        tile_size: side of a tile in pixels.
        backgrounds: (..., C, D).
        render_mode: "RGB"; "D" (accumulated depth) or "ED" (expected depth: divided by alpha), alone or as the last
            channel after the colors: "RGB+D", "RGB+ED". Depth is z in the camera.
        absgrad: whether the backward leaves the sum of absolute gradients in ``meta["means2d"].absgrad``.
        rasterize_mode: "antialiased" scales opacities by what ``eps2d`` added (Yu et al. 2024, "Mip-Splatting").
        channel_chunk: accepted for gsplat's sake: any number of channels is drawn at once.
        camera_model: "pinhole" or "ortho".
        segmented: accepted for gsplat's sake; changes nothing.
        covars: covariances, (..., N, 3, 3) or the upper triangle (..., N, 6), instead of quats and scales.
        sparse_grad, distributed, with_ut, with_eval3d, radial_coeffs, tangential_coeffs, thin_prism_coeffs,
            ftheta_coeffs, rolling_shutter, viewmats_rs: gsplat's features that are not supported yet: anything but the
            default raises.
        backend: "reference", "cpu" or "cuda"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        Colors (..., C, H, W, X), with X = D and a channel of depth as ``render_mode`` says, alphas (..., C, H, W, 1),
        and meta: batch_ids, camera_ids, gaussian_ids (None unless packed), radii, means2d, depths, conics, opacities,
        tile_width, tile_height, tiles_per_gauss, isect_ids, flatten_ids, isect_offsets, width, height, tile_size,
        n_batches, n_cameras. ``meta["means2d"].retain_grad()`` keeps the gradient that densification reads.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype.
        ValueError: shapes or devices do not match, or a mode is unknown.
        NotImplementedError: a feature that is not supported yet.
        RuntimeError: more intersections of Gaussians and tiles than memory; the message has their number.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.splatting import rasterization
        >>> means, quats, scales = torch.randn(100, 3), torch.randn(100, 4), torch.rand(100, 3) * 0.1
        >>> viewmat = torch.eye(4); viewmat[2, 3] = 4.0
        >>> K = torch.tensor([[300.0, 0, 150], [0, 300, 100], [0, 0, 1]])
        >>> colors, alphas, meta = rasterization(
        ...     means, quats, scales, torch.rand(100), torch.rand(100, 3), viewmat[None], K[None], 300, 200
        ... )
        >>> colors.shape, alphas.shape
        (torch.Size([1, 200, 300, 3]), torch.Size([1, 200, 300, 1]))
    """
    _refuse_unsupported(
        sparse_grad=sparse_grad,
        distributed=distributed,
        with_ut=with_ut,
        with_eval3d=with_eval3d,
        radial_coeffs=radial_coeffs,
        tangential_coeffs=tangential_coeffs,
        thin_prism_coeffs=thin_prism_coeffs,
        ftheta_coeffs=ftheta_coeffs,
        viewmats_rs=viewmats_rs,
    )
    if getattr(rolling_shutter, "name", rolling_shutter) not in (None, "GLOBAL"):
        raise NotImplementedError(
            f"rolling_shutter: expected None or GLOBAL (others are not supported), got {rolling_shutter}"
        )
    for name, mode, known in (
        ("render_mode", render_mode, RENDER_MODES),
        ("rasterize_mode", rasterize_mode, RASTERIZE_MODES),
    ):
        if mode not in known:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {mode!r}")
    lead, cameras = _check(means, opacities, colors, viewmats, sh_degree, backgrounds)
    antialiased = rasterize_mode == "antialiased"
    projected = project_gaussians(
        means,
        quats if covars is None else None,
        scales if covars is None else None,
        viewmats,
        Ks,
        width,
        height,
        covars=covars,
        opacities=opacities,
        near_plane=near_plane,
        far_plane=far_plane,
        radius_clip=radius_clip,
        eps2d=eps2d,
        camera_model=camera_model,
        antialiased=antialiased,
        packed=packed,
        backend=backend,
    )
    pick = _Packed(projected, lead, cameras) if packed else _Dense(lead, cameras)
    opacities = pick.per_gaussian(opacities)
    if antialiased:
        opacities = opacities * projected.compensations
    depths = projected.depths
    if render_mode in ("D", "ED"):
        drawn = depths[..., None]
        if backgrounds is not None:
            backgrounds = backgrounds.new_zeros((*lead, cameras, 1))
    else:
        drawn = _colors(pick, means, colors, viewmats, projected.radii, sh_degree, backend)
        if render_mode != "RGB":
            drawn = torch.cat([drawn, depths[..., None]], -1)
            if backgrounds is not None:
                backgrounds = torch.nn.functional.pad(backgrounds, (0, 1))

    images = math.prod(lead) * cameras
    tiles = intersect_tiles(
        projected.means2d.detach(),
        projected.radii,
        depths.detach(),
        width,
        height,
        tile_size=tile_size,
        conics=projected.conics.detach(),
        opacities=opacities.detach(),
        image_ids=pick.image_ids,
        n_images=images if packed else None,
        backend=backend,
    )
    isect_offsets = tiles.isect_offsets.reshape(*lead, cameras, *tiles.isect_offsets.shape[-2:])
    image, alphas = rasterize(
        projected.means2d,
        projected.conics,
        drawn,
        opacities,
        width,
        height,
        isect_offsets,
        tiles.flatten_ids,
        tile_size=tile_size,
        backgrounds=backgrounds,
        absgrad=absgrad and torch.is_grad_enabled() and projected.means2d.requires_grad,
        backend=backend,
    )
    if render_mode in ("ED", "RGB+ED"):
        image = torch.cat([image[..., :-1], image[..., -1:] / alphas.clamp(min=1e-10)], -1)
    meta = {
        **pick.ids,
        "radii": projected.radii,
        "means2d": projected.means2d,
        "depths": depths,
        "conics": projected.conics,
        "opacities": opacities,
        "tile_width": isect_offsets.shape[-1],
        "tile_height": isect_offsets.shape[-2],
        "tiles_per_gauss": tiles.tiles_per_gauss,
        "isect_ids": tiles.isect_ids,
        "flatten_ids": tiles.flatten_ids,
        "isect_offsets": isect_offsets,
        "width": width,
        "height": height,
        "tile_size": tile_size,
        "n_batches": math.prod(lead),
        "n_cameras": cameras,
    }
    return image, alphas, meta


def _refuse_unsupported(**features) -> None:
    for name, value in features.items():
        if value is not None and value is not False:
            got = value if isinstance(value, bool) else type(value).__name__
            raise NotImplementedError(f"{name}: not supported yet; expected the default, got {got}")


def _check(means, opacities, colors, viewmats, sh_degree, backgrounds) -> tuple[tuple[int, ...], int]:
    """Checks what the steps do not; returns the batch dimensions and the number of cameras."""
    checks.single_or_double("means", means)
    if means.dim() < 2 or means.shape[-1] != 3:
        raise ValueError(f"means: expected shape (..., N, 3), got {tuple(means.shape)}")
    lead, count = tuple(means.shape[:-2]), means.shape[-2]
    checks.same_kind("viewmats", viewmats, "means", means)
    if viewmats.dim() != means.dim() + 1 or tuple(viewmats.shape[:-3]) != lead or viewmats.shape[-2:] != (4, 4):
        raise ValueError(
            f"viewmats: expected shape {(*lead, 'C', 4, 4)} (the batch of means, and cameras), "
            f"got {tuple(viewmats.shape)}"
        )
    cameras = viewmats.shape[-3]
    checks.same_kind("opacities", opacities, "means", means)
    checks.shape("opacities", opacities, (*lead, count), "the Gaussians of means")
    checks.same_kind("colors", colors, "means", means)
    if sh_degree is not None and (not isinstance(sh_degree, int) or not 0 <= sh_degree <= 4):
        raise ValueError(f"sh_degree: expected None or an integer from 0 to 4, got {sh_degree!r}")
    last = ("D",) if sh_degree is None else ("K", 3)
    fits = [
        colors.dim() == len(front) + len(last)
        and tuple(colors.shape[: len(front)]) == front
        and (sh_degree is None or colors.shape[-1] == 3)
        and min(colors.shape[len(front) :]) >= 1
        for front in ((*lead, count), (*lead, cameras, count))
    ]
    if not any(fits):
        raise ValueError(
            f"colors: expected shape {(*lead, count, *last)} or {(*lead, cameras, count, *last)}"
            f"{'' if sh_degree is None else ' (spherical harmonics, as sh_degree is given)'}, got {tuple(colors.shape)}"
        )
    if sh_degree is not None and colors.shape[-2] < (sh_degree + 1) ** 2:
        raise ValueError(
            f"colors: expected at least {(sh_degree + 1) ** 2} coefficients for sh_degree {sh_degree}, "
            f"got {colors.shape[-2]} (shape {tuple(colors.shape)})"
        )
    if backgrounds is not None:
        checks.same_kind("backgrounds", backgrounds, "means", means)
        channels = 3 if sh_degree is not None else colors.shape[-1]
        checks.shape("backgrounds", backgrounds, (*lead, cameras, channels), "the cameras, and the channels of colors")
    return lead, cameras


class _Dense:
    """Tensors of a Gaussian, in the shape (..., C, N) that the steps work on."""

    image_ids = None
    ids: dict[str, Tensor | None]

    def __init__(self, lead: tuple[int, ...], cameras: int):
        self.lead, self.cameras = lead, cameras
        self.ids = dict.fromkeys(("batch_ids", "camera_ids", "gaussian_ids"))

    def per_gaussian(self, x: Tensor) -> Tensor:
        """(..., N, k) for every camera."""
        at = len(self.lead)
        return x.unsqueeze(at).expand(*self.lead, self.cameras, *x.shape[at:])

    def per_camera_and_gaussian(self, x: Tensor) -> Tensor:
        return x

    def per_camera(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-2)

    def shared_coefficients(self, x: Tensor) -> Tensor:
        """(..., N, K, 3) as spherical_harmonics takes them for directions (..., C, N, 3)."""
        return x if not self.lead else self.per_gaussian(x)


class _Packed:
    """Tensors of a Gaussian, as rows (nnz) of what is seen."""

    def __init__(self, projected, lead: tuple[int, ...], cameras: int):
        self.lead, self.cameras = lead, cameras
        self.ids: dict[str, Tensor | None] = {
            name: getattr(projected, name) for name in ("batch_ids", "camera_ids", "gaussian_ids")
        }
        self.batch, self.camera, self.gaussian = projected.batch_ids, projected.camera_ids, projected.gaussian_ids
        self.image_ids = self.batch * cameras + self.camera

    def per_gaussian(self, x: Tensor) -> Tensor:
        at = len(self.lead)
        count = x.shape[at]
        return _rows(x.flatten(0, at), self.batch * count + self.gaussian)

    def per_camera_and_gaussian(self, x: Tensor) -> Tensor:
        at = len(self.lead) + 1
        return _rows(x.flatten(0, at), self.image_ids * x.shape[at] + self.gaussian)

    def per_camera(self, x: Tensor) -> Tensor:
        return _rows(x.flatten(0, len(self.lead)), self.image_ids)

    def shared_coefficients(self, x: Tensor) -> Tensor:
        return self.per_gaussian(x)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x, with a gradient that is added in a fixed order (on CUDA that of index_select is not)."""
    return x.index_select(0, index) if x.device.type == "cpu" else x[index]


def _colors(pick, means, colors, viewmats, radii, sh_degree, backend) -> Tensor:
    """Colors of every Gaussian in every camera: (..., C, N, D) or (nnz, D)."""
    dims = means.dim() + (1 if sh_degree is not None else 0)  # of colors that all cameras share
    shared = colors.dim() == dims
    if sh_degree is None:
        return pick.per_gaussian(colors) if shared else pick.per_camera_and_gaussian(colors)
    centres = torch.linalg.inv(viewmats)[..., :3, 3]
    dirs = pick.per_gaussian(means) - pick.per_camera(centres)
    coefficients = pick.shared_coefficients(colors) if shared else pick.per_camera_and_gaussian(colors)
    seen = (radii > 0).all(-1) if pick.image_ids is None else None  # packed: all are
    values = spherical_harmonics(sh_degree, dirs, coefficients, masks=seen, backend=backend)
    return (values + 0.5).clamp(min=0)
