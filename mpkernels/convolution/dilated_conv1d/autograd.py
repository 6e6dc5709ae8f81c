"""How the kernels of the dilated convolution are called and differentiated.

The forward is an autograd.Function whose backward is a second Function over the kernels' own backward. A convolution
is linear in its input and linear in its weights, so the derivatives of both Functions, of any order and in forward
mode, are the same two ops with other arguments: for changes dx, dw, db, ds of the arguments

    d out         = conv(dx, w, db, ds) + conv(x, dw, 0, s)
    d (gx, gs)    = backward of x and s at dw instead of w
    d gw          = backward of w at dx, ds instead of x, s

and the derivative of the backward, in the gradient that it is given, is the first line again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels import backends
from mpkernels.autograd import Function, contiguous, differentiated, fold, forward_mode, unfold
from mpkernels.convolution.dilated_conv1d import schema
from mpkernels.convolution.dilated_conv1d.sequences import readable


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    dilation: int,
    groups: int,
    left: int,
    channels_last: bool,
    backend: str,
) -> Tensor:
    """The op on arguments as in schema.py, differentiable.

    Where nothing asks for a derivative the op is called directly: the Function costs as much as a small op.
    """
    arguments = (x, weight, bias, state, dilation, groups, left, channels_last, backend)
    if differentiated(arguments[:4]):
        return _pick(_Convolution).apply(*arguments)
    return _forward(*arguments)


def run_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    settings: tuple,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and state, differentiable; ``settings`` as :func:`run` takes them after the state.

    One that ``needs`` leaves out has shape (0,).
    """
    return _pick(_ConvolutionBackward).apply(grad_out, x, weight, state, *settings, *needs)


def _pick(function):
    """The variant that also has a forward-mode derivative, kept apart because torch.compile does not trace those."""
    return _FORWARD_MODE[function] if forward_mode() else function


def _forward(x, weight, bias, state, dilation, groups, left, channels_last, backend) -> Tensor:
    return backends.call(backend, schema.FORWARD)(
        readable(x), weight.contiguous(), contiguous(bias), contiguous(state), dilation, groups, left, channels_last
    )


def _along(x, weight, state, settings, of_x, of_weight, of_bias, of_state) -> Tensor | None:
    """The change of out for changes of the arguments, None for those that do not change."""
    found = None
    if of_x is not None or of_state is not None:
        of_x = torch.zeros_like(x) if of_x is None else of_x
        found = run(of_x, weight, of_bias, of_state, *settings)
    elif of_bias is not None:
        found = of_bias[:, None].expand(x.shape[0], weight.shape[0], x.shape[2])
    if of_weight is not None:
        through_weight = run(x, of_weight, None, state, *settings)
        found = through_weight if found is None else found + through_weight
    return found


class _Convolution(Function):
    """First derivatives by the kernels' own backward; its backward is a Function, and so differentiable again."""

    @staticmethod
    def forward(x, weight, bias, state, dilation, groups, left, channels_last, backend):
        return _forward(x, weight, bias, state, dilation, groups, left, channels_last, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, state = inputs[:4]
        ctx.save_for_backward(x, weight, state)
        ctx.settings = inputs[4:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        (grad_out,) = gradients
        result: list[Tensor | None] = [None] * 9
        needs = tuple(ctx.needs_input_grad[:4])
        if grad_out is None or not any(needs):
            return tuple(result)
        found = _pick(_ConvolutionBackward).apply(grad_out, *ctx.saved_tensors, *ctx.settings, *needs)
        for i, need in enumerate(needs):
            if need:
                result[i] = found[i]
        return tuple(result)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if in_dims[1] is not None or in_dims[2] is not None:
            return _one_by_one(_Convolution, info, in_dims, inputs)
        x, state = fold(info.batch_size, (in_dims[0], in_dims[3]), (inputs[0], inputs[3]))
        out = _pick(_Convolution).apply(x, inputs[1], inputs[2], state, *inputs[4:])
        return unfold(out, info.batch_size), 0


class _ConvolutionBackward(Function):
    """The kernels' backward; its own derivatives are the two ops again (see above)."""

    @staticmethod
    def forward(
        grad_out,
        x,
        weight,
        state,
        dilation,
        groups,
        left,
        channels_last,
        backend,
        needs_x,
        needs_weight,
        needs_bias,
        needs_state,
    ):
        return backends.call(backend, schema.BACKWARD)(
            readable(grad_out),
            readable(x),
            weight.contiguous(),
            contiguous(state),
            dilation,
            groups,
            left,
            channels_last,
            needs_x,
            needs_weight,
            needs_bias,
            needs_state,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.settings = inputs[4:9]
        ctx.needs = inputs[9:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        of_x, of_weight, of_bias, of_state = (g if need else None for g, need in zip(gradients, ctx.needs, strict=True))
        grad_out, x, weight, state = ctx.saved_tensors
        needs_grad, needs_x, needs_weight, needs_state = ctx.needs_input_grad[:4]
        result: list[Tensor | None] = [None] * 13
        if needs_grad:
            result[0] = _along(x, weight, state, ctx.settings, of_x, of_weight, of_bias, of_state)
        if of_weight is not None and (needs_x or needs_state):
            found = run_backward(grad_out, x, of_weight, state, ctx.settings, (needs_x, False, False, needs_state))
            result[1] = found[0] if needs_x else None
            result[3] = found[3] if needs_state else None
        if needs_weight and (of_x is not None or of_state is not None):
            of_x = torch.zeros_like(x) if of_x is None else of_x
            needs = (False, True, False, False)
            result[2] = run_backward(grad_out, of_x, weight, of_state, ctx.settings, needs)[1]
        return tuple(result)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        _, needs_weight, needs_bias, _ = needs = inputs[9:]
        if in_dims[2] is not None or needs_weight or needs_bias:  # every sample has its own gradient of the weights
            return _one_by_one(_ConvolutionBackward, info, in_dims, inputs, needs)
        grad_out, x, state = fold(
            info.batch_size, (in_dims[0], in_dims[1], in_dims[3]), (inputs[0], inputs[1], inputs[3])
        )
        found = _pick(_ConvolutionBackward).apply(grad_out, x, inputs[2], state, *inputs[4:])
        unfolded = tuple(unfold(g, info.batch_size) if need else g for g, need in zip(found, needs, strict=True))
        return unfolded, tuple(0 if need else None for need in needs)


class _ConvolutionForwardMode(_Convolution):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _Convolution.setup_context(ctx, inputs, output)
        x, weight, _, state = inputs[:4]
        ctx.save_for_forward(x, weight, state)

    @staticmethod
    def jvp(ctx, *tangents):
        x, weight, state = ctx.saved_tensors
        found = _along(x, weight, state, ctx.settings, *tangents[:4])
        return x.new_zeros(x.shape[0], weight.shape[0], x.shape[2]) if found is None else found


class _ConvolutionBackwardForwardMode(_ConvolutionBackward):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _ConvolutionBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4])
        ctx.outputs = [(g.shape, g.dtype, g.device) for g in output]

    @staticmethod
    def jvp(ctx, *tangents):
        grad_out, x, weight, state = ctx.saved_tensors
        of_grad, of_x, of_weight, of_state = tangents[:4]
        needs_x, needs_weight, _, needs_state = ctx.needs
        terms = []  # (gradients, which of them change)
        if of_grad is not None:
            terms.append((run_backward(of_grad, x, weight, state, ctx.settings, ctx.needs), ctx.needs))
        if of_weight is not None and (needs_x or needs_state):
            needs = (needs_x, False, False, needs_state)
            terms.append((run_backward(grad_out, x, of_weight, state, ctx.settings, needs), needs))
        if needs_weight and (of_x is not None or of_state is not None):
            of_x = torch.zeros_like(x) if of_x is None else of_x
            needs = (False, True, False, False)
            terms.append((run_backward(grad_out, of_x, weight, of_state, ctx.settings, needs), needs))
        found = []
        for i, (shape, dtype, device) in enumerate(ctx.outputs):
            changes = [gradients[i] for gradients, needs in terms if needs[i]]
            found.append(sum(changes[1:], changes[0]) if changes else torch.zeros(shape, dtype=dtype, device=device))
        return tuple(found)


_FORWARD_MODE = {_Convolution: _ConvolutionForwardMode, _ConvolutionBackward: _ConvolutionBackwardForwardMode}


def _one_by_one(function, info, in_dims, inputs, needs=None):
    """Samples one after another, where each has weights, or a gradient of weights, of its own."""
    found = []
    for v in range(info.batch_size):
        one = (x if dim is None else x.select(dim, v) for x, dim in zip(inputs, in_dims, strict=True))
        found.append(_pick(function).apply(*one))
    if needs is None:
        return torch.stack(found), 0
    columns = zip(zip(*found, strict=True), needs, strict=True)
    return tuple(torch.stack(x) if need else x[0] for x, need in columns), tuple(0 if need else None for need in needs)
