"""How the kernels of the depthwise convolution are called and differentiated.

The forward is an autograd.Function whose backward is a second Function over the kernels' own backward, so that
gradients can be differentiated again; that second step goes through torch operations (:mod:`derivative`).
"""

from __future__ import annotations

from collections.abc import Sequence

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
    one_by_one,
    vjp,
)
from mpkernels.convolution.depthwise_conv1d import derivative, schema

_TENSORS = 5  # x, weight, bias, state, seq_idx


def run(*arguments, backend: str) -> Tensor:
    """The op (x, weight, bias, state, seq_idx, dilation, silu), differentiable.

    Where nothing asks for a derivative the op is called directly: the Function costs as much as a small op.
    """
    if differentiated(arguments[:4]):
        return _pick(_Depthwise).apply(*arguments, backend)
    return _forward(*arguments, backend)  # pyright: ignore[reportCallIssue]


def _pick(function):
    """The variant that also has a forward-mode derivative, kept apart because torch.compile does not trace those."""
    return _FORWARD_MODE[function] if forward_mode() else function


def layout(x: Tensor) -> tuple[Tensor, bool]:
    """Inputs as the kernels read them, and whether their channels lie side by side."""
    if x.stride(2) == 1 and not (x.shape[2] == 1 and x.stride(1) == 1):
        return x, False
    if x.stride(1) == 1:
        return x, True
    return x.contiguous(), False


def _in_order(x: Tensor | None, channels_last: bool) -> Tensor | None:
    """A (B, C, n) tensor contiguous in the order asked for; copied only where it is not."""
    if x is None:
        return None
    return x.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else x.contiguous()


def _forward(x, weight, bias, state, seq_idx, dilation, silu, backend):
    x, channels_last = layout(x)
    return backends.call(backend, schema.FORWARD)(
        x,
        weight.contiguous(),
        contiguous(bias),
        _in_order(state, channels_last),
        contiguous(seq_idx),
        dilation,
        silu,
        channels_last,
    )


class _Depthwise(Function):
    """First derivatives by the kernels' own backward; its backward is a Function, and so differentiable again."""

    @staticmethod
    def forward(x, weight, bias, state, seq_idx, dilation, silu, backend):
        return _forward(x, weight, bias, state, seq_idx, dilation, silu, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:_TENSORS])
        ctx.settings = inputs[_TENSORS:]

    @staticmethod
    def backward(ctx, *gradients):
        needed = ctx.needs_input_grad[:4]
        found = _pick(_DepthwiseBackward).apply(*gradients, *ctx.saved_tensors, *ctx.settings, *needed)
        return *(x if need else None for x, need in zip(found, needed, strict=True)), None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if in_dims[4] is not None:
            return one_by_one(_pick(_Depthwise), info.batch_size, in_dims, inputs)
        tensors = _fold(info.batch_size, in_dims[:4], inputs[:4])
        out = _pick(_Depthwise).apply(*tensors, *inputs[4:])
        return _unfold(out, info.batch_size), 0


class _DepthwiseBackward(Function):
    """The kernels' backward; differentiated again through :mod:`derivative`."""

    @staticmethod
    def forward(
        grad,
        x,
        weight,
        bias,
        state,
        seq_idx,
        dilation,
        silu,
        backend,
        needs_x,
        needs_weight,
        needs_bias,
        needs_state,
    ):
        x, channels_last = layout(x)
        return backends.call(backend, schema.BACKWARD)(
            _in_order(grad, channels_last),  # (torch.compile does not know its strides here)
            x,
            weight.contiguous(),
            contiguous(bias),
            _in_order(state, channels_last),
            contiguous(seq_idx),
            dilation,
            silu,
            channels_last,
            needs_x,
            needs_weight,
            needs_bias,
            needs_state,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6])
        ctx.settings = inputs[6:8]
        ctx.needs = inputs[9:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        wanted = [i for i in range(5) if ctx.saved_tensors[i] is not None and ctx.needs_input_grad[i]]
        kept = [i for i, (g, need) in enumerate(zip(gradients, ctx.needs, strict=True)) if need and g is not None]
        result: list[Tensor | None] = [None] * 13
        if not wanted or not kept:
            return tuple(result)
        _, transpose = vjp(*_gradient_of(ctx, wanted, kept))
        for i, x in zip(wanted, transpose(tuple(gradients[i] for i in kept)), strict=True):
            result[i] = x
        return tuple(result)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if in_dims[5] is not None:
            return one_by_one(_pick(_DepthwiseBackward), info.batch_size, in_dims, inputs)
        size = info.batch_size
        (grad,) = _fold(size, in_dims[:1], inputs[:1])
        tensors = _fold(size, in_dims[1:5], inputs[1:5])
        needs = inputs[9:]
        of_x, of_weight, of_bias, of_state = _pick(_DepthwiseBackward).apply(grad, *tensors, *inputs[5:])
        out = (
            _unfold(of_x, size) if needs[0] else of_x,
            of_weight.unflatten(0, (size, -1)) if needs[1] else of_weight,
            of_bias.unflatten(0, (size, -1)) if needs[2] else of_bias,
            _unfold(of_state, size) if needs[3] else of_state,
        )
        return out, tuple(0 if need else None for need in needs)


def _fold(batch: int, in_dims: Sequence, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A mapped dimension as more channels: (V, B, C, n) -> (B, V C, n), (V, C, ...) -> (V C, ...)."""
    return [
        None if x is None else x.transpose(0, 1).flatten(1, 2) if x.dim() == 4 else x.flatten(0, 1)
        for x in mapped_first(batch, in_dims, tensors)
    ]


def _unfold(x: Tensor, batch: int) -> Tensor:
    """(B, V C, n) -> (V, B, C, n)."""
    return x.unflatten(1, (batch, x.shape[1] // batch)).transpose(0, 1)


def _gradient_of(ctx, wanted, kept):
    """The gradients numbered ``kept`` as a differentiable function of the saved tensors numbered ``wanted``."""

    def gradients(*saved):
        return derivative.depthwise_gradient(*saved, *ctx.settings)

    return of_some(gradients, ctx.saved_tensors, wanted, kept)


class _DepthwiseForwardMode(_Depthwise):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _Depthwise.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:_TENSORS])
        ctx.output_like = output.shape, output.dtype, output.device

    @staticmethod
    def jvp(ctx, *tangents):
        inputs = ctx.saved_tensors
        shape, dtype, device = ctx.output_like
        # the gradient is linear in the gradient of the output: its transpose is the derivative in a direction
        found, transpose = vjp(
            lambda g: tuple(x for x in derivative.depthwise_gradient(g, *inputs, *ctx.settings[:2]) if x is not None),
            [torch.zeros(shape, dtype=dtype, device=device)],
        )
        present = [t for x, t in zip(inputs[:4], tangents[:4], strict=True) if x is not None]
        along = tuple(torch.zeros_like(x) if t is None else t for x, t in zip(found, present, strict=True))
        return _in_order(transpose(along)[0], layout(inputs[0])[1])  # (views need tangents in the order of the primal)


class _DepthwiseBackwardForwardMode(_DepthwiseBackward):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _DepthwiseBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:6])
        ctx.output_like = [(x.shape, x.dtype, x.device) for x in output]

    @staticmethod
    def jvp(ctx, *tangents):
        wanted = [i for i in range(5) if ctx.saved_tensors[i] is not None and tangents[i] is not None]
        kept = [i for i, need in enumerate(ctx.needs) if need]
        found = directional(*_gradient_of(ctx, wanted, kept), [tangents[i] for i in wanted])
        result = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.output_like]
        for i, x in zip(kept, found, strict=True):
            result[i] = _in_order(x, layout(ctx.saved_tensors[1])[1]) if x.dim() == 3 else x  # pyright: ignore
        return tuple(result)


_FORWARD_MODE = {_Depthwise: _DepthwiseForwardMode, _DepthwiseBackward: _DepthwiseBackwardForwardMode}
