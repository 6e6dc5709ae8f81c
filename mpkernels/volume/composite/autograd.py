"""How the kernels of volume compositing are called and differentiated.

The forward is an autograd.Function whose backward is a second Function over the kernels' own backward, so that
gradients can be differentiated again; that second step goes through torch operations (:mod:`derivative`). One pair of
Functions serves every backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import backends
from mpkernels.autograd import (
    Function,
    contiguous,
    differentiated,
    directional,
    forward_mode,
    mapped_first,
    of_some,
    unfold,
    vjp,
)
from mpkernels.volume.composite import derivative, schema


def run(*arguments, backend: str) -> tuple[Tensor, ...]:
    """The op on (R, S) or (N,) samples (arguments as in schema.py), differentiable.

    Where nothing asks for a derivative the op is called directly: the Function costs as much as a small op.
    """
    if differentiated(arguments[:6]):
        return _pick(_Composite).apply(*arguments, backend)
    return _forward(*arguments, backend)  # pyright: ignore[reportCallIssue]


def _pick(function):
    """The variant that also has a forward-mode derivative, kept apart because torch.compile does not trace those."""
    return _FORWARD_MODE[function] if forward_mode() else function


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


def _forward(densities, values, t_starts, t_ends, packed_info, background, early_stop_eps, gaps, backend):
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


class _Composite(Function):
    """First derivatives by the kernels' own backward; its backward is a Function, and so differentiable again."""

    @staticmethod
    def forward(densities, values, t_starts, t_ends, packed_info, background, early_stop_eps, gaps, backend):
        return _forward(densities, values, t_starts, t_ends, packed_info, background, early_stop_eps, gaps, backend)

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
            x if need else None
            for x, need in zip(found, (needed[0], needed[1], needed[2], needed[3], needed[5]), strict=True)
        )
        return densities, values, t_starts, t_ends, None, background, None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        tensors = _fold_batch(info.batch_size, in_dims[:6], inputs[:6], inputs[4] is not None)
        value, opacity, depth, weights = _pick(_Composite).apply(*tensors, *inputs[6:])
        out = tuple(unfold(x, info.batch_size) for x in (value, opacity, depth, weights))
        return out, (0, 0, 0, 0)


class _CompositeBackward(Function):
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
        result: list[Tensor | None] = [None] * 16
        if not wanted or not kept:
            return tuple(result)
        _, transpose = vjp(*_gradient_of(ctx, wanted, kept))
        for i, x in zip(wanted, transpose(tuple(gradients[i] for i in kept)), strict=True):
            result[i] = x
        return tuple(result)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        packed = inputs[8] is not None
        tensors = _fold_batch(info.batch_size, in_dims[:10], inputs[:10], packed, packed_at=8)
        found = _pick(_CompositeBackward).apply(*tensors, *inputs[10:])
        empty = (
            False,
            not inputs[13],
            not inputs[14],
            not inputs[14] or inputs[7] is None,
            not inputs[15] or inputs[9] is None,
        )
        out = tuple(x if e else unfold(x, info.batch_size) for x, e in zip(found, empty, strict=True))
        return out, tuple(None if e else 0 for e in empty)


def _gradient_of(ctx, wanted, kept):
    """The gradients numbered ``kept`` as a differentiable function of the saved tensors numbered ``wanted``."""

    def gradients(*saved):
        return derivative.composite_gradient(saved[:4], saved[4:], ctx.early_stop_eps)

    return of_some(gradients, ctx.saved_tensors, wanted, kept)


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
        found, transpose = vjp(
            lambda *g: tuple(x for x in derivative.composite_gradient(g, inputs, ctx.settings[0]) if x is not None),
            zeros,
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
        kept = [
            i for i, need in enumerate(ctx.needs) if need and (i < 3 or ctx.saved_tensors[(7, 9)[i - 3]] is not None)
        ]
        found = directional(*_gradient_of(ctx, wanted, kept), [tangents[i] for i in wanted])
        result = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.output_shapes]
        for i, x in zip(kept, found, strict=True):
            result[i] = x
        return tuple(result)


_FORWARD_MODE = {_Composite: _CompositeForwardMode, _CompositeBackward: _CompositeBackwardForwardMode}


def _fold_batch(batch: int, in_dims, tensors, packed: bool, packed_at: int = 4) -> list[Tensor | None]:
    """Turns a vmapped dimension into more rays: (B, R, ...) -> (B R, ...), packed (B, N, ...) -> (B N, ...)."""
    folded = mapped_first(batch, in_dims, tensors)
    if packed:
        packed_info, densities = folded[packed_at], folded[packed_at - 4]
        assert packed_info is not None
        assert densities is not None
        samples = densities.shape[1]
        first = torch.arange(batch, device=packed_info.device) * samples
        folded[packed_at] = packed_info + torch.stack([first, torch.zeros_like(first)], dim=-1)[:, None, :]
    return [None if x is None else x.flatten(0, 1) for x in folded]
