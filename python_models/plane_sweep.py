"""A plane-sweep volume fitted to a stereo pair through :func:`mpkernels.composite`.

The scene is a stack of fronto-parallel planes in the left camera, uniformly spaced in disparity (the plane sweep
of Collins, "A space-sweep approach to true multi-image matching", CVPR 1996), each with a colour and a density for
every pixel (a multiplane image: Zhou et al., "Stereo Magnification", SIGGRAPH 2018). A pixel of either photograph is
volume-rendered along the planes (Max, "Optical models for direct volume rendering", TVCG 1995, eqs. 1-5):

    alpha_i = 1 - exp(-sigma_i delta),   T_i = prod_{j<i} (1 - alpha_j),   C = sum_i T_i alpha_i c_i

The pair is rectified, so a plane of disparity d is a pure horizontal shift: the right pixel x_r sees the left pixel
x_l = x_r + d. Disparity and depth are tied by Z = baseline * focal / (d + doffs), where doffs is the distance between
the two principal points.

The ray coordinate is t = d_near - d, in pixels of disparity. Planes are uniform in it, the densities are per pixel of
disparity, and the `depth` that the op returns is a disparity but for its sign and origin.

Random blocks of the right photograph are held out: they take part in nothing but the figures reported on them. The
ground-truth disparity is used for figures and one baseline only.

    python -m python_models.plane_sweep --output out/plane_sweep
"""

from __future__ import annotations

import argparse
import importlib.resources
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

import mpkernels

SCALE = 4  # the volume is fitted at a quarter of the photographs' resolution
FOCAL = 994.978  # pixels of the 741x500 photographs
BASELINE = 0.193001  # metres
PRINCIPAL_POINT_SHIFT = 31.086  # "doffs": pixels of the 741x500 photographs
# The search range that Middlebury publishes with the cameras for every method (ndisp = 280 pixels at 2964x1988, a
# quarter of it at 741x500). The ground-truth disparities play no part in it.
FULL_DISPARITY_RANGE = (0.0, 70.0)

HELD_OUT_BLOCK = 8  # pixels a side
HELD_OUT_SHARE = 0.2
COLOUR_RATE = 0.001
DENSITY_RATE = 0.1
SMOOTHNESS = 0.02  # weight of the edge-aware total variation of disparity
SPREAD = 0.002  # weight of the variance of disparity along a ray
EDGE_FALLOFF = 10.0  # per unit of colour
STEREO_COLOUR = 0.1  # weight of colour beside local contrast in the photo-consistency that starts the densities
STEREO_CAP = 0.1  # photo-consistency counts no error as larger
STEREO_STEP, STEREO_JUMP = 0.01, 0.1  # cost of a change of disparity by one plane, by more
STEREO_TEMPERATURE = 0.007

Progress = Callable[[dict], None] | None


@dataclass(frozen=True)
class StereoPair:
    """A rectified pair. Colours are in [0, 1]; disparity is in pixels of these pictures, NaN where unknown."""

    left: Tensor  # (height, width, 3)
    right: Tensor  # (height, width, 3)
    disparity: Tensor  # (height, width), of the left view: right[y, x - disparity[y, x]] shows left[y, x]
    disparity_range: tuple[float, float]  # farthest, nearest


def depth_of_disparity(disparity: float) -> float:
    """Metres, of a disparity in pixels of the 741x500 photographs: Z = baseline * focal / (disparity + doffs)."""
    return BASELINE * FOCAL / (disparity + PRINCIPAL_POINT_SHIFT)


def load_motorcycle() -> StereoPair:
    """The Middlebury 2014 "Motorcycle" pair at 741x500, as shipped inside the scikit-image wheel."""
    folder = importlib.resources.files("skimage") / "data"
    names = ("motorcycle_left.png", "motorcycle_right.png", "motorcycle_disp.npz")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the installed scikit-image does not ship {', '.join(missing)}; the wheels of scikit-image 0.25.2 and "
            "0.26.0 do: pip install scikit-image==0.26.0"
        )

    def picture(name: str) -> Tensor:
        with (folder / name).open("rb") as file:
            return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).float() / 255

    with (folder / names[2]).open("rb") as file:
        disparity = torch.from_numpy(np.load(file)["arr_0"].astype(np.float32))
    disparity[~disparity.isfinite()] = math.nan
    return StereoPair(picture(names[0]), picture(names[1]), disparity, FULL_DISPARITY_RANGE)


def shrink(picture: Tensor, scale: int) -> Tensor:
    """Average blocks of scale x scale pixels of a (height, width, channels) picture, dropping what is left over."""
    height, width, channels = picture.shape[0] // scale, picture.shape[1] // scale, picture.shape[2]
    blocks = picture[: height * scale, : width * scale].reshape(height, scale, width, scale, channels)
    return blocks.mean(dim=(1, 3))


def shrink_pair(pair: StereoPair, scale: int) -> StereoPair:
    """The pair at 1/scale of its resolution; a disparity is the median of the known ones in its block."""
    height, width = pair.disparity.shape[0] // scale, pair.disparity.shape[1] // scale
    blocks = pair.disparity[: height * scale, : width * scale].reshape(height, scale, width, scale)
    disparity = blocks.permute(0, 2, 1, 3).reshape(height, width, -1).nanmedian(dim=-1).values / scale
    far, near = pair.disparity_range
    return StereoPair(shrink(pair.left, scale), shrink(pair.right, scale), disparity, (far / scale, near / scale))


def held_out_blocks(height: int, width: int, seed: int) -> Tensor:
    """A random choice of 8x8 blocks that make a fifth of a picture: a bool (height, width), True where held out."""
    rows, columns = -(-height // HELD_OUT_BLOCK), -(-width // HELD_OUT_BLOCK)
    chosen = torch.zeros(rows * columns, dtype=torch.bool)
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
    chosen[order[: round(HELD_OUT_SHARE * rows * columns)]] = True
    grid = chosen.reshape(rows, columns)
    return grid.repeat_interleave(HELD_OUT_BLOCK, 0).repeat_interleave(HELD_OUT_BLOCK, 1)[:height, :width].contiguous()


def psnr(picture: Tensor, target: Tensor, where: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB, -10 log10(mean squared error), over the pixels where `where` is True."""
    error = (picture.clamp(0, 1) - target).square()
    return -10 * math.log10(max((error if where is None else error[where]).mean().item(), 1e-12))


class _ShiftPlanes(torch.autograd.Function):
    """out[y, x, s] = (1 - f_s) volume[y, x + n_s, s] + f_s volume[y, x + n_s + 1, s], with n_s + f_s = disparity_s.

    Planes that share the whole part n_s are moved as one slice; the gradient is the transpose, in a fixed order.
    The last dimension holds planes and their channels, plane by plane.
    """

    @staticmethod
    def forward(ctx, volume: Tensor, runs: list, fraction: Tensor, width: int) -> Tensor:
        ctx.runs, ctx.full_width = runs, volume.shape[1]
        ctx.save_for_backward(fraction)
        moved = volume.new_empty(volume.shape[0], width + 1, volume.shape[2])
        for planes, shift in runs:
            moved[:, :, planes] = volume[:, shift : shift + width + 1, planes]
        return torch.lerp(moved[:, :-1], moved[:, 1:], fraction)

    @staticmethod
    def backward(ctx, grad_out: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        beside = grad_out * ctx.saved_tensors[0]
        moved = functional.pad(grad_out - beside, (0, 0, 0, 1))
        moved[:, 1:] += beside
        grad = grad_out.new_zeros(grad_out.shape[0], ctx.full_width, grad_out.shape[2])
        for planes, shift in ctx.runs:
            grad[:, shift : shift + moved.shape[1], planes] = moved[:, :, planes]
        return grad, None, None, None


class PlaneSweepVolume(torch.nn.Module):
    """Planes of colour and density in the left camera, rendered into both.

    The volume is wider than the left picture by the largest disparity: what the right camera sees beyond the left
    picture's right edge is in it too.

    height and width are those of the pictures; disparity_range is the farthest and the nearest in pixels,
    0 <= farthest < nearest; planes (at least 2) are ordered near to far and uniformly spaced in disparity.
    """

    disparity: Tensor
    fraction: Tensor
    t_edges: Tensor

    def __init__(self, height: int, width: int, disparity_range: tuple[float, float], planes: int):
        super().__init__()
        far, near = disparity_range
        if not 0 <= far < near:
            raise ValueError(f"disparity_range: expected 0 <= farthest < nearest, got {disparity_range}")
        self.width, self.step, self.near = width, (near - far) / (planes - 1), near
        disparity = torch.linspace(near, far, planes, dtype=torch.float64)
        whole = disparity.floor()
        starts = [i for i in range(planes) if i == 0 or whole[i] != whole[i - 1]] + [planes]
        self.runs = [(a, b, int(whole[a])) for a, b in itertools.pairwise(starts)]
        self.full_width = width + int(whole[0]) + 1
        self.register_buffer("disparity", disparity.float())  # (planes,)
        self.register_buffer("fraction", (disparity - whole).float())  # (planes,)
        self.register_buffer("t_edges", (torch.arange(planes + 1) - 0.5) * self.step)  # t = near - disparity
        self.raw_density = torch.nn.Parameter(torch.zeros(height, self.full_width, planes))
        self.colour = torch.nn.Parameter(torch.full((height, self.full_width, planes, 3), 0.5))

    def shift(self, volume: Tensor) -> Tensor:
        """The planes of a (height, full_width, planes[, 3]) volume as the right camera sees them."""
        channels = math.prod(volume.shape[3:])
        runs = [(slice(a * channels, b * channels), whole) for a, b, whole in self.runs]
        fraction = self.fraction.repeat_interleave(channels)
        out = _ShiftPlanes.apply(volume.flatten(2), runs, fraction, self.width)
        return out.unflatten(2, volume.shape[2:])

    def forward(self, backend: str | None = None):
        """What :func:`mpkernels.composite` returns for the left and for the right picture."""

        def composite(density: Tensor, colour: Tensor):
            t_starts, t_ends = self.t_edges[:-1].expand_as(density), self.t_edges[1:].expand_as(density)
            return mpkernels.composite(density, colour, t_starts, t_ends, backend=backend)

        density = functional.softplus(self.raw_density)  # per pixel of disparity
        left = composite(density, self.colour)
        left = type(left)(*(field[:, : self.width] for field in left))  # cheaper than cropping the volume
        return left, composite(self.shift(density), self.shift(self.colour))

    def disparity_of(self, rendered) -> Tensor:
        """Expected disparity of a rendering, in pixels: d_near minus the mean of t over what the ray hit."""
        return self.near - rendered.depth / rendered.opacity.clamp_min(1e-6)


def _box_mean(volume: Tensor, radius: int) -> Tensor:
    """Mean over a (2 radius + 1)-pixel square of a (height, width, channels) volume, zero outside."""
    pooled = functional.avg_pool2d(volume.permute(2, 0, 1), 2 * radius + 1, stride=1, padding=radius)
    return pooled.permute(1, 2, 0)


def _pad_columns(volume: Tensor, before: int, after: int, mode: str = "constant") -> Tensor:
    return functional.pad(volume.permute(2, 0, 1), (before, after), mode=mode).permute(1, 2, 0)


def _detail(picture: Tensor, weight: Tensor) -> Tensor:
    """A picture less its local mean over the pixels of non-zero weight: blind to the exposure of either camera."""
    mean = _box_mean(torch.cat([picture * weight, weight], dim=-1), 2)
    return picture - mean[..., :3] / mean[..., 3:].clamp_min(1e-6)


def _semi_global(cost: Tensor, guide: Tensor) -> Tensor:
    """Matching costs (height, width, planes) gathered along four directions: Hirschmueller, TPAMI 2008, eq. 13.

    L(p, d) = C(p, d) + min(L(q, d), L(q, d -+ 1) + P1, min_k L(q, k) + P2) - min_k L(q, k), q the pixel before p;
    P2 falls where the guide picture has an edge.
    """
    total = torch.zeros_like(cost)
    for turn in range(4):
        turned, picture = torch.rot90(cost, turn), torch.rot90(guide, turn)
        path = turned.clone()
        for row in range(1, path.shape[0]):
            above = path[row - 1]
            best = above.amin(dim=-1, keepdim=True)
            edge = (picture[row] - picture[row - 1]).abs().mean(dim=-1, keepdim=True)
            jump = best + (STEREO_JUMP * torch.exp(-EDGE_FALLOFF * edge)).clamp_min(STEREO_STEP)
            beside = functional.pad(above, (1, 1), value=math.inf)
            beside = torch.minimum(beside[:, 2:], beside[:, :-2]) + STEREO_STEP
            path[row] += torch.minimum(torch.minimum(above, beside), jump) - best
        total += torch.rot90(path, -turn)
    return total / 4


@torch.no_grad()
def initialise(volume: PlaneSweepVolume, left: Tensor, right: Tensor, trained: Tensor) -> None:
    """Colours from the photographs, densities from their photo-consistency (semi-global matching over the planes).

    left, right: photographs, (height, width, 3); of the right one, only the pixels where `trained` (height, width) is
    True have an influence.
    """
    width, full_width = left.shape[1], volume.full_width
    weight = trained.float()[..., None]
    right = right * weight  # nothing that is held out goes further than this line
    near_by = _box_mean(torch.cat([right, weight], dim=-1), HELD_OUT_BLOCK)  # stands in for what is held out
    filled = torch.where(trained[..., None], right, near_by[..., :3] / near_by[..., 3:].clamp_min(1e-6))
    source = torch.cat([filled, _detail(right, weight), weight], dim=-1)  # (height, width, 7)
    margin = full_width - width
    source = _pad_columns(source, margin, margin + 1)
    left_wide = _pad_columns(left, 0, margin, mode="replicate")
    left_detail = _detail(left, torch.ones_like(weight))
    inside = (torch.arange(full_width, device=left.device) < width)[:, None]  # the left photograph reaches here
    costs, weights = [], []
    for plane, disparity in enumerate(volume.disparity.tolist()):
        start = margin - math.ceil(disparity)  # left column x sees right column x - disparity
        here, beside = source[:, start : start + full_width], source[:, start + 1 : start + 1 + full_width]
        seen = torch.lerp(here, beside, math.ceil(disparity) - disparity)
        colour, detail, weight = seen.split([3, 3, 1], dim=-1)
        # The mean of both photographs; the left one alone where the right is held out, and the other way round.
        share = torch.where(inside, 0.5 * weight, 1.0)
        volume.colour[:, :, plane] = torch.lerp(left_wide, colour, share)
        weight = weight[:, :width]
        cost = (left - colour[:, :width]).abs().mean(dim=-1, keepdim=True) * STEREO_COLOUR
        cost = cost + (left_detail - detail[:, :width]).abs().mean(dim=-1, keepdim=True)
        costs.append(cost.clamp_max(STEREO_CAP) * weight)
        weights.append(weight)
    # Averaged over a small square, and faintly over a large one that reaches into the held-out blocks.
    both = torch.cat(costs + weights, dim=-1)
    cost, known = (_box_mean(both, 1) + 0.02 * _box_mean(both, HELD_OUT_BLOCK)).chunk(2, dim=-1)
    cost = torch.where(known > 1e-4, cost / known.clamp_min(1e-4), STEREO_CAP)
    cost = _pad_columns(_semi_global(cost, left), 0, margin, mode="replicate")
    probability = torch.softmax(-cost / STEREO_TEMPERATURE, dim=-1)  # (height, full_width, planes)
    before = probability.cumsum(dim=-1) - probability
    alpha = (probability / (1 - before).clamp_min(1e-3)).clamp(0.003, 0.9)
    density = -torch.log1p(-alpha) / volume.step
    volume.raw_density.copy_(density + torch.log(-torch.expm1(-density)))  # the inverse of softplus


def _roughness(field: Tensor, photograph: Tensor, seen: Tensor) -> Tensor:
    """Total variation of a (height, width) field, less where the photograph has an edge between two seen pixels."""
    total = field.new_zeros(())
    for dim in (0, 1):
        edge = photograph.diff(dim=dim).abs().mean(dim=-1)
        both = seen.narrow(dim, 1, edge.shape[dim]) & seen.narrow(dim, 0, edge.shape[dim])
        weight = torch.where(both, torch.exp(-EDGE_FALLOFF * edge), 1.0)
        total = total + (weight * field.diff(dim=dim).abs()).mean()
    return total


def optimise(
    volume: PlaneSweepVolume, pair: StereoPair, trained: Tensor, *, steps: int, backend: str | None, progress: Progress
) -> list[float]:
    """Fit a volume, in place, to the left photograph and to the trained pixels of the right one; the losses.

    The loss is the mean squared error, plus SMOOTHNESS times the edge-aware total variation of the op's depth, plus
    SPREAD times the variance of the ray coordinate under the op's weights. Ctrl-C ends it and keeps what is fitted.
    """
    rates = ((volume.raw_density, DENSITY_RATE), (volume.colour, COLOUR_RATE))
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in rates]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    views = ((pair.left, torch.ones_like(trained)), (pair.right, trained))
    middle = (volume.t_edges[:-1] + volume.t_edges[1:]) / 2  # (planes,)
    losses: list[float] = []
    started = time.perf_counter()
    try:
        for step in range(steps):
            rendered = volume(backend)
            loss = pair.left.new_zeros(())
            for view, (photograph, seen) in zip(rendered, views, strict=True):
                error = (view.values - photograph).square() * seen[..., None]
                # The sum of w (t - depth)^2, multiplied out: the sum of w t is the depth.
                spread = (view.weights @ middle.square() - (2 - view.opacity) * view.depth.square()).mean()
                roughness = _roughness(view.depth, photograph, seen)
                loss = loss + error.sum() / (3 * seen.sum()) + SMOOTHNESS * roughness + SPREAD * spread
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                volume.colour.clamp_(0, 1)
            losses.append(loss.item())
            if progress is not None:
                report = {"step": step + 1, "steps": steps, "loss": losses[-1]}
                if step % 10 == 0 or step + 1 == steps:
                    report["psnr_held_out"] = psnr(rendered[1].values.detach(), pair.right, ~trained)
                report["seconds_left"] = (time.perf_counter() - started) / (step + 1) * (steps - step - 1)
                progress(report)
    except KeyboardInterrupt:
        print(f"Interrupted after {len(losses)} of {steps} steps; writing what is fitted so far.")
    return losses


def warp_left(left: Tensor, disparity: Tensor) -> Tensor:
    """The right view out of the left picture: out[y, x] = left[y, x + disparity[y, x]], disparity of the right view."""
    width = left.shape[1]
    columns = (torch.arange(width) + disparity).clamp(0, width - 1)
    whole = columns.floor().long().clamp_max(width - 2)

    def at(index: Tensor) -> Tensor:
        return left.gather(1, index[..., None].expand(-1, -1, left.shape[2]))

    return torch.lerp(at(whole), at(whole + 1), (columns - whole)[..., None])


def right_disparity(disparity: Tensor) -> Tensor:
    """The disparity of the right view from the left's: nearest wins, holes take the farther end of their row's gap."""
    height, width = disparity.shape
    columns = torch.arange(width).expand(height, width)
    target = (columns - disparity).round().nan_to_num(-1)
    target = torch.where((target < 0) | (target >= width), width, target).long()  # what is out of sight
    nearest = torch.full((height, width + 1), -1.0).scatter_reduce(1, target, disparity.nan_to_num(-1), "amax")
    known = nearest[:, :width] >= 0
    nearest = nearest[:, :width].masked_fill(~known, math.inf)
    before = torch.where(known, columns, 0).cummax(dim=1).values
    after = torch.where(known, columns, width - 1).flip(1).cummin(dim=1).values.flip(1)
    return torch.minimum(nearest.gather(1, before), nearest.gather(1, after)).nan_to_num(posinf=0)


def baselines(full: StereoPair, pair: StereoPair, held_out: Tensor, scale: int) -> dict[str, float]:
    """Held-out PSNR of the right view made from the left photograph, warped at full resolution, then shrunk."""
    planes = np.arange(*pair.disparity_range, 1 / scale).tolist()
    sweep = [warp_left(pair.left, torch.full_like(pair.disparity, d)) for d in planes]
    scores = [psnr(picture, pair.right, ~held_out) for picture in sweep]  # chosen on training pixels
    best_disparity = torch.full_like(full.disparity, scale * planes[int(np.argmax(scores))])
    best = shrink(warp_left(full.left, best_disparity), scale)
    truth = shrink(warp_left(full.left, right_disparity(full.disparity)), scale)
    named = {"unshifted": pair.left, "warped_by_best_plane": best, "warped_by_true_disparity": truth}
    return {f"left_{name}": psnr(picture, pair.right, held_out) for name, picture in named.items()}


def _pictures(output: pathlib.Path, pair: StereoPair, volume, left, right, held_out: Tensor) -> list[dict[str, str]]:
    import matplotlib

    turbo = matplotlib.colormaps["turbo"]
    output.mkdir(parents=True, exist_ok=True)
    far, near = pair.disparity_range

    def colour_map(disparity: Tensor) -> np.ndarray:
        known = disparity.isfinite().numpy()[..., None]
        return turbo(((disparity.nan_to_num() - far) / (near - far)).clamp(0, 1).numpy())[..., :3] * known

    z_far, z_near = (depth_of_disparity(SCALE * d) for d in (far, near))
    span = f"blue {z_far:.2f} m to red {z_near:.2f} m, uniform in disparity"
    fitted, true = colour_map(volume.disparity_of(left)), colour_map(pair.disparity)
    error = (right.values.clamp(0, 1) - pair.right).abs() * 4
    masked = torch.where(held_out[..., None], pair.right * 0.15 + 0.85, pair.right)
    shown = [
        ("left", "Left photograph", "Fitted to, every pixel.", pair.left),
        ("right", "Right photograph", "Fitted to, but for the held-out blocks.", pair.right),
        ("right_rendered", "Right view, rendered", "The planes, shifted and composited.", right.values),
        ("disparity", "Disparity, fitted", f"Left view, from the op's depth: {span}.", fitted),
        ("disparity_true", "Disparity, ground truth", f"Not fitted to: {span}; black is unknown.", true),
        ("right_error", "Error of the right view", "Absolute difference, times 4.", error),
        ("held_out", "Held-out pixels", "White blocks of the right photograph are not fitted to.", masked),
    ]
    entries = []
    for name, title, caption, picture in shown:
        pixels = (torch.as_tensor(picture).clamp(0, 1) * 255).round().byte().numpy()
        enlarged = pixels.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
        Image.fromarray(enlarged).save(output / f"{name}.png")
        entries.append({"file": f"{name}.png", "title": title, "caption": caption})
    return entries


def fit(
    *,
    steps: int = 300,
    planes: int = 48,
    device: str | torch.device | None = None,
    backend: str | None = None,
    seed: int = 0,
    output: pathlib.Path | None,
    progress: Progress = None,
) -> dict:
    """Fit a plane-sweep volume to the Motorcycle pair at 185x125 and say how well it shows held-out pixels.

    Args:
        steps: of Adam, 0 or more.
        planes: 2 or more, uniformly spaced in disparity over 0 to 17.5 pixels (6.18 m to 1.90 m).
        device: "cpu" (default) or "cuda".
        backend: of :func:`mpkernels.composite`; None chooses.
        seed: of the choice of held-out blocks, the one thing that is random.
        output: a folder for the pictures and report.json, made if missing; None writes nothing.
        progress: called after each step with step, steps, loss, seconds_left and, now and then, psnr_held_out.

    Returns:
        A JSON-serialisable dict: figures (PSNR in dB, disparity errors in pixels at 185x125), pictures, timings.
    """
    for name, value, least in (("steps", steps, 0), ("planes", planes, 2)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    kind = str(device or "cpu").partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: expected 'cpu', or 'cuda' where torch finds a GPU, got {str(device)!r}")
    place = torch.device(device or "cpu")
    started = time.perf_counter()
    full = load_motorcycle()
    pair = shrink_pair(full, SCALE)
    held_out = held_out_blocks(pair.disparity.shape[0], pair.disparity.shape[1], seed)
    on_place = StereoPair(pair.left.to(place), pair.right.to(place), pair.disparity, pair.disparity_range)
    trained = ~held_out.to(place)
    height, width = pair.disparity.shape
    volume = PlaneSweepVolume(height, width, pair.disparity_range, planes).to(place)
    initialise(volume, on_place.left, on_place.right, trained)

    def figures():
        with torch.no_grad():
            left, right = (type(view)(*(field.cpu() for field in view)) for view in volume(backend))
        error = (volume.disparity_of(left) - pair.disparity).abs()
        error = error[error.isfinite()]
        numbers = {
            "psnr_right_held_out": psnr(right.values, pair.right, held_out),
            "psnr_right_trained": psnr(right.values, pair.right, ~held_out),
            "psnr_left": psnr(left.values, pair.left),
            "disparity_error_median": error.median().item(),
            "disparity_within_1_pixel": (error < 1).float().mean().item(),
        }
        return left, right, numbers

    before = figures()[2]
    fitting = time.perf_counter()
    losses = optimise(volume, on_place, trained, steps=steps, backend=backend, progress=progress)
    fitted = time.perf_counter()
    left, right, after = figures()
    result = {
        "model": "plane_sweep",
        "data": "Middlebury 2014 Motorcycle, as shipped in scikit-image, at 185x125",
        "settings": {"planes": planes, "steps": steps, "seed": seed, "device": str(place), "backend": backend},
        "disparity_range": list(pair.disparity_range),
        "depth_range_metres": [depth_of_disparity(d) for d in FULL_DISPARITY_RANGE],
        "steps_done": len(losses),
        "figures": after,
        "figures_before_fitting": before,
        "baselines_psnr_right_held_out": baselines(full, pair, held_out, SCALE),
        "loss": {"first": losses[0], "last": losses[-1]} if losses else {},
        "pictures": [] if output is None else _pictures(pathlib.Path(output), pair, volume, left, right, held_out),
    }
    seconds, total = fitted - fitting, time.perf_counter() - started
    result["timings"] = {
        "fit_seconds": seconds,
        "seconds_per_step": seconds / max(len(losses), 1),
        "total_seconds": total,
    }
    if output is not None:
        (pathlib.Path(output) / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def main() -> None:
    """The command line: fits with a progress bar, then prints the figures."""
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description="Fit a plane-sweep volume to a stereo pair.")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out/plane_sweep"), help="folder to write")
    for name, default in (("steps", 300), ("planes", 48), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--backend", help="of mpkernels.composite")
    arguments = parser.parse_args()
    text = "loss {task.fields[loss]:.5f}  held-out PSNR {task.fields[psnr]:.2f} dB"
    kinds = (rich_progress.BarColumn, rich_progress.MofNCompleteColumn, rich_progress.TimeRemainingColumn)
    with rich_progress.Progress(*(kind() for kind in kinds), rich_progress.TextColumn(text)) as bar:
        task = bar.add_task("", total=arguments.steps, loss=math.nan, psnr=math.nan)

        def show(report: dict) -> None:
            extra = {"psnr": report["psnr_held_out"]} if "psnr_held_out" in report else {}
            bar.update(task, completed=report["step"], loss=report["loss"], **extra)

        try:
            result = fit(**vars(arguments), progress=show)
        except (ValueError, FileNotFoundError, mpkernels.BackendError) as error:
            bar.stop()
            parser.error(str(error))
    table = Table("figure", "value")
    beside = {f"psnr_right_held_out, {k} (baseline)": v for k, v in result["baselines_psnr_right_held_out"].items()}
    for name, value in {**beside, **result["figures"], **result["timings"]}.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
