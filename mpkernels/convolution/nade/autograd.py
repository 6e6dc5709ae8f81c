"""How the kernels of NADE are called and differentiated.

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
from mpkernels.convolution.nade import derivative, schema

_TENSORS = 5  # x, in_weight, in_bias, out_weight, out_bias


def run(
    x: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """The op (arguments as in schema.py), differentiable: (log_prob, logits); logits has no gradient of its own.

    Where nothing asks for a derivative the op is called directly: the Function costs as much as a small op.
    """
    if differentiated((x, in_weight, in_bias, out_weight, out_bias)):
        return _pick(_Nade).apply(x, in_weight, in_bias, out_weight, out_bias, backend)
    return _forward(x, in_weight, in_bias, out_weight, out_bias, backend)


def _pick(function):
    """The variant that also has a forward-mode derivative, kept apart because torch.compile does not trace those."""
    return _FORWARD_MODE[function] if forward_mode() else function


def _forward(x, in_weight, in_bias, out_weight, out_bias, backend):
    tensors = (tensor.contiguous() for tensor in (x, in_weight, in_bias, out_weight, out_bias))
    return backends.call(backend, schema.FORWARD)(*tensors)


class _Nade(Function):
    """First derivatives by the kernels' own backward; its backward is a Function, and so differentiable again."""

    @staticmethod
    def forward(x, in_weight, in_bias, out_weight, out_bias, backend):
        return _forward(x, in_weight, in_bias, out_weight, out_bias, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1], *inputs[:_TENSORS])
        ctx.backend = inputs[_TENSORS]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        grad = gradients[0]
        if grad is None:
            return (None,) * (_TENSORS + 1)
        needed = ctx.needs_input_grad
        found = _pick(_NadeBackward).apply(grad, *ctx.saved_tensors, needed[0], ctx.backend)
        return (*(x if need else None for x, need in zip(found, needed[:_TENSORS], strict=True)), None)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if any(dim is not None for dim in in_dims[1:_TENSORS]):
            return one_by_one(_pick(_Nade), info.batch_size, in_dims, inputs)
        (x,) = fold(info.batch_size, in_dims[:1], inputs[:1])
        log_prob, logits = _pick(_Nade).apply(x, *inputs[1:])
        return (unfold(log_prob, info.batch_size), unfold(logits, info.batch_size)), (0, 0)


class _NadeBackward(Function):
    """The kernels' backward; differentiated again through :mod:`derivative`."""

    @staticmethod
    def forward(grad, logits, x, in_weight, in_bias, out_weight, out_bias, needs_x, backend):
        tensors = (tensor.contiguous() for tensor in (grad, logits, x, in_weight, in_bias, out_weight))
        return backends.call(backend, schema.BACKWARD)(*tensors, needs_x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], *inputs[2 : 2 + _TENSORS])  # logits are a function of the others
        ctx.needs_x = inputs[7]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:7])
        wanted = [i for i, need in enumerate(needed) if need]
        kept = [i for i, g in enumerate(gradients) if g is not None and (i > 0 or ctx.needs_x)]
        result: list[Tensor | None] = [None] * 9
        if wanted and kept:
            _, transpose = vjp(*_gradient_of(ctx, wanted, kept))
            for i, x in zip(wanted, transpose(tuple(gradients[i] for i in kept)), strict=True):
                result[i if i == 0 else i + 1] = x
        return tuple(result)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        # each has gradients of weights to itself
        return one_by_one(_pick(_NadeBackward), info.batch_size, in_dims, inputs)


def _gradient_of(ctx, wanted: list[int], kept: list[int]):
    """The gradients numbered ``kept`` as a differentiable function of the saved tensors numbered ``wanted``."""
    return of_some(derivative.log_prob_gradient, ctx.saved_tensors, wanted, kept)


class _NadeForwardMode(_Nade):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _Nade.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:_TENSORS])
        ctx.wide = output[0].dtype

    @staticmethod
    def jvp(ctx, *tangents):
        inputs = ctx.saved_tensors
        samples = torch.zeros(inputs[0].shape[0], dtype=ctx.wide, device=inputs[0].device)
        # the gradient is linear in that of the output: its transpose is the derivative in a direction
        found, transpose = vjp(lambda grad: derivative.log_prob_gradient(grad, *inputs), (samples,))
        along = [torch.zeros_like(x) if t is None else t for x, t in zip(found, tangents[:_TENSORS], strict=True)]
        return transpose(tuple(along))[0], torch.zeros_like(inputs[0], dtype=ctx.wide)


class _NadeBackwardForwardMode(_NadeBackward):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _NadeBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], *inputs[2 : 2 + _TENSORS])
        ctx.outputs = [(x.shape, x.dtype, x.device) for x in output]

    @staticmethod
    def jvp(ctx, *tangents):
        along = (tangents[0], *tangents[2:7])
        wanted = [i for i, tangent in enumerate(along) if tangent is not None]
        kept = [i for i in range(_TENSORS) if i > 0 or ctx.needs_x]
        result = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.outputs]
        if not wanted:
            return tuple(result)
        found = directional(*_gradient_of(ctx, wanted, kept), [along[i] for i in wanted])
        for i, x in zip(kept, found, strict=True):
            result[i] = x
        return tuple(result)


_FORWARD_MODE = {_Nade: _NadeForwardMode, _NadeBackward: _NadeBackwardForwardMode}
