"""The affine injector of SRFlow: every element transformed by parameters of the conditioning alone."""

from __future__ import annotations

from torch import Tensor

from mpkernels.flows.affine_coupling import affine_coupling


def affine_injector(
    h: Tensor,
    log_scale_or_raw: Tensor | None,
    shift: Tensor | None = None,
    *,
    scale: str = "exp",
    inverse: bool = False,
    layout: str | None = None,
    clamp: float | None = None,
    epsilon: float = 0.0,
    shift_first: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The affine injector: h e^s(u) + b(u), with all elements of h transformed, and its log-determinant, sum of s(u).

    Lugmayr et al. 2020 ("SRFlow", eq. 8): scale and shift come from a network of the conditioning u (the low-resolution
    image) alone, so that nothing of h has to be kept. It is :func:`affine_coupling` with ``mask="none"``: its
    arguments, broadcasting, dtypes, numerics, round trip, gradients and errors are the same. SRFlow's own code has
    (h + b) (sigmoid(s + 2) + 1e-4): ``scale="sigmoid", epsilon=1e-4, shift_first=True``.

    Args:
        h: (B, ...), any strides; float32, float64, bfloat16 or float16 (computed in float32).
        log_scale_or_raw: what s is made of, broadcast to the shape of h; with ``layout`` the network's whole output,
            twice the channels.
        shift: b, broadcast to the shape of h; None with ``layout``.
        scale: "exp", "sigmoid", "tanh", "softclamp" or "additive".
        inverse: h from its result: (h - b) e^-s, and minus the log-determinant.
        layout: "shift_scale", "scale_shift", "shift_scale_interleaved" or "scale_shift_interleaved".
        clamp, epsilon, shift_first: as in :func:`affine_coupling`.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        (the transformed h, contiguous; log_abs_det (B,), float32, float64 for float64).

    Raises:
        TypeError, ValueError, mpkernels.BackendError: as :func:`affine_coupling`, which names h ``x``.

    Example:
        >>> import torch
        >>> from mpkernels.flows import affine_injector
        >>> h, u = torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4)
        >>> out, log_abs_det = affine_injector(h, u, layout="scale_shift")
        >>> torch.allclose(out, h * u[:, :3].exp() + u[:, 3:], atol=1e-5)
        True
        >>> torch.allclose(log_abs_det, u[:, :3].sum((1, 2, 3)), atol=1e-4)
        True
    """
    return affine_coupling(
        h,
        log_scale_or_raw,
        shift,
        scale=scale,
        inverse=inverse,
        layout=layout,
        clamp=clamp,
        epsilon=epsilon,
        shift_first=shift_first,
        backend=backend,
    )
