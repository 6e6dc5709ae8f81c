"""The strategy of the first paper: Gaussians with a high gradient on the screen grow, transparent ones go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mpkernels.splatting.strategies import edits
from mpkernels.splatting.strategies.base import Optimizers, Params, Strategy, from_info


@dataclass
class DefaultStrategy(Strategy):
    """Adaptive density control of Kerbl et al. 2023, "3D Gaussian Splatting", section 5.2; gsplat 1.5.3's interface.

    Every ``refine_every`` steps a Gaussian whose mean gradient on the screen is above ``grow_grad2d`` is duplicated if
    it is small, split in two if it is large, and those too transparent are removed; every ``reset_every`` steps
    opacities are cut to twice ``prune_opa``. An opacity that is NaN counts as transparent.

    One thing differs from the code of gsplat 1.5.3: that never cuts opacities, by the precedence of ``&`` in a
    condition (its pull request 776 mended it later). ``reset_opacities=False`` does the same.

    Args:
        prune_opa: Gaussians with an opacity below this are removed.
        grow_grad2d: mean gradient to the mean on the screen, in units of half the image, above which a Gaussian grows.
            With ``absgrad`` a higher value is usual, as 0.0008.
        grow_scale3d: those at most this large (over the scale of the scene) are duplicated, larger ones split.
        grow_scale2d: those with a larger radius (over the image's longer side) are split, until
            ``refine_scale2d_stop_iter``.
        prune_scale3d: those larger (over the scale of the scene) are removed, after the first ``reset_every`` steps.
        prune_scale2d: those with a larger radius (over the image's longer side) are removed, likewise, until
            ``refine_scale2d_stop_iter``.
        refine_scale2d_stop_iter: the step at which radii stop to count; 0: they never do.
        refine_start_iter: nothing grows or goes until after this step.
        refine_stop_iter: nothing changes from this step on.
        reset_every: opacities are cut every so many steps.
        refine_every: Gaussians grow and go every so many steps.
        pause_refine_after_reset: for so many steps after opacities were cut nothing grows or goes.
        absgrad: use ``info["means2d"].absgrad``, the sum over pixels of absolute gradients (Ye et al. 2024, "AbsGS");
            rasterize with ``absgrad=True``.
        revised_opacity: the two halves of a split Gaussian share its opacity (Bulo et al. 2024, arXiv:2404.06109).
        verbose: print what changed.
        key_for_gradient: the tensor in ``info`` whose gradient counts.
        generator: random numbers for the positions of split Gaussians; None: torch's global generator.
        reset_opacities: whether opacities are cut at all.

    Example:
        >>> import torch
        >>> from mpkernels.splatting.strategies import DefaultStrategy
        >>> shapes = {"means": (4, 3), "scales": (4, 3), "quats": (4, 4), "opacities": (4,)}
        >>> params = torch.nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes.items()})
        >>> optimizers = {name: torch.optim.Adam([param]) for name, param in params.items()}
        >>> strategy = DefaultStrategy()
        >>> strategy.check_sanity(params, optimizers)
        >>> state = strategy.initialize_state(scene_scale=1.0)

        and in each step of training::

            colors, alphas, info = rasterization(...)
            strategy.step_pre_backward(params, optimizers, state, step, info)
            loss.backward()
            ...  # the optimizers' steps
            strategy.step_post_backward(params, optimizers, state, step, info)
    """

    prune_opa: float = 0.005
    grow_grad2d: float = 0.0002
    grow_scale3d: float = 0.01
    grow_scale2d: float = 0.05
    prune_scale3d: float = 0.1
    prune_scale2d: float = 0.15
    refine_scale2d_stop_iter: int = 0
    refine_start_iter: int = 500
    refine_stop_iter: int = 15_000
    reset_every: int = 3000
    refine_every: int = 100
    pause_refine_after_reset: int = 0
    absgrad: bool = False
    revised_opacity: bool = False
    verbose: bool = False
    key_for_gradient: Literal["means2d", "gradient_2dgs"] = "means2d"
    generator: torch.Generator | None = None
    reset_opacities: bool = True

    def initialize_state(self, scene_scale: float = 1.0) -> dict[str, Any]:
        """The running state: sums of gradients ("grad2d"), times seen ("count"), largest "radii" if they count.

        Args:
            scene_scale: the unit of ``grow_scale3d`` and ``prune_scale3d``, as half the extent of the cameras.

        Returns:
            A dict for the other methods; its tensors are made in the first step.
        """
        state: dict[str, Any] = {"grad2d": None, "count": None, "scene_scale": scene_scale}
        if self.refine_scale2d_stop_iter > 0:
            state["radii"] = None
        return state

    def step_pre_backward(
        self, params: Params, optimizers: Optimizers, state: dict[str, Any], step: int, info: dict[str, Any]
    ) -> None:
        """Makes ``loss.backward()`` keep the gradient to the means on the screen.

        Raises:
            ValueError: ``info`` lacks them, or they have no gradient (the parameters need requires_grad).
        """
        means2d = from_info(info, self.key_for_gradient)
        if not means2d.requires_grad:
            raise ValueError(
                f"info[{self.key_for_gradient!r}]: expected a tensor with requires_grad; "
                "render from parameters with requires_grad, and not under torch.no_grad()"
            )
        means2d.retain_grad()

    @torch.no_grad()
    def step_post_backward(
        self,
        params: Params,
        optimizers: Optimizers,
        state: dict[str, Any],
        step: int,
        info: dict[str, Any],
        packed: bool = False,
    ) -> None:
        """Adds this step's gradients to the state, and in some steps changes the set of Gaussians.

        Args:
            params: edited in place, see :meth:`check_sanity`.
            optimizers: edited in place.
            state: edited in place, of :meth:`initialize_state`.
            step: the number of this step, from 0.
            info: the third output of rasterization: means2d (..., C, N, 2) after ``loss.backward()``, radii (..., C, N,
                2), width, height, n_cameras; or packed (nnz, 2), with gaussian_ids (nnz,).
            packed: whether ``info`` is packed; also True whenever it has gaussian_ids.

        Raises:
            ValueError: ``info`` lacks something, there is no gradient, or the numbers of Gaussians differ.
        """
        if step >= self.refine_stop_iter:
            return
        self._update_state(params, state, info, packed)
        if (
            step > self.refine_start_iter
            and step % self.refine_every == 0
            and step % self.reset_every >= self.pause_refine_after_reset
        ):
            duplicated, halved = self._grow(params, optimizers, state, step)
            grown = len(params["means"])
            removed = self._prune(params, optimizers, state, step)
            if self.verbose:
                print(f"Step {step}: {duplicated} duplicated, {halved} split: {grown} Gaussians")
                print(f"Step {step}: {removed} removed: {grown - removed} Gaussians")
            for name in ("grad2d", "count", "radii"):
                if state.get(name) is not None:
                    state[name].zero_()
            if params["means"].is_cuda:
                torch.cuda.empty_cache()  # blocks of the old sizes do not fit again
        if self.reset_opacities and step > 0 and step % self.reset_every == 0:
            edits.reset_opacities(params, optimizers, state, 2 * self.prune_opa)

    def _update_state(self, params: Params, state: dict[str, Any], info: dict[str, Any], packed: bool) -> None:
        width, height, cameras = (from_info(info, name) for name in ("width", "height", "n_cameras"))
        radii = from_info(info, "radii")
        gradients = self._gradient(info)
        ids = info.get("gaussian_ids")
        if packed and ids is None:
            raise ValueError(
                "info: expected 'gaussian_ids' with packed=True; rasterize with packed=True, or drop it here"
            )
        size = len(params["means"])
        if ids is None and gradients.shape[-2] != size:
            raise ValueError(
                f"info[{self.key_for_gradient!r}]: expected the gradients of {size} Gaussians (those of params), "
                f"got the shape {tuple(gradients.shape)}"
            )

        norms = torch.hypot(gradients[..., 0] * (width / 2 * cameras), gradients[..., 1] * (height / 2 * cameras))
        seen = (radii > 0).all(dim=-1)
        largest = radii.amax(dim=-1).to(norms.dtype) / max(width, height)
        norms, largest = (torch.where(seen, value, 0) for value in (norms, largest))
        seen = seen.to(norms.dtype)
        if ids is None:  # sums over cameras, in their order
            norms, seen, largest = (value.reshape(radii[..., 0, 0].numel(), size) for value in (norms, seen, largest))
            total, count, largest = norms.sum(0), seen.sum(0), _highest(largest)
        else:
            zeros = torch.zeros(size, dtype=norms.dtype, device=norms.device)
            total, count = _add_at(zeros, ids, norms), _add_at(zeros, ids, seen)
            largest = zeros.scatter_reduce(0, ids, largest, "amax")

        names = ["grad2d", "count"] + (["radii"] if self.refine_scale2d_stop_iter > 0 else [])
        for name in names:
            if state.get(name) is None:
                state[name] = torch.zeros(size, device=gradients.device)
            elif len(state[name]) != size:
                raise ValueError(
                    f"state[{name!r}]: expected {size} rows (those of params), got {len(state[name])}; "
                    "after Gaussians were added or removed elsewhere, begin with a new initialize_state()"
                )
        state["grad2d"] += total
        state["count"] += count
        if self.refine_scale2d_stop_iter > 0:
            state["radii"] = torch.maximum(state["radii"], largest.to(state["radii"].dtype))

    def _gradient(self, info: dict[str, Any]) -> Tensor:
        key = self.key_for_gradient
        means2d = from_info(info, key)
        if self.absgrad:
            gradient = getattr(means2d, "absgrad", None)
            if gradient is None:
                raise ValueError(
                    f"info[{key!r}]: has no .absgrad, which absgrad=True needs: rasterize with absgrad=True, "
                    "and call step_post_backward after loss.backward()"
                )
            return gradient
        # .grad of a tensor that is no leaf and retains nothing only warns
        gradient = means2d.grad if means2d.is_leaf or means2d.retains_grad else None
        if gradient is None:
            raise ValueError(
                f"info[{key!r}]: has no .grad: call step_pre_backward before loss.backward(), which makes it retain "
                "its gradient, and step_post_backward after it"
            )
        return gradient

    def _grow(self, params: Params, optimizers: Optimizers, state: dict[str, Any], step: int) -> tuple[int, int]:
        """Duplicates and splits; returns how many."""
        high = state["grad2d"] / state["count"].clamp_min(1) > self.grow_grad2d
        small = params["scales"].exp().amax(-1) <= self.grow_scale3d * state["scene_scale"]
        twice, halved = high & small, high & ~small
        if step < self.refine_scale2d_stop_iter:
            halved |= state["radii"] > self.grow_scale2d
        duplicated, split = int(twice.sum()), int(halved.sum())
        if duplicated:
            edits.duplicate(params, optimizers, state, twice)
            halved = torch.cat([halved, halved.new_zeros(duplicated)])  # copies are not split as well
        if split:
            edits.split(params, optimizers, state, halved, self.revised_opacity, generator=self.generator)
        return duplicated, split

    def _prune(self, params: Params, optimizers: Optimizers, state: dict[str, Any], step: int) -> int:
        """Removes the transparent and the far too large; returns how many."""
        gone = ~(edits.opacities_of(params) >= self.prune_opa)
        if step > self.reset_every:
            gone |= params["scales"].exp().amax(-1) > self.prune_scale3d * state["scene_scale"]
            if step < self.refine_scale2d_stop_iter:
                gone |= state["radii"] > self.prune_scale2d
        removed = int(gone.sum())
        if removed:
            edits.remove(params, optimizers, state, gone)
        return removed


def _highest(values: Tensor) -> Tensor:
    """The maximum over rows of values that are not negative, 0 without a row."""
    return values.amax(0) if len(values) else values.sum(0)


def _add_at(total: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """Adds values at ids, which may repeat, in a fixed order: each device has one call that keeps one."""
    if total.is_cuda:
        return total.index_put((ids,), values, accumulate=True)
    return total.index_add(0, ids, values)
