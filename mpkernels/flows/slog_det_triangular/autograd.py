"""How the kernel of the triangular log-determinant is called and differentiated.

The gradient of log_abs_det is 1 / diagonal, which is left to torch: there is nothing to fuse, and it is differentiable
again as it stands. The sign is constant.
"""

from __future__ import annotations

from torch import Tensor

from mpkernels import backends
from mpkernels.autograd import Function, differentiated, fold, forward_mode, unfold
from mpkernels.flows.slog_det_triangular import schema


def run(diagonal: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    """The op on the diagonals (N, n), differentiable."""
    if differentiated((diagonal,)):
        return _pick(_SlogDet).apply(diagonal, backend)
    return backends.call(backend, schema.FORWARD)(diagonal)


def _pick(function):
    """The variant that also has a forward-mode derivative, kept apart because torch.compile does not trace those."""
    return _SlogDetForwardMode if forward_mode() else function


class _SlogDet(Function):
    @staticmethod
    def forward(diagonal, backend):
        return backends.call(backend, schema.FORWARD)(diagonal)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.mark_non_differentiable(output[0])

    @staticmethod
    def backward(ctx, *gradients):
        (diagonal,) = ctx.saved_tensors
        of_log_abs_det = gradients[1]
        return (of_log_abs_det[:, None] / diagonal.to(of_log_abs_det.dtype)).to(diagonal.dtype), None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        (diagonal,) = fold(info.batch_size, in_dims[:1], inputs[:1])
        sign, log_abs_det = _pick(_SlogDet).apply(diagonal, inputs[1])
        return (unfold(sign, info.batch_size), unfold(log_abs_det, info.batch_size)), (0, 0)


class _SlogDetForwardMode(_SlogDet):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _SlogDet.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx, *tangents):
        (diagonal,) = ctx.saved_tensors
        wide = schema.wide(diagonal)
        return None, (tangents[0].to(wide) / diagonal.to(wide)).sum(-1)
