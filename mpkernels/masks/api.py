"""The functions that make masks: they check their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels.masks.integers import (
    Integers,
    as_tensor,
    batch_integers,
    batch_shape,
    check_align,
    check_integers,
    check_not_negative,
    check_regular,
    frozen,
    is_int,
    readable,
    runs,
)
from mpkernels.masks.values import Causal, Documents, Intervals, Mask, Padding, Prefix, Window, dense_mask


def causal(align: str = "upper_left") -> Mask:
    """Query i sees the keys up to its own: j <= i, or j <= i + S - L where ``align`` is "lower_right".

    "upper_left" is the meaning of ``is_causal`` in torch, "lower_right" that of flash-attn and of a cache of past keys.
    The two are one where L = S.

    Raises:
        ValueError: ``align`` is none of the two.

    Example:
        >>> from mpkernels import masks
        >>> masks.to_dense(masks.causal(align="lower_right"), (2, 3)).int()
        tensor([[1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    check_align("causal", align)
    return Causal(align, False)


def strictly_causal(align: str = "upper_left") -> Mask:
    """Query i sees the keys before its own alone: j < i, or j < i + S - L where ``align`` is "lower_right".

    With "upper_left" the first row sees nothing: its output is 0.

    Raises:
        ValueError: ``align`` is none of the two.

    Example:
        >>> from mpkernels import masks
        >>> masks.to_dense(masks.strictly_causal(), (2, 2)).int()
        tensor([[0, 0],
                [1, 0]], dtype=torch.int32)
    """
    check_align("strictly_causal", align)
    return Causal(align, True)


def window(left: int | None, right: int | None, align: str = "upper_left") -> Mask:
    """Query i sees the keys i - left <= j <= i + right; with "lower_right", i + S - L takes the place of i.

    Args:
        left: how many keys before its own a query sees; None or -1 for all of them.
        right: how many keys after its own a query sees; None or -1 for all of them. 0 is causal.
        align: "upper_left" or "lower_right", as in :func:`causal`.

    Raises:
        TypeError: ``left`` or ``right`` is no integer.
        ValueError: ``left`` or ``right`` is less than -1, or ``align`` is none of the two.

    Example:
        >>> from mpkernels import masks
        >>> masks.to_dense(masks.window(1, 0), (3, 3)).int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
    """
    check_align("window", align)
    for name, value in (("left", left), ("right", right)):
        if value is not None and not is_int(value):
            raise TypeError(f"window: {name}: expected an int or None, got {type(value).__name__}")
        if value is not None and value < -1:
            raise ValueError(f"window: {name}: expected at least 0, or -1 or None for no limit, got {value}")
    return Window(None if left == -1 else left, None if right == -1 else right, align)


def prefix(n: Integers) -> Mask:
    """Prefix-LM: the first n keys are seen by every query, the others causally: j < max(i + 1, n).

    Args:
        n: an integer, or one for each batch item: a list or an integer tensor (B,) (any shape that broadcasts to the
            batch dimensions), on the device of the scores. May exceed S.

    Raises:
        TypeError: ``n`` holds no integers.
        ValueError: ``n`` is negative.

    Example:
        >>> from mpkernels import masks
        >>> masks.to_dense(masks.prefix(2), (3, 3)).int()
        tensor([[1, 1, 0],
                [1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    value = batch_integers("prefix: n", n)
    check_not_negative("prefix: n", value)
    return Prefix(value)


def padding(lengths: Integers) -> Mask:
    """Of each batch item only the first keys are real: every query sees j < lengths[b].

    Args:
        lengths: an integer for each batch item: a list or an integer tensor (B,) (any shape that broadcasts to the
            batch dimensions), on the device of the scores; one integer counts for all. The values are read once, here
            (on a GPU that waits for the device), and not at all under torch.compile, torch.func and CUDA graph
            capture: there a length past S counts as S, a negative one as 0.

    Raises:
        TypeError: ``lengths`` holds no integers.
        ValueError: a length is negative; where the mask is used, a length is past S.

    Example:
        >>> import torch
        >>> from mpkernels import masks
        >>> masks.to_dense(masks.padding([1, 3]), (2, 1, 1, 3))[:, 0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    value = batch_integers("padding: lengths", lengths)
    return Padding(value, check_not_negative("padding: lengths", value))


def documents(ids: Integers, key_ids: Integers | None = None, unsorted: str = "error") -> Mask:
    """Packed sequences: a query sees the keys of its own document, those whose id equals its own.

    The keys of a document have to lie together, as they do where ids are sorted; then every row is an interval of keys.

    Args:
        ids: the document of each query, and of each key where ``key_ids`` is None: a list or an integer tensor (L,) or
            (B, L) (any batch dimensions that broadcast), on the device of the scores. The values are read once, here
            (on a GPU that waits for the device). Under torch.compile an assertion in the graph takes the place of the
            error; under torch.func and CUDA graph capture the order of ids is not checked.
        key_ids: the document of each key, (S,) or (B, S).
        unsorted: what happens where the keys of a document do not lie together: "error", or "dense" for a dense mask
            (B, 1, L, S) (under torch.compile, torch.func and CUDA graph capture always, for the ids are not read).

    Raises:
        TypeError: ids are no integers.
        ValueError: the keys of a document do not lie together and ``unsorted`` is "error"; wrong shapes or devices.

    Example:
        >>> from mpkernels import masks
        >>> masks.to_dense(masks.documents([0, 0, 1]), (3, 3)).int()
        tensor([[1, 1, 0],
                [1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
        >>> masks.documents([0, 1, 0])
        Traceback (most recent call last):
        ...
        ValueError: documents: ids: expected the keys of a document to lie together; sort the tokens first, with \
order = torch.argsort(ids, dim=-1, stable=True), or ask for unsorted="dense"
    """
    if unsorted not in ("error", "dense"):
        raise ValueError(f"documents: unsorted: expected 'error' or 'dense', got {unsorted!r}")
    kept = []
    for name, value in (("ids", ids), ("key_ids", key_ids)):
        value = None if value is None and name == "key_ids" else frozen(f"documents: {name}", value)
        if isinstance(value, Tensor):
            check_integers(f"documents: {name}", value)
        elif isinstance(value, tuple):
            check_regular(f"documents: {name}", value)
        if value is not None and not batch_shape(value):
            raise ValueError(f"documents: {name}: expected shape (L,) or (B, L), got one number")
        kept.append(value)
    given = [value for value in kept if isinstance(value, Tensor)]
    device = given[0].device if given else torch.device("cpu")
    if len(given) == 2 and given[1].device != device:
        raise ValueError(f"documents: key_ids: expected the device of ids, {device}, got {given[1].device}")
    of_queries = as_tensor(kept[0], device)
    of_keys = of_queries if kept[1] is None else as_tensor(kept[1], device)
    known = readable(of_queries) and readable(of_keys)
    if unsorted == "dense" and not known:
        return Documents(kept[0], kept[1], True, None)
    try:
        first, last, together = runs(of_queries, of_keys)
    except RuntimeError as error:
        shapes = f"{tuple(of_queries.shape[:-1])} and {tuple(of_keys.shape[:-1])}"
        raise ValueError(f"documents: key_ids: batch dimensions of ids and key_ids do not match: {shapes}") from error
    name = "ids" if key_ids is None else "key_ids"
    message = (
        f"documents: {name}: expected the keys of a document to lie together; sort the tokens first, with "
        f'order = torch.argsort({name}, dim=-1, stable=True), or ask for unsorted="dense"'
    )
    scattered = False
    if known:
        scattered = not bool(together)
        if scattered and unsorted == "error":
            raise ValueError(message)
    elif torch.compiler.is_compiling():
        torch._assert_async(together, message)
    # ids that came as lists go with the scores to any device, so their runs are computed there
    return Documents(kept[0], kept[1], scattered, (first, last) if given and not scattered else None)


def dense(tensor: Tensor) -> Mask:
    """Any mask, as a bool tensor: query i sees key j where it is True.

    Args:
        tensor: bool, broadcasts to (..., H, L, S), on the device of the scores. It is not copied. The kernels
            summarise it by blocks and skip empty ones, but have to read it; the other masks cost nothing.

    Raises:
        TypeError: it is no bool tensor.

    Example:
        >>> import torch
        >>> from mpkernels import masks
        >>> masks.to_dense(masks.dense(torch.tensor([True, False, True])) & masks.causal(), (3, 3)).int()
        tensor([[1, 0, 0],
                [1, 0, 0],
                [1, 0, 1]], dtype=torch.int32)
    """
    return dense_mask("dense", tensor)


def intervals(first: Tensor | None, last: Tensor | None) -> Mask:
    """A query sees the keys first <= j < last of its row: the form in which kernels take every mask but ``dense``.

    Args:
        first: the first key of each row, an integer tensor that broadcasts to (..., H, L), on the device of the scores;
            None for 0. Values are clamped to [0, S], and first may exceed last: the row sees nothing. Not copied.
        last: the one after the last key, likewise; None for S.

    Raises:
        TypeError: ``first`` or ``last`` is no integer tensor.
        ValueError: both are None, or on two devices.

    Example:
        >>> import torch
        >>> from mpkernels import masks
        >>> masks.to_dense(masks.intervals(torch.tensor([0, 2]), torch.tensor([2, 3])), (2, 3)).int()
        tensor([[1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    for name, value in (("first", first), ("last", last)):
        if value is not None:
            check_integers(f"intervals: {name}", value)
            if not value.dim():
                raise ValueError(f"intervals: {name}: expected shape (L,) or (..., H, L), got ()")
    if first is None and last is None:
        raise ValueError("intervals: first, last: expected at least one of them, got None twice")
    if first is not None and last is not None and first.device != last.device:
        raise ValueError(f"intervals: last: expected the device of first, {first.device}, got {last.device}")
    return Intervals(first, last)
