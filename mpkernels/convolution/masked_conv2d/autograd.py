"""How the kernels of the masked convolution are called and differentiated, on every backend.

The convolution is linear in x, in weight and in bias, so that every derivative, of any order and in either mode, is
again one of the two ops: with the forward F(x, w) and the gradients X(g, w) of x and W(g, x) of the weight,

    <a, X(g, w)> has the gradients F(a, w) to g and W(g, a) to w,
    <a, W(g, x)> has the gradients F(x, a) to g and X(g, a) to x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import backends
from mpkernels.autograd import Function, contiguous, differentiated, fold, forward_mode, unfold
from mpkernels.convolution.masked_conv2d import schema


def run(x: Tensor, weight: Tensor, bias: Tensor | None, *settings, backend: str) -> Tensor:
    """The op (arguments as in schema.py), differentiable. Where nothing asks for that it is called directly."""
    if differentiated((x, weight, bias)):
        return _convolve(x, weight, bias, settings, backend)
    return backends.call(backend, schema.FORWARD)(*map(contiguous, (x, weight, bias)), *settings)


def _convolve(x, weight, bias, settings, backend) -> Tensor:
    return _pick(_Convolution).apply(x, weight, bias, settings, backend)  # pyright: ignore[reportReturnType]


def _gradients(grad, x, weight, settings, needs, backend) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; those that ``needs`` does not name are empty."""
    return _pick(_ConvolutionBackward).apply(grad, x, weight, settings, needs, backend)  # pyright: ignore


def _pick(function):
    """The variant that also has a forward-mode derivative, kept apart because torch.compile does not trace those."""
    return _FORWARD_MODE[function] if forward_mode() else function


class _Convolution(Function):
    @staticmethod
    def forward(x, weight, bias, settings, backend):
        return backends.call(backend, schema.FORWARD)(*map(contiguous, (x, weight, bias)), *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.settings, ctx.backend = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx, *gradients):
        needs = tuple(ctx.needs_input_grad[:2]) + (ctx.has_bias and ctx.needs_input_grad[2],)
        x, weight = ctx.saved_tensors
        found = _gradients(gradients[0], x, weight, ctx.settings, needs, ctx.backend)
        return *(x if need else None for x, need in zip(found, needs, strict=True)), None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        x, weight, bias, settings, backend = inputs
        if in_dims[1] is None and in_dims[2] is None:
            (x,) = fold(info.batch_size, in_dims[:1], (x,))
            return unfold(_convolve(x, weight, bias, settings, backend), info.batch_size), 0
        tensors = [_samples(info.batch_size, dim, x) for dim, x in zip(in_dims[:3], inputs[:3], strict=True)]
        return torch.stack([_convolve(x, w, b, settings, backend) for x, w, b in zip(*tensors, strict=True)]), 0


class _ConvolutionBackward(Function):
    @staticmethod
    def forward(grad, x, weight, settings, needs, backend):
        return backends.call(backend, schema.BACKWARD)(*map(contiguous, (grad, x, weight)), *settings, *needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.settings, ctx.needs, ctx.backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        grad, x, weight = ctx.saved_tensors
        along_x, along_weight, along_bias = (g if need else None for g, need in zip(gradients, ctx.needs, strict=True))
        of_grad = of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_grad = _along(along_x, along_weight, along_bias, grad, x, weight, ctx.settings, ctx.backend)
        if ctx.needs_input_grad[1] and along_weight is not None:
            of_x = _gradients(grad, x, along_weight, ctx.settings, (True, False, False), ctx.backend)[0]
        if ctx.needs_input_grad[2] and along_x is not None:
            of_weight = _gradients(grad, along_x, weight, ctx.settings, (False, True, False), ctx.backend)[1]
        return of_grad, of_x, of_weight, None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        grad, x, weight, settings, needs, backend = inputs
        if in_dims[2] is None and not needs[1] and not needs[2]:
            grad, x = fold(info.batch_size, in_dims[:2], (grad, x))
            found = _gradients(grad, x, weight, settings, needs, backend)
            return (unfold(found[0], info.batch_size), *found[1:]), (0, None, None)
        tensors = [_samples(info.batch_size, dim, x) for dim, x in zip(in_dims[:3], inputs[:3], strict=True)]
        found = [_gradients(g, x, w, settings, needs, backend) for g, x, w in zip(*tensors, strict=True)]
        return tuple(torch.stack(x) for x in zip(*found, strict=True)), (0, 0, 0)


def _along(along_x, along_weight, along_bias, grad, x, weight, settings, backend) -> Tensor | None:
    """What the output changes by, where x, weight and bias change by these directions (None: not at all)."""
    found = None
    if along_x is not None:
        found = _convolve(along_x, weight, along_bias, settings, backend)
    if along_weight is not None:
        more = _convolve(x, along_weight, along_bias if found is None else None, settings, backend)
        found = more if found is None else found + more
    if found is None and along_bias is not None:
        found = along_bias[:, None, None].expand_as(grad)
    return found


class _ConvolutionForwardMode(_Convolution):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _Convolution.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])
        ctx.like = torch.empty_like(output)

    @staticmethod
    def jvp(ctx, *tangents):
        x, weight = ctx.saved_tensors
        along_x, along_weight, along_bias = tangents[:3]
        found = _along(along_x, along_weight, along_bias, ctx.like, x, weight, ctx.settings, ctx.backend)
        return torch.zeros_like(ctx.like) if found is None else found


class _ConvolutionBackwardForwardMode(_ConvolutionBackward):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _ConvolutionBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])
        ctx.likes = [torch.empty_like(x) for x in output]

    @staticmethod
    def jvp(ctx, *tangents):
        along_grad, along_x, along_weight = tangents[:3]
        grad, x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs
        found = [torch.zeros_like(like) for like in ctx.likes]
        if along_grad is not None:
            found = list(_gradients(along_grad, x, weight, ctx.settings, ctx.needs, ctx.backend))
        if along_weight is not None and needs_x:
            more = _gradients(grad, x, along_weight, ctx.settings, (True, False, False), ctx.backend)
            found[0] = found[0] + more[0]
        if along_x is not None and needs_weight:
            more = _gradients(grad, along_x, weight, ctx.settings, (False, True, False), ctx.backend)
            found[1] = found[1] + more[1]
        return tuple(found)


_FORWARD_MODE = {_Convolution: _ConvolutionForwardMode, _ConvolutionBackward: _ConvolutionBackwardForwardMode}


def _samples(count: int, dim: int | None, x: Tensor | None) -> list[Tensor | None]:
    """The samples of a mapped tensor; one that all share, or None, for each of them."""
    return [x] * count if x is None or dim is None else list(x.unbind(dim))
