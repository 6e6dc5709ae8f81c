"""How the kernels of spherical harmonics are called and differentiated, on every backend."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.function import once_differentiable

from mpkernels import backends
from mpkernels.autograd import Function, contiguous, differentiated
from mpkernels.splatting.spherical_harmonics import schema


def run(degree: int, dirs: Tensor, coeffs: Tensor, masks: Tensor | None, *, backend: str) -> Tensor:
    """The op on (B, C, N, 3) directions (arguments as in schema.py), differentiable once."""
    if differentiated((dirs, coeffs)):
        return _SphericalHarmonics.apply(degree, dirs, coeffs, masks, backend)  # pyright: ignore[reportReturnType]
    return _forward(degree, dirs, coeffs, masks, backend)


def _forward(degree, dirs, coeffs, masks, backend):
    return backends.call(backend, schema.FORWARD)(degree, dirs.contiguous(), coeffs.contiguous(), contiguous(masks))


class _SphericalHarmonics(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(degree, dirs, coeffs, masks, backend):
        return _forward(degree, dirs, coeffs, masks, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.degree, dirs, coeffs, masks, ctx.backend = inputs
        ctx.save_for_backward(dirs, coeffs, masks)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        dirs, coeffs, masks = ctx.saved_tensors
        needs_dirs, needs_coeffs = ctx.needs_input_grad[1:3]
        of_dirs, of_coeffs = backends.call(ctx.backend, schema.BACKWARD)(
            gradients[0].contiguous(),
            ctx.degree,
            dirs.contiguous(),
            coeffs.contiguous(),
            contiguous(masks),
            needs_dirs,
            needs_coeffs,
        )
        return None, of_dirs if needs_dirs else None, of_coeffs if needs_coeffs else None, None, None
