"""How the kernel of the product with a matrix is called and differentiated.

It is linear in x and in the weight, each with the other fixed, so that every derivative is one of the two ops again:
the backward is a second autograd.Function, and its own derivatives are the forward on the gradients' gradients and the
backward with one argument exchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import backends
from mpkernels.autograd import Function, differentiated, fold, forward_mode, one_by_one, unfold
from mpkernels.flows.invertible_conv1x1 import reference, schema

_OF_X, _OF_WEIGHT = (True, False, False), (False, True, False)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str) -> Tensor:
    """The op on x (B, C, S), differentiable, on a backend or on the reference."""
    if backend == "reference":
        return reference.channel_mix(x, weight, bias)
    if differentiated((x, weight, bias)):
        return _mix(x, weight, bias, backend)
    return _forward(x, weight, bias, backend)


def _forward(x, weight, bias, backend):
    bias = None if bias is None else bias.contiguous()
    return backends.call(backend, schema.FORWARD)(x, weight.contiguous(), bias)


def _pick(function):
    """The variant that also has a forward-mode derivative, kept apart because torch.compile does not trace those."""
    return _FORWARD_MODE[function] if forward_mode() else function


def _mix(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return _pick(_Mix).apply(x, weight, bias, backend)


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, needs, backend: str) -> tuple[Tensor, ...]:
    return _pick(_MixBackward).apply(grad, x, weight, backend, *needs)


def _sum(*terms: Tensor | None) -> Tensor | None:
    """The sum of those that there are."""
    there = [x for x in terms if x is not None]
    return sum(there[1:], there[0]) if there else None


class _Mix(Function):
    """First derivatives by the kernel's own backward; its backward is a Function, and so differentiable again."""

    @staticmethod
    def forward(x, weight, bias, backend):
        return _forward(x, weight, bias, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.backend = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, *gradients):
        needed = ctx.needs_input_grad[:3]
        (grad,), (x, weight) = gradients, ctx.saved_tensors
        found = _gradients(grad, x, weight, needed, ctx.backend)
        return *(g if need else None for g, need in zip(found, needed, strict=True)), None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if in_dims[1] is not None or in_dims[2] is not None:
            return one_by_one(_pick(_Mix), info.batch_size, in_dims, inputs)
        (x,) = fold(info.batch_size, in_dims[:1], inputs[:1])
        return unfold(_pick(_Mix).apply(x, *inputs[1:]), info.batch_size), 0


class _MixBackward(Function):
    """The kernel's backward: gradients of x, weight and bias, linear in each of grad, x and weight."""

    @staticmethod
    def forward(grad, x, weight, backend, needs_x, needs_weight, needs_bias):
        return backends.call(backend, schema.BACKWARD)(
            grad.contiguous(), x, weight.contiguous(), needs_x, needs_weight, needs_bias
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.backend = inputs[:4]
        ctx.needs = inputs[4:]
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        grad, x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = (g if need else None for g, need in zip(gradients, ctx.needs, strict=True))
        backend, needed = ctx.backend, ctx.needs_input_grad
        for_grad = for_x = for_weight = None
        if needed[0]:
            if of_x is not None:
                for_grad = _mix(of_x, weight, of_bias, backend)
            elif of_bias is not None:
                for_grad = of_bias[:, None].expand_as(grad).to(grad.dtype)
            if of_weight is not None:
                for_grad = _sum(for_grad, _mix(x, of_weight, None, backend))
        if needed[1] and of_weight is not None:
            for_x = _gradients(grad, x, of_weight, _OF_X, backend)[0]
        if needed[2] and of_x is not None:
            for_weight = _gradients(grad, of_x, weight, _OF_WEIGHT, backend)[1]
        return for_grad, for_x, for_weight, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if inputs[4:] != _OF_X or in_dims[2] is not None:
            return one_by_one(_pick(_MixBackward), info.batch_size, in_dims, inputs)
        grad, x = fold(info.batch_size, in_dims[:2], inputs[:2])
        found = _pick(_MixBackward).apply(grad, x, *inputs[2:])
        return (unfold(found[0], info.batch_size), *found[1:]), (0, None, None)


class _MixForwardMode(_Mix):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _Mix.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])
        ctx.output = output.shape, output.dtype, output.device

    @staticmethod
    def jvp(ctx, *tangents):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = tangents[:3]
        along = None
        if of_x is not None:
            along = _mix(of_x, weight, of_bias, ctx.backend)
        elif of_bias is not None:
            shape, dtype, device = ctx.output
            along = torch.zeros(shape, dtype=dtype, device=device) + of_bias[:, None].to(dtype)
        if of_weight is not None:
            along = _sum(along, _mix(x, of_weight, None, ctx.backend))
        return along


class _MixBackwardForwardMode(_MixBackward):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _MixBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])
        ctx.outputs = [(x.shape, x.dtype, x.device) for x in output]

    @staticmethod
    def jvp(ctx, *tangents):
        grad, x, weight = ctx.saved_tensors
        of_grad, of_x, of_weight = tangents[:3]
        along: list[Tensor | None] = [None, None, None]
        if of_grad is not None:
            found = _gradients(of_grad, x, weight, ctx.needs, ctx.backend)
            along = [g if need else None for g, need in zip(found, ctx.needs, strict=True)]
        if of_weight is not None and ctx.needs[0]:
            along[0] = _sum(along[0], _gradients(grad, x, of_weight, _OF_X, ctx.backend)[0])
        if of_x is not None and ctx.needs[1]:
            along[1] = _sum(along[1], _gradients(grad, of_x, weight, _OF_WEIGHT, ctx.backend)[1])
        return tuple(
            torch.zeros(shape, dtype=dtype, device=device) if g is None else g
            for g, (shape, dtype, device) in zip(along, ctx.outputs, strict=True)
        )


_FORWARD_MODE = {_Mix: _MixForwardMode, _MixBackward: _MixBackwardForwardMode}
