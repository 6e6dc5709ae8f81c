"""The public functions of the masked convolution: they check their input and choose a backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.convolution.masked_conv2d import autograd, reference, schema


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask_type: str,
    colors: int = 1,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    backend: str | None = None,
) -> Tensor:
    """PixelCNN's masked convolution: every output sees the pixels that come before its own, in raster order.

    out = conv2d(x, weight * mask, bias), of the size of x, with the masks of van den Oord et al. 2016, "Pixel Recurrent
    Neural Networks", section 3.4: all taps in the rows above, in the own row those to the left; of the pixel itself,
    type A sees the colours strictly before the own one, type B also the own one. (One colour: A nothing, B everything.)
    :func:`pixelcnn_mask` is that mask as a tensor; it is never built here. Hidden taps, and the hidden channels of the
    centre, cost nothing: they are not read, their weights have gradients of exactly 0, and a NaN in them stays there.

    Layers of it have a blind spot: what lies above and far to the right is never seen. :func:`vertical_stack` and
    :func:`horizontal_stack` together have none.

    Args:
        x: (B, C, H, W); float32, float64, bfloat16 or float16 (accumulated in float32).
        weight: (D, C, kh, kw), kh and kw odd. Same dtype.
        bias: (D,), or None.
        mask_type: "A" for the first layer, "B" for those behind it.
        colors: number of colours that are generated one after another, 3 for red, green, blue. The channels of x, and
            those of the output, are that many equal, neighbouring blocks, in that order: divisible by ``colors``. A
            1 x 1 kernel of type B mixes the channels of a feature map without breaking the order.
        stride: pixels between outputs, a number or one for rows and one for columns.
        dilation: pixels between taps, a number or one for rows and one for columns.
        backend: "reference", "cpu" or "triton"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        (B, D, ceil(H / stride), ceil(W / stride)) in the dtype of x; outside of the picture are zeros. Differentiable
        to any order in x, weight and bias.

    Raises:
        TypeError: an argument is no tensor or no whole number, or has an integer or a different dtype.
        ValueError: shapes or devices do not match, a kernel of even size, channels that ``colors`` does not divide, a
            number outside of its range.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.convolution import masked_conv2d
        >>> x = torch.zeros(1, 3, 8, 8, requires_grad=True)
        >>> out = masked_conv2d(x, torch.randn(6, 3, 5, 5), mask_type="A", colors=3)
        >>> out[0, 2, 4, 4].backward()  # of the second colour: at its own pixel it sees the first one alone
        >>> x.grad[0, :, 4, 4] != 0
        tensor([ True, False, False])
    """
    _check_tensors(x, weight, bias)
    inclusive = _mask_type(mask_type) == "B"
    colors = _whole("colors", colors)
    for name, channels in (("x", x.shape[1]), ("weight", weight.shape[0])):
        if channels % colors:
            raise ValueError(f"{name}: expected channels in {colors} equal blocks (colors={colors}), got {channels}")
    kh, kw = weight.shape[2:]
    taps = kh // 2 * kw + kw // 2 + (inclusive if colors == 1 else 0)
    return _run(x, weight, bias, taps, colors, inclusive, stride, dilation, backend)


def vertical_stack(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask_type: str,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    backend: str | None = None,
) -> Tensor:
    """A convolution of the gated PixelCNN's vertical stack: every column of the rows above (van den Oord et al. 2016,
    "Conditional Image Generation with PixelCNN Decoders", section 2.2).

    Type A sees the rows above its own; it is the first layer, on the picture. From then on a row of the vertical maps
    has seen nothing of its own row of the picture, so that type B, every later layer, also sees its own row, in every
    column. The rows above are complete, in all their colours: there is no rule of colours, and any operation along the
    channels keeps the order.

    The horizontal stack reads the vertical one at the same pixel, through a 1 x 1 convolution of any kind:
    h = horizontal_stack(h) + conv1x1(v). That is safe because v, here, is already one row late. (Where a vertical
    stack also sees the own row of the picture in its first layer, v has to be moved down by a row instead.)

    Args:
        x: (B, C, H, W); float32, float64, bfloat16 or float16 (accumulated in float32).
        weight: (D, C, kh, kw), kh and kw odd, centred; rows below the middle (type A: from the middle on) are hidden.
        bias: (D,), or None.
        mask_type: "A" for the first layer, "B" for those behind it.
        stride, dilation, backend: as in :func:`masked_conv2d`.

    Returns:
        (B, D, ceil(H / stride), ceil(W / stride)) in the dtype of x. Differentiable to any order.

    Raises:
        TypeError, ValueError, mpkernels.BackendError: as :func:`masked_conv2d`.

    Example:
        >>> import torch
        >>> from mpkernels.convolution import horizontal_stack, vertical_stack
        >>> x = torch.randn(1, 3, 8, 8)
        >>> v = vertical_stack(x, torch.randn(12, 3, 7, 7), mask_type="A")
        >>> h = horizontal_stack(x, torch.randn(12, 3, 1, 7), mask_type="A", colors=3)
        >>> h = h + torch.nn.functional.conv2d(v, torch.randn(12, 12, 1, 1))
        >>> v = vertical_stack(v, torch.randn(12, 12, 3, 3), mask_type="B")
        >>> h = horizontal_stack(h, torch.randn(12, 12, 1, 3), mask_type="B", colors=3)
        >>> h.shape
        torch.Size([1, 12, 8, 8])
    """
    _check_tensors(x, weight, bias)
    inclusive = _mask_type(mask_type) == "B"
    taps = (weight.shape[2] // 2 + inclusive) * weight.shape[3]
    return _run(x, weight, bias, taps, 1, inclusive, stride, dilation, backend)


def horizontal_stack(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask_type: str,
    colors: int = 1,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    backend: str | None = None,
) -> Tensor:
    """A convolution of the gated PixelCNN's horizontal stack: the own row, to the left (van den Oord et al. 2016,
    "Conditional Image Generation with PixelCNN Decoders", section 2.2).

    The pixel itself is seen by type and colour as in :func:`masked_conv2d`, which this is for a kernel of one row. How
    it meets the vertical stack is shown at :func:`vertical_stack`. What follows within this stack (1 x 1 convolutions
    of the gate, the residual and the output) must keep the order of the colours: ``masked_conv2d`` of type B, and,
    with ``colors``, gates whose two halves are taken within every block of channels.

    Args:
        x: (B, C, H, W); float32, float64, bfloat16 or float16 (accumulated in float32).
        weight: (D, C, 1, kw), kw odd, centred; taps to the right of the middle are hidden.
        bias: (D,), or None.
        mask_type: "A" for the first layer, on the picture; "B" for those behind it.
        colors: as in :func:`masked_conv2d`.
        stride, dilation, backend: as in :func:`masked_conv2d`.

    Returns:
        (B, D, ceil(H / stride), ceil(W / stride)) in the dtype of x. Differentiable to any order.

    Raises:
        TypeError, ValueError, mpkernels.BackendError: as :func:`masked_conv2d`.

    Example:
        >>> import torch
        >>> from mpkernels.convolution import horizontal_stack
        >>> x = torch.ones(1, 1, 1, 4)
        >>> horizontal_stack(x, torch.ones(1, 1, 1, 5), mask_type="A")[0, 0, 0]
        tensor([0., 1., 2., 2.])
    """
    _check_tensors(x, weight, bias)
    if weight.shape[2] != 1:
        raise ValueError(f"weight: expected shape (D, C, 1, kw), a kernel of one row, got {tuple(weight.shape)}")
    return masked_conv2d(
        x,
        weight,
        bias,
        mask_type=mask_type,
        colors=colors,
        stride=stride,
        dilation=dilation,
        backend=backend,
    )


def _run(x, weight, bias, taps, colors, inclusive, stride, dilation, backend) -> Tensor:
    settings = (taps, colors, inclusive, *_pair("stride", stride), *_pair("dilation", dilation))
    chosen = backends.choose(schema.FORWARD, x.device.type, backend)
    if chosen == "reference":
        return reference.masked_conv2d(x, weight, bias, *settings)
    return autograd.run(x, weight, bias, *settings, backend=chosen)


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    checks.floating("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected shape (B, C, H, W), got {tuple(x.shape)}")
    checks.same_kind("weight", weight, "x", x)
    if weight.dim() != 4:
        raise ValueError(f"weight: expected shape (D, C, kh, kw), got {tuple(weight.shape)}")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight: expected the channels of x, C = {x.shape[1]}, in its second dimension, got {tuple(weight.shape)}"
        )
    if any(size % 2 == 0 for size in weight.shape[2:]):
        raise ValueError(f"weight: expected a kernel of odd size, which has a centre, got {tuple(weight.shape)}")
    if bias is not None:
        checks.same_kind("bias", bias, "x", x)
        checks.shape("bias", bias, (weight.shape[0],), "D, the outputs of weight")


def _mask_type(value: object) -> str:
    if not isinstance(value, str) or value not in ("A", "B"):
        raise ValueError(f"mask_type: expected 'A' or 'B', got {value!r}")
    return value


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")
    if not 1 <= value < 2**31:
        raise ValueError(f"{name}: expected a number of 1 or more, below 2^31, got {value}")
    return int(value)


def _pair(name: str, value: object) -> tuple[int, int]:
    """The settings of rows and columns."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise ValueError(f"{name}: expected one number, or one for rows and one for columns, got {tuple(value)}")
        return _whole(name, value[0]), _whole(name, value[1])
    number = _whole(name, value)
    return number, number
