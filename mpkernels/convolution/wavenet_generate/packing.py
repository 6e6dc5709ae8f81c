"""The weights of a WaveNet, and their packing into the order in which the sample loop reads them (schema.py)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpkernels import checks
from mpkernels.convolution.wavenet_generate.schema import BLOCK, PANEL


class WaveNetLayer(NamedTuple):
    """Weights of one layer, as :func:`mpkernels.convolution.gated_residual_layer` takes them."""

    weight: Tensor  # (2 G, R, K): first the G filters, then the G gates; the last tap reads the newest position
    residual: Tensor | None  # (R, G); not read in the last layer
    skip: Tensor  # (S, G)
    dilation: int
    bias: Tensor | None = None  # (2 G,)
    residual_bias: Tensor | None = None  # (R,)
    skip_bias: Tensor | None = None  # (S,)
    condition_weight: Tensor | None = None  # (2 G, A)


class WaveNetWeights(NamedTuple):
    """Weights of a WaveNet: one dtype (float32, float64, bfloat16 or float16), one device."""

    input: Tensor  # (classes, R), the input of each class; for a mixture of logistics (R,), times the value before
    layers: Sequence[WaveNetLayer]
    hidden: Tensor  # (H, S)
    output: Tensor  # (O, H)
    input_bias: Tensor | None = None  # (R,), added to the input
    hidden_bias: Tensor | None = None  # (H,)
    output_bias: Tensor | None = None  # (O,)
    residual_scale: float = 1.0  # factor of the residual outputs: 1, or sqrt(1/2)
    skip_scale: float = 1.0  # factor of the sum of the skips: 1, or sqrt(1/L)


class PackedWaveNet(NamedTuple):
    """What :func:`pack_wavenet` makes of weights: hand it to ``wavenet_generate`` in their place."""

    network: WaveNetWeights  # the weights as they are used, for shapes and for the reference
    weights: Tensor  # (.,) all matrices
    offsets: Tensor  # (L, 1, 2 G) the biases of the dilated convolutions
    biases: Tensor  # (.,) all others
    embedding: Tensor  # (classes, R), or (2, R) for a mixture

    @property
    def sizes(self) -> list[int]:
        """K, R, G, S, H, O, A."""
        first = self.network.layers[0]
        condition = 0 if first.condition_weight is None else first.condition_weight.shape[1]
        gates, residual, taps = first.weight.shape
        return [taps, residual, gates // 2, first.skip.shape[0], *self.network.hidden.shape[:1], *_out(self), condition]

    @property
    def dilations(self) -> list[int]:
        """Of every layer."""
        return [layer.dilation for layer in self.network.layers]

    @property
    def rows(self) -> int:
        """Inputs that are kept of each sequence, of all layers together."""
        return (self.sizes[0] - 1) * sum(self.dilations)


def _out(packed: PackedWaveNet) -> tuple[int]:
    return (packed.network.output.shape[0],)


def pack_wavenet(network: WaveNetWeights, dtype: torch.dtype | None = None) -> PackedWaveNet:
    """Puts the weights of a WaveNet in the order in which :func:`wavenet_generate` reads them, once for many calls.

    Args:
        network: the weights. They are copied: later changes are not seen.
        dtype: what the matrices are stored as: torch.float32 or torch.bfloat16 (half the memory, and half of what each
            sample reads), or torch.float64. Sums, activations, biases and the embedding are float32 in both (float64
            for float64). Default: that of the weights; float16 is stored as float32.

    Returns:
        a :class:`PackedWaveNet`. With bfloat16, all results are those of the weights rounded to bfloat16 (on a
        CPU bit for bit).

    Raises:
        TypeError: a weight is no tensor or has another dtype than the others, ``dtype`` is none of the three.
        ValueError: shapes or devices do not match, a dilation is below 1, there is no layer, or a weight needs a
            gradient.

    Example:
        >>> import torch
        >>> from mpkernels.convolution import WaveNetLayer, WaveNetWeights, pack_wavenet
        >>> layers = [WaveNetLayer(torch.randn(16, 8, 2), torch.randn(8, 8), torch.randn(4, 8), 2**i) for i in range(3)]
        >>> network = WaveNetWeights(torch.randn(256, 8), layers, torch.randn(4, 4), torch.randn(256, 4))
        >>> pack_wavenet(network, torch.bfloat16).weights.dtype
        torch.bfloat16
    """
    check(network)
    given = network.input.dtype
    if dtype is None:
        dtype = torch.float32 if given == torch.float16 else given
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise TypeError(f"dtype: expected torch.float32, torch.float64 or torch.bfloat16, got {dtype}")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    stored = _converted(network, dtype, wide)
    layers = stored.layers
    taps = layers[0].weight.shape[2]
    matrices, biases = [], []
    for i, layer in enumerate(layers):
        last = i == len(layers) - 1
        matrices.append(layer.weight[:, :, -1])
        if layer.condition_weight is not None:
            matrices.append(layer.condition_weight)
        rows = [(layer.skip, layer.skip_bias)]
        if not last and layer.residual is not None:
            rows.insert(0, (layer.residual, layer.residual_bias))
        matrices.append(torch.cat([weight for weight, _ in rows]))
        biases.append(torch.cat([_or_zeros(bias, weight, wide) for weight, bias in rows]))
    matrices += [stored.hidden, stored.output]
    biases.append(_or_zeros(stored.hidden_bias, stored.hidden, wide))
    biases.append(_or_zeros(stored.output_bias, stored.output, wide))
    if taps > 1:
        matrices += [layer.weight[:, :, :-1].transpose(1, 2).flatten(1) for layer in layers]
    embedding = stored.input
    if network.input.dim() == 1:
        bias = torch.zeros_like(embedding) if stored.input_bias is None else stored.input_bias
        embedding = torch.stack([embedding, bias])
    elif stored.input_bias is not None:
        embedding = embedding + stored.input_bias
    return PackedWaveNet(
        stored,
        torch.cat([panel for matrix in matrices for panel in _panels(matrix)]),
        torch.stack([_or_zeros(layer.bias, layer.weight, wide) for layer in layers])[:, None],
        torch.cat([torch.nn.functional.pad(bias, (0, -bias.shape[0] % BLOCK)) for bias in biases]),
        embedding.contiguous(),
    )


def _or_zeros(bias: Tensor | None, weight: Tensor, wide: torch.dtype) -> Tensor:
    return torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if bias is None else bias


def _panels(matrix: Tensor) -> Iterable[Tensor]:
    """A (P, D) matrix in the order of schema.py."""
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, -matrix.shape[0] % BLOCK)).t()  # (D, P)
    if matrix.element_size() == 2:
        padded = padded.unflatten(1, (-1, 2, BLOCK // 2)).transpose(2, 3).flatten(1)
    return (panel.flatten() for panel in padded.split(PANEL, 1))


def _converted(network: WaveNetWeights, dtype: torch.dtype, wide: torch.dtype) -> WaveNetWeights:
    """Matrices in ``dtype``, biases and the input in ``wide``, all of them copies."""

    def matrix(x: Tensor) -> Tensor:
        return x.detach().to(dtype, copy=True)

    def vector(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(wide, copy=True)

    layers = [
        WaveNetLayer(
            matrix(layer.weight),
            None if layer.residual is None else matrix(layer.residual),
            matrix(layer.skip),
            layer.dilation,
            vector(layer.bias),
            vector(layer.residual_bias),
            vector(layer.skip_bias),
            None if layer.condition_weight is None else matrix(layer.condition_weight),
        )
        for layer in network.layers
    ]
    return WaveNetWeights(
        network.input.detach().to(wide, copy=True),
        layers,
        matrix(network.hidden),
        matrix(network.output),
        vector(network.input_bias),
        vector(network.hidden_bias),
        vector(network.output_bias),
        float(network.residual_scale),
        float(network.skip_scale),
    )


def check(network: object) -> None:
    """Raises unless ``network`` holds weights whose shapes, dtypes and devices fit each other."""
    if not isinstance(network, WaveNetWeights):
        raise TypeError(f"network: expected WaveNetWeights or PackedWaveNet, got {type(network).__name__}")
    checks.floating("network.input", network.input)
    if network.input.dim() not in (1, 2) or 0 in network.input.shape:
        raise ValueError(f"network.input: expected shape (classes, R) or (R,), got {tuple(network.input.shape)}")
    residual = network.input.shape[-1]
    if len(network.layers) == 0:
        raise ValueError("network.layers: expected at least one layer, got none")
    first = network.layers[0]
    checks.tensor("network.layers[0].weight", first.weight)
    if first.weight.dim() != 3 or first.weight.shape[0] % 2 or 0 in first.weight.shape:
        raise ValueError(
            f"network.layers[0].weight: expected shape (2 G, {residual}, K), got {tuple(first.weight.shape)}"
        )
    gates, _, taps = first.weight.shape
    checks.tensor("network.layers[0].skip", first.skip)
    skip = first.skip.shape[0] if first.skip.dim() == 2 else 0
    if skip < 1:
        raise ValueError(f"network.layers[0].skip: expected shape (S, {gates // 2}), got {tuple(first.skip.shape)}")
    condition = first.condition_weight
    if condition is not None:
        checks.tensor("network.layers[0].condition_weight", condition)
    width = condition.shape[1] if condition is not None and condition.dim() == 2 else 0

    def fits(name: str, x: object, shape: tuple[int, ...], because: str, optional: bool = True) -> None:
        if x is None and optional:
            return
        checks.tensor(f"network.{name}", x)
        assert isinstance(x, Tensor)
        checks.same_kind(f"network.{name}", x, "network.input", network.input)
        checks.shape(f"network.{name}", x, shape, because)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"network.{name}: expected a tensor that needs no gradient, got one with requires_grad: "
                "wavenet_generate has none; call it under torch.no_grad(), and train by gated_residual_layer"
            )

    fits("input", network.input, tuple(network.input.shape), "", False)
    fits("input_bias", network.input_bias, (residual,), "R of network.input")
    for i, layer in enumerate(network.layers):
        name = f"layers[{i}]"
        if isinstance(layer.dilation, bool) or not isinstance(layer.dilation, int):
            raise TypeError(f"network.{name}.dilation: expected an integer, got {type(layer.dilation).__name__}")
        if layer.dilation < 1:
            raise ValueError(f"network.{name}.dilation: expected at least 1, got {layer.dilation}")
        fits(f"{name}.weight", layer.weight, (gates, residual, taps), "(2 G, R, K) of layer 0 and the input", False)
        fits(f"{name}.bias", layer.bias, (gates,), "2 G")
        is_last = i == len(network.layers) - 1
        fits(f"{name}.residual", layer.residual, (residual, gates // 2), "(R, G)", is_last)
        fits(f"{name}.residual_bias", layer.residual_bias, (residual,), "R")
        fits(f"{name}.skip", layer.skip, (skip, gates // 2), "(S, G)", False)
        fits(f"{name}.skip_bias", layer.skip_bias, (skip,), "S")
        if condition is None and layer.condition_weight is not None:
            raise ValueError(f"network.{name}.condition_weight: expected None, as in layer 0, got a tensor")
        fits(f"{name}.condition_weight", layer.condition_weight, (gates, width), "(2 G, A) of layer 0", width == 0)
    checks.tensor("network.hidden", network.hidden)
    hidden = network.hidden.shape[0] if network.hidden.dim() else 0
    fits("hidden", network.hidden, (hidden, skip), "(H, S)", False)
    fits("hidden_bias", network.hidden_bias, (hidden,), "H")
    checks.tensor("network.output", network.output)
    out = network.output.shape[0] if network.output.dim() else 0
    fits("output", network.output, (out, hidden), "(O, H)", False)
    fits("output_bias", network.output_bias, (out,), "O")
    if hidden < 1 or out < 1:
        raise ValueError(f"network.output: expected at least one output, got {tuple(network.output.shape)}")
    if network.input.dim() == 2 and out != network.input.shape[0]:
        raise ValueError(
            f"network.output: expected {network.input.shape[0]} outputs, the classes of network.input, got {out}"
        )
    if network.input.dim() == 1 and out % 3:
        raise ValueError(
            f"network.output: expected a multiple of 3 outputs (weight, mean and log scale of each logistic), got {out}"
        )
