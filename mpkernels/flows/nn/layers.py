"""The layers between couplings: ActNorm, the invertible 1x1 convolution, permutations, reshaping, a diagonal scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpkernels.flows.actnorm import actnorm, actnorm_statistics
from mpkernels.flows.invertible_conv1x1 import PLU, invertible_conv1x1, plu_decompose
from mpkernels.flows.nn.base import Shape, Transform, no_log_abs_det, rebuilding, wide
from mpkernels.flows.reshaping import squeeze, unsqueeze


class ActNorm(Transform):
    """An affine map a channel, which the first batch in training sets to zero mean and unit variance (Glow, 3.1).

    Args:
        channels: C of inputs (B, C, ...).
        epsilon: is added to the standard deviation of the first batch.
        shift_first: (x + bias) e^l as in Glow, or x e^l + bias.
        log_scale_factor: the parameter is l divided by this (3 in Glow's code), which makes its steps longer.

    ``initialized``, a buffer, says whether the first batch was seen; it is part of the state_dict, so a loaded module
    does not start again. Each process of a distributed run sees its own first batch: broadcast the parameters after it
    (DistributedDataParallel does so where the first batch runs before it wraps the module).

    Example:
        >>> import torch
        >>> from mpkernels.flows import nn
        >>> layer = nn.ActNorm(3)
        >>> y, logabsdet = layer(5 + 2 * torch.randn(64, 3, 8, 8))
        >>> abs(float(y.detach().mean())) < 1e-4, bool(layer.initialized)
        (True, True)
    """

    initialized: Tensor

    def __init__(
        self, channels: int, *, epsilon: float = 1e-6, shift_first: bool = True, log_scale_factor: float = 1.0
    ):
        super().__init__()
        _count("channels", channels)
        if not epsilon > 0:
            raise ValueError(f"epsilon: expected a number above 0, got {epsilon!r}")
        if not log_scale_factor > 0:
            raise ValueError(f"log_scale_factor: expected a number above 0, got {log_scale_factor!r}")
        self.epsilon, self.shift_first, self.log_scale_factor = epsilon, shift_first, float(log_scale_factor)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.scaled_log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self._ready = False  # what ``initialized`` says, where it can be read without waiting for a device

    @property
    def log_scale(self) -> Tensor:
        """l, (C,)."""
        return self.scaled_log_scale if self.log_scale_factor == 1 else self.scaled_log_scale * self.log_scale_factor

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Data to noise: ``(outputs, logabsdet)``."""
        self.see(inputs)
        return actnorm(inputs, self.bias, self.log_scale, shift_first=self.shift_first)

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Noise to data: ``(outputs, logabsdet)``."""
        return actnorm(inputs, self.bias, self.log_scale, shift_first=self.shift_first, inverse=True)

    def see(self, inputs: Tensor) -> None:
        """Sets the parameters from ``inputs``, if this is the first batch in training."""
        if self._ready or not self.training or rebuilding.active:
            return
        if not bool(self.initialized):
            self.initialize(inputs)
        self._ready = True

    @torch.no_grad()
    def initialize(self, inputs: Tensor) -> None:
        """Sets the parameters so that the outputs for ``inputs`` have zero mean and unit variance."""
        bias, log_scale = actnorm_statistics(inputs, epsilon=self.epsilon)
        self.bias.copy_(bias if self.shift_first else bias * log_scale.exp())
        self.scaled_log_scale.copy_(log_scale / self.log_scale_factor)
        self.initialized.fill_(True)

    def _load_from_state_dict(self, *args, **kwargs):
        self._ready = False
        super()._load_from_state_dict(*args, **kwargs)


class InvertibleConv1x1(Transform):
    """A product with a C x C matrix at every position; it starts as a random rotation (Glow, 3.2).

    Args:
        channels: C of inputs (B, C, ...) or (B, C).
        plu: trains the parts of W = P L (U + diag(sign e^log_scale)), with fixed P and sign, whose log-determinant is
            sum log_scale (eq. 11); otherwise W itself.
        generator: of the rotation; None takes torch's own.

    Example:
        >>> import torch
        >>> from mpkernels.flows import nn
        >>> layer = nn.InvertibleConv1x1(6)
        >>> x = torch.randn(2, 6, 4, 4)
        >>> y, logabsdet = layer(x)
        >>> torch.allclose(logabsdet, torch.zeros(2), atol=1e-4), torch.allclose(layer.inverse(y)[0], x, atol=1e-4)
        (True, True)
    """

    def __init__(self, channels: int, *, plu: bool = True, generator: torch.Generator | None = None):
        super().__init__()
        _count("channels", channels)
        rotation = torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64)).Q
        rotation = rotation.to(torch.get_default_dtype())
        self.plu = plu
        if plu:
            parts = plu_decompose(rotation)
            self.register_buffer("permutation", parts.permutation)
            self.register_buffer("sign", parts.sign)
            self.lower, self.upper = nn.Parameter(parts.lower), nn.Parameter(parts.upper)
            self.log_scale = nn.Parameter(parts.log_scale)
        else:
            self.matrix = nn.Parameter(rotation)

    @property
    def weight(self) -> Tensor | PLU:
        """What :func:`mpkernels.flows.invertible_conv1x1` takes."""
        if not self.plu:
            return self.matrix
        return PLU(self.permutation, self.lower, self.upper, self.sign, self.log_scale)  # pyright: ignore

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Data to noise: ``(outputs, logabsdet)``."""
        return invertible_conv1x1(inputs, self.weight)

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Noise to data: ``(outputs, logabsdet)``."""
        return invertible_conv1x1(inputs, self.weight, inverse=True)


class Permutation(Transform):
    """Puts dimension 1 into another order: ``outputs[:, i] = inputs[:, order[i]]``; the log-determinant is 0.

    Args:
        order: a permutation of 0 .. C - 1, or C for a random one.
        seed: of the random one.

    Example:
        >>> import torch
        >>> from mpkernels.flows import nn
        >>> nn.Permutation([2, 0, 1])(torch.tensor([[10, 20, 30]]).float())[0]
        tensor([[30., 10., 20.]])
    """

    order: Tensor
    order_back: Tensor

    def __init__(self, order: int | Sequence[int] | Tensor, seed: int = 0):
        super().__init__()
        if isinstance(order, int):
            _count("order", order)
            order = torch.randperm(order, generator=torch.Generator().manual_seed(seed))
        order = torch.as_tensor(order, dtype=torch.int64)
        if order.dim() != 1 or not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
            raise ValueError(f"order: expected every number below C once, got {order.tolist()}")
        self.register_buffer("order", order)
        self.register_buffer("order_back", order.argsort(), persistent=False)

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Data to noise: ``(outputs, logabsdet)``."""
        return self._permuted(inputs, self.order)

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Noise to data: ``(outputs, logabsdet)``."""
        return self._permuted(inputs, self.order_back)

    def _permuted(self, x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() < 2 or x.shape[1] != len(order):
            raise ValueError(f"inputs: expected shape (B, {len(order)}, ...), got {tuple(x.shape)}")
        return x.index_select(1, order), no_log_abs_det(x)

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.order_back = self.order.argsort()


class Reverse(Transform):
    """Turns dimension 1 round; the log-determinant is 0.

    Example:
        >>> import torch
        >>> from mpkernels.flows import nn
        >>> nn.Reverse()(torch.tensor([[1.0, 2.0, 3.0]]))[0]
        tensor([[3., 2., 1.]])
    """

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Data to noise: ``(outputs, logabsdet)``."""
        return inputs.flip(1), no_log_abs_det(inputs)

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Noise to data: ``(outputs, logabsdet)``."""
        return inputs.flip(1), no_log_abs_det(inputs)


class DiagonalScale(Transform):
    """y = x e^log_scale, feature by feature: NICE's last layer (Dinh et al. 2014, 3.3); it starts as the identity.

    Args:
        features: D of inputs (B, D).

    Example:
        >>> import torch
        >>> from mpkernels.flows import nn
        >>> nn.DiagonalScale(3)(torch.ones(1, 3))[0].tolist()
        [[1.0, 1.0, 1.0]]
    """

    def __init__(self, features: int):
        super().__init__()
        _count("features", features)
        self.log_scale = nn.Parameter(torch.zeros(features))

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Data to noise: ``(outputs, logabsdet)``."""
        return self._scaled(inputs, self.log_scale)

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Noise to data: ``(outputs, logabsdet)``."""
        return self._scaled(inputs, -self.log_scale)

    def _scaled(self, x: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() != 2 or x.shape[1] != len(log_scale):
            raise ValueError(f"inputs: expected shape (B, {len(log_scale)}), got {tuple(x.shape)}")
        dtype = wide(x)
        outputs = (x.to(dtype) * log_scale.to(dtype).exp()).to(x.dtype)
        return outputs, log_scale.to(dtype).sum().expand(x.shape[0])


class Squeeze(Transform):
    """Space into channels, (B, C, H, W) -> (B, C f f, H / f, W / f); see :func:`mpkernels.flows.squeeze`.

    Example:
        >>> import torch
        >>> from mpkernels.flows import nn
        >>> nn.Squeeze()(torch.zeros(2, 3, 8, 8))[0].shape
        torch.Size([2, 12, 4, 4])
    """

    def __init__(self, factor: int = 2):
        super().__init__()
        _count("factor", factor)
        self.factor = factor

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Data to noise: ``(outputs, logabsdet)``."""
        return squeeze(inputs, self.factor), no_log_abs_det(inputs)

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Noise to data: ``(outputs, logabsdet)``."""
        return unsqueeze(inputs, self.factor), no_log_abs_det(inputs)

    def output_shape(self, shape: Sequence[int]) -> Shape:
        """See :meth:`Transform.output_shape`."""
        c, h, w = shape
        return c * self.factor**2, h // self.factor, w // self.factor

    def input_shape(self, shape: Sequence[int]) -> Shape:
        """See :meth:`Transform.input_shape`."""
        c, h, w = shape
        return c // self.factor**2, h * self.factor, w * self.factor


class Unsqueeze(Squeeze):
    """Channels into space: the inverse of :class:`Squeeze`.

    Example:
        >>> import torch
        >>> from mpkernels.flows import nn
        >>> nn.Unsqueeze()(torch.zeros(2, 12, 4, 4))[0].shape
        torch.Size([2, 3, 8, 8])
    """

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Data to noise: ``(outputs, logabsdet)``."""
        return super().inverse(inputs, context)

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Noise to data: ``(outputs, logabsdet)``."""
        return super().forward(inputs, context)

    def output_shape(self, shape: Sequence[int]) -> Shape:
        """See :meth:`Transform.output_shape`."""
        return super().input_shape(shape)

    def input_shape(self, shape: Sequence[int]) -> Shape:
        """See :meth:`Transform.input_shape`."""
        return super().output_shape(shape)


def _count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
