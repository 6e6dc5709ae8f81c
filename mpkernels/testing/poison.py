"""Fresh memory that is filled with NaN, so that a kernel which leaves an element unwritten is seen."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

_VARIABLE = "MPKERNELS_POISON"  # read by csrc/common/tensor.h at every allocation


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills what the package's kernels allocate with NaN (all-ones bytes for integers) before they write to it."""
    before = os.environ.get(_VARIABLE)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    os.environ[_VARIABLE] = "1"
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty fills with NaN in this mode
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before
