"""A step of Glow, of two passes over the data: one product with a matrix, one coupling."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.flows.actnorm.api import parameter
from mpkernels.flows.affine_coupling import affine_coupling
from mpkernels.flows.affine_coupling import schema as coupling
from mpkernels.flows.invertible_conv1x1.api import check_weight, mix
from mpkernels.flows.invertible_conv1x1.matrix import PLU, of_weight


def glow_step(
    x: Tensor,
    bias: Tensor,
    log_scale: Tensor,
    weight: Tensor | PLU,
    network: Callable[..., Tensor],
    *,
    scale: str = "sigmoid",
    layout: str = "shift_scale",
    shift_first: bool = False,
    epsilon: float = 0.0,
    parity: int = 0,
    context: object = None,
    inverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A step of Glow and its log-determinant: ActNorm, invertible 1x1 convolution, affine coupling of the channels.

        z = W ((x + bias) e^log_scale),   y = [z_kept; z_other e^l + t] with (l, t) from network(z_kept)
        log_abs_det = S (sum log_scale + log |det W|) + sum l

    (Kingma and Dhariwal 2018, "Glow", table 1 and fig. 2a.) ActNorm costs no pass of its own: it is folded into the
    matrix, W diag(e^log_scale), and an offset, in both directions and in the gradients. What remains is one product
    with a matrix at every position, and one coupling that reads the network's output where it lies: forward, x, z and
    the parameters are read and z and y written, once each. Gradients of any order to all tensors, and to what the
    network has, the same bits in every run.

    (Folding subtracts W e^log_scale bias from W e^log_scale x: with means far above the deviations of x that loses
    digits in proportion, as the variance of a difference does.)

    Args:
        x: (B, C, ...) or (B, C), any strides, C >= 2. float32, float64, bfloat16 or float16 (computed in float32).
        bias: (C,), that of ActNorm; the dtype of x, or float32 beside a half type. See :func:`actnorm`.
        log_scale: (C,), as bias.
        weight: (C, C), or :class:`PLU`; see :func:`invertible_conv1x1`, also for singular ones.
        network: takes the kept channels of z, a strided view (B, K, ...), and where ``context`` is given that too;
            returns the parameters of the other T channels, (B, 2 T, ...), any strides; with ``scale="additive"`` the
            shift alone, (B, T, ...).
        scale, layout, shift_first, epsilon: of the coupling; see :func:`affine_coupling`. Glow's own code has
            ``layout="shift_scale_interleaved"`` and ``shift_first=True``.
        parity: 0 keeps the first (C + 1) // 2 channels and transforms the others; 1 keeps those others.
        context: whatever the network takes beside its input, or None.
        inverse: x from y, with the negative log-determinant.
        backend: that of the coupling; the product runs on "cpu" on a CPU, and by torch's own product on a GPU.
            "reference" holds for both. None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        (y, log_abs_det): y contiguous, with the shape and the dtype of x; log_abs_det (B,) in float32 (float64 for
        float64).

    Raises:
        TypeError: an argument is no tensor, or has an integer or a different dtype; ``network`` is not callable.
        ValueError: shapes or devices do not match, C < 2, an unknown name, the inverse of a singular weight is asked
            for (in eager mode on a CPU).
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.flows import actnorm_statistics, glow_step
        >>> x = 2 + 3 * torch.randn(4, 6, 8, 8)
        >>> network = torch.nn.Conv2d(3, 6, 3, padding=1)
        >>> step = (*actnorm_statistics(x), torch.linalg.qr(torch.randn(6, 6)).Q, network)
        >>> y, log_abs_det = glow_step(x, *step)
        >>> back, minus = glow_step(y, *step, inverse=True)
        >>> torch.allclose(back, x, atol=1e-3), torch.allclose(minus, -log_abs_det)
        (True, True)
    """
    _check(x, weight, network)
    bias, log_scale = parameter("bias", bias, x), parameter("log_scale", log_scale, x)
    wide, positions = log_scale.dtype, math.prod(x.shape[2:])
    chosen = backends.choose(coupling.FORWARD, x.device.type, backend)
    product = chosen if chosen in ("cpu", "reference") else "cpu" if x.device.type == "cpu" else "reference"
    settings = {"mask": "channel", "shift_first": shift_first, "epsilon": epsilon, "inverse": inverse}

    def couple(x: Tensor) -> tuple[Tensor, Tensor]:
        first = (x.shape[1] + 1) // 2
        kept = x[:, first:] if parity else x[:, :first]
        found = network(kept) if context is None else network(kept, context)
        _check_parameters(found, x, kept, scale)
        pair = (None, found) if scale == "additive" else (found, None)
        order = None if scale == "additive" else layout
        return affine_coupling(x, *pair, scale=scale, layout=order, parity=parity, **settings, backend=chosen)

    matrix, log_abs_det = of_weight(weight, wide, inverse)
    constant = (log_abs_det + log_scale.sum(dtype=torch.float64)) * (-positions if inverse else positions)
    if inverse:
        z, of_coupling = couple(x)
        y = mix(z, torch.exp(-log_scale)[:, None] * matrix, -bias, product)
    else:
        matrix = matrix * torch.exp(log_scale)
        y, of_coupling = couple(mix(x, matrix, torch.mv(matrix, bias), product))
    return y, of_coupling + constant.to(wide)


def _check_parameters(found: object, x: Tensor, kept: Tensor, scale: str) -> None:
    if not isinstance(found, Tensor):
        raise TypeError(f"network: expected a function that returns a torch.Tensor, got {type(found).__name__} from it")
    each, letters = (1, "T") if scale == "additive" else (2, "2 T")
    expected = (x.shape[0], each * (x.shape[1] - kept.shape[1]), *x.shape[2:])
    if found.shape != torch.Size(expected):
        raise ValueError(f"network: expected output of shape {expected} (B, {letters}, ...), got {tuple(found.shape)}")


def _check(x: Tensor, weight: Tensor | PLU, network: object) -> None:
    checks.floating("x", x)
    if x.dim() < 2 or x.shape[1] < 2:
        raise ValueError(f"x: expected shape (B, C, ...) with C >= 2, got {tuple(x.shape)}")
    check_weight(weight, x)
    if not callable(network):
        raise TypeError(f"network: expected a function or module, got {type(network).__name__}")
