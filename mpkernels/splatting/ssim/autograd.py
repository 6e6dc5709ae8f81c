"""How the kernels of SSIM are called and differentiated, on every backend."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.function import once_differentiable

from mpkernels import backends
from mpkernels.autograd import Function, differentiated
from mpkernels.splatting.ssim import schema


def run(image: Tensor, target: Tensor, *settings, backend: str) -> Tensor:
    """The op on planes of rows (arguments as in schema.py), differentiable once."""
    if differentiated((image, target)):
        return _Ssim.apply(image, target, *settings, backend)  # pyright: ignore[reportReturnType]
    return _forward(image, target, *settings, backend)  # pyright: ignore[reportCallIssue]


def _forward(image, target, step, window_size, sigma, data_range, valid, mean, backend):
    return backends.call(backend, schema.FORWARD)(
        image.contiguous(), target.contiguous(), step, window_size, sigma, data_range, valid, mean
    )


class _Ssim(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(image, target, step, window_size, sigma, data_range, valid, mean, backend):
        return _forward(image, target, step, window_size, sigma, data_range, valid, mean, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        image, target, *ctx.settings, ctx.backend = inputs
        ctx.save_for_backward(image, target)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        image, target = ctx.saved_tensors
        needs_image, needs_target = ctx.needs_input_grad[:2]
        of_image, of_target = backends.call(ctx.backend, schema.BACKWARD)(
            gradients[0].contiguous(),
            image.contiguous(),
            target.contiguous(),
            *ctx.settings,
            needs_image,
            needs_target,
        )
        return of_image if needs_image else None, of_target if needs_target else None, *(None,) * 7
