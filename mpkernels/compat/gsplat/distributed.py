"""gsplat.distributed: one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch


def cli(fn: Callable[[int, int, int, Any], None], args: Any, verbose: bool = False) -> bool:
    """Calls ``fn(local_rank=0, world_rank=0, world_size=1, args)``: gsplat starts a process a GPU.

    Raises:
        NotImplementedError: this process is one of several, or sees several GPUs.
    """
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1 or torch.cuda.device_count() > 1:
        raise NotImplementedError(
            "training on several GPUs is not supported by mpkernels.compat.gsplat: set CUDA_VISIBLE_DEVICES to one"
        )
    fn(0, 0, 1, args)
    return True
