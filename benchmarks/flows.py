"""Times the flows' ops beside nflows, zuko and what users of torch write; measures memory; records both.

    python benchmarks/flows.py [--record] [--only WORDS] [--threads N] [--quick] [--no-compile] [--device DEVICE]

How: benchmarks/rows.py. nflows and zuko are timed where they are installed. ``--only`` chooses the rows that have all
of its words in their names; ``--record`` replaces these rows in benchmarks/results/<machine>/flows_peers.json.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from peers import OF_MEMORY
from rows import (
    COMPILED,
    COPY,
    EAGER,
    FORWARD,
    OF_COMPILED,
    OF_COPY,
    OF_EAGER,
    OURS,
    TRAINING,
    Function,
    Problem,
    Row,
    Script,
    normal,
)
from torch import Tensor
from torch.nn import functional

from mpkernels import flows
from mpkernels.flows import nn

FILE = "flows_peers.json"
NFLOWS, ZUKO, STORED = "nflows", "zuko compiled", "stored activations"
CONTESTANTS = (OURS, EAGER, COMPILED, NFLOWS, ZUKO, STORED, COPY)
BINS, TAIL_BOUND = 8, 3.0


def _copied(*moved: Tensor) -> Tensor:
    """A tensor whose copy reads and writes as many bytes as these are."""
    return moved[0].new_ones(sum(x.numel() for x in moved) // 2)


def spline(device: str, scale: int, inverse: bool, elements: int = 262_144) -> Problem:
    """A spline for each of (B, 64) elements, from a linear layer's outputs, with log-determinants of the samples."""
    x, parameters = normal((elements // scale // 64, 64), (elements // scale // 64, 64, 3 * BINS - 1), device=device)
    peers: dict[str, Function] = {}
    if importlib.util.find_spec("nflows") is not None:
        splines = importlib.import_module("nflows.transforms.splines.rational_quadratic")

        def nflows(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
            parts = parameters[..., :BINS], parameters[..., BINS : 2 * BINS], parameters[..., 2 * BINS :]
            y, log_abs_det = splines.unconstrained_rational_quadratic_spline(
                x, *parts, inverse=inverse, tail_bound=TAIL_BOUND
            )
            return y, log_abs_det.sum(1)

        peers[NFLOWS] = nflows
    if importlib.util.find_spec("zuko") is not None:
        transforms = importlib.import_module("zuko.transforms")

        def zuko(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
            parts = parameters[..., :BINS], parameters[..., BINS : 2 * BINS], parameters[..., 2 * BINS :]
            transform = transforms.MonotonicRQSTransform(*parts, bound=TAIL_BOUND)
            y, log_abs_det = (transform.inv if inverse else transform).call_and_ladj(x)
            return y, log_abs_det.sum(1)

        peers[ZUKO] = torch.compile(zuko, dynamic=False)

    ours = partial(flows.spline_coupling, tail_bound=TAIL_BOUND, inverse=inverse)
    return Problem([x, parameters], ours, None, _copied(x, parameters, x), peers)


def glow(device: str, scale: int, shape: tuple[int, int, int, int] = (32, 48, 32, 32)) -> Problem:
    """Glow's coupling of half the channels, whole: both halves in, both halves out."""
    batch, channels, height, width = shape
    x, h = normal(
        (max(batch // scale, 1), channels, height, width), (max(batch // scale, 1), *shape[1:]), device=device
    )

    def ours(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return flows.affine_coupling(x, h, layout="shift_scale", scale="sigmoid", mask="channel", shift_first=True)

    def eager(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed = x.chunk(2, 1)
        shift, raw = h.chunk(2, 1)
        factor = torch.sigmoid(raw + 2)
        changed = (changed + shift) * factor
        return torch.cat([kept, changed], 1), torch.log(factor).flatten(1).sum(1)

    return Problem([x, h], ours, eager, _copied(x, h, x))


def checkerboard(device: str, scale: int, shape: tuple[int, int, int, int] = (32, 48, 32, 32)) -> Problem:
    """RealNVP's coupling of every other pixel."""
    batch, channels, height, width = shape
    x, h = normal(
        (max(batch // scale, 1), channels, height, width),
        (max(batch // scale, 1), 2 * channels, height, width),
        device=device,
    )
    index = torch.arange(height)[:, None] + torch.arange(width)
    kept = (index % 2).to(device, torch.float32)

    def ours(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return flows.affine_coupling(x, h, layout="scale_shift", scale="tanh", mask="checkerboard")

    def eager(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = h.chunk(2, 1)
        log_scale = torch.tanh(raw) * (1 - kept)
        shift = shift * (1 - kept)
        y = x * kept + (1 - kept) * (x * torch.exp(log_scale) + shift)
        return y, log_scale.flatten(1).sum(1)

    # half of x's parameters matter, but they lie between the others: all of them are read
    return Problem([x, h], ours, eager, _copied(x, h, x))


def glow_step(device: str, scale: int, plu: bool) -> Problem:
    """ActNorm, the 1 x 1 convolution and the coupling of C = 48 at 16 x 16, with the network's output given."""
    channels = 48
    x, h, bias, log_scale, square = normal(
        *[(max(64 // scale, 1), channels, 16, 16)] * 2,
        *((channels,), (channels,), (channels, channels)),
        device=device,
    )
    weight = torch.linalg.qr(square)[0]
    parts = flows.plu_decompose(weight)
    lower, upper = torch.ones(channels, channels, device=device).tril(-1), torch.ones_like(weight).triu(1)
    permutation = torch.eye(channels, device=device)[parts.permutation]
    leaves = [x, h, bias, 0.1 * log_scale, *((parts.lower, parts.upper, parts.log_scale) if plu else (weight,))]

    def ours(x: Tensor, h: Tensor, bias: Tensor, log_scale: Tensor, *matrix: Tensor) -> tuple[Tensor, Tensor]:
        found = parts._replace(lower=matrix[0], upper=matrix[1], log_scale=matrix[2]) if plu else matrix[0]
        return flows.glow_step(x, bias, log_scale, found, lambda kept: h, shift_first=True)

    def eager(x: Tensor, h: Tensor, bias: Tensor, log_scale: Tensor, *matrix: Tensor) -> tuple[Tensor, Tensor]:
        positions = x.shape[2] * x.shape[3]
        x = (x + bias[:, None, None]) * torch.exp(log_scale)[:, None, None]
        if plu:
            unit = matrix[0] * lower + torch.eye(channels, device=device)
            full = permutation @ unit @ (matrix[1] * upper + torch.diag(parts.sign * torch.exp(matrix[2])))
            log_abs_det = matrix[2].sum()
        else:
            full = matrix[0]
            log_abs_det = torch.linalg.slogdet(full)[1]
        x = functional.conv2d(x, full[:, :, None, None])
        kept, changed = x.chunk(2, 1)
        shift, raw = h.chunk(2, 1)
        factor = torch.sigmoid(raw + 2)
        changed = (changed + shift) * factor
        constant = positions * (log_scale.sum() + log_abs_det)
        return torch.cat([kept, changed], 1), torch.log(factor).flatten(1).sum(1) + constant

    return Problem(leaves, ours, eager)


def actnorm(device: str, scale: int) -> Problem:
    """A scale and a shift for each channel."""
    x, bias, log_scale = normal((max(32 // scale, 1), 48, 32, 32), (48,), (48,), device=device)

    def eager(x: Tensor, bias: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        y = (x + bias[:, None, None]) * torch.exp(log_scale)[:, None, None]
        return y, (1024 * log_scale.sum()).expand(x.shape[0])

    return Problem([x, bias, log_scale], flows.actnorm, eager, x)


def triangular(device: str, scale: int, size: int = 16) -> Problem:
    """Log-determinants of many small triangular matrices."""
    (matrices,) = normal((65_536 // scale, size, size), device=device)
    matrices = matrices.tril()
    return Problem([matrices], lambda x: flows.slog_det_triangular(x)[1], lambda x: torch.linalg.slogdet(x)[1])


class _Network(torch.nn.Sequential):
    """Glow's network of a coupling."""

    def __init__(self, inputs: int, outputs: int, hidden: int = 64):
        super().__init__(
            torch.nn.Conv2d(inputs, hidden, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(hidden, hidden, 1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(hidden, outputs, 3, padding=1),
        )
        for parameter in self[-1].parameters():
            torch.nn.init.normal_(parameter, std=0.01)


def recompute(device: str, scale: int, levels: int = 3, steps: int = 32) -> Problem:
    """A Glow of 3 levels of 32 steps, trained with activations rebuilt from the outputs, or kept."""
    torch.manual_seed(0)
    found, channels = [], 3
    for _ in range(levels):
        channels *= 4
        made = [nn.GlowStep(channels, _Network(channels // 2, channels)) for _ in range(max(steps // scale, 1))]
        found.append(nn.Sequential(nn.Squeeze(), *made, memory="recompute"))
        channels //= 2
    model = nn.MultiScale(found).to(device)
    (x,) = normal((16, 3, 32, 32), device=device)
    with torch.no_grad():
        model(x)  # ActNorm's first batch

    def run(memory: str, x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        for level in found:
            level.memory = memory
        return model(x)

    return Problem([x, *model.parameters()], partial(run, "recompute"), None, None, {STORED: partial(run, "store")})


def _row(what: str, which: str, make: Callable[..., Problem], **bars: float) -> Row:
    names = {"eager": OF_EAGER, "compiled": OF_COMPILED, "copy": OF_COPY, "nflows": f"x {NFLOWS}", "zuko": f"x {ZUKO}"}
    compiled = make.func is not spline if isinstance(make, partial) else True
    return Row(what, which, make, bars={names[name]: x for name, x in bars.items()}, compiled=compiled)


LARGE = (  # what a GPU's bandwidth is asked of
    ("affine_coupling 2^26, channels, sigmoid", partial(glow, shape=(1024, 64, 32, 32)), 0.85),
    ("affine_coupling 2^26, checkerboard, tanh", partial(checkerboard, shape=(1024, 64, 32, 32)), 0.85),
    ("spline_coupling 2^22 x 8 bins", partial(spline, inverse=False, elements=2**22), 1 / 1.5),
)
ROWS = (
    _row("spline_coupling 262,144 x 8 bins", FORWARD, partial(spline, inverse=False), nflows=12.0, zuko=4.0),
    _row("spline_coupling 262,144 x 8 bins, inverse", FORWARD, partial(spline, inverse=True), nflows=12.0, zuko=4.0),
    _row("spline_coupling 262,144 x 8 bins", TRAINING, partial(spline, inverse=False), nflows=8.0, zuko=4.0),
    _row("affine_coupling 32x48x32x32, channels, sigmoid", FORWARD, glow, eager=3.0, copy=0.6),
    _row("affine_coupling 32x48x32x32, channels, sigmoid", TRAINING, glow, eager=2.5, compiled=1.1),
    _row("affine_coupling 32x48x32x32, checkerboard, tanh", FORWARD, checkerboard, eager=5.0, copy=0.6),
    _row("affine_coupling 32x48x32x32, checkerboard, tanh", TRAINING, checkerboard, eager=5.0, compiled=1.1),
    _row("affine_coupling 256x48x32x32, channels, sigmoid", FORWARD, partial(glow, shape=(256, 48, 32, 32)), copy=0.6),
    _row(
        "affine_coupling 256x48x32x32, checkerboard, tanh",
        FORWARD,
        partial(checkerboard, shape=(256, 48, 32, 32)),
        copy=0.6,
    ),
    _row("glow_step 64x48x16x16", TRAINING, partial(glow_step, plu=False), eager=2.0),
    _row("glow_step 64x48x16x16, PLU", TRAINING, partial(glow_step, plu=True), eager=2.0),
    *(_row("actnorm 32x48x32x32", which, actnorm) for which in (FORWARD, TRAINING)),
    *(_row("slog_det_triangular 65,536 x 16x16", which, triangular) for which in (FORWARD, TRAINING)),
    *(
        Row(what, FORWARD, make, bars={OF_COPY: asked}, compiled=False, devices=("cuda",))
        for what, make, asked in LARGE
    ),
    Row("Glow 3 x 32, memory=recompute", TRAINING, recompute, bars={f"x {STORED}": 1 / 1.6}, compiled=False),
    Row("Glow 3 x 32, memory=recompute", TRAINING, recompute, bars={OF_MEMORY: 0.25}, memory=True, beside=STORED),
)
SCRIPT = Script(__doc__, __file__, FILE, ROWS, CONTESTANTS)

if __name__ == "__main__":
    raise SystemExit(SCRIPT.main())
