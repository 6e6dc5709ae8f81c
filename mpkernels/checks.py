"""Checks of public arguments. Every message names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch

SINGLE_AND_DOUBLE = (torch.float32, torch.float64)
MOST_PROGRAMS = 2**31 - 1
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tensor(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def floating(name: str, value: torch.Tensor) -> None:
    """Raises TypeError unless ``value`` is a tensor of a supported floating-point dtype."""
    tensor(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected a floating-point tensor (float32, float64, bfloat16, float16), got {value.dtype}"
        )


def single_or_double(name: str, value: torch.Tensor) -> None:
    """Raises TypeError unless ``value`` is a tensor of float32 or float64."""
    tensor(name, value)
    if value.dtype not in SINGLE_AND_DOUBLE:
        raise TypeError(f"{name}: expected float32 or float64, got {value.dtype}")


def programs(op: str, count: int) -> None:
    """Raises ValueError where a grid of ``count`` programs is more than a GPU starts."""
    if count > MOST_PROGRAMS:
        raise ValueError(f"{op}: expected at most {MOST_PROGRAMS} programs, got {count}")


def same_kind(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Raises unless ``value`` has the dtype and the device of ``like``."""
    tensor(name, value)
    if value.dtype != like.dtype:
        raise TypeError(f"{name}: expected the dtype of {like_name}, {like.dtype}, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected the device of {like_name}, {like.device}, got {value.device}")


def shape(name: str, value: torch.Tensor, expected: Sequence[int], because: str) -> None:
    """Raises ValueError unless ``value`` has the expected shape; ``because`` says where it comes from."""
    if value.shape != torch.Size(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)} ({because}), got {tuple(value.shape)}")
