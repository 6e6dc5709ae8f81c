"""How the kernels of the projection are called and differentiated (once), on every backend."""

from __future__ import annotations

from torch import Tensor

from mpkernels import backends
from mpkernels.autograd import Function, contiguous, differentiated, fold, unfold
from mpkernels.splatting.project_gaussians import schema

TENSORS = 7  # means, quats, scales, covars, opacities, viewmats, Ks


def run(*arguments, backend: str) -> tuple[Tensor, ...]:
    """The op on (B, N) Gaussians and (B, C) cameras (arguments as in schema.py), differentiable.

    Where nothing asks for a derivative the op is called directly: the Function costs as much as a small op.
    """
    if differentiated(arguments[:TENSORS]):
        return _Project.apply(*arguments, backend)
    return _forward(*arguments, backend)


def _forward(*arguments) -> tuple[Tensor, ...]:
    *arguments, backend = arguments
    tensors = (contiguous(x) for x in arguments[:TENSORS])
    return backends.call(backend, schema.FORWARD)(*tensors, *arguments[TENSORS:])


class _Project(Function):
    @staticmethod
    def forward(*arguments):
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        means, quats, scales, covars, _, viewmats, Ks = inputs[:TENSORS]
        width, height, _, _, _, eps2d, ortho, _, backend = inputs[TENSORS:]
        ctx.save_for_backward(output[0], means, quats, scales, covars, viewmats, Ks)
        ctx.settings = (width, height, eps2d, ortho, backend)
        ctx.mark_non_differentiable(output[0])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        needed = ctx.needs_input_grad
        found = _ProjectBackward.apply(
            *gradients[1:], *ctx.saved_tensors, *ctx.settings, any(needed[:4]), needed[5] or needed[6]
        )
        means, quats, scales, covars, viewmats, Ks = (
            x if needed[i] else None for i, x in zip((0, 1, 2, 3, 5, 6), found, strict=True)
        )
        return means, quats, scales, covars, None, viewmats, Ks, *[None] * 9

    @staticmethod
    def vmap(info, in_dims, *inputs):
        tensors = fold(info.batch_size, in_dims[:TENSORS], inputs[:TENSORS])
        out = _Project.apply(*tensors, *inputs[TENSORS:])
        return tuple(unfold(x, info.batch_size) for x in out), (0,) * 5


class _ProjectBackward(Function):
    """The kernels' backward; a Function so that vmap sees it, and so that a second derivative is refused."""

    @staticmethod
    def forward(
        grad_means2d,
        grad_depths,
        grad_conics,
        grad_compensations,
        radii,
        means,
        quats,
        scales,
        covars,
        viewmats,
        Ks,
        width,
        height,
        eps2d,
        ortho,
        backend,
        needs_gaussians,
        needs_cameras,
    ):
        return backends.call(backend, schema.BACKWARD)(
            contiguous(grad_means2d),
            contiguous(grad_depths),
            contiguous(grad_conics),
            contiguous(grad_compensations),
            radii.contiguous(),
            means.contiguous(),
            contiguous(quats),
            contiguous(scales),
            contiguous(covars),
            viewmats.contiguous(),
            Ks.contiguous(),
            width,
            height,
            eps2d,
            ortho,
            needs_gaussians,
            needs_cameras,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("project_gaussians: second derivatives are not supported")

    @staticmethod
    def vmap(info, in_dims, *inputs):
        tensors = fold(info.batch_size, in_dims[:11], inputs[:11])
        needs_gaussians, needs_cameras = inputs[-2:]
        found = _ProjectBackward.apply(*tensors, *inputs[11:])
        shaped = needs_gaussians and inputs[8] is None
        kept = (needs_gaussians, shaped, shaped, needs_gaussians and not shaped, needs_cameras, needs_cameras)
        out = tuple(unfold(x, info.batch_size) if keep else x for x, keep in zip(found, kept, strict=True))
        return out, tuple(0 if keep else None for keep in kept)
