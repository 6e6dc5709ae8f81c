"""Times the convolutions beside what users of torch write, eager and compiled; measures memory; records both.

    python benchmarks/convolution.py [--record] [--only WORDS] [--threads N] [--quick] [--no-compile] [--device DEVICE]

How: benchmarks/rows.py. The peers of wavenet_generate are timed over few samples. ``--only`` chooses the rows that have
all of its words in their names; ``--record`` replaces these rows in
benchmarks/results/<machine>/convolution_peers.json.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peers import MEMORY
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

from mpkernels.convolution import (
    depthwise_conv1d,
    dilated_conv1d,
    gated_residual_layer,
    masked_conv2d,
    masked_linear,
    pack_wavenet,
    pixelcnn_mask,
    wavenet_generate,
)
from mpkernels.convolution.wavenet_generate import spec as wavenet
from mpkernels.profiling import timing

ROOT = Path(__file__).resolve().parents[1]
FILE = "convolution_peers.json"
CAUSAL = "causal-conv1d"  # where it is installed
CONTESTANTS = (OURS, EAGER, COMPILED, COPY, CAUSAL)
RATE, OF_RECOMPUTING, OF_CACHED, OF_NAIVE = "kHz", "x recomputing", "x cached loop", "x naive loop"


def dilated(device: str, scale: int, channels: int, outputs: int, dilation: int, length: int = 16_000) -> Problem:
    """A convolution over time, and torch's of a padded copy."""
    x, weight, bias = normal((1, channels, length // scale), (outputs, channels, 2), (outputs,), device=device)
    return Problem(
        [x, weight, bias],
        lambda x, weight, bias: dilated_conv1d(x, weight, bias, dilation=dilation),
        lambda x, weight, bias: functional.conv1d(functional.pad(x, (dilation, 0)), weight, bias, dilation=dilation),
    )


def gated(device: str, scale: int, residual: int = 64, skip: int = 128, dilation: int = 16) -> Problem:
    """WaveNet's layer."""
    x, weight, bias, of_residual, residual_bias, of_skip, skip_bias = normal(
        *((1, residual, 16_000 // scale), (2 * residual, residual, 2), (2 * residual,)),
        *((residual, residual), (residual,), (skip, residual), (skip,)),
        device=device,
    )
    leaves = [x, weight * 0.1, bias, of_residual * 0.1, residual_bias, of_skip * 0.1, skip_bias]

    def ours(x, weight, bias, of_residual, residual_bias, of_skip, skip_bias):
        return gated_residual_layer(
            *(x, weight, bias),
            **{"residual_weight": of_residual, "residual_bias": residual_bias},
            **{"skip_weight": of_skip, "skip_bias": skip_bias, "dilation": dilation},
        )[:2]

    def eager(x, weight, bias, of_residual, residual_bias, of_skip, skip_bias):
        z = functional.conv1d(functional.pad(x, (dilation, 0)), weight, bias, dilation=dilation)
        filters, gates = z.chunk(2, 1)
        h = torch.tanh(filters) * torch.sigmoid(gates)
        added = functional.conv1d(h, of_residual[:, :, None], residual_bias)
        return x + added, functional.conv1d(h, of_skip[:, :, None], skip_bias)

    return Problem(leaves, ours, eager)


def depthwise(device: str, scale: int) -> Problem:
    """Each channel by itself, with SiLU; compiled is the unrolled sum that causal-conv1d's users compare with."""
    width = 4
    x, weight, bias = normal((2, 1024, 2048 // scale), (1024, width), (1024,), device=device)

    def eager(x, weight, bias):
        if torch.compiler.is_compiling():
            padded = functional.pad(x, (width - 1, 0))
            taps = (padded[:, :, k : k + x.shape[2]] * weight[:, k, None] for k in range(width))
            return functional.silu(sum(taps) + bias[:, None])
        padded = functional.pad(x, (width - 1, 0))
        return functional.silu(functional.conv1d(padded, weight[:, None], bias, groups=weight.shape[0]))

    peers = {}
    if device == "cuda" and importlib.util.find_spec("causal_conv1d") is not None:
        causal_conv1d = importlib.import_module("causal_conv1d")
        peers[CAUSAL] = lambda x, weight, bias: causal_conv1d.causal_conv1d_fn(x, weight, bias, activation="silu")
    ours = partial(depthwise_conv1d, activation="silu")
    return Problem([x, weight, bias], ours, eager, x, peers)


def masked2d(device: str, scale: int, colors: int) -> Problem:
    """PixelCNN's convolution 5 x 5 of type B."""
    channels, outputs = (64, 128) if colors == 1 else (66, 126)
    x, weight, bias = normal(
        (max(8 // scale, 1), channels, 32, 32), (outputs, channels, 5, 5), (outputs,), device=device
    )
    mask = pixelcnn_mask(5, 5, outputs, channels, "B", colors).to(device)
    return Problem(
        [x, weight, bias],
        lambda x, weight, bias: masked_conv2d(x, weight, bias, mask_type="B", colors=colors),
        lambda x, weight, bias: functional.conv2d(x, weight * mask, bias, padding=2),
    )


def made(device: str, scale: int, ordered: bool) -> Problem:
    """MADE's three layers 784-2000-2000-784; ``ordered`` or with the pixels in a random order."""
    generator = torch.Generator().manual_seed(0)
    sizes = (784, 2000 // scale, 2000 // scale, 784)
    x, *weights = normal((256, 784), *((o, i) for i, o in itertools.pairwise(sizes)), device=device)
    biases = normal(*((o,) for o in sizes[1:]), device=device)
    pixels = torch.arange(784) if ordered else torch.randperm(784, generator=generator)
    hidden = [torch.arange(n) * 783 // n for n in sizes[1:3]]
    degrees = [d.to(device) for d in (pixels, *hidden, pixels)]
    allowed = [
        (i < o[:, None] if last else i <= o[:, None]).float()
        for i, o, last in zip(degrees, degrees[1:], (False, False, True), strict=False)
    ]

    def layers(linear: Callable[[Tensor, int, Tensor, Tensor], Tensor]) -> Function:
        def network(x, *parameters):
            for layer in range(3):
                x = linear(x, layer, parameters[layer], parameters[3 + layer])
                x = functional.relu(x) if layer < 2 else x
            return x

        return network

    return Problem(
        [x, *(w * 0.03 for w in weights), *biases],
        layers(lambda x, n, w, b: masked_linear(x, w, b, degrees[n], degrees[n + 1], strict=n == 2)),
        layers(lambda x, n, w, b: functional.linear(x, w * allowed[n], b)),
    )


def generate(seconds: float, dtype: torch.dtype, steps: int = 2_000) -> dict:
    """nv-wavenet's "Medium" on one core: samples a second, beside recomputing and a loop with caches in torch."""
    network = wavenet.random_network(torch.float32, torch.Generator().manual_seed(0), **wavenet.MEDIUM)
    packed = pack_wavenet(network, dtype)
    field_of_view = 1 + sum((layer.weight.shape[2] - 1) * layer.dilation for layer in network.layers)
    past = torch.randint(256, (1, field_of_view), generator=torch.Generator().manual_seed(0))
    cached_steps = 40
    times = timing.paired(
        {
            OURS: lambda: wavenet_generate(packed, steps),
            OF_CACHED: lambda: wavenet.eager_cached(network, cached_steps),
            OF_RECOMPUTING: lambda: wavenet.recomputed(network, past),
        },
        budget_s=seconds,
        min_rounds=3,
        warm_up=1,
    )
    own = timing.median(times, OURS) / steps
    return {
        "seconds": {OURS: own},
        "spread": {OURS: timing.spread(times, OURS)},
        "reached": {
            RATE: 1e-3 / own,
            OF_CACHED: timing.ratio(times, OF_CACHED, OURS) * steps / cached_steps,
            OF_RECOMPUTING: timing.ratio(times, OF_RECOMPUTING, OURS) * steps,
        },
    }


def sample_pictures(_: float) -> dict:
    """PixelCNN on 28 x 28: the cached loop beside the whole network a pixel, 16 pictures at a time."""
    sys.path.insert(0, str(ROOT))
    from python_models import pixelcnn, pixelcnn_sampling

    model = pixelcnn.PixelCNN(pixelcnn.Config())
    found = pixelcnn_sampling.compare_sampling(model, 16)
    return {
        "seconds": {OURS: found["cached_seconds"]},
        "spread": {},
        "reached": {OF_NAIVE: found["naive_over_cached"]},
    }


def _dilated_rows() -> list[Row]:
    rows = []
    for channels, outputs, asked in ((64, 128, 1.0), (128, 256, 1.3)):
        for dilation in (1, 512):
            make = partial(dilated, channels=channels, outputs=outputs, dilation=dilation)
            what = f"dilated_conv1d {channels}->{outputs}, dilation {dilation}"
            rows += [Row(what, which, make, bars={OF_EAGER: asked}, compiled=False) for which in (FORWARD, TRAINING)]
    make = partial(dilated, channels=64, outputs=64, dilation=512, length=400_000)
    return [*rows, Row("dilated_conv1d 64->64, T=400,000", FORWARD, make, bars={MEMORY: 0.55}, memory=True)]


LAYER = {OF_EAGER: 1.5, OF_COMPILED: 1.2}
ROWS = (
    *_dilated_rows(),
    *(Row("gated_residual_layer R64 S128", which, gated, bars=LAYER) for which in (FORWARD, TRAINING)),
    Row("depthwise_conv1d + SiLU", FORWARD, depthwise, bars={OF_EAGER: 3.0, OF_COMPILED: 1.2, OF_COPY: 0.5}),
    Row("depthwise_conv1d + SiLU", TRAINING, depthwise),
    *(
        Row(f"masked_conv2d 5x5 B, {n}", which, partial(masked2d, colors=c), bars={OF_EAGER: 1.5}, compiled=False)
        for c, n in ((1, "64->128"), (3, "66->126, colors=3"))
        for which in (FORWARD, TRAINING)
    ),
    *(
        Row(f"masked_linear 784-2000-2000-784, {n}", which, partial(made, ordered=o), bars={OF_EAGER: 1.5})
        for o, n in ((True, "in order"), (False, "random order"))
        for which in (FORWARD, TRAINING)
    ),
    *(
        Row(
            f"wavenet_generate Medium, {str(dtype).removeprefix('torch.')} weights, 1 thread",
            loop=partial(generate, dtype=dtype),
            threads=1,
            bars={RATE: 16.0, OF_RECOMPUTING: 200.0, OF_CACHED: 20.0},
        )
        for dtype in (torch.float32, torch.bfloat16)
    ),
    Row("pixelcnn sampling 28x28, 16 pictures", loop=sample_pictures, bars={OF_NAIVE: 50.0}),
)


SCRIPT = Script(__doc__, __file__, FILE, ROWS, CONTESTANTS)

if __name__ == "__main__":
    raise SystemExit(SCRIPT.main())
