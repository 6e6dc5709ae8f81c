"""How the kernels of the spline coupling are called and differentiated.

The forward is an autograd.Function whose backward is a second Function over the kernels' own backward, so that
gradients can be differentiated again; that second step goes through torch operations (:mod:`derivative`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import backends
from mpkernels.autograd import Function, differentiated, directional, fold, forward_mode, of_some, unfold, vjp
from mpkernels.flows.spline_coupling import derivative, schema

_TENSORS = 3  # x, parameters, low
_NUMBERS = 5  # tail_bound, min_bin_width, min_bin_height, min_derivative, inverse


def run(*arguments, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The op (arguments as in schema.py, up to return_low), differentiable.

    Where nothing asks for a derivative the op is called directly: the Function costs as much as a small op.
    """
    if differentiated(arguments[:2]):
        parameters = arguments[1]
        parameters_first = parameters.stride(3) != 1 and parameters.stride(2) == 1
        return _pick(_Spline).apply(*arguments, parameters_first, backend)
    return backends.call(backend, schema.FORWARD)(*arguments)


def _pick(function):
    """The variant that also has a forward-mode derivative, kept apart because torch.compile does not trace those."""
    return _FORWARD_MODE[function] if forward_mode() else function


class _Spline(Function):
    """First derivatives by the kernels' own backward; its backward is a Function, and so differentiable again."""

    @staticmethod
    def forward(
        x,
        parameters,
        low,
        tail_bound,
        min_bin_width,
        min_bin_height,
        min_derivative,
        inverse,
        return_low,
        parameters_first,
        backend,
    ):
        return backends.call(backend, schema.FORWARD)(
            x, parameters, low, tail_bound, min_bin_width, min_bin_height, min_derivative, inverse, return_low
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:_TENSORS])
        ctx.numbers = inputs[_TENSORS : _TENSORS + _NUMBERS]
        ctx.parameters_first, ctx.backend = inputs[-2:]
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx, *gradients):
        needed = ctx.needs_input_grad[:2]
        found = _pick(_SplineBackward).apply(
            *gradients[:2], *ctx.saved_tensors, *ctx.numbers, ctx.parameters_first, *needed, ctx.backend
        )
        return *(x if need else None for x, need in zip(found, needed, strict=True)), *(None,) * 9

    @staticmethod
    def vmap(info, in_dims, *inputs):
        tensors = fold(info.batch_size, in_dims[:_TENSORS], inputs[:_TENSORS])
        y, log_abs_det, low = _pick(_Spline).apply(*tensors, *inputs[_TENSORS:])
        returns_low = inputs[_TENSORS + _NUMBERS]
        size = info.batch_size
        out = unfold(y, size), unfold(log_abs_det, size), unfold(low, size) if returns_low else low
        return out, (0, 0, 0 if returns_low else None)


class _SplineBackward(Function):
    """The kernels' backward; differentiated again through :mod:`derivative`."""

    @staticmethod
    def forward(
        grad_y,
        grad_log_abs_det,
        x,
        parameters,
        low,
        tail_bound,
        min_bin_width,
        min_bin_height,
        min_derivative,
        inverse,
        parameters_first,
        needs_x,
        needs_parameters,
        backend,
    ):
        return backends.call(backend, schema.BACKWARD)(
            grad_y,
            grad_log_abs_det,
            x,
            parameters,
            low,
            tail_bound,
            min_bin_width,
            min_bin_height,
            min_derivative,
            inverse,
            parameters_first,
            needs_x,
            needs_parameters,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[: 2 + _TENSORS])
        ctx.numbers = inputs[2 + _TENSORS : 2 + _TENSORS + _NUMBERS]
        ctx.needs = inputs[-3:-1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        wanted = [i for i in range(4) if ctx.needs_input_grad[i]]
        kept = [i for i, (g, need) in enumerate(zip(gradients, ctx.needs, strict=True)) if need and g is not None]
        result: list[Tensor | None] = [None] * 14
        if not wanted or not kept:
            return tuple(result)
        _, transpose = vjp(*_gradient_of(ctx, wanted, kept))
        for i, x in zip(wanted, transpose(tuple(gradients[i] for i in kept)), strict=True):
            result[i] = x
        return tuple(result)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        tensors = fold(info.batch_size, in_dims[: 2 + _TENSORS], inputs[: 2 + _TENSORS])
        found = _pick(_SplineBackward).apply(*tensors, *inputs[2 + _TENSORS :])
        needs = inputs[-3:-1]
        out = tuple(unfold(x, info.batch_size) if need else x for x, need in zip(found, needs, strict=True))
        return out, tuple(0 if need else None for need in needs)


def _gradient_of(ctx, wanted, kept):
    """The gradients numbered ``kept`` as a differentiable function of the saved tensors numbered ``wanted``."""

    def gradients(*saved):
        return derivative.spline_gradient(*saved, *ctx.numbers)

    return of_some(gradients, ctx.saved_tensors, wanted, kept)


class _SplineForwardMode(_Spline):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _Spline.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:_TENSORS])
        ctx.output_like = [(x.shape, x.dtype, x.device) for x in output[:2]]

    @staticmethod
    def jvp(ctx, *tangents):
        inputs = ctx.saved_tensors
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.output_like]
        # the gradient is linear in the gradients of the outputs: its transpose is the derivative in a direction
        found, transpose = vjp(lambda *g: derivative.spline_gradient(*g, *inputs, *ctx.numbers), zeros)
        along = (torch.zeros_like(x) if t is None else t for x, t in zip(found, tangents[:2], strict=True))
        return *transpose(tuple(along)), None


class _SplineBackwardForwardMode(_SplineBackward):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _SplineBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[: 2 + _TENSORS])
        ctx.output_like = [(x.shape, x.dtype, x.device, x.stride()) for x in output]

    @staticmethod
    def jvp(ctx, *tangents):
        wanted = [i for i in range(4) if tangents[i] is not None]
        kept = [i for i, need in enumerate(ctx.needs) if need]
        found = directional(*_gradient_of(ctx, wanted, kept), [tangents[i] for i in wanted])
        # (views need tangents in the order of the primal)
        result = [
            torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()
            for shape, dtype, device, stride in ctx.output_like
        ]
        for i, x in zip(kept, found, strict=True):
            result[i] = result[i] + x
        return tuple(result)


_FORWARD_MODE = {_Spline: _SplineForwardMode, _SplineBackward: _SplineBackwardForwardMode}
