"""How the rasterization kernels are called and differentiated (once)."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.function import once_differentiable

from mpkernels import backends
from mpkernels.autograd import Function, contiguous, differentiated
from mpkernels.splatting.rasterize import schema


def run(*arguments, absgrad: bool, backend: str) -> tuple[Tensor, Tensor]:
    """Colors (I, H, W, D) and alphas (I, H, W); arguments as in schema.py, but with means2d and all of a Gaussian's
    arguments in any shape (..., N, k): the caller's own means2d gets ``absgrad``.
    """
    if differentiated(arguments[:5]):
        colors, alphas, *_ = _Rasterize.apply(*arguments, absgrad, backend)
    else:
        colors, alphas, *_ = _forward(*arguments, backend)
    return colors, alphas


def _flat(means2d, conics, colors, opacities, backgrounds, masks, isect_offsets, flatten_ids):
    """The arguments in the shapes of the schema."""
    count = opacities.numel()
    return (
        means2d.reshape(count, 2).contiguous(),
        conics.reshape(count, 3).contiguous(),
        colors.reshape(count, colors.shape[-1]).contiguous(),
        opacities.reshape(count).contiguous(),
        contiguous(backgrounds),
        contiguous(masks),
        isect_offsets.contiguous(),
        flatten_ids.contiguous(),
    )


def _forward(*arguments):
    *tensors, width, height, tile_size, backend = arguments
    return backends.call(backend, schema.FORWARD)(*_flat(*tensors), width, height, tile_size)


class _Rasterize(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return _forward(*arguments[:11], arguments[12])

    @staticmethod
    def setup_context(ctx, inputs, output):
        colors, _, transmittances, last = output
        ctx.save_for_backward(*inputs[:8], colors, transmittances, last)
        ctx.settings = inputs[8:]
        ctx.mark_non_differentiable(transmittances, last)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_colors, grad_alphas, *_ = gradients
        *tensors, render_colors, transmittances, last = ctx.saved_tensors
        width, height, tile_size, absgrad, backend = ctx.settings
        if grad_colors is None and grad_alphas is None:
            return (None,) * 13
        needs_backgrounds = ctx.needs_input_grad[4]
        *found, of_backgrounds, absolute = backends.call(backend, schema.BACKWARD)(
            contiguous(grad_colors),
            contiguous(grad_alphas),
            *_flat(*tensors),
            render_colors,
            transmittances,
            last,
            width,
            height,
            tile_size,
            absgrad,
            needs_backgrounds,
        )
        if absgrad:
            tensors[0].absgrad = absolute.reshape(tensors[0].shape)  # gsplat's place for it
        found = [x.reshape(like.shape) for x, like in zip(found, tensors[:4], strict=True)]
        return *found, (of_backgrounds if needs_backgrounds else None), *(None,) * 8
