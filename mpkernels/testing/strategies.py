"""Hypothesis strategies: shapes and values that ops meet and authors forget. Needs `hypothesis`."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mpkernels.library import triton_interpreted

# sizes around the widths of vectors, warps and blocks
SIZES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 123, 127, 128, 129)


def sizes(*, zero: bool = True, largest: int = 129) -> st.SearchStrategy[int]:
    """A dimension's size: any, with those around vector, warp and block widths more often."""
    special = st.sampled_from([size for size in SIZES if size <= largest])
    return st.one_of(special, st.integers(0 if zero else 1, largest))


def generators() -> st.SearchStrategy[torch.Generator]:
    """Seeded torch generators, for values that need not shrink."""
    return st.integers(0, 2**31 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


@st.composite
def packed_infos(draw, *, rays: int = 8, longest: int = 70) -> tuple[torch.Tensor, int]:
    """([start, count] of rays, number of samples): empty rays, gaps and any order among them."""
    counts = draw(st.lists(st.integers(0, longest), max_size=rays))
    spaces = draw(st.lists(st.integers(0, 3), min_size=len(counts) + 1, max_size=len(counts) + 1))
    starts, at = [], 0
    for count, space in zip(counts, spaces[:-1], strict=True):
        starts.append(at + space)
        at += space + count
    rows = draw(st.permutations(list(zip(starts, counts, strict=True))))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2), at + spaces[-1]


def fuzz(examples: int, interpreted: int | None = None) -> settings:
    """How often a test of several backends draws: the same numbers in every run, fewer in Triton's interpreter.

    Args:
        examples: how many.
        interpreted: how many in Triton's interpreter, if not as many.
    """
    return settings(
        max_examples=interpreted if interpreted is not None and triton_interpreted() else examples,
        deadline=None,
        derandomize=True,
        # one test runs in several subclasses, and interpreters and fibres take their time
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow, HealthCheck.data_too_large],
    )
