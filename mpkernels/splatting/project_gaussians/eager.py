"""The projection as one writes it in vectorised torch: what the kernels are timed against, and a second opinion."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def project_gaussians(
    means: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    quats: Tensor | None = None,
    scales: Tensor | None = None,
    covars: Tensor | None = None,
    opacities: Tensor | None = None,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    camera_model: str = "pinhole",
    antialiased: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The arguments and outputs of the public function, without a defence against NaN."""
    fx, fy, cx, cy = (Ks[..., i, j, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))  # (..., C, 1)
    x, y, z = (torch.einsum("...cij,...nj->...cni", viewmats[..., :3, :3], means) + viewmats[..., None, :3, 3]).unbind(
        -1
    )
    zero = torch.zeros_like(z)
    if camera_model == "ortho":
        rows = [torch.stack([fx + zero, zero, zero], -1), torch.stack([zero, fy + zero, zero], -1)]
        u, v = fx * x + cx, fy * y + cy
    else:
        u, v = fx * x / z + cx, fy * y / z + cy
        margin = 0.15 * width, 0.15 * height
        shear_x = torch.minimum(torch.maximum(u, -margin[0] + 0 * cx), width + margin[0] + 0 * cx) - cx
        shear_y = torch.minimum(torch.maximum(v, -margin[1] + 0 * cy), height + margin[1] + 0 * cy) - cy
        rows = [torch.stack([fx / z, zero, -shear_x / z], -1), torch.stack([zero, fy / z, -shear_y / z], -1)]
    a = torch.stack(rows, -2) @ viewmats[..., None, :3, :3]  # (..., C, N, 2, 3)
    if covars is None:
        assert quats is not None
        assert scales is not None
        w, v3 = functional.normalize(quats, dim=-1).split([1, 3], -1)
        # the columns of R: each unit vector turned, e + 2 w (v x e) + 2 v x (v x e)
        eye = torch.eye(3, dtype=means.dtype, device=means.device).expand(*v3.shape[:-1], 3, 3)
        along = torch.linalg.cross(v3[..., None, :].expand_as(eye), eye)
        turned = eye + 2 * (w[..., None] * along + torch.linalg.cross(v3[..., None, :].expand_as(eye), along))
        half = a @ (turned * scales[..., :, None]).mT[..., None, :, :, :]
        cov = half @ half.mT
    else:
        full = covars if covars.shape[-2:] == (3, 3) else covars[..., (0, 1, 2, 1, 3, 4, 2, 4, 5)].unflatten(-1, (3, 3))
        cov = a @ full[..., None, :, :, :] @ a.mT
    blurred = cov + eps2d * torch.eye(2, dtype=means.dtype, device=means.device)
    det = torch.linalg.det(blurred)
    compensation = (torch.linalg.det(cov).clamp(min=0) / det).sqrt()
    inverse = torch.linalg.inv(blurred)
    conic = torch.stack([inverse[..., 0, 0], inverse[..., 0, 1], inverse[..., 1, 1]], -1)
    k = torch.full_like(z, 3.33)
    drawn = (z >= near_plane) & (z <= far_plane)
    if opacities is not None:
        o = opacities[..., None, :] * (compensation if antialiased else 1)
        drawn &= o >= 1 / 255
        k = (2 * (255 * o).clamp(min=1).log()).sqrt().clamp(max=3.33)
    radii = (k[..., None] * blurred.diagonal(dim1=-2, dim2=-1).sqrt()).ceil()
    u_radius, v_radius = radii.unbind(-1)
    drawn &= (radii > radius_clip).any(-1)
    drawn &= (u + u_radius > 0) & (u - u_radius < width) & (v + v_radius > 0) & (v - v_radius < height)
    each = drawn[..., None]
    return (
        torch.where(each, radii, 0).int(),
        torch.where(each, torch.stack([u, v], -1), 0),
        torch.where(drawn, z, 0),
        torch.where(each, conic, 0),
        torch.where(drawn, compensation, 0),
    )
