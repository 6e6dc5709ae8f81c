"""What a multi-scale flow does between its levels: squeeze, unsqueeze and split. Their log-determinant is 0."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from mpkernels import checks


def squeeze(x: Tensor, factor: int = 2) -> Tensor:
    """Space into channels: (B, C, H, W) -> (B, C f f, H / f, W / f), channels in the order (C, fh, fw).

    RealNVP (Dinh et al. 2017, section 3.6); the order is that of ``torch.nn.functional.pixel_unshuffle``, Glow's
    PyTorch ports and SRFlow.

    Args:
        x: (B, C, H, W), any dtype.
        factor: f >= 1.

    Returns:
        (B, C f f, H / f, W / f), a copy.

    Raises:
        TypeError: ``x`` is no tensor, ``factor`` no integer.
        ValueError: ``x`` has not 4 dimensions, or ``factor`` does not divide H and W.

    Example:
        >>> import torch
        >>> from mpkernels.flows import squeeze
        >>> squeeze(torch.arange(4.0).reshape(1, 1, 2, 2)).flatten()
        tensor([0., 1., 2., 3.])
    """
    _check(x, factor)
    if x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(f"x: expected H and W that factor {factor} divides, got shape {tuple(x.shape)}")
    return functional.pixel_unshuffle(x, factor)


def unsqueeze(x: Tensor, factor: int = 2) -> Tensor:
    """What :func:`squeeze` did, undone: (B, C f f, H, W) -> (B, C, H f, W f).

    Args:
        x: (B, C f f, H, W), any dtype.
        factor: f >= 1.

    Returns:
        (B, C, H f, W f), a copy.

    Raises:
        TypeError: ``x`` is no tensor, ``factor`` no integer.
        ValueError: ``x`` has not 4 dimensions, or the square of ``factor`` does not divide its channels.

    Example:
        >>> import torch
        >>> from mpkernels.flows import squeeze, unsqueeze
        >>> x = torch.randn(2, 3, 4, 6)
        >>> torch.equal(unsqueeze(squeeze(x)), x)
        True
    """
    _check(x, factor)
    if x.shape[1] % (factor * factor):
        raise ValueError(
            f"x: expected channels that the square of factor, {factor * factor}, divides, got shape {tuple(x.shape)}"
        )
    return functional.pixel_shuffle(x, factor)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The channels that the flow goes on with, and those that are factored out (RealNVP, section 3.6), as views.

    Args:
        x: (B, C, ...) with even C, any dtype.

    Returns:
        (kept on, factored out): the first and the second half of the channels. ``torch.cat`` puts them together.

    Raises:
        TypeError: ``x`` is no tensor.
        ValueError: ``x`` has no channels, or an odd number of them.

    Example:
        >>> import torch
        >>> from mpkernels.flows import split
        >>> on, out = split(torch.arange(4.0)[None])
        >>> on, out
        (tensor([[0., 1.]]), tensor([[2., 3.]]))
    """
    checks.tensor("x", x)
    if x.dim() < 2 or x.shape[1] % 2:
        raise ValueError(f"x: expected shape (B, C, ...) with even C, got {tuple(x.shape)}")
    half = x.shape[1] // 2
    return x.narrow(1, 0, half), x.narrow(1, half, half)


def _check(x: Tensor, factor: int) -> None:
    checks.tensor("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected shape (B, C, H, W), got {tuple(x.shape)}")
    if isinstance(factor, bool) or not isinstance(factor, int):
        raise TypeError(f"factor: expected an integer, got {type(factor).__name__}")
    if factor < 1:
        raise ValueError(f"factor: expected at least 1, got {factor}")
