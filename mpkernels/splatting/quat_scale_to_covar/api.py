"""The public function of covariances from quaternions and scales: checks its input and chooses a backend."""

from __future__ import annotations

from torch import Tensor

from mpkernels import backends, checks
from mpkernels.splatting.quat_scale_to_covar import autograd, reference, schema


def quat_scale_to_covar(
    quats: Tensor, scales: Tensor, *, inverse: bool = False, triu: bool = False, backend: str | None = None
) -> Tensor:
    """Covariances R S S^T R^T of Gaussians, or their inverses R S^-1 S^-T R^T.

    R is the rotation of the quaternion (w, x, y, z) divided by its length, S the diagonal matrix of the scales
    (Kerbl et al. 2023, "3D Gaussian splatting", eq. 6). Exact gradients to both, once differentiable. A zero quaternion
    counts as the identity rotation, with gradient 0.

    Args:
        quats: rotations wxyz, (..., 4), of any length; float32 or float64.
        scales: standard deviations along the rotated axes, (..., 3). The inverse of a scale of 0 is infinite.
        inverse: return the inverses (precisions).
        triu: return the upper triangles alone: (..., 6) xx, xy, xz, yy, yz, zz.
        backend: "reference", "cpu" or "cuda"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        (..., 3, 3), or (..., 6) with ``triu``; the dtype of ``quats``.

    Raises:
        TypeError: an argument is no tensor, is neither float32 nor float64, or differs in dtype.
        ValueError: shapes or devices do not match.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.splatting.quat_scale_to_covar import quat_scale_to_covar
        >>> quat_scale_to_covar(torch.tensor([2.0, 0, 0, 0]), torch.tensor([1.0, 2, 3]), triu=True)
        tensor([1., 0., 0., 4., 0., 9.])
    """
    checks.single_or_double("quats", quats)
    if quats.dim() == 0 or quats.shape[-1] != 4:
        raise ValueError(f"quats: expected shape (..., 4), got {tuple(quats.shape)}")
    checks.same_kind("scales", scales, "quats", quats)
    lead = quats.shape[:-1]
    checks.shape("scales", scales, (*lead, 3), "quats give (...)")
    chosen = backends.choose(schema.FORWARD, quats.device.type, backend)
    inverse, triu = bool(inverse), bool(triu)
    if chosen == "reference":
        return reference.quat_scale_to_covar(quats, scales, inverse, triu)
    covars = autograd.run(quats.reshape(-1, 4), scales.reshape(-1, 3), inverse, triu, chosen)
    return covars.reshape(*lead, *covars.shape[1:])
