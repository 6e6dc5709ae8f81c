"""The public functions of volume compositing: they check their input, choose a backend and differentiate."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.volume import packing
from mpkernels.volume.composite import derivative, reference, schema


class CompositeOutput(NamedTuple):
    """What :func:`composite` returns, for rays of shape (...) with S samples and C channels."""

    values: Tensor  # (..., C) composited values, background included
    opacity: Tensor  # (...) sum of the weights: 1 - transmittance behind the last sample
    depth: Tensor  # (...) sum of weight times interval midpoint, in the units of t
    weights: Tensor  # (..., S), packed: (N,)


def composite(
    sigmas: Tensor,
    values: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    *,
    packed_info: Tensor | None = None,
    background: Tensor | None = None,
    early_stop_eps: float = 0.0,
    backend: str | None = None,
) -> CompositeOutput:
    """Composites density samples along rays: emission-absorption volume rendering.

    alpha_i = 1 - exp(-sigma_i (t_end_i - t_start_i)), T_i = prod_{j<i} (1 - alpha_j), w_i = T_i alpha_i;
    values = sum_i w_i c_i + (1 - sum_i w_i) background, depth = sum_i w_i (t_start_i + t_end_i) / 2
    (Max 1995, "Optical models for direct volume rendering"; NeRF, Mildenhall et al. 2020, eq. 3).

    All four outputs have exact gradients to sigmas, values, t_starts, t_ends and background, of any order, right at
    alpha = 1 and at sigma = 0 (no division), and the same bits in every run. An infinite sigma counts as the
    largest finite one.

    Args:
        sigmas: densities, 1 / unit of t. Dense rays: (..., S), samples from near to far. Packed rays: (N,).
            float32, float64, bfloat16 or float16 (accumulated in float32).
        values: colours or features, (..., S, C) or packed (N, C), C >= 1.
        t_starts: where each interval starts along the ray, the shape of ``sigmas``. May be expanded over rays.
        t_ends: where it ends, the shape of ``sigmas``.
        packed_info: (R, 2) int64, [start, count] of each ray's samples in the packed tensors. Rays may be empty and
            in any order, must not overlap; samples in no ray get weight 0. Values are checked once per tensor.
        background: seen behind the rays: (C,) or (..., C), packed (R, C). Default: nothing (zeros).
        early_stop_eps: a ray stops in front of the first sample whose transmittance T_i is below this; samples behind
            get weight 0 and gradient 0, whatever they hold. In [0, 1); 0 never stops.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        CompositeOutput (values (..., C), opacity (...), depth (...), weights (..., S)); packed: (R, C), (R,), (R,),
        (N,). The dtype is that of the input.

    Raises:
        TypeError: an argument is no tensor, has an integer or a different dtype.
        ValueError: shapes or devices do not match, ``packed_info`` runs past the end or overlaps.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch, mpkernels
        >>> t = torch.linspace(0, 1, 65).expand(100, 65)
        >>> out = mpkernels.composite(torch.rand(100, 64), torch.rand(100, 64, 3), t[:, :-1], t[:, 1:])
        >>> out.values.shape, out.weights.shape
        (torch.Size([100, 3]), torch.Size([100, 64]))
    """
    checks.floating("sigmas", sigmas)
    checks.same_kind("t_ends", t_ends, "sigmas", sigmas)
    checks.shape("t_ends", t_ends, sigmas.shape, "that of sigmas")
    return _composite("sigmas", sigmas, values, "t_starts", t_starts, t_ends, packed_info, background, early_stop_eps, backend)


def composite_from_alphas(
    alphas: Tensor,
    values: Tensor,
    ts: Tensor,
    *,
    packed_info: Tensor | None = None,
    background: Tensor | None = None,
    early_stop_eps: float = 0.0,
    backend: str | None = None,
) -> CompositeOutput:
    """Composites samples of given opacity along rays: "over", front to back (Porter and Duff 1984).

    As :func:`composite`, for models that give alpha_i instead of a density: T_i = prod_{j<i} (1 - alpha_j),
    w_i = T_i alpha_i, values = sum_i w_i c_i + (1 - sum_i w_i) background, depth = sum_i w_i t_i. The gradient to
    alphas is exact at alpha = 0 and alpha = 1.

    Args:
        alphas: opacities, usually in [0, 1] (not checked): (..., S), or packed (N,).
        values: (..., S, C), or packed (N, C).
        ts: where each sample lies along the ray, the shape of ``alphas``.
        packed_info, background, early_stop_eps, backend: as in :func:`composite`.

    Returns:
        CompositeOutput, as :func:`composite`.

    Raises:
        TypeError, ValueError, mpkernels.BackendError: as :func:`composite`.

    Example:
        >>> import torch, mpkernels
        >>> out = mpkernels.composite_from_alphas(torch.full((2, 3), 0.5), torch.ones(2, 3, 1), torch.ones(2, 3))
        >>> out.weights[0]
        tensor([0.5000, 0.2500, 0.1250])
    """
    checks.floating("alphas", alphas)
    return _composite("alphas", alphas, values, "ts", ts, None, packed_info, background, early_stop_eps, backend)


def _composite(name, densities, values, t_name, t_starts, t_ends, packed_info, background, early_stop_eps, backend):
    """Checks what both functions share, then runs on (R, S) dense or (N,) packed rays."""
    lead = densities.shape[:-1]
    if densities.dim() == 0 or (packed_info is not None and densities.dim() != 1):
        expected = "(N,) with packed_info" if packed_info is not None else "(..., S)"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(densities.shape)}")
    checks.same_kind("values", values, name, densities)
    if values.dim() != densities.dim() + 1 or values.shape[:-1] != densities.shape or values.shape[-1] < 1:
        raise ValueError(
            f"values: expected shape {(*densities.shape, 'C')} with C >= 1 (that of {name}, and the channels), "
            f"got {tuple(values.shape)} for {name} of shape {tuple(densities.shape)}"
        )
    checks.same_kind(t_name, t_starts, name, densities)
    checks.shape(t_name, t_starts, densities.shape, f"that of {name}")
    if not isinstance(early_stop_eps, (int, float)):
        raise TypeError(f"early_stop_eps: expected a number in [0, 1), got {type(early_stop_eps).__name__}")
    if not 0 <= early_stop_eps < 1:
        raise ValueError(f"early_stop_eps: expected a number in [0, 1), got {early_stop_eps}")
    gaps = False
    if packed_info is not None:
        gaps = packing.check_packed_info("packed_info", packed_info, densities)
        lead = packed_info.shape[:1]
    channels = values.shape[-1]
    if background is not None:
        checks.same_kind("background", background, name, densities)
        if background.shape != (channels,) and background.shape != (*lead, channels):
            raise ValueError(
                f"background: expected shape {(channels,)} or {(*lead, channels)} (the channels of values), "
                f"got {tuple(background.shape)}"
            )
        background = background.expand(*lead, channels)

    chosen = backends.choose(schema.FORWARD, densities.device.type, backend)
    early_stop_eps = float(early_stop_eps)
    if chosen == "reference":
        return CompositeOutput(
            *reference.composite(densities, values, t_starts, t_ends, packed_info, background, early_stop_eps)
        )

    flat = packed_info is not None or len(lead) == 1
    if not flat:
        rays, samples = math.prod(lead), densities.shape[-1]
        densities, t_starts = densities.reshape(rays, samples), t_starts.reshape(rays, samples)
        t_ends = None if t_ends is None else t_ends.reshape(rays, samples)
        values = values.reshape(rays, samples, channels)
        background = None if background is None else background.reshape(rays, channels)

    arguments = (densities, values, t_starts, t_ends, packed_info, background, early_stop_eps, gaps)
    if _differentiated(arguments[:6]):
        out = _pick(_Composite).apply(*arguments, chosen)
    else:
        out = _run(*arguments, chosen)
    if flat:
        return CompositeOutput(*out)
    value, opacity, depth, weights = out
    return CompositeOutput(
        value.reshape(*lead, channels), opacity.reshape(lead), depth.reshape(lead), weights.reshape(*lead, samples)
    )


def _differentiated(tensors) -> bool:
    """Whether autograd, a torch.func transform or the compiler has to see an autograd.Function."""
    return (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors))
        or torch._C._are_functorch_transforms_active()
        or _forward_mode()
    )


def _forward_mode() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


def _pick(function):
    """The variant that also has a forward-mode derivative, kept apart because torch.compile does not trace those."""
    return _FORWARD_MODE[function] if _forward_mode() else function


def _rows(x: Tensor | None) -> Tensor | None:
    """What the kernels read: each ray's samples contiguous, any stride between rays."""
    if x is None or x.dim() == 1:
        return None if x is None else x.contiguous()
    inner = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != inner:
            return x.contiguous()
        inner *= size
    return x


def _run(densities, values, t_starts, t_ends, packed_info, background, early_stop_eps, gaps, backend):
    return backends.call(backend, schema.FORWARD)(
        _rows(densities),
        _rows(values),
        _rows(t_starts),
        _rows(t_ends),
        None if packed_info is None else packed_info.contiguous(),
        _rows(background),
        early_stop_eps,
        gaps,
    )


class _Composite(torch.autograd.Function):
    """First derivatives by the kernels' own backward; its backward is a Function, and so differentiable again."""

    @staticmethod
    def forward(densities, values, t_starts, t_ends, packed_info, background, early_stop_eps, gaps, backend):
        return _run(densities, values, t_starts, t_ends, packed_info, background, early_stop_eps, gaps, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6])
        ctx.settings = inputs[6:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        needed = ctx.needs_input_grad
        found = _pick(_CompositeBackward).apply(
            *gradients,
            *ctx.saved_tensors,
            *ctx.settings,
            needed[1],
            needed[2] or needed[3],
            needed[5],
        )
        densities, values, t_starts, t_ends, background = (
            x if need else None for x, need in zip(found, (needed[0], needed[1], needed[2], needed[3], needed[5]), strict=True)
        )
        return densities, values, t_starts, t_ends, None, background, None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        tensors = _fold_batch(info.batch_size, in_dims[:6], inputs[:6], inputs[4] is not None)
        value, opacity, depth, weights = _pick(_Composite).apply(*tensors, *inputs[6:])
        out = tuple(_unfold(x, info.batch_size) for x in (value, opacity, depth, weights))
        return out, (0, 0, 0, 0)


class _CompositeBackward(torch.autograd.Function):
    """The kernels' backward; differentiated again through :mod:`derivative`."""

    @staticmethod
    def forward(
        grad_values,
        grad_opacity,
        grad_depth,
        grad_weights,
        densities,
        values,
        t_starts,
        t_ends,
        packed_info,
        background,
        early_stop_eps,
        gaps,
        backend,
        needs_values,
        needs_ts,
        needs_background,
    ):
        def contiguous(x):
            return None if x is None else x.contiguous()

        return backends.call(backend, schema.BACKWARD)(
            contiguous(grad_values),
            contiguous(grad_opacity),
            contiguous(grad_depth),
            _rows(grad_weights),
            _rows(densities),
            _rows(values),
            _rows(t_starts),
            _rows(t_ends),
            contiguous(packed_info),
            _rows(background),
            early_stop_eps,
            gaps,
            needs_values,
            needs_ts,
            needs_background,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:10])
        ctx.early_stop_eps = inputs[10]
        ctx.needs = (True, inputs[13], inputs[14], inputs[14], inputs[15])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        wanted = [i for i in range(10) if i != 8 and ctx.saved_tensors[i] is not None and ctx.needs_input_grad[i]]
        kept = [i for i, (g, need) in enumerate(zip(gradients, ctx.needs, strict=True)) if need and g is not None]
        if not wanted or not kept:
            return (None,) * 16
        function, chosen = _gradient_of(ctx, wanted, kept)
        _, transpose = torch.func.vjp(function, *chosen)
        result: list[Tensor | None] = [None] * 16
        for i, x in zip(wanted, transpose(tuple(gradients[i] for i in kept)), strict=True):
            result[i] = x
        return tuple(result)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        packed = inputs[8] is not None
        tensors = _fold_batch(info.batch_size, in_dims[:10], inputs[:10], packed, packed_at=8)
        found = _pick(_CompositeBackward).apply(*tensors, *inputs[10:])
        empty = (False, not inputs[13], not inputs[14], not inputs[14] or inputs[7] is None, not inputs[15] or inputs[9] is None)
        out = tuple(x if e else _unfold(x, info.batch_size) for x, e in zip(found, empty, strict=True))
        return out, tuple(None if e else 0 for e in empty)


def _gradient_of(ctx, wanted, kept):
    """The gradients numbered ``kept`` as a differentiable function of the saved tensors numbered ``wanted``."""
    tensors = ctx.saved_tensors

    def gradient(*chosen):
        full = list(tensors)
        for i, x in zip(wanted, chosen, strict=True):
            full[i] = x
        found = derivative.composite_gradient(tuple(full[:4]), *full[4:8], full[8], full[9], ctx.early_stop_eps)
        return tuple(found[i] for i in kept)

    return gradient, [tensors[i] for i in wanted]


class _CompositeForwardMode(_Composite):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _Composite.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:6])
        ctx.output_shapes = [(x.shape, x.dtype, x.device) for x in output]

    @staticmethod
    def jvp(ctx, *tangents):
        inputs = ctx.saved_tensors
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.output_shapes]
        # the gradient is linear in the gradients of the outputs: its transpose is the derivative in a direction
        found, transpose = torch.func.vjp(
            lambda *g: tuple(x for x in derivative.composite_gradient(g, *inputs, ctx.settings[0]) if x is not None),
            *zeros,
        )
        present = [t for i, t in enumerate(tangents[:6]) if i != 4 and inputs[i] is not None]
        return transpose(tuple(torch.zeros_like(x) if t is None else t for x, t in zip(found, present, strict=True)))


class _CompositeBackwardForwardMode(_CompositeBackward):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _CompositeBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:10])
        ctx.output_shapes = [(x.shape, x.dtype, x.device) for x in output]

    @staticmethod
    def jvp(ctx, *tangents):
        wanted = [i for i in range(10) if i != 8 and ctx.saved_tensors[i] is not None and tangents[i] is not None]
        kept = [i for i, need in enumerate(ctx.needs) if need and (i < 3 or ctx.saved_tensors[(7, 9)[i - 3]] is not None)]
        function, chosen = _gradient_of(ctx, wanted, kept)
        found, transpose = torch.func.vjp(function, *chosen)
        # transposed twice: derivatives in a direction without nesting forward mode
        _, forwards = torch.func.vjp(lambda *g: transpose(g), *(torch.zeros_like(x) for x in found))
        result = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.output_shapes]
        for i, x in zip(kept, forwards(tuple(tangents[i] for i in wanted)), strict=True):
            result[i] = x
        return tuple(result)


_FORWARD_MODE = {_Composite: _CompositeForwardMode, _CompositeBackward: _CompositeBackwardForwardMode}


def _fold_batch(batch: int, in_dims, tensors, packed: bool, packed_at: int = 4) -> list[Tensor | None]:
    """Turns a vmapped dimension into more rays: (B, R, ...) -> (B R, ...), packed (B, N, ...) -> (B N, ...)."""
    folded: list[Tensor | None] = []
    samples = 0
    for x, dim in zip(tensors, in_dims, strict=True):
        if x is not None:
            x = x.unsqueeze(0).expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)
        folded.append(x)
    if packed:
        packed_info, densities = folded[packed_at], folded[packed_at - 4]
        assert packed_info is not None and densities is not None
        samples = densities.shape[1]
        first = torch.arange(batch, device=packed_info.device) * samples
        folded[packed_at] = packed_info + torch.stack([first, torch.zeros_like(first)], dim=-1)[:, None, :]
    return [None if x is None else x.flatten(0, 1) for x in folded]


def _unfold(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, x.shape[0] // batch))
