"""Schemas and fake functions of SSIM. Imports torch (and the namespaces) alone.

Images are planes of rows, (P, H, M), contiguous: a plane is one channel of one image (``step`` = 1 and M = W) or one
image with its channels side by side in memory (``step`` = C channels and M = W C). ``step`` is the distance between
neighbouring pixels of a row, so that both layouts are read in place.

With r = window_size // 2 the map has shape (P, H, M), or, where ``valid``, (P, H - 2 r, M - 2 r step). The op returns
it, or, where ``mean``, its mean of shape () (0 for no pixels). ``grad`` has the shape of what the op returned.
Gradients that are not needed come back as tensors without elements.
"""

from __future__ import annotations

from mpkernels import library

FORWARD = "ssim"
BACKWARD = "ssim_backward"

_ARGUMENTS = (
    "Tensor image, Tensor target, int step, int window_size, float sigma, float data_range, bool valid, bool mean"
)
_TRITON = "mpkernels.splatting.ssim.triton"


def _fake_forward(image, target, step, window_size, sigma, data_range, valid, mean):
    if mean:
        return image.new_empty(())
    planes, rows, width = image.shape
    around = window_size - 1 if valid else 0
    return image.new_empty((planes, rows - around, width - around * step))


def _fake_backward(grad, image, target, step, window_size, sigma, data_range, valid, mean, needs_image, needs_target):
    return (
        image.new_empty(image.shape if needs_image else (0,)),
        target.new_empty(target.shape if needs_target else (0,)),
    )


library.define(f"{FORWARD}({_ARGUMENTS}) -> Tensor", _fake_forward)
library.define(
    f"{BACKWARD}(Tensor grad, {_ARGUMENTS}, bool needs_image, bool needs_target) -> (Tensor, Tensor)", _fake_backward
)
library.implement_triton(FORWARD, _TRITON, "forward")
library.implement_triton(BACKWARD, _TRITON, "backward")
