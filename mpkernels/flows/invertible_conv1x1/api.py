"""The public function of the invertible 1x1 convolution: checks its input and chooses a backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.flows.invertible_conv1x1 import autograd, schema
from mpkernels.flows.invertible_conv1x1.matrix import PLU, of_weight, readable


def invertible_conv1x1(
    x: Tensor,
    weight: Tensor | PLU,
    bias: Tensor | None = None,
    *,
    inverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A product with a C x C matrix at every position, and its log-determinant (Kingma and Dhariwal 2018, "Glow").

        y[b, :, ...] = W x[b, :, ...] + bias      log_abs_det[b] = S log |det W|

    where S is the number of positions (section 3.2). With a matrix, log |det W| comes from an LU decomposition; with
    its parts, W = P L (U + diag(sign e^log_scale)) (eq. 11), it is sum log_scale. ``inverse`` takes y back to x, with
    the negative log-determinant, by a product with the inverse matrix. Inverses and determinants are computed in
    float64. The round trip ends within about C roundings times the condition number of W. Gradients of any
    order to x, the weight (or lower, upper and log_scale) and bias, the same bits in every run.

    Args:
        x: (B, C, ...) or (B, C), any strides. float32, float64, bfloat16 or float16 (computed in float32).
        weight: (C, C), or a :class:`PLU` (see :func:`plu_decompose`); the dtype of x, or float32 beside a half type.
            A singular matrix has the log_abs_det -inf. Of a :class:`PLU` nothing outside the strict triangles is read.
        bias: (C,), as weight.
        inverse: whether to compute x from y. A singular weight is then refused where it is seen without waiting (in
            eager mode on a CPU); elsewhere results are infinite or NaN.
        backend: "reference" or "cpu"; None chooses (see :func:`mpkernels.use_backend`): on a GPU torch's own product.

    Returns:
        (y, log_abs_det): y contiguous, with the shape and the dtype of x; log_abs_det (B,) in float32 (float64 for
        float64).

    Raises:
        TypeError: an argument is no tensor, or has an integer or a different dtype.
        ValueError: shapes or devices do not match, ``permutation`` is none, the inverse of a singular weight is asked
            for (in eager mode on a CPU).
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.flows import invertible_conv1x1, plu_decompose
        >>> x, weight = torch.randn(2, 4, 8, 8), torch.linalg.qr(torch.randn(4, 4)).Q
        >>> y, log_abs_det = invertible_conv1x1(x, plu_decompose(weight))
        >>> torch.allclose(y, torch.nn.functional.conv2d(x, weight[:, :, None, None]), atol=1e-5)
        True
        >>> torch.allclose(invertible_conv1x1(y, plu_decompose(weight), inverse=True)[0], x, atol=1e-5)
        True
    """
    checks.floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected shape (B, C, ...), got {tuple(x.shape)}")
    check_weight(weight, x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if bias is not None:
        _check("bias", bias, x, (x.shape[1],))
    positions = math.prod(x.shape[2:])
    matrix, log_abs_det = of_weight(weight, wide, inverse)
    if bias is not None:
        bias = bias.to(wide)
        bias = -(matrix @ bias) if inverse else bias
    y = mix(x, matrix, bias, backend)
    return y, (log_abs_det * (-positions if inverse else positions)).to(wide).expand(x.shape[0])


def mix(x: Tensor, matrix: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    """The product matrix x + bias at every position of checked x (B, C, ...); both in the dtype that is computed in."""
    chosen = backends.choose(schema.FORWARD, x.device.type, backend)
    shape = x.shape
    return autograd.run(x.reshape(*shape[:2], math.prod(shape[2:])), matrix, bias, backend=chosen).reshape(shape)


def check_weight(weight: Tensor | PLU, x: Tensor) -> None:
    """Raises unless ``weight`` is a (C, C) matrix, or its parts, for the channels of x."""
    channels = x.shape[1]
    if not isinstance(weight, PLU):
        checks.tensor("weight", weight)
        _check("weight", weight, x, (channels, channels))
        return
    permutation = weight.permutation
    checks.tensor("weight.permutation", permutation)
    if permutation.dtype != torch.int64:
        raise TypeError(f"weight.permutation: expected int64, got {permutation.dtype}")
    if permutation.device != x.device:
        raise ValueError(f"weight.permutation: expected the device of x, {x.device}, got {permutation.device}")
    checks.shape("weight.permutation", permutation, (channels,), "the channels of x")
    if readable(permutation) and sorted(permutation.tolist()) != list(range(channels)):
        raise ValueError(f"weight.permutation: expected every number below {channels} once, got {permutation.tolist()}")
    for name in ("lower", "upper"):
        _check(f"weight.{name}", getattr(weight, name), x, (channels, channels))
    for name in ("sign", "log_scale"):
        _check(f"weight.{name}", getattr(weight, name), x, (channels,))


def _check(name: str, value: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    checks.floating(name, value)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if value.dtype not in (x.dtype, wide):
        raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, or {wide}, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {value.device}")
    checks.shape(name, value, shape, "the channels of x")
