"""The whole of Gaussian splatting in plain torch: every pixel against every Gaussian, sorted by depth, without tiles.

Kerbl et al. 2023, "3D Gaussian Splatting for Real-Time Radiance Field Rendering", with the conventions of gsplat 1.5.3.
It calls nothing of the ops, and is what tests hold :func:`mpkernels.splatting.rasterization` against.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpkernels.splatting.constants import ALPHA_MAX, ALPHA_MIN, CLAMP_MARGIN, EXTENT, TRANSMITTANCE_MIN


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
    *,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    packed: bool = True,
    tile_size: int = 16,
    backgrounds: Tensor | None = None,
    render_mode: str = "RGB",
    rasterize_mode: str = "classic",
    camera_model: str = "pinhole",
    covars: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Colors (C, H, W, X) and alphas (C, H, W, 1), without batch dimensions.

    ``packed`` and ``tile_size`` are there to be ignored: they may not change the image.
    """
    del packed, tile_size
    if covars is None:
        assert quats is not None
        assert scales is not None
        axes = _rotations(quats) * scales[:, None, :]  # R S
        covars = axes @ axes.mT
    elif covars.shape[-1] == 6:
        covars = covars[:, [0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(-1, 3, 3)
    images, alphas = [], []
    for c in range(len(viewmats)):
        view = _camera(means, covars, opacities, viewmats[c], Ks[c], width, height, eps2d, rasterize_mode, camera_model)
        mean2d, conic, radii, depth, opacity = view
        off = (mean2d + radii <= 0) | (mean2d - radii >= mean2d.new_tensor([width, height]))
        shown = (radii > 0).all(-1) & ~off.any(-1) & ~(radii <= radius_clip).all(-1)
        shown &= (depth >= near_plane) & (depth <= far_plane)
        order = torch.argsort(depth.detach().float(), stable=True)
        order = order[shown[order]]

        color = colors if colors.dim() == (2 if sh_degree is None else 3) else colors[c]
        if sh_degree is not None:
            camera = torch.linalg.inv(viewmats[c])[:3, 3]
            color = (_harmonics(sh_degree, means - camera, color) + 0.5).clamp(min=0)
        if render_mode in ("D", "ED"):
            color = depth[:, None]
        elif render_mode != "RGB":
            color = torch.cat([color, depth[:, None]], -1)
        image, left = _draw(*(x[order] for x in (mean2d, conic, opacity, color)), width, height)
        if backgrounds is not None and render_mode not in ("D", "ED"):
            behind = backgrounds[c]
            image = image + left * torch.cat([behind, behind.new_zeros(image.shape[-1] - len(behind))])
        if render_mode.endswith("ED"):
            image = torch.cat([image[..., :-1], image[..., -1:] / (1 - left).clamp(min=1e-10)], -1)
        images.append(image)
        alphas.append(1 - left)
    return torch.stack(images), torch.stack(alphas)


def _rotations(quats: Tensor) -> Tensor:
    """(N, 3, 3) of quaternions w, x, y, z; zeros count as no rotation."""
    square = quats.square().sum(-1, keepdim=True)
    w, x, y, z = torch.where(square > 0, quats / torch.where(square > 0, square, 1).sqrt(), 0).unbind(-1)
    rows = (
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack(rows, -1).reshape(-1, 3, 3)


def _camera(means, covars, opacities, viewmat, K, width, height, eps2d, rasterize_mode, camera_model):
    """Centres (N, 2), conics (N, 3), radii (N, 2), depths (N,) and opacities (N,) in one camera (Zwicker 2002, EWA)."""
    rotation = viewmat[:3, :3]
    x, y, z = (means @ rotation.T + viewmat[:3, 3]).unbind(-1)
    sigma = rotation @ covars @ rotation.T
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    zero, one = torch.zeros_like(z), torch.ones_like(z)
    if camera_model == "ortho":
        mean2d = torch.stack([fx * x + cx, fy * y + cy], -1)
        jacobian = torch.stack([fx * one, zero, zero, zero, fy * one, zero], -1)
    else:
        margin_x, margin_y = CLAMP_MARGIN * width / (2 * fx), CLAMP_MARGIN * height / (2 * fy)
        u = torch.minimum(torch.maximum(x / z, -(cx / fx + margin_x)), (width - cx) / fx + margin_x)
        v = torch.minimum(torch.maximum(y / z, -(cy / fy + margin_y)), (height - cy) / fy + margin_y)
        mean2d = torch.stack([fx * x / z + cx, fy * y / z + cy], -1)
        jacobian = torch.stack([fx / z, zero, -fx * u / z, zero, fy / z, -fy * v / z], -1)
    jacobian = jacobian.reshape(-1, 2, 3)
    plane = jacobian @ sigma @ jacobian.mT
    sharp = torch.linalg.det(plane)
    plane = plane + eps2d * torch.eye(2, dtype=plane.dtype, device=plane.device)
    area = torch.linalg.det(plane)
    inverse = torch.stack([plane[:, 1, 1], -plane[:, 0, 1], plane[:, 0, 0]], -1) / area[:, None]
    if rasterize_mode == "antialiased":
        opacities = opacities * (sharp / area).clamp(min=0).sqrt()
    with torch.no_grad():
        reach = (2 * (opacities / ALPHA_MIN).log()).clamp(min=0).sqrt().clamp(max=EXTENT)
        half = (plane[:, 0, 0] + plane[:, 1, 1]) / 2
        longest = (half + (half * half - area).clamp(min=0.01).sqrt()).sqrt()
        side = torch.minimum(torch.diagonal(plane, dim1=-2, dim2=-1).sqrt(), longest[:, None])
        radii = (reach[:, None] * side).ceil()
        radii = torch.where(((opacities >= ALPHA_MIN) & (area > 0))[:, None], radii, 0)
    return mean2d, inverse, radii, z, opacities


def _harmonics(degree: int, dirs: Tensor, coefficients: Tensor) -> Tensor:
    """Real spherical harmonics to degree 3 as 3DGS orders and signs them: (N, 3)."""
    x, y, z = torch.nn.functional.normalize(dirs, dim=-1).unbind(-1)
    basis = [torch.full_like(x, 0.5 / math.sqrt(math.pi))]
    if degree > 0:
        first = math.sqrt(3 / (4 * math.pi))
        basis += [-first * y, first * z, -first * x]
    if degree > 1:
        second = math.sqrt(15 / math.pi) / 2
        basis += [second * x * y, -second * y * z, second * (3 * z * z - 1) / math.sqrt(12)]
        basis += [-second * x * z, second * (x * x - y * y) / 2]
    if degree > 2:
        outer, middle = math.sqrt(35 / (2 * math.pi)) / 4, math.sqrt(105 / math.pi) / 4
        inner, axis = math.sqrt(21 / (2 * math.pi)) / 4, math.sqrt(7 / math.pi) / 4
        basis += [-outer * y * (3 * x * x - y * y), 2 * middle * x * y * z, -inner * y * (5 * z * z - 1)]
        basis += [axis * z * (5 * z * z - 3), -inner * x * (5 * z * z - 1), middle * z * (x * x - y * y)]
        basis += [-outer * x * (x * x - 3 * y * y)]
    if degree > 3:
        raise ValueError(f"degree: expected at most 3 here, got {degree}")
    return torch.einsum("bn,nbc->nc", torch.stack(basis), coefficients[:, : len(basis)])


def _draw(mean2d, conic, opacity, color, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Every pixel against every Gaussian in order: colors (H, W, D), and what is left of the light (H, W, 1)."""
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centre = torch.stack([xs, ys], -1).to(mean2d) + 0.5
    left = mean2d.new_ones(height, width)
    going = torch.ones_like(left, dtype=torch.bool)
    image = mean2d.new_zeros(height, width, color.shape[-1])
    for i in range(len(mean2d)):
        dx, dy = (centre - mean2d[i]).unbind(-1)
        a, b, c = conic[i]
        alpha = opacity[i] * torch.exp(-(a * dx * dx + c * dy * dy) / 2 - b * dx * dy)
        seen = alpha >= ALPHA_MIN
        alpha = torch.where(seen, alpha.clamp(max=ALPHA_MAX), 0)
        after = left * (1 - alpha)
        going = going & (after > TRANSMITTANCE_MIN)
        alpha = torch.where(going, alpha, 0)
        image = image + (left * alpha)[..., None] * color[i]
        left = left * (1 - alpha)
    return image, left[..., None]
