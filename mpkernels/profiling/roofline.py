"""The ceilings of this machine, measured now: what a kernel's bytes and operations are divided by.

A kernel that must move ``bytes`` and do ``flops`` takes at least ``max(bytes / bandwidth, flops / peak)`` seconds
(Williams, Waterman, Patterson 2009, "Roofline"). The bandwidth is that of torch's own copy of a buffer larger than the
caches, bytes read and written added up; the peak is that of torch's float32 matrix product.

Copy bandwidth is a yardstick, not a law: a plain store also reads the line that it overwrites, which the count leaves
out, so a kernel that reads more than it writes can pass 100 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from mpkernels.profiling import timing
from mpkernels.spec import Cost

COPY_BYTES = 256 * 2**20  # of each of the two buffers
MATRIX = {"cpu": 1024, "cuda": 8192}  # side of the matrices of the peak


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches on the simplest possible kernels."""

    device: str
    threads: int
    copy_bytes_per_s: float  # torch's copy, read + written
    read_bytes_per_s: float  # torch's sum
    flops_per_s: float  # torch's float32 matrix product, 2 n^3

    def seconds(self, cost: Cost) -> float:
        """The roofline: the least time in which a kernel of that cost could run."""
        return max(cost.bytes / self.copy_bytes_per_s, cost.flops / self.flops_per_s)

    def bound(self, cost: Cost) -> str:
        """Which ceiling comes first: "memory" or "compute"."""
        memory = cost.bytes / self.copy_bytes_per_s >= cost.flops / self.flops_per_s
        return "memory" if memory else "compute"

    def to_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def copy(device: str = "cpu", size: int = COPY_BYTES) -> tuple[Callable[[], object], int]:
    """A function that copies one buffer into another, and the bytes that a call moves."""
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source), 2 * source.numel() * source.element_size()


def measure(
    device: str = "cpu", *, budget_s: float = 1.5, size: int = COPY_BYTES, matrix: int | None = None
) -> Ceilings:
    """Measures the ceilings of a device, with the threads that torch uses now.

    Args:
        device: "cpu" or "cuda".
        budget_s: seconds of measuring.
        size: bytes of each buffer; larger than the last cache, or the caches are measured.
        matrix: side of the square matrices; chosen by device if None.
    """
    run_copy, copied = copy(device, size)
    buffer = torch.ones(size // 4, device=device)
    side = matrix or MATRIX[device]
    a, b = torch.rand(side, side, device=device), torch.rand(side, side, device=device)
    product = torch.empty_like(a)
    with torch.no_grad():
        times = timing.paired(
            {"copy": run_copy, "read": buffer.sum, "product": lambda: torch.mm(a, b, out=product)},
            budget_s=budget_s,
            min_rounds=3,
            device=device,
        )
    return Ceilings(
        device=device,
        threads=torch.get_num_threads(),
        copy_bytes_per_s=copied / timing.median(times, "copy"),
        read_bytes_per_s=buffer.numel() * buffer.element_size() / timing.median(times, "read"),
        flops_per_s=2 * side**3 / timing.median(times, "product"),
    )
