"""Pictures of masks: text, and a PNG for documents."""

from __future__ import annotations

import math
from os import PathLike
from typing import NamedTuple

import torch
from torch import Tensor

from mpkernels.masks.representation import filled, resolve
from mpkernels.masks.values import Mask, as_mask

BLOCK = 64  # of the figures: about what kernels take at once
_MOST_ROWS, _MOST_COLUMNS, _MOST_CELLS = 32, 64, 64  # of the text, and of the PNG
_PAIRS_AT_ONCE = 2**22

_MARKS = "·▒█"  # nothing, some, all of a block is visible
_TONES = ((233, 236, 240), (146, 190, 226), (31, 94, 148))
_INK, _FAINT, _PAPER = (30, 41, 54), (110, 122, 136), (255, 255, 255)


class _Head(NamedTuple):
    """The mask of one head of one batch item."""

    first: Tensor | None  # (L,)
    last: Tensor | None  # (L,)
    dense: Tensor | None  # (L or 1, S)
    length: int
    keys: int


def _one_head(mask: Mask | None, length: int, keys: int, batch: int, head: int) -> _Head:
    try:
        outer = () if mask is None else mask.outer()
    except RuntimeError as error:
        raise ValueError(f"mask: the dimensions of batch and head of its parts do not match: {error}") from error
    outer = (1,) * (1 - len(outer)) + outer
    sizes = {"batch": math.prod(outer[:-1]), "head": outer[-1]}
    for name, index in (("batch", batch), ("head", head)):
        if index < 0 or (sizes[name] > 1 and index >= sizes[name]):
            raise ValueError(f"{name}: expected an index below {sizes[name]}, of which the mask knows, got {index}")
    first, last, dense = resolve(mask, (*outer, length, keys))

    def pick(x: Tensor | None, rank: int) -> Tensor | None:
        if x is None:
            return None
        x = x.reshape((1,) * (len(outer) + rank - x.dim()) + tuple(x.shape))
        x = x.expand(*outer, *x.shape[-rank:])
        index = min(batch, sizes["batch"] - 1), min(head, sizes["head"] - 1)
        return x.flatten(0, -rank - 2)[index].cpu() if len(outer) > 1 else x[index[1]].cpu()

    return _Head(pick(first, 1), pick(last, 1), pick(dense, 2), length, keys)


def _visible(mask: _Head, rows_a_block: int, keys_a_block: int) -> tuple[Tensor, Tensor]:
    """How many pairs of each block are visible, and how many it has: (blocks of rows, blocks of keys) int64."""
    starts = torch.arange(0, mask.length, rows_a_block)
    begin = torch.arange(0, mask.keys, keys_a_block)
    end = (begin + keys_a_block).clamp(max=mask.keys)
    of_rows = (starts + rows_a_block).clamp(max=mask.length) - starts
    pairs = of_rows[:, None] * (end - begin)
    width = len(begin) if mask.dense is None else mask.keys
    step = max(1, _PAIRS_AT_ONCE // max(1, width * rows_a_block)) * rows_a_block
    counts = [pairs[:0]]
    for start in range(0, mask.length, step):
        rows = slice(start, min(start + step, mask.length))
        first = torch.zeros(1, 1) if mask.first is None else mask.first[rows, None]
        last = torch.full((1, 1), mask.keys) if mask.last is None else mask.last[rows, None]
        if mask.dense is None:
            held = (torch.minimum(last, end) - torch.maximum(first, begin)).clamp(min=0).to(torch.int64)
            held = held.expand(rows.stop - start, len(begin))
        else:
            dense = mask.dense if mask.dense.shape[0] == 1 else mask.dense[rows]
            seen = filled(first[:, 0], last[:, 0], dense, (rows.stop - start, mask.keys), dense.device)
            missing = len(begin) * keys_a_block - mask.keys
            held = torch.nn.functional.pad(seen, (0, missing)).unflatten(1, (len(begin), keys_a_block)).sum(-1)
        missing = -held.shape[0] % rows_a_block
        held = torch.nn.functional.pad(held, (0, 0, 0, missing))
        counts.append(held.unflatten(0, (-1, rows_a_block)).sum(1) if len(begin) else held[::rows_a_block])
    return torch.cat(counts), pairs


def _levels(mask: _Head, rows_a_block: int, keys_a_block: int) -> list[list[int]]:
    """0 where nothing of a block is visible, 1 where some is, 2 where all is."""
    visible, pairs = _visible(mask, rows_a_block, keys_a_block)
    return ((visible > 0).to(torch.int64) + (visible == pairs)).tolist()


def _block(size: int, most: int) -> int:
    """The smallest power of two of which at most ``most`` make ``size``."""
    return 1 << max(0, math.ceil(size / most) - 1).bit_length()


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"


def _figures(mask: _Head) -> list[str]:
    visible, pairs = _visible(mask, BLOCK, BLOCK)
    seen, everything = int(visible.sum()), mask.length * mask.keys
    visited, blocks = int((visible > 0).sum()), visible.numel()
    masked = visited - int((visible == pairs).sum())
    return [
        f"visible pairs: {_share(seen, everything)} ({seen:,} of {everything:,})",
        f"blocks of {BLOCK} x {BLOCK} visited: {_share(visited, blocks)} ({visited} of {blocks}, {masked} masked)",
    ]


def _text(title: str, mask: _Head) -> str:
    rows_a_mark, keys_a_mark = _block(mask.length, _MOST_ROWS), _block(mask.keys, _MOST_COLUMNS)
    levels = _levels(mask, rows_a_mark, keys_a_mark) if mask.keys else []
    wide = 2 if mask.keys <= _MOST_COLUMNS // 2 else 1  # a character is twice as high as wide
    margin = max(len("query"), len(str(mask.length)))
    width = wide * math.ceil(mask.keys / keys_a_mark)
    final = str(mask.keys - 1)
    scale = "0" + final.rjust(width - 1) if width > len(final) + 1 else "0"
    lines = [title, f"{'query':>{margin}}   {scale}  key"]
    for index, row in enumerate(levels):
        label = str(index * rows_a_mark) if index % 4 == 0 or index == len(levels) - 1 else ""
        lines.append(f"{label:>{margin}} │ {''.join(_MARKS[level] * wide for level in row)}")
    if rows_a_mark == keys_a_mark == 1:
        lines.append(f"{_MARKS[2]} visible, {_MARKS[0]} hidden")
    else:
        size = f"a mark is {rows_a_mark} x {keys_a_mark} pairs"
        lines.append(f"{size}: {_MARKS[2]} all visible, {_MARKS[1]} some, {_MARKS[0]} none")
    return "\n".join([*lines, *_figures(mask)])


def _draw(title: str, mask: _Head, path: str | PathLike[str]) -> None:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ImportError("masks.show: a PNG needs pillow: pip install pillow") from error
    pairs_a_cell = _block(max(mask.length, mask.keys), _MOST_CELLS)
    levels = _levels(mask, pairs_a_cell, pairs_a_cell)
    rows, columns = math.ceil(mask.length / pairs_a_cell), math.ceil(mask.keys / pairs_a_cell)
    cell = max(3, min(28, 448 // max(1, rows, columns)))
    gap = 1 if cell >= 6 else 0
    text, small = ImageFont.load_default(15), ImageFont.load_default(12)
    unit = "pair" if pairs_a_cell == 1 else f"block of {pairs_a_cell} x {pairs_a_cell}"
    legend = [(2, f"{unit} visible" if pairs_a_cell == 1 else f"{unit}: all visible")]
    legend += [(0, "hidden")] if pairs_a_cell == 1 else [(1, "some"), (0, "none: skipped")]
    figures = _figures(mask)
    left, top = 58, 64
    needed = max(small.getlength(line) for line in figures)
    across = sum(small.getlength(label) + 34 for _, label in legend)
    width = round(left + max(columns * cell, needed, across, 220) + 24)
    bottom = top + rows * cell
    image = Image.new("RGB", (width, bottom + 28 + 18 * len(figures) + 22), _PAPER)
    draw = ImageDraw.Draw(image)
    while text.getlength(title) > width - 32 and len(title) > 4:
        title = title[:-4].rstrip(" .") + "..."
    draw.text((16, 12), title, _INK, text)
    right = left + columns * cell - gap
    draw.text((left, top - 20), "0", _FAINT, small)
    draw.text((left + columns * cell / 2, top - 20), "keys", _INK, small, anchor="ma")
    draw.text((right, top - 20), str(mask.keys), _FAINT, small, anchor="ra")
    draw.text((left - 8, top - 2), "0", _FAINT, small, anchor="ra")
    draw.text((left - 8, (top + bottom) / 2), "queries", _INK, small, anchor="rm")
    draw.text((left - 8, bottom), str(mask.length), _FAINT, small, anchor="rs")
    for row, line in enumerate(levels):
        for column, level in enumerate(line):
            x, y = left + column * cell, top + row * cell
            draw.rectangle((x, y, x + cell - 1 - gap, y + cell - 1 - gap), _TONES[level])
    x, y = left, bottom + 14
    for level, label in legend:
        draw.rectangle((x, y + 1, x + 11, y + 12), _TONES[level])
        draw.text((x + 18, y), label, _INK, small)
        x += round(small.getlength(label)) + 34
    for index, line in enumerate(figures):
        draw.text((left, y + 22 + 18 * index), line, _FAINT, small)
    image.quantize(64).save(path, format="PNG", optimize=True)


def show(
    mask: Mask | Tensor | None,
    L: int,
    S: int,
    *,
    path: str | PathLike[str] | None = None,
    batch: int = 0,
    head: int = 0,
) -> str:
    """Draws a mask: returns it as text, and writes a PNG where ``path`` is given.

    Large masks are drawn by blocks in three tones: all pairs of a block are visible (kernels take it without a mask),
    some are (they mask it), none is (they skip it). Below stand the shares of visible pairs and of blocks of 64 x 64.

    Args:
        mask: a mask, a bool tensor or None, as in :func:`resolve`.
        L: the number of queries.
        S: the number of keys.
        path: the PNG to write. Needs pillow.
        batch: the batch item, where the mask tells them apart (batch dimensions counted as one).
        head: the head, where the mask tells them apart.

    Returns:
        The text, lines of at most about 80 characters.

    Raises:
        TypeError, ValueError: as :func:`resolve`; ``batch`` or ``head`` is out of range.
        ImportError: ``path`` is given and pillow is missing.

    Example:
        >>> from mpkernels import masks
        >>> print(masks.show(masks.window(1, 0), 4, 4))
        window(1, 0)
        query   0      3  key
            0 │ ██······
              │ ████····
              │ ··████··
            3 │ ····████
        █ visible, · hidden
        visible pairs: 43.8 % (7 of 16)
        blocks of 64 x 64 visited: 100.0 % (1 of 1, 1 masked)
    """
    mask = None if mask is None else as_mask("mask", mask)
    title = "no mask" if mask is None else repr(mask)
    one = _one_head(mask, L, S, batch, head)
    if path is not None:
        _draw(title, one, path)
    return _text(title, one)
