"""The public function of SSIM: checks its input and chooses a backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.splatting.ssim import autograd, reference, schema


def ssim(
    image: Tensor,
    target: Tensor,
    *,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    padding: str = "same",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Structural similarity of two images, 1 where they are alike (Wang et al. 2004, "Image quality assessment").

    SSIM = (2 mu_x mu_y + C1) (2 sigma_xy + C2) / ((mu_x^2 + mu_y^2 + C1) (sigma_x^2 + sigma_y^2 + C2)) for each pixel
    and channel, with means, variances and covariance weighted by a Gaussian window that sums to 1, C1 = (0.01
    data_range)^2 and C2 = (0.03 data_range)^2. Windows that reach outside the image see zeros there, as in 3DGS and
    fused-ssim (padding "same"), or are left out ("valid").

    Gradients to both images are exact, of first order, and have the same bits in every run. Where the images are equal
    the result is 1, and the gradient 0, without a rounding.

    Args:
        image: (B, C, H, W) or (C, H, W), of any size; float32 or float64. Rendered images (B, H, W, C) are read in
            place as ``x.permute(0, 3, 1, 2)``.
        target: the shape of ``image``.
        window_size: pixels of the window, in both directions: odd.
        sigma: standard deviation of the window, in pixels.
        data_range: the largest value less the smallest one that a pixel can have.
        padding: "same": the map has the size of the image. "valid": only windows that lie inside, which makes it
            window_size - 1 smaller in both directions.
        reduction: "mean" over all pixels and channels (0 where there are none), or "none": the map.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        The mean, of shape (), or the map (B, C, H', W'), in the dtype of ``image``.

    Raises:
        TypeError: an image is no tensor, or has another dtype; another argument has the wrong type.
        ValueError: shapes or devices do not match, an image is smaller than a "valid" window, an even window,
            a number that is not positive, an unknown padding or reduction.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.splatting.ssim import ssim
        >>> image = torch.rand(1, 3, 32, 48)
        >>> ssim(image, image), ssim(image, image / 2, padding="valid", reduction="none").shape
        (tensor(1.), torch.Size([1, 3, 22, 38]))
    """
    checks.single_or_double("image", image)
    if image.dim() not in (3, 4):
        raise ValueError(f"image: expected shape (B, C, H, W) or (C, H, W), got {tuple(image.shape)}")
    checks.same_kind("target", target, "image", image)
    checks.shape("target", target, image.shape, "that of image")
    if not isinstance(window_size, int) or isinstance(window_size, bool):
        raise TypeError(f"window_size: expected an odd integer, got {type(window_size).__name__}")
    if window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"window_size: expected an odd integer, at least 1, got {window_size}")
    for name, value in (("sigma", sigma), ("data_range", data_range)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a positive number, got {type(value).__name__}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    if padding not in ("same", "valid"):
        raise ValueError(f"padding: expected 'same' or 'valid', got {padding!r}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
    valid = padding == "valid"
    if valid and min(image.shape[-2:]) < window_size:
        raise ValueError(
            f"image: expected at least {window_size} rows and columns for padding 'valid' (window_size), "
            f"got {image.shape[-2]} x {image.shape[-1]}"
        )

    settings = (window_size, float(sigma), float(data_range), valid, reduction == "mean")
    chosen = backends.choose(schema.FORWARD, image.device.type, backend)
    batched = image.dim() == 4
    if not batched:
        image, target = image[None], target[None]
    if chosen == "reference":
        found = reference.ssim(image, target, *settings)
    else:
        found = _run(image, target, settings, chosen)
    return found if batched or reduction == "mean" else found[0]


def _run(image: Tensor, target: Tensor, settings: tuple, backend: str) -> Tensor:
    """The kernels on (B, C, H, W) images, read in the layout that ``image`` has."""
    batch, channels, height, width = image.shape
    window_size, _, _, valid, mean = settings
    around = window_size - 1 if valid else 0
    rows, columns = height - around, width - around
    # channels side by side in memory: rows of all channels, whose neighbours lie `channels` apart
    if channels > 1 and not image.is_contiguous() and image.is_contiguous(memory_format=torch.channels_last):
        planes = [x.permute(0, 2, 3, 1).reshape(batch, height, width * channels) for x in (image, target)]
        found = autograd.run(*planes, channels, *settings, backend=backend)
        return found if mean else found.reshape(batch, rows, columns, channels).permute(0, 3, 1, 2)
    planes = [x.reshape(batch * channels, height, width) for x in (image, target)]
    found = autograd.run(*planes, 1, *settings, backend=backend)
    return found if mean else found.reshape(batch, channels, rows, columns)
