"""How the kernels of ActNorm are called and differentiated, on every backend.

The forward is an autograd.Function whose backward is a second Function over the kernels' own backward, so that
gradients can be differentiated again; that second step goes through torch operations (:mod:`derivative`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import backends
from mpkernels.autograd import (
    Function,
    differentiated,
    directional,
    fold,
    forward_mode,
    of_some,
    one_by_one,
    unfold,
    vjp,
)
from mpkernels.flows.actnorm import derivative, schema


def run(
    x: Tensor, bias: Tensor, log_scale: Tensor, shift_first: bool, inverse: bool, *, backend: str
) -> tuple[Tensor, Tensor]:
    """The op on x (B, C, S), differentiable.

    Where nothing asks for a derivative the op is called directly: the Function costs as much as a small op.
    """
    if differentiated((x, bias, log_scale)):
        return _pick(_ActNorm).apply(x, bias, log_scale, shift_first, inverse, backend)
    return _forward(x, bias, log_scale, shift_first, inverse, backend)


def _forward(x, bias, log_scale, shift_first, inverse, backend):
    return backends.call(backend, schema.FORWARD)(x, bias.contiguous(), log_scale.contiguous(), shift_first, inverse)


def _pick(function):
    """The variant that also has a forward-mode derivative, kept apart because torch.compile does not trace those."""
    return _FORWARD_MODE[function] if forward_mode() else function


class _ActNorm(Function):
    """First derivatives by the kernels' own backward; its backward is a Function, and so differentiable again."""

    @staticmethod
    def forward(x, bias, log_scale, shift_first, inverse, backend):
        return _forward(x, bias, log_scale, shift_first, inverse, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.settings = inputs[3:]

    @staticmethod
    def backward(ctx, *gradients):
        needed = ctx.needs_input_grad[:3]
        found = _pick(_ActNormBackward).apply(*gradients, *ctx.saved_tensors, *ctx.settings, *needed)
        return *(x if need else None for x, need in zip(found, needed, strict=True)), None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if in_dims[1] is not None or in_dims[2] is not None:
            return one_by_one(_pick(_ActNorm), info.batch_size, in_dims, inputs)
        (x,) = fold(info.batch_size, in_dims[:1], inputs[:1])
        y, log_abs_det = _pick(_ActNorm).apply(x, *inputs[1:])
        return (unfold(y, info.batch_size), unfold(log_abs_det, info.batch_size)), (0, 0)


class _ActNormBackward(Function):
    """The kernels' backward; differentiated again through :mod:`derivative`."""

    @staticmethod
    def forward(
        grad_y,
        grad_log_abs_det,
        x,
        bias,
        log_scale,
        shift_first,
        inverse,
        backend,
        needs_x,
        needs_bias,
        needs_log_scale,
    ):
        return backends.call(backend, schema.BACKWARD)(
            grad_y.contiguous(),
            grad_log_abs_det.contiguous(),
            x,
            bias.contiguous(),
            log_scale.contiguous(),
            shift_first,
            inverse,
            needs_x,
            needs_bias,
            needs_log_scale,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5])
        ctx.settings = inputs[5:7]
        ctx.needs = inputs[8:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        wanted = [i for i in range(5) if ctx.needs_input_grad[i]]
        kept = [i for i, (g, need) in enumerate(zip(gradients, ctx.needs, strict=True)) if need and g is not None]
        result: list[Tensor | None] = [None] * 11
        if not wanted or not kept:
            return tuple(result)
        _, transpose = vjp(*_gradient_of(ctx, wanted, kept))
        for i, x in zip(wanted, transpose(tuple(gradients[i] for i in kept)), strict=True):
            result[i] = x
        return tuple(result)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        parameters_alike = in_dims[3] is None and in_dims[4] is None
        if not parameters_alike or inputs[9] or inputs[10]:
            return one_by_one(_pick(_ActNormBackward), info.batch_size, in_dims, inputs)
        tensors = fold(info.batch_size, in_dims[:3], inputs[:3])
        of_x, *others = _pick(_ActNormBackward).apply(*tensors, *inputs[3:])
        return (unfold(of_x, info.batch_size) if inputs[8] else of_x, *others), (0 if inputs[8] else None, None, None)


def _gradient_of(ctx, wanted, kept):
    """The gradients numbered ``kept`` as a differentiable function of the saved tensors numbered ``wanted``."""

    def gradients(*saved):
        return derivative.actnorm_gradient(*saved, *ctx.settings)

    return of_some(gradients, ctx.saved_tensors, wanted, kept)


class _ActNormForwardMode(_ActNorm):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _ActNorm.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def jvp(ctx, *tangents):
        inputs = ctx.saved_tensors
        x = inputs[0]
        # the gradient is linear in the gradients of the outputs: its transpose is the derivative in a direction
        zeros = [torch.zeros(x.shape, dtype=x.dtype, device=x.device)]
        zeros.append(torch.zeros(x.shape[:1], dtype=schema.wide(x), device=x.device))
        found, transpose = vjp(lambda g, h: derivative.actnorm_gradient(g, h, *inputs, *ctx.settings[:2]), zeros)
        along = tuple(
            torch.zeros_like(g) if t is None else t.contiguous() for g, t in zip(found, tangents[:3], strict=True)
        )
        return transpose(along)


class _ActNormBackwardForwardMode(_ActNormBackward):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _ActNormBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:5])
        ctx.output_like = [(x.shape, x.dtype, x.device) for x in output]

    @staticmethod
    def jvp(ctx, *tangents):
        wanted = [i for i in range(5) if tangents[i] is not None]
        kept = [i for i, need in enumerate(ctx.needs) if need]
        found = directional(*_gradient_of(ctx, wanted, kept), [tangents[i] for i in wanted])
        result = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.output_like]
        for i, x in zip(kept, found, strict=True):
            result[i] = x
        return tuple(result)


_FORWARD_MODE = {_ActNorm: _ActNormForwardMode, _ActNormBackward: _ActNormBackwardForwardMode}
