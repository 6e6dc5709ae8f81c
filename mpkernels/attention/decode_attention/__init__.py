"""Attention of one or few queries to a long cache of keys and values: the op `decode_attention`."""

from mpkernels.attention.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
