"""How the kernels of MADE's layer are called and differentiated, on every backend.

The layer is linear in x and in the weight, each with the other fixed, so that every derivative is one of the two ops
again: the backward is a second autograd.Function, and its own derivatives are the forward on the gradients' gradients
and the backward with one argument exchanged. Nothing that the mask hides is read in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import backends
from mpkernels.autograd import Function, differentiated, fold, forward_mode, one_by_one, unfold
from mpkernels.convolution.masked_linear import schema

_OF_X, _OF_WEIGHT, _OF_BIAS = 1, 2, 4  # bits of `needs`


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, order_in: Tensor, order_out: Tensor, count: Tensor, *, backend: str
) -> Tensor:
    """The op on (N, I) rows, differentiable."""
    if differentiated((x, weight, bias)):
        return _linear(x, weight, bias, (order_in, order_out, count), backend)
    return _forward(x, weight, bias, order_in, order_out, count, backend)


def _forward(x, weight, bias, order_in, order_out, count, backend):
    bias = None if bias is None else bias.contiguous()
    return backends.call(backend, schema.FORWARD)(x.contiguous(), weight.contiguous(), bias, order_in, order_out, count)


def _pick(function):
    """The variant that also has a forward-mode derivative, kept apart because torch.compile does not trace those."""
    return _FORWARD_MODE[function] if forward_mode() else function


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan, backend: str) -> Tensor:
    return _pick(_MaskedLinear).apply(x, weight, bias, *plan, backend)


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, plan, needs: int, backend: str) -> tuple[Tensor, ...]:
    return _pick(_MaskedLinearBackward).apply(grad, x, weight, *plan, needs, backend)


def _sum(*terms: Tensor | None) -> Tensor | None:
    """The sum of those that there are."""
    there = [x for x in terms if x is not None]
    return sum(there[1:], there[0]) if there else None


class _MaskedLinear(Function):
    """First derivatives by the kernels' own backward; its backward is a Function, and so differentiable again."""

    @staticmethod
    def forward(x, weight, bias, order_in, order_out, count, backend):
        return _forward(x, weight, bias, order_in, order_out, count, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, *plan, ctx.backend = inputs
        ctx.save_for_backward(x, weight, *plan)

    @staticmethod
    def backward(ctx, *gradients):
        (grad,), (x, weight, *plan) = gradients, ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        needs = sum(1 << i for i in range(3) if needed[i])
        found = _gradients(grad, x, weight, plan, needs, ctx.backend) if needs else (None,) * 3
        return *(g if need else None for g, need in zip(found, needed, strict=True)), None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if any(dim is not None for dim in in_dims[1:]):
            return one_by_one(_pick(_MaskedLinear), info.batch_size, in_dims, inputs)
        (x,) = fold(info.batch_size, in_dims[:1], inputs[:1])
        return unfold(_pick(_MaskedLinear).apply(x, *inputs[1:]), info.batch_size), 0


class _MaskedLinearBackward(Function):
    """The kernels' backward: gradients of x, weight and bias, linear in each of grad, x and weight."""

    @staticmethod
    def forward(grad, x, weight, order_in, order_out, count, needs, backend):
        return backends.call(backend, schema.BACKWARD)(
            grad.contiguous(), x.contiguous(), weight.contiguous(), order_in, order_out, count, needs
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.needs, ctx.backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        grad, x, weight, *plan = ctx.saved_tensors
        of_x, of_weight, of_bias = (g if ctx.needs >> i & 1 else None for i, g in enumerate(gradients))
        backend, needed = ctx.backend, ctx.needs_input_grad
        for_grad = for_x = for_weight = None
        if needed[0]:
            if of_x is not None:
                for_grad = _linear(of_x, weight, of_bias, plan, backend)
            elif of_bias is not None:
                for_grad = of_bias.expand_as(grad)
            if of_weight is not None:
                for_grad = _sum(for_grad, _linear(x, of_weight, None, plan, backend))
        if needed[1] and of_weight is not None:
            for_x = _gradients(grad, x, of_weight, plan, _OF_X, backend)[0]
        if needed[2] and of_x is not None:
            for_weight = _gradients(grad, of_x, weight, plan, _OF_WEIGHT, backend)[1]
        return for_grad, for_x, for_weight, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if inputs[6] != _OF_X or any(dim is not None for dim in in_dims[2:]):
            return one_by_one(_pick(_MaskedLinearBackward), info.batch_size, in_dims, inputs)
        grad, x = fold(info.batch_size, in_dims[:2], inputs[:2])
        found = _pick(_MaskedLinearBackward).apply(grad, x, *inputs[2:])
        return (unfold(found[0], info.batch_size), *found[1:]), (0, None, None)


class _MaskedLinearForwardMode(_MaskedLinear):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _MaskedLinear.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], inputs[1], *inputs[3:6])
        ctx.output = output.shape, output.dtype, output.device

    @staticmethod
    def jvp(ctx, *tangents):
        x, weight, *plan = ctx.saved_tensors
        of_x, of_weight, of_bias = tangents[:3]
        along = None
        if of_x is not None:
            along = _linear(of_x, weight, of_bias, plan, ctx.backend)
        elif of_bias is not None:
            shape, dtype, device = ctx.output
            along = torch.zeros(shape, dtype=dtype, device=device) + of_bias
        if of_weight is not None:
            along = _sum(along, _linear(x, of_weight, None, plan, ctx.backend))
        return along


class _MaskedLinearBackwardForwardMode(_MaskedLinearBackward):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _MaskedLinearBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:6])
        ctx.outputs = [(x.shape, x.dtype, x.device) for x in output]

    @staticmethod
    def jvp(ctx, *tangents):
        grad, x, weight, *plan = ctx.saved_tensors
        of_grad, of_x, of_weight = tangents[:3]
        along: list[Tensor | None] = [None, None, None]
        if of_grad is not None:
            found = _gradients(of_grad, x, weight, plan, ctx.needs, ctx.backend)
            along = [g if ctx.needs >> i & 1 else None for i, g in enumerate(found)]
        if of_weight is not None and ctx.needs & _OF_X:
            along[0] = _sum(along[0], _gradients(grad, x, of_weight, plan, _OF_X, ctx.backend)[0])
        if of_x is not None and ctx.needs & _OF_WEIGHT:
            along[1] = _sum(along[1], _gradients(grad, of_x, weight, plan, _OF_WEIGHT, ctx.backend)[1])
        return tuple(
            torch.zeros(shape, dtype=dtype, device=device) if g is None else g
            for g, (shape, dtype, device) in zip(along, ctx.outputs, strict=True)
        )


_FORWARD_MODE = {_MaskedLinear: _MaskedLinearForwardMode, _MaskedLinearBackward: _MaskedLinearBackwardForwardMode}
