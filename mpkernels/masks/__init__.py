"""Masks of attention: frozen values that combine with ``&``, and cost nothing where they hide whole blocks.

==============================  ===================================================================================
``causal()``                    the keys up to a query's own; ``strictly_causal()`` without its own
``window(left, right)``         the keys around it
``prefix(n)``                   causal, but the first n keys are seen by all
``padding(lengths)``            the first keys of each batch item are real
``documents(ids)``              packed sequences: the keys of a query's own document
``intervals(first, last)``      any interval of keys a row
``dense(tensor)``               anything
==============================  ===================================================================================
"""

from mpkernels.masks.api import (
    causal,
    dense,
    documents,
    intervals,
    padding,
    prefix,
    strictly_causal,
    window,
)
from mpkernels.masks.picture import show
from mpkernels.masks.representation import resolve, to_dense, visible_pairs
from mpkernels.masks.values import Mask

__all__ = [
    "Mask",
    "causal",
    "dense",
    "documents",
    "intervals",
    "padding",
    "prefix",
    "resolve",
    "show",
    "strictly_causal",
    "to_dense",
    "visible_pairs",
    "window",
]
