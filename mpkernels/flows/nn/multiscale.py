"""Several levels of transforms, as in RealNVP and Glow, each of which gives half of its channels away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpkernels.flows.nn.base import Shape, Transform, check_module, no_log_abs_det, run
from mpkernels.flows.nn.sequential import Sequential
from mpkernels.flows.reshaping import split


class MultiScale(Transform):
    """Levels of transforms; after each but the last, half of the channels is factored out (Dinh et al. 2017, 3.6).

    The outputs are all parts, flattened and concatenated in the order in which they leave: (B, D). Inputs (B, C, ...).

    Args:
        levels: each a transform, or a list of transforms, which becomes ``Sequential(*list, memory=memory,
            checkpoint_every=checkpoint_every)``. With "recompute" every level is rebuilt from its own outputs, all of
            which are outputs of the whole.
        memory, checkpoint_every: see :class:`Sequential`; for levels that are lists.
        input_shape: the shape of one sample, without the batch. None: that of the first ``forward``. It is part of the
            state_dict.

    Raises:
        TypeError: ``levels`` is no list of modules, or of lists of modules.
        ValueError: ``levels`` is empty; inputs of another shape; ``inverse`` before the shape is known.

    Example:
        >>> import torch
        >>> from mpkernels.flows import nn
        >>> flow = nn.MultiScale([[nn.Squeeze(), nn.ActNorm(12)], [nn.Squeeze(), nn.ActNorm(24)]])
        >>> x = torch.randn(5, 3, 8, 8)
        >>> outputs, logabsdet = flow(x)
        >>> outputs.shape, [tuple(part.shape) for part in flow.parts(outputs)]
        (torch.Size([5, 192]), [(5, 6, 4, 4), (5, 24, 2, 2)])
        >>> torch.allclose(flow.inverse(outputs)[0], x, atol=1e-5)
        True
    """

    flat_outputs = True

    def __init__(
        self,
        levels: Sequence[nn.Module | Sequence[nn.Module]],
        *,
        memory: str = "store",
        checkpoint_every: int | None = None,
        input_shape: Sequence[int] | None = None,
    ):
        super().__init__()
        if not isinstance(levels, Sequence):
            raise TypeError(f"levels: expected a list of transforms, got {type(levels).__name__}")
        if not levels:
            raise ValueError("levels: expected at least one level, got an empty list")
        self.levels = nn.ModuleList()
        for i, level in enumerate(levels):
            if isinstance(level, (list, tuple)):
                level = Sequential(*level, memory=memory, checkpoint_every=checkpoint_every)
            check_module(f"levels[{i}]", level)
            self.levels.append(level)  # pyright: ignore[reportArgumentType]
        self._input_shape: Shape | None = None if input_shape is None else tuple(input_shape)

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Data (B, C, ...) to all parts (B, D): ``(outputs, logabsdet)``."""
        shape = tuple(inputs.shape[1:])
        if self._input_shape is None:
            self._input_shape = shape
        if shape != self._input_shape:
            raise ValueError(f"inputs: expected samples of shape {self._input_shape}, got {shape}")
        parts, state, total = [], inputs, no_log_abs_det(inputs)
        for i, level in enumerate(self.levels):
            state, log_abs_det = run(level, state, context, False)
            total = total + log_abs_det
            if i + 1 < len(self.levels):
                state, out = split(state)
                parts.append(out.flatten(1))
        return torch.cat([*parts, state.flatten(1)], 1), total

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """All parts (B, D) to data (B, C, ...): ``(outputs, logabsdet)``."""
        parts = self.parts(inputs)
        state, total = parts.pop(), no_log_abs_det(inputs)
        for i, level in reversed(list(enumerate(self.levels))):
            if i + 1 < len(self.levels):
                state = torch.cat([state, parts.pop()], 1)
            state, log_abs_det = run(level, state, context, True)
            total = total + log_abs_det
        return state, total

    def parts(self, outputs: Tensor) -> list[Tensor]:
        """The parts of ``outputs`` (B, D) as views in their shapes (B, C, ...), the first to leave first.

        Raises:
            ValueError: the shape of a sample is not known yet, or gives another D.
        """
        if self._input_shape is None:
            raise ValueError("input_shape: expected the shape of a sample, or forward to run first, got neither")
        shapes = self.part_shapes(self._input_shape)
        sizes = [math.prod(shape) for shape in shapes]
        if outputs.dim() != 2 or outputs.shape[1] != sum(sizes):
            raise ValueError(f"outputs: expected shape (B, {sum(sizes)}), got {tuple(outputs.shape)}")
        return [part.unflatten(1, shape) for part, shape in zip(outputs.split(sizes, 1), shapes, strict=True)]

    def part_shapes(self, shape: Sequence[int]) -> list[Shape]:
        """The shapes of one sample's parts, from that of its inputs (all without the batch)."""
        shapes, shape = [], tuple(shape)
        for i, level in enumerate(self.levels):
            shape = level.output_shape(shape) if isinstance(level, Transform) else shape
            if i + 1 < len(self.levels):
                on, out = (tuple(part.shape[1:]) for part in split(torch.empty(1, *shape, device="meta")))
                shapes.append(out)
                shape = on
        return [*shapes, shape]

    def output_shape(self, shape: Sequence[int]) -> Shape:
        """See :meth:`Transform.output_shape`."""
        return (sum(math.prod(part) for part in self.part_shapes(shape)),)

    def input_shape(self, shape: Sequence[int]) -> Shape:
        """See :meth:`Transform.input_shape`."""
        if self._input_shape is None:
            raise ValueError("input_shape: expected the shape of a sample, or forward to run first, got neither")
        return self._input_shape

    def get_extra_state(self) -> dict:
        """The shape of a sample, for state_dict."""
        return {"input_shape": self._input_shape}

    def set_extra_state(self, state: dict) -> None:
        """The shape of a sample, from state_dict."""
        shape = state["input_shape"]
        self._input_shape = None if shape is None else tuple(shape)
