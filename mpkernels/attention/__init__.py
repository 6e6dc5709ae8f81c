"""Attention: softmax(Q K^T / sqrt(d) + bias) V over the keys that a mask leaves, without ever storing the scores."""

from mpkernels.attention.attention import attention
from mpkernels.attention.attention_varlen import attention_varlen
from mpkernels.attention.decode_attention import decode_attention
from mpkernels.attention.scaled_dot_product_attention import scaled_dot_product_attention

__all__ = ["attention", "attention_varlen", "decode_attention", "scaled_dot_product_attention"]
