"""The public function of the affine coupling: checks its input and chooses a backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.flows.affine_coupling import autograd, reference, schema
from mpkernels.flows.layouts import LAYOUTS

SCALES = {
    "exp": schema.EXP,
    "sigmoid": schema.SIGMOID,
    "tanh": schema.TANH,
    "softclamp": schema.SOFTCLAMP,
    "additive": schema.ADDITIVE,
}
MASKS = {"none": schema.NONE, "checkerboard": schema.CHECKERBOARD, "channel": schema.CHANNEL}
_CLAMPS = {"tanh": 1.0, "softclamp": 2.0}
_HALF = (torch.bfloat16, torch.float16)


def affine_coupling(
    x: Tensor,
    log_scale_or_raw: Tensor | None,
    shift: Tensor | None = None,
    *,
    scale: str = "exp",
    mask: str | Tensor = "none",
    parity: int = 0,
    inverse: bool = False,
    layout: str | None = None,
    clamp: float | None = None,
    epsilon: float = 0.0,
    shift_first: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """An affine coupling and its log-determinant in one pass: y = x e^l + t where the mask lets through, else y = x.

    The transform of NICE (Dinh et al. 2014), RealNVP (Dinh et al. 2017, eqs. 4 to 9) and Glow (Kingma and Dhariwal
    2018, table 1), behind the network that computes l and t from the elements that are kept. Masks are computed from
    indices; parameters are read where they lie, as strided parts of a network's output too. Gradients of any order to
    x, the scale's parameter and the shift, the same bits in every run.

    What other libraries call a coupling, with h the output of their network:

    ===================================  ============================================================================
    NICE                                 ``affine_coupling(x, None, h, scale="additive", mask=...)``
    RealNVP: s = g tanh(raw), g learned  ``affine_coupling(x, g * torch.tanh(raw), shift, mask="checkerboard")``
    Glow                                 ``scale="sigmoid", shift_first=True, layout="shift_scale_interleaved"``
    SRFlow                               the same with ``epsilon=1e-4``
    nflows                               ``scale="sigmoid", epsilon=1e-3, layout="shift_scale"``
    normflows                            ``scale="exp", layout="shift_scale_interleaved"``
    FrEIA                                ``scale="softclamp", clamp=2.0, layout="scale_shift"``
    ===================================  ============================================================================

    (With ``mask="channel"`` the network's output has as many channels as are transformed, and the first half of x is
    kept; ``mask="none"`` transforms a half that was taken out before.)

    Args:
        x: (B, ...), 1 to 5 dimensions or more, any strides: (B,), (B, D), (B, C, L), (B, C, H, W), ... float32,
            float64, bfloat16 or float16 (computed in float32).
        log_scale_or_raw: what l is made of; None for "additive". Broadcast to the shape of x, or with
            ``mask="channel"`` to that with the number of transformed channels in dimension 1. With ``layout`` the
            network's whole output, twice that in dimension 1. The dtype of x; a half type too beside a wider half's
            or float32's x, to which it is converted.
        shift: t, as ``log_scale_or_raw``; None with ``layout``.
        scale: "exp" l = raw; "sigmoid" l = log(sigmoid(raw + 2) + epsilon), for epsilon 0 by logsigmoid, finite where
            the sigmoid rounds to 0; "tanh" l = clamp tanh(raw); "softclamp" l = clamp 0.636 atan(raw); "additive" 0.
        mask: "none"; "checkerboard", transforming where (h + w) mod 2 = parity (3-D: the position, 2-D: the index mod
            2); "channel", transforming the second part of the channels (parity 0) or the first one (parity 1), the
            first having (C + 1) // 2; or a bool tensor that broadcasts to x, True where x is kept (RealNVP's b).
        parity: 0 or 1; nothing with "none" and tensors.
        inverse: x from y instead: (x - t) e^-l, and minus the log-determinant.
        layout: where dimension 1 of ``log_scale_or_raw`` holds both: "shift_scale" [t; s], "scale_shift" [s; t],
            "shift_scale_interleaved" t s t s ..., "scale_shift_interleaved". Its gradient is written in one piece.
            (For two arguments, see :func:`mpkernels.flows.split_parameters`.)
        clamp: of "tanh" (default 1) and "softclamp" (default 2).
        epsilon: of "sigmoid", >= 0.
        shift_first: (x + t) e^l instead of x e^l + t; its inverse x e^-l - t.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        (y, log_abs_det): y as x, contiguous; log_abs_det (B,), the sum of l over the transformed elements, float32
        (float64 for float64).

    Parameters of kept elements are not used: whatever they are, outputs and gradients do not change. Elsewhere a NaN
    makes a NaN of that element and of the log-determinant of that sample alone. The factor e^l is computed from an
    exponent limited to +-87 (+-708 in float64; "sigmoid": of raw + 2), so that it is never 0 or infinite and neither
    is that of the inverse; the log-determinant is not limited, and may be infinite where raw is.

    Round trip: where nothing overflows or becomes subnormal, inverse(forward(x)) is within
    8 eps (|x| + |t| + (|y| + |t|) / e^l) of x, eps being torch.finfo(x.dtype).eps: what rounding y and its terms
    loses, magnified by the inverse scale, and the roundings of e^l.

    Raises:
        TypeError: an argument is no tensor, or has another dtype; a mask that is neither a name nor a bool tensor.
        ValueError: shapes or devices do not match; an unknown name; a parameter that is missing, or does not belong to
            that scale; clamp or epsilon is not finite, or epsilon below 0; "checkerboard" of more than 4 dimensions.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.flows import affine_coupling
        >>> x, h = torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8)
        >>> y, log_abs_det = affine_coupling(x, h, scale="sigmoid", mask="channel", layout="shift_scale")
        >>> back, minus = affine_coupling(y, h, scale="sigmoid", mask="channel", layout="shift_scale", inverse=True)
        >>> torch.allclose(back, x, atol=1e-4), torch.allclose(minus, -log_abs_det)
        (True, True)
    """
    checks.floating("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected shape (B, ...), got a tensor without dimensions")
    if not isinstance(scale, str) or scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(map(repr, SCALES))}, got {scale!r}")
    if parity not in (0, 1):
        raise ValueError(f"parity: expected 0 or 1, got {parity!r}")
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout: expected None or one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    used_clamp = _clamp(scale, clamp)
    _number("epsilon", epsilon)
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon: expected a finite number >= 0, got {epsilon}")
    if epsilon != 0 and scale != "sigmoid":
        raise ValueError(f"epsilon: expected 0 with scale={scale!r} (it belongs to 'sigmoid'), got {epsilon}")

    pattern, kept = _pattern(x, mask)
    shape = [x.shape[0], x.shape[1] if x.dim() > 1 else 1, *x.shape[2:]]
    if pattern == schema.CHANNEL:
        first = (shape[1] + 1) // 2
        shape[1] = first if parity else shape[1] - first
    raw, shift = _parameters(x, log_scale_or_raw, shift, scale, layout, shape)

    chosen = backends.choose(schema.FORWARD, x.device.type, backend)
    arguments = (
        _four(x),
        raw,
        shift,
        kept,
        SCALES[scale],
        used_clamp,
        float(epsilon),
        schema.SEPARATE if layout is None else LAYOUTS[layout],
        pattern,
        int(parity),
        bool(shift_first),
        bool(inverse),
    )
    if chosen == "reference":
        y, log_abs_det = reference.affine_coupling(*arguments)
    else:
        y, log_abs_det = autograd.run(*arguments, backend=chosen)
    return y if y.shape == x.shape else y.reshape(x.shape), log_abs_det


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def _clamp(scale: str, clamp: float | None) -> float:
    """The clamp of a scale, 1 where it has none."""
    if scale not in _CLAMPS:
        if clamp is not None:
            raise ValueError(f"clamp: expected None with scale={scale!r} (it belongs to 'tanh', 'softclamp')")
        return 1.0
    if clamp is None:
        return _CLAMPS[scale]
    _number("clamp", clamp)
    if not math.isfinite(clamp):
        raise ValueError(f"clamp: expected a finite number, got {clamp}")
    return float(clamp)


def _four(x: Tensor) -> Tensor:
    """(B, ...) as (B, C, H, W): (B, C, L) is (B, C, 1, L), and behind 4 dimensions the inner ones are one."""
    if x.dim() == 4:
        return x
    if x.dim() == 3:
        return x[:, :, None]
    if x.dim() > 4:
        return x.flatten(2, -2)
    return x[..., None, None] if x.dim() == 2 else x[:, None, None, None]


def _pattern(x: Tensor, mask: str | Tensor) -> tuple[int, Tensor | None]:
    """The pattern's number, and the mask where it is a tensor, (B, C, H, W)."""
    if isinstance(mask, str):
        if mask not in MASKS:
            raise ValueError(f"mask: expected one of {', '.join(map(repr, MASKS))} or a bool tensor, got {mask!r}")
        if mask == "checkerboard":
            if x.dim() > 4:
                raise ValueError(f"mask: expected x of at most 4 dimensions for 'checkerboard', got {tuple(x.shape)}")
            return (schema.CHECKERBOARD if x.dim() > 2 else schema.ALTERNATING), None
        if mask == "channel" and x.dim() == 1:
            raise ValueError(f"mask: expected x of at least 2 dimensions for 'channel', got {tuple(x.shape)}")
        return MASKS[mask], None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a name or a bool tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, True where x is kept, got {mask.dtype}")
    if mask.device != x.device:
        raise ValueError(f"mask: expected the device of x, {x.device}, got {mask.device}")
    return schema.TENSOR, _four(_broadcast("mask", mask, x.shape, "that of x"))


def _broadcast(name: str, value: Tensor, shape, because: str) -> Tensor:
    if value.shape == torch.Size(shape):
        return value
    if value.dim() > len(shape) or any(
        n not in (1, m) for n, m in zip(reversed(value.shape), reversed(shape), strict=False)
    ):
        raise ValueError(f"{name}: expected a shape that broadcasts to {tuple(shape)} ({because}), got {_of(value)}")
    return value.expand(shape)


def _of(value: Tensor) -> str:
    return f"{tuple(value.shape)}"


def _parameters(
    x: Tensor, raw: Tensor | None, shift: Tensor | None, scale: str, layout: str | None, shape: list[int]
) -> tuple[Tensor | None, Tensor | None]:
    """The parameters raw and shift, (B, P, H, W), or both in raw, (B, 2 P, H, W)."""
    because = "one for each transformed element"
    if layout is not None:
        if scale == "additive":
            raise ValueError("layout: expected None with scale='additive', which has one parameter")
        if shift is not None:
            raise ValueError("shift: expected None with a layout, where log_scale_or_raw holds both")
        raw = _parameter("log_scale_or_raw", raw, x)
        because = "both parameters of each transformed element"
        shape = [shape[0], 2 * shape[1], *shape[2:]]
        at = raw.dim() - len(shape) + 1
        if at < 0 or raw.shape[at] != shape[1]:
            raise ValueError(f"log_scale_or_raw: expected shape {tuple(shape)} ({because}), got {_of(raw)}")
        return _four(_broadcast("log_scale_or_raw", raw, shape, because)), None
    if shift is None:
        raise ValueError("shift: expected a tensor, or a layout where log_scale_or_raw holds both, got None")
    if scale == "additive":
        if raw is not None:
            raise ValueError("log_scale_or_raw: expected None with scale='additive', where shift is the only parameter")
    else:
        raw = _parameter("log_scale_or_raw", raw, x)
    shift = _parameter("shift", shift, x)
    if x.dim() == 1:
        shape = shape[:1]
    return (
        None if raw is None else _four(_broadcast("log_scale_or_raw", raw, shape, because)),
        _four(_broadcast("shift", shift, shape, because)),
    )


def _parameter(name: str, value: Tensor | None, x: Tensor) -> Tensor:
    checks.tensor(name, value)
    assert value is not None
    checks.floating(name, value)
    if value.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {value.device}")
    if value.dtype != x.dtype:
        if value.dtype not in _HALF or x.dtype == torch.float64:
            raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {value.dtype}")
        value = value.to(x.dtype)
    return value
