"""Attention: softmax(Q K^T / sqrt(d) + bias) V over the keys that a mask leaves, without ever storing the scores."""

from mpkernels.attention.attention import attention

__all__ = ["attention"]
