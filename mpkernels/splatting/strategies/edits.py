"""Edits of a set of Gaussians: parameters, the state of their optimizers and running statistics change together.

In all of them ``params`` maps names to tensors of N rows, and ``optimizers`` the names of the trained ones to torch
optimizers, as in :meth:`Strategy.check_sanity`. Edited parameters are new ``torch.nn.Parameter`` objects, put into
both. In an optimizer's state, and in ``state``, each tensor of N rows is edited (but "step"), and nothing else. Random
numbers come from ``generator``, or from torch's global one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpkernels.splatting.strategies.base import Optimizers, Params, check_optimizer
from mpkernels.splatting.strategies.relocation import compute_relocation

SPLIT_SHRINKS = 1.6  # a split Gaussian's scale over that of its halves (Kerbl et al. 2023, section 5.2)


@torch.no_grad()
def duplicate(params: Params, optimizers: Optimizers, state: MutableMapping[str, Any], mask: Tensor) -> None:
    """Appends a copy of each Gaussian in ``mask`` (N,) bool, with new optimizer state."""
    chosen = mask.nonzero()[:, 0]
    rows = torch.arange(len(mask), device=mask.device)
    _take(params, optimizers, state, torch.cat([rows, chosen]), fresh=_last(len(chosen), len(mask), mask.device))


@torch.no_grad()
def split(
    params: Params,
    optimizers: Optimizers,
    state: MutableMapping[str, Any],
    mask: Tensor,
    revised_opacity: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> None:
    """Replaces each Gaussian in ``mask`` (N,) bool by two, drawn from it, 1.6 times smaller, at the end of the rows.

    With ``revised_opacity`` both together are as opaque as the old one was: 1 - sqrt(1 - opacity) (Bulo et al. 2024,
    "Revising densification in Gaussian splatting", arXiv:2404.06109).
    """
    chosen, rest = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]
    scales = params["scales"][chosen]
    noise = _normal((2, *scales.shape), scales, generator)
    offsets = rotate(params["quats"][chosen], scales.exp() * noise)  # (2, chosen, 3)
    children = {
        "means": params["means"][chosen] + offsets,
        "scales": (scales - math.log(SPLIT_SHRINKS)).expand(2, *scales.shape),
    }
    if revised_opacity:
        half = _half_of_logit(params["opacities"][chosen])
        children["opacities"] = half.expand(2, *half.shape)
    changed = {name: torch.cat([params[name][rest], two.flatten(0, 1)]) for name, two in children.items()}
    fresh = _last(2 * len(chosen), len(rest), mask.device)
    _take(params, optimizers, state, torch.cat([rest, chosen, chosen]), fresh=fresh, changed=changed)


@torch.no_grad()
def remove(params: Params, optimizers: Optimizers, state: MutableMapping[str, Any], mask: Tensor) -> None:
    """Removes the Gaussians in ``mask`` (N,) bool."""
    _take(params, optimizers, state, (~mask).nonzero()[:, 0])


@torch.no_grad()
def reset_opacities(params: Params, optimizers: Optimizers, state: MutableMapping[str, Any], value: float) -> None:
    """Cuts opacities to at most ``value`` (a number in (0, 1), not a logit), with new optimizer state."""
    if not 0 < value < 1:
        raise ValueError(f"value: expected an opacity in (0, 1), got {value}")
    opacities = params["opacities"].clamp(max=math.log(value / (1 - value)))
    _replace(params, optimizers, "opacities", opacities, torch.zeros_like)


@torch.no_grad()
def relocate(
    params: Params,
    optimizers: Optimizers,
    state: MutableMapping[str, Any],
    mask: Tensor,
    binoms: Tensor,
    min_opacity: float = 0.005,
    *,
    generator: torch.Generator | None = None,
) -> int:
    """Moves the Gaussians in ``mask`` (N,) bool onto others, drawn by opacity; returns how many moved.

    Those that share a place afterwards get the opacity and the scale of :func:`compute_relocation`, the opacity cut to
    [``min_opacity``, 1), and new optimizer state, the moved ones as well as those that they moved to. Nothing moves
    where no other has an opacity above 0.
    """
    weights = opacities_of(params).masked_fill(mask, 0)
    dead = mask.nonzero()[:, 0]
    onto = sample(weights, len(dead), generator)
    if onto is None:
        return 0
    rows = torch.arange(len(mask), device=mask.device)
    rows[dead] = onto
    fresh = mask.clone()
    fresh[onto] = True
    changed = {name: value[rows] for name, value in _shared(params, onto, binoms, min_opacity).items()}
    _take(params, optimizers, state, rows, fresh=fresh, changed=changed, zero_statistics=True)
    return len(dead)


@torch.no_grad()
def sample_add(
    params: Params,
    optimizers: Optimizers,
    state: MutableMapping[str, Any],
    n: int,
    binoms: Tensor,
    min_opacity: float = 0.005,
    *,
    generator: torch.Generator | None = None,
) -> int:
    """Appends ``n`` Gaussians on top of others, drawn by opacity, which share as in :func:`relocate`.

    The new ones have new optimizer state; those drawn keep theirs. Returns how many are new: ``n``, or 0 where no
    opacity is above 0.
    """
    weights = opacities_of(params)
    onto = sample(weights, n, generator)
    if onto is None:
        return 0
    rows = torch.cat([torch.arange(len(weights), device=weights.device), onto])
    changed = {name: value[rows] for name, value in _shared(params, onto, binoms, min_opacity).items()}
    fresh = _last(n, len(weights), weights.device)
    _take(params, optimizers, state, rows, fresh=fresh, changed=changed, zero_statistics=True)
    return n


@torch.no_grad()
def add_noise(
    params: Params,
    optimizers: Optimizers,
    state: MutableMapping[str, Any],
    scaler: float,
    *,
    generator: torch.Generator | None = None,
) -> None:
    """Moves means by ``scaler`` * sigmoid(100 (0.005 - opacity)) * covariance * normal noise (eq. 8 of the MCMC paper).

    The means are changed in place, and optimizers are left alone. Where the opacity is NaN nothing moves.
    """
    means = params["means"]
    noise = _normal(means.shape, means, generator)
    factor = torch.sigmoid(100 * (0.005 - opacities_of(params))).nan_to_num(0) * scaler
    noise = noise * factor[:, None]
    # normal noise has no direction, so the R^T of R S S^T R^T need not turn it
    means.add_(rotate(params["quats"], (2 * params["scales"]).exp() * noise))


def opacities_of(params: Params) -> Tensor:
    """Opacities in [0, 1], (N,), from logits (N,) or (N, 1)."""
    return torch.sigmoid(params["opacities"].detach().reshape(len(params["opacities"])))


def rotate(quats: Tensor, vectors: Tensor) -> Tensor:
    """Vectors (..., N, 3) rotated by quaternions (N, 4), wxyz, of any length; that of length 0 rotates nothing."""
    quats = F.normalize(quats, dim=-1)
    w, axis = quats[..., :1], quats[..., 1:].expand_as(vectors)
    cross = torch.linalg.cross(axis, vectors)
    return vectors + 2 * (w * cross + torch.linalg.cross(axis, cross))


def sample(weights: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor | None:
    """``n`` indices (n,) drawn with replacement, in proportion to weights (N,) in [0, 1]; None if all are 0.

    The sum over weights is one of integers, so that the draw is the same in every run on every device, and N may be
    above the 2^24 of torch.multinomial.
    """
    units = (weights.nan_to_num(0).double() * 2**31).to(torch.int64)
    ends = units.cumsum(0)
    if len(ends) == 0 or int(ends[-1]) == 0:
        return None
    device = weights.device if generator is None else generator.device
    uniform = torch.rand(n, dtype=torch.float64, generator=generator, device=device).to(weights.device)
    drawn = (uniform * ends[-1]).to(torch.int64).clamp(max=ends[-1] - 1)
    return torch.searchsorted(ends, drawn, right=True)


def _shared(params: Params, onto: Tensor, binoms: Tensor, min_opacity: float) -> dict[str, Tensor]:
    """Opacities and scales, as parameters, once each Gaussian is shared with those that move onto it."""
    opacities, scales = params["opacities"].detach().clone(), params["scales"].detach().clone()
    count = torch.bincount(onto, minlength=len(opacities))
    places = count.nonzero()[:, 0]
    opacity, scale = compute_relocation(
        opacities_of(params)[places].to(scales.dtype), scales[places].exp(), count[places] + 1, binoms
    )
    highest = 1 - torch.finfo(torch.float32).eps
    opacities[places] = torch.logit(opacity.clamp(min_opacity, highest)).reshape(-1, *opacities.shape[1:])
    scales[places] = scale.log()
    return {"opacities": opacities, "scales": scales}


def _half_of_logit(logits: Tensor) -> Tensor:
    """The logit of 1 - sqrt(1 - opacity), also where the opacity rounds to 0 or 1."""
    half_log_rest = F.logsigmoid(-logits) / 2
    return F.logsigmoid(logits) - torch.log1p(half_log_rest.exp()) - half_log_rest


def _normal(shape: tuple[int, ...] | torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


def _last(count: int, before: int, device: torch.device) -> Tensor:
    """A mask of the last ``count`` rows behind ``before`` others."""
    return torch.arange(before + count, device=device) >= before


def _take(
    params: Params,
    optimizers: Optimizers,
    state: MutableMapping[str, Any],
    rows: Tensor,
    *,
    fresh: Tensor | None = None,
    changed: Mapping[str, Tensor] | None = None,
    zero_statistics: bool = False,
) -> None:
    """Makes Gaussian i of the new set from row ``rows[i]`` of the old, but for parameters that are ``changed``.

    The optimizer state of ``fresh`` rows (bool, one for each new row) is 0, and with ``zero_statistics`` their
    running state too.
    """
    size = len(params["means"])

    def taken(value: Tensor) -> Tensor:
        return value[rows]

    def taken_or_new(value: Tensor) -> Tensor:
        value = value[rows]
        if fresh is not None:
            value[fresh] = 0
        return value

    for name in list(params.keys()):
        value = changed[name] if changed and name in changed else params[name].detach()[rows]
        _replace(params, optimizers, name, value, taken_or_new)
    _edit(state, size, taken_or_new if zero_statistics else taken)


def _replace(params: Params, optimizers: Optimizers, name: str, value: Tensor, of_state) -> None:
    """Puts a new tensor in the place of a parameter, also in its optimizer, whose state becomes ``of_state(state)``."""
    old = params[name]
    optimizer = optimizers.get(name)
    if optimizer is None and old.requires_grad:
        raise ValueError(f"optimizers: expected one for {name!r}, which has requires_grad; got {sorted(optimizers)}")
    new = torch.nn.Parameter(value, requires_grad=old.requires_grad)
    if optimizer is not None:
        check_optimizer(name, old, optimizer)
        kept = optimizer.state.pop(old, None)
        optimizer.param_groups[0]["params"] = [new]
        if kept is not None:
            _edit(kept, len(old), of_state)
            optimizer.state[new] = kept
    params[name] = new


def _edit(state: MutableMapping[str, Any], size: int, change) -> None:
    """Changes each tensor of ``size`` rows in a dict of state; "step" counts steps, whatever its shape."""
    for key, value in state.items():
        if key != "step" and isinstance(value, Tensor) and value.dim() > 0 and len(value) == size:
            state[key] = change(value)
