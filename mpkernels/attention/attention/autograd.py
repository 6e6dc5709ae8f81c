"""How the kernels of attention are called and differentiated.

The forward is an autograd.Function whose backward is a second Function over the kernels' own backward, so that
gradients can be differentiated again; that second step goes through torch operations (:mod:`derivative`). One pair of
Functions serves every backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpkernels import backends
from mpkernels.attention.attention import derivative, schema
from mpkernels.autograd import (
    Function,
    contiguous,
    differentiated,
    directional,
    fold,
    forward_mode,
    mapped_first,
    of_some,
    one_by_one,
    unfold,
    vjp,
)

# Where the arguments of the two Functions stand: _Attention takes those of schema.py and the backend, and
# _AttentionBackward takes grad_out, grad_lse, query, key, value, out, lse, and then the same from `first` on.
_TENSORS = 8  # query, key, value, first, last, mask, bias, seed
_BACKWARD_TENSORS = 12
_DIFFERENTIABLE = (0, 1, 2, 6)
_BACKWARD_DIFFERENTIABLE = (0, 1, 2, 3, 4, 10)  # out and lse are functions of the others


def run(*arguments, backend: str) -> tuple[Tensor, Tensor]:
    """The op on (B, H, L, E) tensors (arguments as in schema.py), differentiable: (out, lse).

    Where nothing asks for a derivative the op is called directly: the Function costs as much as a small op.
    """
    if differentiated(arguments[:_TENSORS]):
        return _pick(_Attention).apply(*arguments, backend)
    return _forward(*arguments, backend)  # pyright: ignore[reportCallIssue]


def _pick(function):
    """The variant that also has a forward-mode derivative, kept apart because torch.compile does not trace those."""
    return _FORWARD_MODE[function] if forward_mode() else function


def _rows(x: Tensor | None) -> Tensor | None:
    """What the kernels read: rows that are contiguous, with any strides between them."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _forward(query, key, value, first, last, mask, bias, seed, scale, softcap, dropout_p, heads_last, backend):
    return backends.call(backend, schema.FORWARD)(
        _rows(query),
        _rows(key),
        _rows(value),
        contiguous(first),
        contiguous(last),
        mask,
        bias,
        seed,
        scale,
        softcap,
        dropout_p,
        heads_last,
    )


class _Attention(Function):
    """First derivatives by the kernels' own backward; its backward is a Function, and so differentiable again."""

    @staticmethod
    def forward(query, key, value, first, last, mask, bias, seed, scale, softcap, dropout_p, heads_last, backend):
        return _forward(
            query, key, value, first, last, mask, bias, seed, scale, softcap, dropout_p, heads_last, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], *output, *inputs[3:_TENSORS])
        ctx.settings = inputs[_TENSORS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        grad_out, grad_lse = gradients
        needs_bias = ctx.needs_input_grad[6]
        result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if grad_out is None and grad_lse is None:
            return tuple(result)
        *settings, backend = ctx.settings
        found = _pick(_AttentionBackward).apply(grad_out, grad_lse, *ctx.saved_tensors, *settings, needs_bias, backend)
        for i, x in zip(_DIFFERENTIABLE, found, strict=True):
            if ctx.needs_input_grad[i]:
                result[i] = x
        return tuple(result)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if inputs[7] is not None:  # dropout counts batches, and every sample starts to count anew
            return one_by_one(_pick(_Attention), info.batch_size, in_dims, inputs)
        batch = inputs[0].shape[0] if in_dims[0] is None else inputs[0].movedim(in_dims[0], 0).shape[1]
        tensors = [
            *fold(info.batch_size, in_dims[:3], inputs[:3]),
            *_fold_shared(info.batch_size, batch, in_dims[3:7], inputs[3:7]),
            None,
        ]
        found = _pick(_Attention).apply(*tensors, *inputs[_TENSORS:])
        return tuple(unfold(x, info.batch_size) for x in found), (0, 0)


class _AttentionBackward(Function):
    """The kernels' backward; differentiated again through :mod:`derivative`."""

    @staticmethod
    def forward(
        grad_out,
        grad_lse,
        query,
        key,
        value,
        out,
        lse,
        first,
        last,
        mask,
        bias,
        seed,
        scale,
        softcap,
        dropout_p,
        heads_last,
        needs_bias,
        backend,
    ):
        return backends.call(backend, schema.BACKWARD)(
            _rows(grad_out),
            contiguous(grad_lse),
            _rows(query),
            _rows(key),
            _rows(value),
            _rows(out),
            contiguous(lse),
            contiguous(first),
            contiguous(last),
            mask,
            bias,
            seed,
            scale,
            softcap,
            dropout_p,
            heads_last,
            needs_bias,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:_BACKWARD_TENSORS])
        ctx.settings = inputs[_BACKWARD_TENSORS:]
        ctx.needs = (True, True, True, inputs[16])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        wanted = [i for i in _BACKWARD_DIFFERENTIABLE if ctx.saved_tensors[i] is not None and ctx.needs_input_grad[i]]
        kept = [i for i, (g, need) in enumerate(zip(gradients, ctx.needs, strict=True)) if need and g is not None]
        result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if not wanted or not kept:
            return tuple(result)
        _, transpose = vjp(*_gradient_of(ctx, wanted, kept))
        for i, x in zip(wanted, transpose(tuple(gradients[i] for i in kept)), strict=True):
            result[i] = x
        return tuple(result)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if inputs[11] is not None:
            return one_by_one(_pick(_AttentionBackward), info.batch_size, in_dims, inputs)
        needs_bias = inputs[16]
        batch = inputs[2].shape[0] if in_dims[2] is None else inputs[2].movedim(in_dims[2], 0).shape[1]
        tensors = [
            *fold(info.batch_size, in_dims[:7], inputs[:7]),
            *_fold_shared(info.batch_size, batch, in_dims[7:10], inputs[7:10]),
            # every sample has its own gradient of a bias, also of one that all of them share
            *_fold_shared(info.batch_size, batch, in_dims[10:11], inputs[10:11], own=needs_bias),
            None,
        ]
        found = list(_pick(_AttentionBackward).apply(*tensors, *inputs[_BACKWARD_TENSORS:]))
        dims: list[int | None] = [0, 0, 0, 0]
        for i in range(3):
            found[i] = unfold(found[i], info.batch_size)
        if needs_bias:
            found[3] = unfold(found[3], info.batch_size)  # (V, B, ...), of a bias that may have had one for all B
            shared = inputs[10].movedim(in_dims[10], 0)[0] if in_dims[10] is not None else inputs[10]
            if shared.shape[0] != found[3].shape[1]:
                found[3] = found[3].sum(1, keepdim=True)
        else:
            dims[3] = None
        return tuple(found), tuple(dims)


def _gradient_of(ctx, wanted: Sequence[int], kept: Sequence[int]):
    """The gradients numbered ``kept`` as a differentiable function of the saved tensors numbered ``wanted``."""

    def gradients(*saved):
        return derivative.attention_gradient(*saved[:5], *saved[7:], *ctx.settings[:3])

    return of_some(gradients, ctx.saved_tensors, wanted, kept)


class _AttentionForwardMode(_Attention):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _Attention.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:_TENSORS])
        ctx.outputs = [(x.shape, x.dtype, x.device) for x in output]

    @staticmethod
    def jvp(ctx, *tangents):
        inputs = ctx.saved_tensors
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.outputs]
        present = [i for i in _DIFFERENTIABLE if inputs[i] is not None]

        def gradient(grad_out, grad_lse):
            found = derivative.attention_gradient(grad_out, grad_lse, *inputs, *ctx.settings[:3])
            return tuple(x for x in found if x is not None)

        # the gradient is linear in the gradients of the outputs: its transpose is the derivative in a direction
        found, transpose = vjp(gradient, zeros)
        along = [tangents[i] for i in present]
        return transpose(tuple(torch.zeros_like(x) if t is None else t for x, t in zip(found, along, strict=True)))


class _AttentionBackwardForwardMode(_AttentionBackward):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _AttentionBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:_BACKWARD_TENSORS])
        ctx.outputs = [(x.shape, x.dtype, x.device) for x in output]

    @staticmethod
    def jvp(ctx, *tangents):
        wanted = [i for i in _BACKWARD_DIFFERENTIABLE if ctx.saved_tensors[i] is not None and tangents[i] is not None]
        kept = [i for i, need in enumerate(ctx.needs) if need]
        result = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.outputs]
        if not wanted:
            return tuple(result)
        found = directional(*_gradient_of(ctx, wanted, kept), [tangents[i] for i in wanted])
        for i, x in zip(kept, found, strict=True):
            result[i] = x
        return tuple(result)


_FORWARD_MODE = {_Attention: _AttentionForwardMode, _AttentionBackward: _AttentionBackwardForwardMode}


def _fold_shared(count: int, batch: int, in_dims, tensors, own: bool = False) -> list[Tensor | None]:
    """As ``fold``, for (1 or B, ...) tensors: one that no sample has for its own stays one, unless ``own``."""
    folded: list[Tensor | None] = []
    for x, dim in zip(tensors, in_dims, strict=True):
        if x is None or (dim is None and x.shape[0] == 1 and not own):
            folded.append(x)
            continue
        (mapped,) = mapped_first(count, (dim,), (x,))
        assert mapped is not None
        folded.append(mapped.expand(count, batch, *mapped.shape[2:]).flatten(0, 1))
    return folded
