"""The public functions of ActNorm: they check their input and choose a backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.flows.actnorm import autograd, reference, schema


def actnorm(
    x: Tensor,
    bias: Tensor,
    log_scale: Tensor,
    *,
    inverse: bool = False,
    shift_first: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """ActNorm: an affine map a channel, and its log-determinant (Kingma and Dhariwal 2018, "Glow", table 1).

        y[b, c, ...] = (x[b, c, ...] + bias[c]) e^log_scale[c]      log_abs_det[b] = S sum_c log_scale[c]

    where S is the number of positions. Without ``shift_first`` y = x e^log_scale + bias, as nflows has it. ``inverse``
    takes y back to x, with the negative log-determinant: x e^-log_scale - bias, or (x - bias) e^-log_scale. Gradients
    of any order to x, bias and log_scale, the same bits in every run. :func:`actnorm_statistics` gives the first bias
    and log_scale from a batch.

    Args:
        x: (B, C, ...) or (B, C), any strides; fast where positions, or channels, lie side by side in memory. float32,
            float64, bfloat16 or float16 (computed in float32).
        bias: (C,), in the dtype of x, or float32 beside a half type.
        log_scale: (C,), as bias. A scale is thus never 0. Nothing is checked: an infinite or NaN log_scale makes
            log_abs_det infinite or NaN, and what it makes of y (e^inf = inf, e^-inf = 0, inf 0 = NaN) stays in its
            channel.
        inverse: whether to compute x from y.
        shift_first: whether the shift comes before the scale.
        backend: "reference", "cpu" or "triton"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        (y, log_abs_det): y contiguous, with the shape and the dtype of x; log_abs_det (B,) in float32 (float64 for
        float64).

    Raises:
        TypeError: an argument is no tensor, or has an integer or a different dtype.
        ValueError: shapes or devices do not match.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.flows import actnorm, actnorm_statistics
        >>> x = 5 + 3 * torch.randn(8, 4, 6, 6)
        >>> bias, log_scale = actnorm_statistics(x)
        >>> y, log_abs_det = actnorm(x, bias, log_scale)
        >>> abs(float(y.mean())) < 1e-5, abs(float(y.var(correction=0)) - 1) < 1e-4
        (True, True)
        >>> torch.allclose(actnorm(y, bias, log_scale, inverse=True)[0], x, atol=1e-5)
        True
    """
    checks.floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected shape (B, C, ...), got {tuple(x.shape)}")
    bias, log_scale = parameter("bias", bias, x), parameter("log_scale", log_scale, x)
    shape = x.shape
    x = x.reshape(*shape[:2], math.prod(shape[2:]))
    chosen = backends.choose(schema.FORWARD, x.device.type, backend)
    if chosen == "reference":
        y, log_abs_det = reference.actnorm(x, bias, log_scale, bool(shift_first), bool(inverse))
    else:
        y, log_abs_det = autograd.run(x, bias, log_scale, bool(shift_first), bool(inverse), backend=chosen)
    return y.reshape(shape), log_abs_det


def actnorm_statistics(x: Tensor, *, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The bias and log_scale that make :func:`actnorm` of a batch zero-mean and of unit variance in every channel.

    As in Glow: bias = -mean(x), log_scale = -log(sqrt(mean((x + bias)^2)) + epsilon), over samples and positions. Sums
    run in float64. No gradient: this is how parameters begin.

    Args:
        x: (B, C, ...) or (B, C), at least one number a channel; float32, float64, bfloat16 or float16. A channel with
            a NaN or an infinity has NaN in both results.
        epsilon: above 0 and finite; a constant channel gets the log_scale -log(epsilon).

    Returns:
        (bias, log_scale), both (C,), in float32 (float64 for float64), for ``shift_first=True``. For
        ``shift_first=False`` the bias is bias e^log_scale.

    Raises:
        TypeError: ``x`` is no floating-point tensor, or ``epsilon`` no number.
        ValueError: there is no number a channel (an empty batch), or ``epsilon`` is not above 0 and finite.

    Example:
        >>> import torch
        >>> from mpkernels.flows import actnorm_statistics
        >>> actnorm_statistics(torch.tensor([[1.0], [3.0]]))
        (tensor([-2.]), tensor([-1.0000e-06]))
    """
    checks.floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected shape (B, C, ...), got {tuple(x.shape)}")
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)):
        raise TypeError(f"epsilon: expected a number, got {type(epsilon).__name__}")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon: expected a finite number above 0, got {epsilon}")
    if x.shape[0] * math.prod(x.shape[2:]) == 0:
        raise ValueError(f"x: expected at least one number a channel, got shape {tuple(x.shape)}")
    others = [d for d in range(x.dim()) if d != 1]
    value = x.detach().to(torch.float64)
    mean = value.mean(others, keepdim=True)
    deviation = (value - mean).square().mean(others).sqrt()
    wide = schema.wide(x)
    return -mean.flatten().to(wide), -torch.log(deviation + epsilon).to(wide)


def parameter(name: str, value: Tensor, x: Tensor) -> Tensor:
    """A checked (C,) parameter, in the dtype that is computed in."""
    checks.floating(name, value)
    wide = schema.wide(x)
    if value.dtype not in (x.dtype, wide):
        raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, or {wide}, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {value.device}")
    checks.shape(name, value, (x.shape[1],), "the channels of x")
    return value if value.dtype == wide else value.to(wide)
