"""The strategy that samples: dead Gaussians move onto live ones, and noise moves the transparent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mpkernels.splatting.strategies import edits
from mpkernels.splatting.strategies.base import Optimizers, Params, Strategy
from mpkernels.splatting.strategies.relocation import binomials


@dataclass
class MCMCStrategy(Strategy):
    """Kheradmand et al. 2024, "3D Gaussian Splatting as Markov Chain Monte Carlo"; gsplat 1.5.3's interface.

    Every ``refine_every`` steps, Gaussians with an opacity of at most ``min_opacity`` (or NaN) move onto others, drawn
    by opacity, and 5% more are added, up to ``cap_max``; in each step noise is added to the means. The loss should
    hold opacities and scales small (0.01 times their mean, in the paper).

    Args:
        cap_max: the most Gaussians there will be.
        noise_lr: the noise, over the learning rate of the means.
        refine_start_iter: nothing moves or is added until after this step.
        refine_stop_iter: nothing moves or is added from this step on; noise is.
        refine_every: Gaussians move and are added every so many steps.
        min_opacity: the opacity at which a Gaussian is dead.
        verbose: print what changed.
        generator: random numbers; None: torch's global generator.

    Example:
        >>> from mpkernels.splatting.strategies import MCMCStrategy
        >>> strategy = MCMCStrategy(cap_max=500_000)
        >>> state = strategy.initialize_state()

        and in each step of training, where ``lr`` is the learning rate of the means in this step::

            colors, alphas, info = rasterization(...)
            loss.backward()
            ...  # the optimizers' steps
            strategy.step_post_backward(params, optimizers, state, step, info, lr=lr)
    """

    cap_max: int = 1_000_000
    noise_lr: float = 5e5
    refine_start_iter: int = 500
    refine_stop_iter: int = 25_000
    refine_every: int = 100
    min_opacity: float = 0.005
    verbose: bool = False
    generator: torch.Generator | None = None

    def initialize_state(self) -> dict[str, Any]:
        """The running state: the table of binomial coefficients, "binoms"."""
        return {"binoms": binomials()}

    @torch.no_grad()
    def step_post_backward(
        self,
        params: Params,
        optimizers: Optimizers,
        state: dict[str, Any],
        step: int,
        info: dict[str, Any],
        lr: float,
    ) -> None:
        """Moves and adds Gaussians in some steps, and adds noise in each.

        Args:
            params: edited in place, see :meth:`check_sanity`.
            optimizers: edited in place.
            state: of :meth:`initialize_state`; other tensors of N rows in it are edited likewise.
            step: the number of this step, from 0.
            info: the third output of rasterization, not read.
            lr: the learning rate of the means in this step.

        Raises:
            ValueError: parameters or optimizers are missing.
        """
        missing = [name for name in ("means", "scales", "quats", "opacities") if name not in params]
        if missing:
            raise ValueError(f"params: missing {', '.join(missing)}")
        if state.get("binoms") is None:
            raise ValueError("state: expected 'binoms' in it (of initialize_state())")
        state["binoms"] = binoms = state["binoms"].to(params["means"].device)
        if self.refine_start_iter < step < self.refine_stop_iter and step % self.refine_every == 0:
            statistics = {name: value for name, value in state.items() if name != "binoms"}
            options: dict[str, Any] = {"min_opacity": self.min_opacity, "generator": self.generator}

            dead = ~(edits.opacities_of(params) > self.min_opacity)
            moved = edits.relocate(params, optimizers, statistics, dead, binoms, **options) if bool(dead.any()) else 0

            size = len(params["means"])
            more = max(0, min(self.cap_max, int(1.05 * size)) - size)
            added = edits.sample_add(params, optimizers, statistics, more, binoms, **options) if more else 0

            state.update(statistics)
            if self.verbose:
                print(f"Step {step}: {moved} moved, {added} added: {size + added} Gaussians")
            if params["means"].is_cuda:
                torch.cuda.empty_cache()  # blocks of the old sizes do not fit again
        edits.add_noise(params, optimizers, state, lr * self.noise_lr, generator=self.generator)
