"""How the kernels of quat_scale_to_covar are called and differentiated (once), on every backend."""

from __future__ import annotations

from torch import Tensor

from mpkernels import backends
from mpkernels.autograd import Function, differentiated, fold, unfold
from mpkernels.splatting.quat_scale_to_covar import schema


def run(quats: Tensor, scales: Tensor, inverse: bool, triu: bool, backend: str) -> Tensor:
    """The op on (N, 4) quaternions and (N, 3) scales, differentiable."""
    if differentiated((quats, scales)):
        return _Covar.apply(quats, scales, inverse, triu, backend)
    return _forward(quats, scales, inverse, triu, backend)


def _forward(quats, scales, inverse, triu, backend):
    return backends.call(backend, schema.FORWARD)(quats.contiguous(), scales.contiguous(), inverse, triu)


class _Covar(Function):
    @staticmethod
    def forward(quats, scales, inverse, triu, backend):
        return _forward(quats, scales, inverse, triu, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        quats, scales, *ctx.settings = inputs
        ctx.save_for_backward(quats, scales)

    @staticmethod
    def backward(ctx, *gradients):
        found = _CovarBackward.apply(*gradients, *ctx.saved_tensors, *ctx.settings)
        quats, scales = (x if need else None for x, need in zip(found, ctx.needs_input_grad[:2], strict=True))
        return quats, scales, None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        out = _Covar.apply(*fold(info.batch_size, in_dims[:2], inputs[:2]), *inputs[2:])
        return unfold(out, info.batch_size), 0


class _CovarBackward(Function):
    """The kernels' backward; a Function so that vmap sees it, and so that a second derivative is refused."""

    @staticmethod
    def forward(grad, quats, scales, inverse, triu, backend):
        return backends.call(backend, schema.BACKWARD)(
            grad.contiguous(), quats.contiguous(), scales.contiguous(), inverse, triu
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("quat_scale_to_covar: second derivatives are not supported")

    @staticmethod
    def vmap(info, in_dims, *inputs):
        found = _CovarBackward.apply(*fold(info.batch_size, in_dims[:3], inputs[:3]), *inputs[3:])
        return tuple(unfold(x, info.batch_size) for x in found), (0, 0)
