"""gsplat.optimizers.selective_adam: Adam on the Gaussians that were seen."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels.compat.gsplat.cuda._wrapper import adam


class SelectiveAdam(torch.optim.Adam):
    """Adam that changes visible rows alone, and keeps the state of the others (Mallick et al. 2024, "Taming 3DGS").

    As in gsplat there is no bias correction: the first steps are up to lr * (1 - beta1) / sqrt(1 - beta2) large.

    Args:
        params: parameters, or groups with one parameter each.
        eps: added to the denominator.
        betas: decay of the running means of the gradient and of its square.

    Example:
        >>> import torch
        >>> from mpkernels.compat.gsplat import SelectiveAdam
        >>> param = torch.ones(2, requires_grad=True)
        >>> optimizer = SelectiveAdam([{"params": [param], "lr": 0.1}], eps=1e-8, betas=(0.0, 0.0))
        >>> param.sum().backward()
        >>> optimizer.step(torch.tensor([True, False]))
        >>> param.detach()
        tensor([0.9000, 1.0000])
    """

    def __init__(self, params, eps: float, betas: tuple[float, float]):
        super().__init__(params=params, eps=eps, betas=betas)

    @torch.no_grad()
    def step(self, visibility: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Changes the rows in which ``visibility`` (N,) is True (or not 0).

        Raises:
            ValueError: a group has several parameters, or another number of rows.
        """
        for group in self.param_groups:
            if len(group["params"]) != 1:
                raise ValueError(f"params: expected groups of one parameter each, got {len(group['params'])}")
            (param,) = group["params"]
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
            if visibility.numel() != len(param):
                raise ValueError(
                    f"visibility: expected {len(param)} elements, the rows of the parameter, "
                    f"got {tuple(visibility.shape)}"
                )
            adam(
                param,
                param.grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                visibility.reshape(-1) != 0,
                float(group["lr"]),
                group["betas"][0],
                group["betas"][1],
                group["eps"],
            )
