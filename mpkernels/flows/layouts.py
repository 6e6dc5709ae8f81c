"""How the two parameters of an affine transform lie in the output of one network."""

from __future__ import annotations

from torch import Tensor

from mpkernels import checks
from mpkernels.flows.affine_coupling import schema

LAYOUTS = {
    "shift_scale": schema.SHIFT_SCALE,
    "scale_shift": schema.SCALE_SHIFT,
    "shift_scale_interleaved": schema.SHIFT_SCALE_INTERLEAVED,
    "scale_shift_interleaved": schema.SCALE_SHIFT_INTERLEAVED,
}


def split_parameters(h: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The scale's and the shift's part of a network's output, as views: for code that wants two arguments.

    :func:`affine_coupling` with ``layout=`` reads the whole output in place, and writes its gradient in one piece.

    Args:
        h: (B, 2 P, ...), any floating-point dtype.
        layout: "shift_scale" [t; s] (nflows), "scale_shift" [s; t] (FrEIA), "shift_scale_interleaved" t s t s ...
            (normflows; Glow's and SRFlow's "cross" split), "scale_shift_interleaved" s t s t ...

    Returns:
        (raw, shift), both (B, P, ...), views of ``h``.

    Raises:
        TypeError: ``h`` is no floating-point tensor.
        ValueError: ``h`` has no dimension 1 of an even size, or ``layout`` is unknown.

    Example:
        >>> import torch
        >>> from mpkernels.flows import split_parameters
        >>> raw, shift = split_parameters(torch.arange(4.0)[None], "shift_scale_interleaved")
        >>> raw, shift
        (tensor([[1., 3.]]), tensor([[0., 2.]]))
    """
    checks.floating("h", h)
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    if h.dim() < 2 or h.shape[1] % 2 != 0:
        raise ValueError(f"h: expected shape (B, 2 P, ...), got {tuple(h.shape)}")
    if layout.endswith("interleaved"):
        first, second = h[:, 0::2], h[:, 1::2]
    else:
        half = h.shape[1] // 2
        first, second = h.narrow(1, 0, half), h.narrow(1, half, half)
    return (first, second) if layout.startswith("scale") else (second, first)
