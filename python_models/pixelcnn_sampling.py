"""Samples of a PixelCNN: by the whole model for each value, or by what no earlier value has computed yet.

`python -m python_models.pixelcnn --compare-sampling` measures both. They take the same random numbers, and draw the
same pictures (up to roundings, where a number lies on the edge between two values).

What can be kept: the vertical stack sees the rows above alone, so a row of it is computed when the row before is
drawn, all columns at once. The horizontal stack of a pixel reads what it computed for the pixels to the left, and what
the vertical stack has sent to this pixel. With three colours, the blocks of channels of a colour are computed when the
colour before is drawn, from a prefix of their inputs: the channels at the pixel itself are in the order of colours.
"""

from __future__ import annotations

import itertools
import statistics
import time

import torch
from torch import Tensor

from python_models.pixelcnn import Config, Layer, PixelCNN, draw, gate


def uniform_numbers(config: Config, batch: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The random numbers of pictures, in [0, 1): (B, colors, H, W, 2)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, config.colors, config.side, config.side, 2, generator=generator, dtype=dtype)


@torch.no_grad()
def sample_naive(model: PixelCNN, uniform: Tensor, values: int | None = None, backend: str | None = None) -> Tensor:
    """Pictures (B, colors, H, W) in [-1, 1], by a whole forward pass for each value.

    Args:
        model: in evaluation mode.
        uniform: of :func:`uniform_numbers`.
        values: how many to draw of each picture, and leave the others 0; None: all.
        backend: of the convolutions.
    """
    batch, colors, height, width, _ = uniform.shape
    x = model.hidden.new_zeros(batch, colors, height, width)
    for number in range(x[0].numel() if values is None else values):
        row, column, color = number // (width * colors), number // colors % width, number % colors
        outputs = model(x, backend)[:, color, :, row, column]
        x[:, color, row, column] = draw(outputs, uniform[:, color, row, column])
    return x


class _LayerCache:
    """A layer's weights in the order in which they are multiplied, and what it computed for this row and those above.

    Memory is channels-last with zeros around the picture, so that the taps of an output lie side by side.
    """

    def __init__(self, layer: Layer, batch: int, height: int, width: int) -> None:
        self.layer, self.reach = layer, layer.horizontal.shape[3] // 2
        inputs, self.colors = layer.horizontal.shape[1], layer.colors
        rows = self.reach + (layer.mask_type == "B")  # that the vertical convolution sees
        like = layer.vertical
        self.above = like.new_zeros(batch, height + self.reach, width + 2 * self.reach, inputs)
        self.left = like.new_zeros(batch, self.reach + width, inputs)
        self.rows = rows
        self.vertical = like[:, :, :rows].permute(2, 3, 1, 0).flatten(0, 2).contiguous()  # (rows taps inputs, 2 width)
        self.link = layer.link[:, :, 0, 0].T.contiguous()
        taps = layer.horizontal[:, :, 0, : self.reach + 1].permute(2, 1, 0).flatten(0, 1)  # (taps inputs, 2 width)
        out = layer.out[:, :, 0, 0].T
        self.horizontal, self.out, self.out_bias, self.seen = [], [], [], []
        outputs, block, of_input = 2 * layer.out.shape[0], layer.out.shape[0] // self.colors, inputs // self.colors
        for color in range(self.colors):
            seen = self.reach * inputs + (color + (layer.mask_type == "B")) * of_input
            part = slice(color * outputs // self.colors, (color + 1) * outputs // self.colors)
            self.seen.append(seen)
            self.horizontal.append(taps[:seen, part].contiguous())
            part = slice(color * block, (color + 1) * block)
            self.out.append(out[: (color + 1) * block, part].contiguous())
            self.out_bias.append(layer.out_bias[part])
        self.gated = like.new_zeros(batch, layer.out.shape[0])
        self.block, self.of_input = block, of_input
        self.tall = self.from_above = like.new_zeros(0)

    def begin_row(self, row: int, place: Tensor | None) -> Tensor:
        """Computes the vertical stack for all columns of a row; returns what the next layer reads of it."""
        batch, _, padded, _ = self.above.shape
        width = padded - 2 * self.reach
        windows = self.above[:, row : row + self.rows].unfold(2, 2 * self.reach + 1, 1)
        windows = windows.permute(0, 2, 1, 4, 3).reshape(batch * width, -1)  # (B W, rows taps inputs)
        tall = torch.addmm(self.layer.vertical_bias, windows, self.vertical)
        if place is not None:
            tall = (tall.view(batch, width, -1) + place[:, row].T).view(batch * width, -1)
        self.from_above = torch.addmm(self.layer.horizontal_bias, tall, self.link).view(batch, width, -1)
        self.left[:, self.reach :].zero_()
        gated = gate(tall, 1).view(batch, width, -1)
        if self.layer.first:
            return gated
        return gated + self.above[:, self.reach + row, self.reach : self.reach + width]

    def pixel(self, column: int, color: int) -> Tensor:
        """A colour's block (B, block) of the horizontal stack at a pixel: what the next layer reads of it."""
        seen = self.left[:, column : column + self.reach + 1].flatten(1)[:, : self.seen[color]]
        part = slice(2 * color * self.block, 2 * (color + 1) * self.block)
        wide = torch.addmm(self.from_above[:, column, part], seen, self.horizontal[color])
        filters, gates = wide[:, : self.block], wide[:, self.block :]
        end = (color + 1) * self.block
        torch.mul(filters.tanh(), gates.sigmoid(), out=self.gated[:, end - self.block : end])
        out = torch.addmm(self.out_bias[color], self.gated[:, :end], self.out[color])
        if not self.layer.first:
            out += self.left[:, self.reach + column, color * self.of_input : (color + 1) * self.of_input]
        return out


class _Linear:
    """The linear prediction that means of logistics have added, from what the first layer keeps of the picture."""

    def __init__(self, model: PixelCNN, first: _LayerCache) -> None:
        self.first, self.above = first, model.above[:, :, 0].flatten(1).T  # (inputs taps, colors)
        self.left = model.left[:, :, 0, :2].permute(2, 1, 0).flatten(0, 1)  # (taps inputs, colors)
        self.inputs = model.left.shape[1]
        self.row = self.above

    def begin_row(self, row: int) -> None:
        """What the row above says about all columns."""
        reach = self.first.reach
        columns = self.first.above.shape[2] - 2 * reach
        windows = self.first.above[:, reach + row - 1, reach - 1 : reach + columns + 1].unfold(1, 3, 1)
        self.row = windows.flatten(2) @ self.above  # (B, columns, colors)

    def pixel(self, column: int, color: int) -> Tensor:
        """(B, 1)"""
        at, seen = self.first.reach + column, self.inputs + 2 * color
        window = self.first.left[:, at - 1 : at + 1].flatten(1)[:, :seen]
        return torch.addmm(self.row[:, column, color : color + 1], window, self.left[:seen, color : color + 1])


@torch.no_grad()
def sample_cached(model: PixelCNN, uniform: Tensor) -> Tensor:
    """The pictures of :func:`sample_naive`, each activation computed once."""
    batch, colors, height, width, _ = uniform.shape
    config = model.config
    caches = [_LayerCache(layer, batch, height, width) for layer in model.layers]  # type: ignore[arg-type]
    block, hidden_block = config.width // colors, config.hidden // colors
    hidden, out = model.hidden[:, :, 0, 0].T.contiguous(), model.out[:, :, 0, 0].T.contiguous()
    x = model.hidden.new_zeros(batch, colors, height, width)
    last = x.new_zeros(batch, config.width)  # of a pixel, after its relu
    found = x.new_zeros(batch, config.hidden)
    first = caches[0]
    linear = _Linear(model, first) if config.mixture > 0 else None
    for row in range(height):
        read = None
        for i, cache in enumerate(caches):
            if read is not None:
                cache.above[:, cache.reach + row, cache.reach : cache.reach + width] = read
            read = cache.begin_row(row, model.places if i == 0 else None)
        if linear is not None:
            linear.begin_row(row)
        for column in range(width):
            for color in range(colors):
                part = slice(color * block, (color + 1) * block)
                for cache, following in itertools.pairwise(caches):
                    following.left[:, following.reach + column, part] = cache.pixel(column, color)
                last[:, part] = caches[-1].pixel(column, color).relu_()
                seen, part = (color + 1) * block, slice(color * hidden_block, (color + 1) * hidden_block)
                at = torch.addmm(model.hidden_bias[part], last[:, :seen], hidden[:seen, part])
                found[:, part] = at.relu_()
                seen, part = (color + 1) * hidden_block, slice(color * config.outputs, (color + 1) * config.outputs)
                outputs = torch.addmm(model.out_bias[part], found[:, :seen], out[:seen, part])
                if linear is not None:
                    outputs[:, config.mixture : 2 * config.mixture] += linear.pixel(column, color)
                value = draw(outputs, uniform[:, color, row, column])
                x[:, color, row, column] = value
                first.left[:, first.reach + column, 2 * color] = value
                first.left[:, first.reach + column, 2 * color + 1] = 1
        inside = first.above[:, first.reach + row, first.reach : first.reach + width].unflatten(2, (colors, 2))
        inside[..., 0] = x[:, :, row].transpose(1, 2)
        inside[..., 1] = 1
    return x


def compare_sampling(
    model: PixelCNN, batch: int = 16, *, repeats: int = 3, seed: int = 0, backend: str | None = None
) -> dict[str, float]:
    """Draws the same pictures in both ways: how many times longer does the naive loop take?

    The naive loop runs whole, once; the cached one ``repeats`` times, of which the median counts.

    Returns:
        Seconds of both, their ratio, and the share of values that are equal.
    """
    uniform = uniform_numbers(model.config, batch, seed)
    sample_cached(model, uniform[:, :, :2])  # a first call is slower
    seconds = []
    drawn = torch.empty(0)
    for _ in range(repeats):
        started = time.perf_counter()
        drawn = sample_cached(model, uniform)
        seconds.append(time.perf_counter() - started)
    model(drawn, backend)
    started = time.perf_counter()
    naive = sample_naive(model, uniform, backend=backend)
    naive_seconds = time.perf_counter() - started
    cached_seconds = statistics.median(seconds)
    return {
        "naive_seconds": naive_seconds,
        "cached_seconds": cached_seconds,
        "naive_over_cached": naive_seconds / cached_seconds,
        "equal_share": (naive == drawn).double().mean().item(),
    }
