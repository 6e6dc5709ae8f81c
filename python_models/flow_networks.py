"""Networks of couplings: from what a coupling keeps (and a context) to the parameters of the transform.

All end in a layer of zeros, so that a new coupling begins near the identity, and all take ``forward(x, context)``,
where the context is None, a vector (B, context), or, beside pictures, also (B, context, H, W).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear layers with ReLU between: (B, inputs) to (B, outputs).

    Args:
        inputs, outputs: features.
        hidden: of each hidden layer.
        layers: how many hidden layers.
        context: features of the context, which the first layer sees too.
        dropout: share of hidden units that is left out in training.
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: int, layers: int = 2, *, context: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        sizes = [inputs + context, *[hidden] * layers]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        self.last = nn.Linear(sizes[-1], outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, inputs), and (B, context) if there is one, to (B, outputs)."""
        x = x if context is None else torch.cat([x, context], dim=1)
        for layer in self.layers:
            x = self.dropout(F.relu(layer(x)))
        return self.last(x)


class ZeroConv2d(nn.Conv2d):
    """A convolution that begins with zeros; its outputs have factors e^(3 s), which s learns (Glow's last layer)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        nn.init.zeros_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)
        self.log_scale = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(B, inputs, H, W) to (B, outputs, H, W); the factors are put into the weights, which are fewer."""
        factor = torch.exp(3 * self.log_scale)
        assert self.bias is not None
        return F.conv2d(x, self.weight * factor.view(-1, 1, 1, 1), self.bias * factor, padding=self.padding)


class _OfContext(nn.Module):
    """What a context adds to the first hidden layer: a vector everywhere the same, a picture at each place its own."""

    def __init__(self, context: int, hidden: int) -> None:
        super().__init__()
        self.of_context = nn.Conv2d(context, hidden, 1, bias=False) if context > 0 else None

    def add(self, h: Tensor, context: Tensor | None) -> Tensor:
        if self.of_context is None:
            return h
        if context is None:
            raise ValueError("context: expected a tensor, got None")
        return h + self.of_context(context if context.dim() == 4 else context[:, :, None, None])


class ConvNet(_OfContext):
    """Glow's network (Kingma & Dhariwal 2018): 3x3, ReLU, 1x1, ReLU, 3x3 of zeros.

    Args:
        inputs, outputs: channels.
        hidden: channels between.
        context: channels of the context.
    """

    def __init__(self, inputs: int, outputs: int, hidden: int, *, context: int = 0) -> None:
        super().__init__(context, hidden)
        self.first = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.second = nn.Conv2d(hidden, hidden, 1)
        for layer in (self.first, self.second):
            assert layer.bias is not None
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        self.last = ZeroConv2d(hidden, outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        h = F.relu(self.add(self.first(x), context))
        return self.last(F.relu(self.second(h)))


class ResNet(_OfContext):
    """Residual blocks of two 3x3 convolutions (He et al. 2016, with activations first), and a last 1x1 of zeros.

    Args:
        inputs, outputs: channels.
        hidden: channels between.
        blocks: how many.
        context: channels of the context.
    """

    def __init__(self, inputs: int, outputs: int, hidden: int, blocks: int = 2, *, context: int = 0) -> None:
        super().__init__(context, hidden)
        self.first = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            pair = [nn.Conv2d(hidden, hidden, 3, padding=1) for _ in range(2)]
            for layer in pair:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(pair[1].weight)  # a new block changes nothing
            self.blocks.append(nn.ModuleList(pair))
        self.last = ZeroConv2d(hidden, outputs, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        h = self.add(self.first(x), context)
        for block in self.blocks:
            assert isinstance(block, nn.ModuleList)
            h = h + block[1](F.relu(block[0](F.relu(h))))
        return self.last(F.relu(h))
