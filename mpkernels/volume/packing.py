"""Packed rays: the samples of all rays one after another, and (R, 2) [start, count] to tell them apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def check_packed_info(name: str, packed_info: object, samples: Tensor) -> bool:
    """Raises unless ``packed_info`` describes rays inside ``samples``; returns whether samples lie in no ray.

    The values are read once per tensor (and once more after it was written to), so that a loop over the same rays
    pays once. On a GPU that reading waits for the device; it is left out under torch.compile, torch.func and CUDA
    graph capture, where the kernels still never leave the memory of their arguments.

    Raises:
        TypeError: it is no tensor, or not int64.
        ValueError: wrong shape or device; a ray starts before 0, has a negative count, runs past the end of the
            samples or overlaps another.
    """
    if not isinstance(packed_info, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(packed_info).__name__}")
    if packed_info.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {packed_info.dtype}")
    if packed_info.dim() != 2 or packed_info.shape[1] != 2:
        raise ValueError(f"{name}: expected shape (R, 2), [start, count] a ray, got {tuple(packed_info.shape)}")
    if packed_info.device != samples.device:
        raise ValueError(f"{name}: expected the device of the samples, {samples.device}, got {packed_info.device}")
    if not _readable(packed_info):
        return True
    total = samples.shape[0]
    key = (packed_info._version if not packed_info.is_inference() else None, total)
    known = getattr(packed_info, "_mpkernels_checked", None)
    if known is not None and key[0] is not None and known[0] == key:
        return known[1]
    gaps = _check_values(name, packed_info, total)
    packed_info._mpkernels_checked = (key, gaps)  # pyright: ignore[reportAttributeAccessIssue]
    return gaps


def _readable(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if isinstance(x, FakeTensor) or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _check_values(name: str, packed_info: Tensor, total: int) -> bool:
    if not packed_info.shape[0]:
        return total > 0
    starts, counts = packed_info.unbind(-1)
    ends = starts + counts
    # written so that one transfer answers every question; sums that overflow int64 come out negative
    disorder = ((ends[:-1] > starts[1:]) & (counts[:-1] > 0) & (counts[1:] > 0)).any()
    facts = torch.stack([packed_info.min(), ends.min(), ends.max(), counts.sum(), disorder.to(torch.int64)])
    least, least_end, most, covered, disordered = facts.tolist()
    if least < 0 or least_end < 0 or most > total:
        wrong = (packed_info < 0).any(-1) | (ends < 0) | (ends > total)
        ray = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected 0 <= start, 0 <= count and start + count <= {total} (the number of samples), "
            f"got [start, count] = {packed_info[ray].tolist()} for ray {ray}"
        )
    if disordered or bool((counts == 0).any()):
        # empty rays may hide an overlap of their neighbours, and rays may come in any order: sort the others
        index = (counts > 0).nonzero()[:, 0]
        index = index[torch.argsort(starts[index], stable=True)]
        overlap = (ends[index[:-1]] > starts[index[1:]]).nonzero()
        if overlap.numel():
            first, second = int(index[overlap[0]]), int(index[overlap[0] + 1])
            raise ValueError(
                f"{name}: expected rays that do not overlap, got [start, count] {packed_info[first].tolist()} for ray "
                f"{first} and {packed_info[second].tolist()} for ray {second}"
            )
    return covered < total
