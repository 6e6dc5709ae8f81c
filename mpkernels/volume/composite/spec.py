"""Cases, workloads and cost of volume compositing."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels.spec import BadInput, Case, Cost, OpSpec, TritonKernel, Workload
from mpkernels.volume.composite import api, eager, schema


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _to(dtype: torch.dtype, device: torch.device, arguments: dict) -> dict:
    def convert(x):
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    return {name: convert(x) for name, x in arguments.items()}


def _intervals(generator: torch.Generator, *shape: int) -> tuple[Tensor, Tensor]:
    """Increasing intervals along the last dimension, with holes between them, starting near 1."""
    edges = 1 + torch.cumsum(_rand(generator, *shape[:-1], 2 * shape[-1]) * (2.0 / max(shape[-1], 1)), dim=-1)
    return edges[..., 0::2], edges[..., 1::2]


def _dense(*shape: int, channels: int = 3, background: str | None = None, density: float = 4.0, **settings):
    """Random rays of shape (..., S)."""

    def make(dtype, device, generator):
        t_starts, t_ends = _intervals(generator, *shape)
        arguments = {
            "sigmas": _rand(generator, *shape) * density,
            "values": _rand(generator, *shape, channels),
            "t_starts": t_starts,
            "t_ends": t_ends,
        }
        if background == "one":
            arguments["background"] = _rand(generator, channels)
        elif background == "each":
            arguments["background"] = _rand(generator, *shape[:-1], channels)
        return _to(dtype, device, arguments) | settings

    return make


def _changed(make, change):
    """A case made from another: ``change(arguments)`` edits converted arguments in place."""

    def changed(dtype, device, generator):
        arguments = make(dtype, device, generator)
        change(arguments)
        return arguments

    return changed


def _strided(arguments: dict) -> None:
    """Every second ray and sample of a larger tensor; values with the channels first in memory."""
    for name, x in arguments.items():
        if name == "values":
            arguments[name] = x.movedim(-1, 0).contiguous().movedim(0, -1)
        elif isinstance(x, Tensor) and x.dim() == 2:
            arguments[name] = x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]


def _expanded(arguments: dict) -> None:
    """All rays share the positions, and all samples of a ray the density."""
    for name in ("t_starts", "t_ends", "ts"):
        if name in arguments:
            arguments[name] = arguments[name][:1].expand_as(arguments[name])
    for name in ("sigmas", "alphas"):
        if name in arguments:
            arguments[name] = arguments[name][:, :1].expand_as(arguments[name])
    arguments["values"] = arguments["values"][:1].expand_as(arguments["values"])


def _packed(
    counts: list[int], *, starts: list[int] | None = None, total: int | None = None, channels: int = 3, **settings
):
    """Packed rays; by default one after another."""

    def make(dtype, device, generator):
        count = torch.tensor(counts, dtype=torch.int64)
        start = torch.cumsum(count, 0) - count if starts is None else torch.tensor(starts, dtype=torch.int64)
        samples = int(count.sum()) if total is None else total
        t_starts, t_ends = _intervals(generator, samples)
        arguments = {
            "sigmas": _rand(generator, samples) * samples,
            "values": _rand(generator, samples, channels),
            "t_starts": t_starts,
            "t_ends": t_ends,
            "packed_info": torch.stack([start, count], dim=-1).reshape(-1, 2),
            "background": _rand(generator, channels),
        }
        return _to(dtype, device, arguments) | settings

    return make


def _early_stop(*, nan: bool, packed: bool = False, channels: int = 3):
    """Rays that fall from transmittance about 0.5 to about 0.03 at one sample each, with eps = 0.1 between."""

    def make(dtype, device, generator):
        rays, samples = 12, 40
        step = torch.arange(samples)
        t_starts = (1 + step / 16).expand(rays, samples).double()  # exact in every dtype
        t_ends = t_starts + 1 / 16
        at = torch.randint(0, samples, (rays,), generator=generator)
        at[0] = samples + 1  # one ray that never stops
        optical_depth = torch.where(step < at[:, None], 0.7 / samples, torch.where(step == at[:, None], 3.0, 0.5))
        values = _rand(generator, rays, samples, channels)
        grown = torch.where(step > at[:, None], torch.nan if nan else 1.0, 1.0)
        arguments = {
            "sigmas": optical_depth * 16 * grown,
            "values": values * grown[..., None],
            "t_starts": t_starts * grown,
            "t_ends": t_ends * grown,
        }
        if packed:
            arguments = {name: x.flatten(0, 1) for name, x in arguments.items()}
            first = torch.arange(rays) * samples
            arguments["packed_info"] = torch.stack([first, torch.full_like(first, samples)], dim=-1)
        return _to(dtype, device, arguments | {"background": _rand(generator, channels)}) | {"early_stop_eps": 0.1}

    return make


def _grows_behind_the_stop(*, packed: bool):
    """A ray that stops at sample 50, with negative densities behind: its transmittance would grow past eps again."""

    def make(dtype, device, generator):
        samples = 700
        sigmas = torch.full((samples,), 0.02, dtype=torch.float64)
        sigmas[50], sigmas[60:] = 4.0, -0.1
        edges = torch.arange(samples + 1).double()
        arguments = {
            "sigmas": sigmas,
            "values": _rand(generator, samples, 3),
            "t_starts": edges[:-1],
            "t_ends": edges[1:],
        }
        if packed:  # beside empty rays, which make the average ray a short one
            arguments["packed_info"] = torch.tensor([[0, samples], [0, 0], [0, 0], [0, 0], [0, 0]])
        return _to(dtype, device, arguments) | {"early_stop_eps": 0.1}

    return make


def _set(name: str, index, value: float):
    def change(arguments: dict) -> None:
        x = arguments[name].clone()
        x[index] = value
        arguments[name] = x

    return change


def _empty_intervals(arguments: dict) -> None:
    arguments["t_ends"] = arguments["t_starts"].clone()


_CASES = (
    Case("one ray of 8 samples", _dense(1, 8, background="one"), second_order=True),
    Case("typical", _dense(64, 48, background="one")),
    Case("a background a ray", _dense(3, 5, background="each"), second_order=True),
    Case("odd sizes", _dense(5, 123, channels=1)),
    Case("one sample", _dense(3, 1, background="one"), second_order=True),
    Case("one ray without a batch dimension", _dense(19, background="one")),
    Case("batch dimensions", _dense(2, 3, 17, background="each")),
    Case("two channels", _dense(6, 33, channels=2)),
    Case("four channels", _dense(6, 33, channels=4, background="each")),
    Case("five channels", _dense(2, 5, channels=5, background="one"), second_order=True),
    Case("a feature vector of 37", _dense(3, 20, channels=37, background="each")),
    Case("no rays", _dense(0, 8, background="one")),
    Case("no samples", _dense(4, 0, background="one")),
    Case("a long ray", _dense(2, 1100, density=0.5)),
    Case("strided", _changed(_dense(9, 21, background="each"), _strided)),
    Case("expanded", _changed(_dense(9, 21, background="one"), _expanded)),
    Case("transparent", _changed(_dense(2, 6, background="one"), _set("sigmas", slice(None), 0.0)), second_order=True),
    Case("opaque at once", _changed(_dense(2, 6, background="one"), _set("sigmas", (..., 0), 1e4)), second_order=True),
    Case("opaque inside", _changed(_dense(4, 40, background="one"), _set("sigmas", (..., 17), 6e4))),
    Case("infinite density", _changed(_dense(4, 19, background="one"), _set("sigmas", (..., 5), torch.inf))),
    Case("empty intervals", _changed(_dense(2, 6, background="one"), _empty_intervals), second_order=True),
    Case("early stop", _early_stop(nan=False)),
    Case("NaN behind an early stop", _early_stop(nan=True)),
    Case("NaN behind an early stop, one channel", _early_stop(nan=True, channels=1)),
    Case("NaN behind an early stop, five channels", _early_stop(nan=True, channels=5)),
    Case("growing behind an early stop", _grows_behind_the_stop(packed=False)),
    Case("packed, growing behind an early stop", _grows_behind_the_stop(packed=True)),
    Case("packed", _packed([5, 0, 17, 1, 0, 64, 33, 0], channels=3)),
    Case("packed, small", _packed([3, 0, 5, 1], channels=2), second_order=True),
    Case("packed with gaps, any order", _packed([4, 10, 0, 7], starts=[30, 3, 0, 15], total=40, channels=5)),
    Case("packed without rays", _packed([], total=3)),
    Case("packed without samples", _packed([0, 0, 0])),
    Case("packed, NaN behind an early stop", _early_stop(nan=True, packed=True)),
    Case("many rays", _dense(1500, 64, background="one"), large=True),
)


def _from_alphas(make):
    """The same case for composite_from_alphas: alphas = 1 - exp(-sigma delta), ts = t_starts."""

    def converted(dtype, device, generator):
        arguments = make(torch.float64, torch.device("cpu"), generator)
        sigmas, t_starts = arguments.pop("sigmas"), arguments.pop("t_starts")
        deltas = arguments.pop("t_ends") - t_starts
        absorbed = torch.nan_to_num(sigmas, nan=torch.nan, posinf=1e300) * deltas
        return _to(dtype, device, {"alphas": -torch.expm1(-absorbed), "ts": t_starts} | arguments)

    return converted


_SAME_FOR_ALPHAS = ("infinite density", "empty intervals", "strided", "expanded")
_ALPHA_CASES = tuple(
    Case(case.name, _from_alphas(case.make), case.second_order, case.large)
    for case in _CASES
    if case.name not in _SAME_FOR_ALPHAS
) + (
    Case("strided", _changed(_from_alphas(_dense(9, 21, background="each")), _strided)),
    Case("expanded", _changed(_from_alphas(_dense(9, 21, background="one")), _expanded)),
)


def _bad(change, base=None):
    return _changed(base or _dense(4, 8, background="one"), change)


def _replace(name: str, function):
    def change(arguments: dict) -> None:
        arguments[name] = function(arguments[name]) if name in arguments else function(None)

    return change


_PACKED = _packed([3, 5], total=8)

_BAD = (
    BadInput("sigmas is no tensor", _bad(_replace("sigmas", lambda x: x.tolist())), TypeError, "sigmas.*Tensor.*list"),
    BadInput("integer sigmas", _bad(_replace("sigmas", lambda x: x.long())), TypeError, "sigmas.*floating.*int64"),
    BadInput(
        "scalar sigmas", _bad(_replace("sigmas", lambda x: x[0, 0]), _dense(4, 8)), ValueError, "t_ends.*expected shape"
    ),
    BadInput(
        "values too short",
        _bad(_replace("values", lambda x: x[:, :-1])),
        ValueError,
        r"values.*\(4, 8, 'C'\).*\(4, 7, 3\)",
    ),
    BadInput("values without channels", _bad(_replace("values", lambda x: x[..., 0])), ValueError, r"values.*\(4, 8\)"),
    BadInput("values of no channels", _bad(_replace("values", lambda x: x[..., :0])), ValueError, r"values.*C >= 1"),
    BadInput(
        "t_starts too long",
        _bad(_replace("t_starts", lambda x: x.repeat(1, 2))),
        ValueError,
        r"t_starts.*\(4, 8\).*\(4, 16\)",
    ),
    BadInput("t_ends of one ray", _bad(_replace("t_ends", lambda x: x[0])), ValueError, r"t_ends.*\(4, 8\).*\(8,\)"),
    BadInput(
        "values of another dtype", _bad(_replace("values", lambda x: x.double())), TypeError, "values.*float32.*float64"
    ),
    BadInput(
        "t_ends of another device", _bad(_replace("t_ends", lambda x: x.to("meta"))), ValueError, "t_ends.*device.*meta"
    ),
    BadInput(
        "background of 4 channels",
        _bad(_replace("background", lambda x: x.new_ones(4))),
        ValueError,
        r"background.*\(3,\)",
    ),
    BadInput(
        "negative early_stop_eps",
        _bad(_replace("early_stop_eps", lambda _: -0.1)),
        ValueError,
        r"early_stop_eps.*\[0, 1\).*-0.1",
    ),
    BadInput(
        "early_stop_eps NaN", _bad(_replace("early_stop_eps", lambda _: float("nan"))), ValueError, "early_stop_eps"
    ),
    BadInput(
        "early_stop_eps a string", _bad(_replace("early_stop_eps", lambda _: "1")), TypeError, "early_stop_eps.*str"
    ),
    BadInput(
        "unknown backend", _bad(_replace("backend", lambda _: "cudnn")), ValueError, "backend.*'reference'.*'cudnn'"
    ),
    BadInput(
        "packed_info of int32",
        _bad(_replace("packed_info", lambda x: x.int()), _PACKED),
        TypeError,
        "packed_info.*int64.*int32",
    ),
    BadInput(
        "packed_info of floats",
        _bad(_replace("packed_info", lambda x: x.float()), _PACKED),
        TypeError,
        "packed_info.*int64",
    ),
    BadInput(
        "packed_info no tensor",
        _bad(_replace("packed_info", lambda x: x.tolist()), _PACKED),
        TypeError,
        "packed_info.*list",
    ),
    BadInput(
        "packed_info of one column",
        _bad(_replace("packed_info", lambda x: x[:, :1]), _PACKED),
        ValueError,
        r"packed_info.*\(R, 2\).*\(2, 1\)",
    ),
    BadInput(
        "packed_info past the end",
        _bad(_replace("packed_info", lambda x: x + x.new_tensor([1, 0])), _PACKED),
        ValueError,
        r"packed_info.*<= 8.*\[4, 5\] for ray 1",
    ),
    BadInput(
        "packed_info negative",
        _bad(_replace("packed_info", lambda x: -x), _PACKED),
        ValueError,
        "packed_info.*0 <= start",
    ),
    BadInput(
        "packed_info huge",
        _bad(_replace("packed_info", lambda x: x + 2**62), _PACKED),
        ValueError,
        "packed_info.*expected 0 <= start",
    ),
    BadInput(
        "packed_info overlaps",
        _bad(_replace("packed_info", lambda x: x.new_tensor([[0, 4], [3, 5]])), _PACKED),
        ValueError,
        "packed_info.*overlap.*ray 0.*ray 1",
    ),
    BadInput(
        "packed_info overlaps around an empty ray",
        _bad(_replace("packed_info", lambda x: x.new_tensor([[0, 4], [8, 0], [3, 5]])), _PACKED),
        ValueError,
        "packed_info.*overlap.*ray 0.*ray 2",
    ),
    BadInput(
        "packed_info overlaps, out of order",
        _bad(_replace("packed_info", lambda x: x.new_tensor([[4, 4], [0, 5]])), _PACKED),
        ValueError,
        "packed_info.*overlap.*ray 1.*ray 0",
    ),
    BadInput(
        "packed_info with dense rays",
        _bad(_replace("packed_info", lambda _: torch.tensor([[0, 8]]))),
        ValueError,
        r"sigmas.*\(N,\).*\(4, 8\)",
    ),
)

_RENAMED = {"sigmas": "alphas", "t_starts": "ts"}


def _alphas_bad(bad: BadInput) -> BadInput:
    def make(dtype, device, generator):
        arguments = bad.make(dtype, device, generator)
        return {_RENAMED.get(name, name): x for name, x in arguments.items() if name != "t_ends"}

    message = bad.message.replace("sigmas", "alphas").replace("t_starts", "ts")
    return BadInput(bad.name.replace("sigmas", "alphas"), make, bad.error, message)


_ALPHAS_BAD = tuple(_alphas_bad(bad) for bad in _BAD if "t_ends" not in bad.name and bad.name != "scalar sigmas") + (
    BadInput(
        "scalar alphas",
        lambda *_: {"alphas": torch.tensor(0.5), "values": torch.ones(3), "ts": torch.tensor(1.0)},
        ValueError,
        r"alphas.*\(\.\.\., S\)",
    ),
)


def _ragged(rays: int, longest: int, **settings):
    """Rays with lengths drawn evenly from 0 to ``longest``, one after another."""

    def make(dtype, device, generator):
        counts = torch.randint(0, longest + 1, (rays,), generator=generator)
        total = int(counts.sum())
        t_starts = torch.rand(total, generator=generator)
        arguments = {
            "sigmas": torch.rand(total, generator=generator) * 4,
            "values": torch.rand(total, 3, generator=generator),
            "t_starts": t_starts,
            "t_ends": t_starts + 4 / longest,
            "packed_info": torch.stack([torch.cumsum(counts, 0) - counts, counts], dim=-1),
        }
        return _to(dtype, device, arguments) | settings

    return make


_RAGGED_SAMPLES = int(torch.randint(0, 513, (16384,), generator=torch.Generator().manual_seed(0)).sum())

_WORKLOADS = (
    Workload("16,384 rays x 128 samples x RGB", _dense(16384, 128), 16384 * 128),
    Workload("packed: 16,384 rays of 0 to 512 samples x RGB", _ragged(16384, 512), _RAGGED_SAMPLES),
    Workload("call overhead: 1 ray x 8 samples x RGB", _dense(1, 8), 8),
    Workload("131,072 rays x 128 samples x RGB", _dense(131072, 128), 2**24, devices=("cuda",)),
)


def _cost(arguments: dict, backward: bool) -> Cost:
    """Bytes: each input read once, each output written once (the backward: gradients of densities and values).

    Operations a sample, an exp counted as 12: forward 12 + 8 + 2 C, backward 12 + 14 + 4 C.
    """
    values = arguments["values"]
    densities = arguments["sigmas"] if "sigmas" in arguments else arguments["alphas"]
    samples, channels, size = densities.numel(), values.shape[-1], values.element_size()
    rays = (
        arguments["packed_info"].shape[0] if arguments.get("packed_info") is not None else densities.shape[:-1].numel()
    )
    read = 1 + channels + (2 if "t_ends" in arguments else 1)
    written = 1 + (channels if backward else 0)
    flops = samples * ((26 + 4 * channels) if backward else (20 + 2 * channels))
    return Cost(flops, size * (samples * (read + written) + rays * (channels + 2)))


def _triton_kernels() -> tuple[TritonKernel, ...]:
    from mpkernels.volume.composite import triton

    return triton.compiled_kernels()


SPECS = (
    OpSpec(
        name="composite",
        family="volume",
        op=schema.FORWARD,
        function=api.composite,
        formula="w_i = T_i (1 - exp(-sigma_i delta_i)); value = sum w_i c_i + (1 - sum w_i) background",
        differentiable=("sigmas", "values", "t_starts", "t_ends", "background"),
        outputs=api.CompositeOutput._fields,
        cases=_CASES,
        bad_inputs=_BAD,
        workloads=_WORKLOADS,
        eager=eager.composite,
        cost=_cost,
        triton_kernels=_triton_kernels,
        demo="python_models.plane_sweep",
    ),
    OpSpec(
        name="composite_from_alphas",
        family="volume",
        op=schema.FORWARD,
        function=api.composite_from_alphas,
        formula="w_i = alpha_i prod_{j<i} (1 - alpha_j); value = sum w_i c_i + (1 - sum w_i) background",
        differentiable=("alphas", "values", "ts", "background"),
        outputs=api.CompositeOutput._fields,
        cases=_ALPHA_CASES,
        bad_inputs=_ALPHAS_BAD,
        workloads=(Workload("16,384 rays x 128 samples x RGB", _from_alphas(_dense(16384, 128)), 16384 * 128),),
        eager=eager.composite_from_alphas,
        cost=_cost,
    ),
)
