"""Masked attention: the op `attention`."""

from mpkernels.attention.attention.api import attention

__all__ = ["attention"]
