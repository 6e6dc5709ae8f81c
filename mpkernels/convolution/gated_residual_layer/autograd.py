"""How the kernels of WaveNet's layer are called and differentiated.

The forward is an autograd.Function whose backward is a second Function over the kernels' own backward, so that
gradients can be differentiated again; that second step goes through torch operations (:mod:`derivative`). One pair of
Functions serves every backend.
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
    fold,
    forward_mode,
    mapped_first,
    of_some,
    unfold,
    vjp,
)
from mpkernels.convolution.dilated_conv1d.sequences import readable
from mpkernels.convolution.gated_residual_layer import derivative, schema

# Where the arguments stand. _Layer takes those of schema.py and the backend; _LayerBackward takes grad_residual,
# grad_skip, gates, then the same tensors and settings (without keep), then needs and the backend.
_TENSORS = 8  # x, weight, offset, condition, condition_weight, projection, projection_bias, state
_BATCHED = (0, 3, 7)  # x, condition and state have a batch dimension; offset may have one
_SHARED = (1, 4, 5, 6)
_OFFSET = 2
_GATES = 2  # a function of the other arguments of _LayerBackward


def run(*arguments, backend: str) -> tuple[Tensor, Tensor]:
    """The op on the arguments of schema.py up to channels_last, differentiable: (residual, skip).

    Where nothing asks for a derivative the op is called directly, and gates are not kept.
    """
    if differentiated(arguments[:_TENSORS]):
        return _pick(_Layer).apply(*arguments, _keeps(arguments[:_TENSORS]), backend)[:2]
    return _forward(*arguments, False, backend)[:2]  # pyright: ignore[reportCallIssue]


def _keeps(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a backward may follow. (Where one follows that this did not foresee, it computes the gates again.)"""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return True
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _pick(function):
    """The variant that also has a forward-mode derivative, kept apart because torch.compile does not trace those."""
    return _FORWARD_MODE[function] if forward_mode() else function


def _readable(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The eight tensors as the kernels read them."""
    return [
        contiguous(x) if x is None or i not in (0, 3) else readable(x)  # x and condition in either memory order
        for i, x in enumerate(tensors)
    ]


def _forward(
    x,
    weight,
    offset,
    condition,
    condition_weight,
    projection,
    projection_bias,
    state,
    dilation,
    residual,
    residual_scale,
    channels_last,
    keep,
    backend,
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.call(backend, schema.FORWARD)(
        *_readable((x, weight, offset, condition, condition_weight, projection, projection_bias, state)),
        dilation,
        residual,
        residual_scale,
        channels_last,
        keep,
    )


class _Layer(Function):
    """First derivatives by the kernels' own backward; its backward is a Function, and so differentiable again."""

    @staticmethod
    def forward(
        x,
        weight,
        offset,
        condition,
        condition_weight,
        projection,
        projection_bias,
        state,
        dilation,
        residual,
        residual_scale,
        channels_last,
        keep,
        backend,
    ):
        return _forward(
            x,
            weight,
            offset,
            condition,
            condition_weight,
            projection,
            projection_bias,
            state,
            dilation,
            residual,
            residual_scale,
            channels_last,
            keep,
            backend,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[2], *inputs[:_TENSORS])
        *ctx.settings, ctx.keep, ctx.backend = inputs[_TENSORS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        grad_residual, grad_skip = gradients[:2]
        gates, *tensors = ctx.saved_tensors
        result: list[Tensor | None] = [None] * 14
        needs = sum(1 << i for i in range(_TENSORS) if ctx.needs_input_grad[i])
        if needs == 0 or (grad_residual is None and grad_skip is None):
            return tuple(result)
        if not ctx.keep:
            gates = _pick(_Layer).apply(*tensors, *ctx.settings, True, ctx.backend)[2]
        found = _pick(_LayerBackward).apply(
            grad_residual, grad_skip, gates, *tensors, *ctx.settings, needs, ctx.backend
        )
        for i in range(_TENSORS):
            if needs >> i & 1:
                result[i] = found[i]
        return tuple(result)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if any(in_dims[i] is not None for i in _SHARED):
            return _one_by_one(_Layer, info, in_dims, inputs, [True, True, inputs[12]])
        tensors = _fold(info.batch_size, in_dims[:_TENSORS], inputs[:_TENSORS])
        residual, skip, gates = _pick(_Layer).apply(*tensors, *inputs[_TENSORS:])
        residual, skip = unfold(residual, info.batch_size), unfold(skip, info.batch_size)
        return (residual, skip, unfold(gates, info.batch_size) if inputs[12] else gates), (
            0,
            0,
            0 if inputs[12] else None,
        )


class _LayerBackward(Function):
    """The kernels' backward; differentiated again through :mod:`derivative`."""

    @staticmethod
    def forward(
        grad_residual,
        grad_skip,
        gates,
        x,
        weight,
        offset,
        condition,
        condition_weight,
        projection,
        projection_bias,
        state,
        dilation,
        residual,
        residual_scale,
        channels_last,
        needs,
        backend,
    ):
        return backends.call(backend, schema.BACKWARD)(
            None if grad_residual is None else readable(grad_residual),
            None if grad_skip is None else readable(grad_skip),
            _in_order(gates, channels_last),
            *_readable((x, weight, offset, condition, condition_weight, projection, projection_bias, state)),
            dilation,
            residual,
            residual_scale,
            channels_last,
            needs,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[: 3 + _TENSORS])
        *settings, needs, backend = inputs[3 + _TENSORS :]
        ctx.settings = (*settings, backend)
        given = inputs[3 : 3 + _TENSORS]
        ctx.kept = [i for i in range(_TENSORS) if needs >> i & 1 and given[i] is not None]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        wanted = [
            i for i, x in enumerate(ctx.saved_tensors) if i != _GATES and x is not None and ctx.needs_input_grad[i]
        ]
        kept = [i for i in ctx.kept if gradients[i] is not None]
        result: list[Tensor | None] = [None] * 17
        if not wanted or not kept:
            return tuple(result)
        _, transpose = vjp(*_gradient_of(ctx, wanted, kept))
        for i, x in zip(wanted, transpose(tuple(gradients[i] for i in kept)), strict=True):
            result[i] = x
        return tuple(result)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        needs = inputs[15]
        wanted = [bool(needs >> i & 1) and inputs[3 + i] is not None for i in range(_TENSORS)]
        if any(in_dims[3 + i] is not None or wanted[i] for i in _SHARED) or wanted[_OFFSET]:
            return _one_by_one(_LayerBackward, info, in_dims, inputs, wanted)  # own gradients of what samples share
        gradients = fold(info.batch_size, in_dims[:3], inputs[:3])
        tensors = _fold(info.batch_size, in_dims[3 : 3 + _TENSORS], inputs[3 : 3 + _TENSORS])
        found = _pick(_LayerBackward).apply(*gradients, *tensors, *inputs[3 + _TENSORS :])
        return tuple(unfold(g, info.batch_size) if want else g for g, want in zip(found, wanted, strict=True)), tuple(
            0 if want else None for want in wanted
        )


def _in_order(gates: Tensor, channels_last: bool) -> Tensor:
    """Gates in the memory order that the kernel wrote them in (transforms may have changed it)."""
    return gates.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else gates.contiguous()


def _gradient_of(ctx, wanted: Sequence[int], kept: Sequence[int]):
    """The gradients numbered ``kept`` as a differentiable function of the saved tensors numbered ``wanted``."""

    def gradients(*saved):
        return derivative.layer_gradient(*saved[:_GATES], *saved[_GATES + 1 :], *ctx.settings)

    return of_some(gradients, ctx.saved_tensors, wanted, kept)


class _LayerForwardMode(_Layer):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _Layer.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:_TENSORS])
        ctx.outputs = [(x.shape, x.dtype, x.device) for x in output]

    @staticmethod
    def jvp(ctx, *tangents):
        inputs = ctx.saved_tensors
        residual, skip, gates = (torch.zeros(shape, dtype=t, device=device) for shape, t, device in ctx.outputs)
        present = [i for i in range(_TENSORS) if inputs[i] is not None]

        def gradient(grad_residual, grad_skip):
            given = [grad_residual, grad_skip, *inputs, *ctx.settings, ctx.backend]
            found = derivative.layer_gradient(*given)
            return tuple(found[i] for i in present)

        # the gradient is linear in the gradients of the outputs: its transpose is the derivative in a direction
        found, transpose = vjp(gradient, (residual, skip))
        along = (tangents[i] for i in present)
        changes = tuple(torch.zeros_like(x) if t is None else t for x, t in zip(found, along, strict=True))
        return (*transpose(changes), gates)  # nothing reads the tangent of gates


class _LayerBackwardForwardMode(_LayerBackward):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _LayerBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[: 3 + _TENSORS])
        ctx.outputs = [(x.shape, x.dtype, x.device) for x in output]

    @staticmethod
    def jvp(ctx, *tangents):
        wanted = [
            i for i, x in enumerate(ctx.saved_tensors) if i != _GATES and x is not None and tangents[i] is not None
        ]
        result = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.outputs]
        if not wanted:
            return tuple(result)
        found = directional(*_gradient_of(ctx, wanted, ctx.kept), [tangents[i] for i in wanted])
        for i, x in zip(ctx.kept, found, strict=True):
            result[i] = x
        return tuple(result)


_FORWARD_MODE = {_Layer: _LayerForwardMode, _LayerBackward: _LayerBackwardForwardMode}


def _fold(count: int, in_dims, tensors) -> list[Tensor | None]:
    """As ``fold`` for the eight tensors: weights, which no sample has for its own, stay as they are."""
    folded = list(tensors)
    for i in _BATCHED:
        (folded[i],) = fold(count, (in_dims[i],), (tensors[i],))
    offset, dim = tensors[_OFFSET], in_dims[_OFFSET]
    if offset is not None and (dim is not None or offset.shape[0] != 1):
        (mapped,) = mapped_first(count, (dim,), (offset,))
        assert mapped is not None
        assert folded[0] is not None
        folded[_OFFSET] = mapped.expand(count, folded[0].shape[0] // count, -1).flatten(0, 1)
    return folded


def _one_by_one(function, info, in_dims, inputs, present: Sequence[bool]):
    """Samples one after another, where each has weights, or a gradient of weights, of its own."""
    found = []
    for v in range(info.batch_size):
        one = (x if dim is None else x.select(dim, v) for x, dim in zip(inputs, in_dims, strict=True))
        found.append(_pick(function).apply(*one))
    columns = zip(zip(*found, strict=True), present, strict=True)
    return tuple(torch.stack(x) if is_there else x[0] for x, is_there in columns), tuple(
        0 if is_there else None for is_there in present
    )
