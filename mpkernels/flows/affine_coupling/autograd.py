"""How the kernels of the affine coupling are called and differentiated.

The forward is an autograd.Function whose backward is a second Function over the kernels' own backward, so that
gradients can be differentiated again; that second step goes through torch operations (:mod:`derivative`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import backends
from mpkernels.autograd import Function, differentiated, directional, fold, forward_mode, of_some, unfold, vjp
from mpkernels.flows.affine_coupling import derivative, schema

_TENSORS = 4  # x, raw, shift, mask
_SETTINGS = 8  # scale to inverse


def run(*arguments, backend: str) -> tuple[Tensor, Tensor]:
    """The op (x, raw, shift, mask, scale, clamp, epsilon, layout, pattern, parity, shift_first, inverse).

    Where nothing asks for a derivative the op is called directly: the Function costs as much as a small op.
    """
    if differentiated(arguments[:3]):
        return _pick(_Affine).apply(*arguments, backend)
    return backends.call(backend, schema.FORWARD)(*arguments)


def _pick(function):
    """The variant that also has a forward-mode derivative, kept apart because torch.compile does not trace those."""
    return _FORWARD_MODE[function] if forward_mode() else function


class _Affine(Function):
    """First derivatives by the kernels' own backward; its backward is a Function, and so differentiable again."""

    @staticmethod
    def forward(x, raw, shift, mask, scale, clamp, epsilon, layout, pattern, parity, shift_first, inverse, backend):
        return backends.call(backend, schema.FORWARD)(
            x, raw, shift, mask, scale, clamp, epsilon, layout, pattern, parity, shift_first, inverse
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:_TENSORS])
        ctx.settings = inputs[_TENSORS:]

    @staticmethod
    def backward(ctx, *gradients):
        needed = ctx.needs_input_grad[:3]
        found = _pick(_AffineBackward).apply(*gradients, *ctx.saved_tensors, *ctx.settings, *needed)
        return *(x if need else None for x, need in zip(found, needed, strict=True)), *(None,) * (_SETTINGS + 2)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        tensors = fold(info.batch_size, in_dims[:_TENSORS], inputs[:_TENSORS])
        found = _pick(_Affine).apply(*tensors, *inputs[_TENSORS:])
        return tuple(unfold(x, info.batch_size) for x in found), (0, 0)


class _AffineBackward(Function):
    """The kernels' backward; differentiated again through :mod:`derivative`."""

    @staticmethod
    def forward(
        grad_y,
        grad_log_abs_det,
        x,
        raw,
        shift,
        mask,
        scale,
        clamp,
        epsilon,
        layout,
        pattern,
        parity,
        shift_first,
        inverse,
        backend,
        needs_x,
        needs_raw,
        needs_shift,
    ):
        return backends.call(backend, schema.BACKWARD)(
            grad_y,
            grad_log_abs_det,
            x,
            raw,
            shift,
            mask,
            scale,
            clamp,
            epsilon,
            layout,
            pattern,
            parity,
            shift_first,
            inverse,
            needs_x,
            needs_raw,
            needs_shift,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[: 2 + _TENSORS])
        ctx.settings = inputs[2 + _TENSORS : 2 + _TENSORS + _SETTINGS]
        ctx.needs = inputs[-3:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        wanted = [i for i in range(5) if ctx.saved_tensors[i] is not None and ctx.needs_input_grad[i]]
        kept = [i for i, (g, need) in enumerate(zip(gradients, ctx.needs, strict=True)) if need and g is not None]
        result: list[Tensor | None] = [None] * (2 + _TENSORS + _SETTINGS + 4)
        if not wanted or not kept:
            return tuple(result)
        _, transpose = vjp(*_gradient_of(ctx, wanted, kept))
        for i, x in zip(wanted, transpose(tuple(gradients[i] for i in kept)), strict=True):
            result[i] = x
        return tuple(result)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        size, count = info.batch_size, 2 + _TENSORS
        tensors = fold(size, in_dims[:count], inputs[:count])
        found = _pick(_AffineBackward).apply(*tensors, *inputs[count:])
        needs = inputs[-3:]
        out = tuple(unfold(x, size) if need else x for x, need in zip(found, needs, strict=True))
        return out, tuple(0 if need else None for need in needs)


def _gradient_of(ctx, wanted, kept):
    """The gradients numbered ``kept`` as a differentiable function of the saved tensors numbered ``wanted``."""

    def gradients(*saved):
        return derivative.affine_gradient(*saved, *ctx.settings)

    return of_some(gradients, ctx.saved_tensors, wanted, kept)


class _AffineForwardMode(_Affine):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _Affine.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:_TENSORS])
        ctx.outputs_like = [(x.shape, x.dtype, x.device) for x in output]

    @staticmethod
    def jvp(ctx, *tangents):
        inputs = ctx.saved_tensors
        # the gradient is linear in the gradients of the outputs: its transpose is the derivative in a direction
        present = [i for i in range(3) if inputs[i] is not None]
        found, transpose = vjp(
            lambda *g: tuple(
                x for x in derivative.affine_gradient(*g, *inputs, *ctx.settings[:_SETTINGS]) if x is not None
            ),
            [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.outputs_like],
        )
        along = (
            torch.zeros_like(x) if tangents[i] is None else tangents[i] for i, x in zip(present, found, strict=True)
        )
        return tuple(x.contiguous() for x in transpose(tuple(along)))


class _AffineBackwardForwardMode(_AffineBackward):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _AffineBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[: 2 + _TENSORS])
        ctx.outputs_like = [(x.shape, x.dtype, x.device) for x in output]

    @staticmethod
    def jvp(ctx, *tangents):
        wanted = [i for i in range(5) if ctx.saved_tensors[i] is not None and tangents[i] is not None]
        kept = [i for i, need in enumerate(ctx.needs) if need]
        found = directional(*_gradient_of(ctx, wanted, kept), [tangents[i] for i in wanted])
        result = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.outputs_like]
        for i, x in zip(kept, found, strict=True):
            result[i] = x.contiguous()
        return tuple(result)


_FORWARD_MODE = {_Affine: _AffineForwardMode, _AffineBackward: _AffineBackwardForwardMode}
