"""Attention: softmax(Q K^T / sqrt(d) + bias) V over the keys that a mask leaves, without ever storing the scores."""
