"""gsplat.strategy.ops: edits of Gaussians, their optimizers and running statistics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mpkernels.splatting.strategies.base import Optimizers, Params
from mpkernels.splatting.strategies.edits import add_noise as inject_noise_to_position
from mpkernels.splatting.strategies.edits import duplicate, relocate, remove, sample_add, split
from mpkernels.splatting.strategies.edits import reset_opacities as reset_opa

__all__ = ["duplicate", "inject_noise_to_position", "relocate", "remove", "reset_opa", "sample_add", "split"]


@torch.no_grad()
def _update_param_with_optimizer(
    param_fn: Callable[[str, Tensor], Tensor],
    optimizer_fn: Callable[[str, Tensor], Tensor],
    params: Params,
    optimizers: Optimizers,
    names: list[str] | None = None,
) -> None:
    """Replaces parameters by ``param_fn(name, param)``, and optimizers' state by ``optimizer_fn(key, value)``.

    Private in gsplat, and taken from there by strategies that others wrote.
    """
    for name in list(params.keys()) if names is None else names:
        old = params[name]
        new = params[name] = param_fn(name, old)
        if name not in optimizers:
            if old.requires_grad:
                raise ValueError(f"optimizers: expected one for {name!r}, which has requires_grad")
            continue
        optimizer = optimizers[name]
        state = optimizer.state.pop(old, {})
        optimizer.param_groups[0]["params"] = [new]
        optimizer.state[new] = {
            key: value if key == "step" else optimizer_fn(key, value) for key, value in state.items()
        }
