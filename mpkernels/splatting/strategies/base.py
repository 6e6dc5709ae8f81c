"""What strategies share: the checks of parameters and optimizers, and of what a rendering says about itself."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Params = MutableMapping[str, Tensor] | torch.nn.ParameterDict
Optimizers = Mapping[str, torch.optim.Optimizer]

REQUIRED = ("means", "scales", "quats", "opacities")


@dataclass
class Strategy:
    """The interface of a strategy: two calls in each step of training, around ``loss.backward()``."""

    def check_sanity(self, params: Params, optimizers: Optimizers) -> None:
        """Checks that parameters and optimizers are of the form that strategies edit.

        Args:
            params: means (N, 3), scales (N, 3) as logarithms, quats (N, 4), opacities (N,) or (N, 1) as logits, and any
                others of N rows.
            optimizers: one for each parameter that is trained, under the parameter's name, with one group that holds
                this parameter alone.

        Raises:
            ValueError: one is missing, or of another form; the message names it.
        """
        missing = [name for name in REQUIRED if name not in params]
        if missing:
            raise ValueError(f"params: expected {', '.join(REQUIRED)}, missing {', '.join(missing)}")
        trained = {name for name, param in params.items() if param.requires_grad}
        if trained != set(optimizers):
            missing, extra = sorted(trained - set(optimizers)), sorted(set(optimizers) - trained)
            raise ValueError(
                "optimizers: expected one for each parameter with requires_grad; "
                f"missing {missing}, without such a parameter {extra}"
            )
        size = len(params["means"])
        for name, param in params.items():
            if param.dim() == 0 or len(param) != size:
                raise ValueError(
                    f"params[{name!r}]: expected {size} rows (those of means), got the shape {tuple(param.shape)}"
                )
        for name, optimizer in optimizers.items():
            check_optimizer(name, params[name], optimizer)

    def step_pre_backward(self, *args: Any, **kwargs: Any) -> None:
        """Called before ``loss.backward()``."""

    def step_post_backward(self, *args: Any, **kwargs: Any) -> None:
        """Called after ``loss.backward()``."""


def check_optimizer(name: str, param: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError unless the optimizer has one group, with this parameter alone."""
    groups = optimizer.param_groups
    if len(groups) != 1:
        raise ValueError(f"optimizers[{name!r}]: expected one parameter group, got {len(groups)}")
    if len(groups[0]["params"]) != 1 or groups[0]["params"][0] is not param:
        raise ValueError(
            f"optimizers[{name!r}]: expected params[{name!r}] alone in its parameter group, "
            f"got {len(groups[0]['params'])} tensor(s) that are not it"
        )


def from_info(info: Mapping[str, Any], name: str) -> Any:
    """An entry of the third output of rasterization; ValueError names a missing one."""
    if name not in info:
        raise ValueError(
            f"info: expected {name!r} in it (pass the third output of rasterization), got {sorted(map(str, info))}"
        )
    return info[name]
