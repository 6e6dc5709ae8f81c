"""Cases, workloads and cost of spherical harmonics."""

from __future__ import annotations

import math

import torch

from mpkernels.spec import BadInput, Case, Cost, OpSpec, TritonKernel, Workload
from mpkernels.splatting.spherical_harmonics import api, eager, schema

_BOTH = (torch.float32, torch.float64)


def _random(
    degree: int, *lead: int, held: tuple[int, ...] | None = None, coefficients: int | None = None, masked: float = 0.0
):
    """Directions of shape (*lead, 3) of lengths about 2, coefficients of shape (*held, K, 3)."""

    def make(dtype, device, generator):
        k = (degree + 1) ** 2 if coefficients is None else coefficients
        dirs = torch.randn(*lead, 3, generator=generator, dtype=torch.float64)
        coeffs = torch.randn(*(lead if held is None else held), k, 3, generator=generator, dtype=torch.float64)
        arguments = {"degree": degree, "dirs": dirs.to(device, dtype), "coeffs": coeffs.to(device, dtype)}
        if masked:
            arguments["masks"] = (torch.rand(*lead, generator=generator) >= masked).to(device)
        return arguments

    return make


def _changed(make, change):
    """A case made from another: ``change(arguments)`` edits the arguments in place."""

    def changed(dtype, device, generator):
        arguments = make(dtype, device, generator)
        change(arguments)
        return arguments

    return changed


def _set(**replaced):
    return lambda arguments: arguments.update(
        {name: f(arguments[name]) if callable(f) else f for name, f in replaced.items()}
    )


def _strided(arguments) -> None:
    """Every second row of larger tensors, and the coefficients with the channels first in memory."""
    arguments["dirs"] = arguments["dirs"].repeat_interleave(2, -2)[..., ::2, :]
    arguments["coeffs"] = arguments["coeffs"].movedim(-1, 0).contiguous().movedim(0, -1)
    arguments["masks"] = arguments["masks"].repeat_interleave(2, -1)[..., ::2]


def _expanded(arguments) -> None:
    """One direction for all, and one row of coefficients, by stride 0."""
    for name in ("dirs", "coeffs"):
        arguments[name] = arguments[name][:1].expand_as(arguments[name])


def _without_direction(arguments) -> None:
    """Zero and non-finite directions, whole and in one component."""
    dirs = arguments["dirs"]
    for i, bad in enumerate((0.0, math.nan, math.inf, -math.inf)):
        dirs[:, 4 * i] = bad
        if bad != 0.0:  # one component is enough
            dirs[:, 4 * i + 1, i % 3] = bad


def _nan_where_masked(arguments) -> None:
    """NaN in all that no unmasked colour needs; some directions stay, so that their coefficients alone are NaN."""
    dead = ~arguments["masks"]
    dirs = arguments["dirs"].clone()
    dirs[dead & (torch.arange(dead.shape[1], device=dead.device) % 3 > 0)] = torch.nan
    coeffs = arguments["coeffs"].clone()
    coeffs[dead.all(0)] = torch.nan
    arguments["dirs"], arguments["coeffs"] = dirs, coeffs


def _huge(arguments) -> None:
    """Lengths whose squares overflow float32, or vanish in it."""
    dirs = arguments["dirs"]
    dirs[0] *= 2.0**100
    dirs[1] *= 2.0**-10


def _cost(arguments, backward: bool) -> Cost:
    k = (arguments["degree"] + 1) ** 2
    dirs, coeffs = arguments["dirs"], arguments["coeffs"]
    colors, gaussians = dirs.numel() // 3, coeffs.numel() // (3 * coeffs.shape[-2])
    size = dirs.element_size()
    if backward:  # reads dirs, gradient, coefficients; writes gradients of dirs and (all) coefficients
        return Cost(colors * (14 * k + 30), size * (9 * colors + 3 * gaussians * (k + coeffs.shape[-2])))
    return Cost(colors * (8 * k + 15), size * (6 * colors + 3 * gaussians * k))


def _triton_kernels() -> tuple[TritonKernel, ...]:
    from mpkernels.splatting.spherical_harmonics import triton  # imports Triton, which a CPU can do without

    return triton.compiled_kernels()


SPECS = (
    OpSpec(
        name="spherical_harmonics",
        family="splatting",
        op=schema.FORWARD,
        function=lambda **arguments: (api.spherical_harmonics(**arguments),),
        formula="sum_k Y_k(dir / |dir|) coeffs_k",
        differentiable=("dirs", "coeffs"),
        outputs=("colors",),
        cases=(
            Case("degree 0", _random(0, 5), second_order=True),
            Case("degree 1", _random(1, 5)),
            Case("degree 2", _random(2, 2, 5, held=(5,)), second_order=True),
            Case("degree 3", _random(3, 3, masked=0.3), second_order=True),
            Case("degree 4", _random(4, 7), second_order=True),
            Case("typical", _random(3, 2, 150, held=(150,), masked=0.3)),
            Case("degree 1 of 16 coefficients", _random(1, 2, 35, held=(35,), coefficients=16)),
            Case("odd sizes", _random(4, 5, 123, 1, held=(123, 1), coefficients=27)),
            Case("batches of cameras", _random(2, 2, 3, 19, held=(2, 1, 19))),
            Case("shared in two places", _random(1, 2, 3, 2, held=(1, 3, 1))),
            Case("one Gaussian, many directions", _random(3, 20, 15, held=())),
            Case("a direction alone", _random(3)),
            Case("no Gaussians", _random(3, 2, 0, held=(0,))),
            Case("no cameras", _random(3, 0, 4, held=(4,))),
            Case("strided", _changed(_random(2, 2, 21, held=(21,), masked=0.5), _strided)),
            Case("expanded", _changed(_random(2, 21), _expanded)),
            Case("zero and non-finite directions", _changed(_random(4, 2, 40, held=(40,)), _without_direction)),
            Case(
                "NaN where masked",
                _changed(_random(3, 2, 70, held=(70,), masked=0.6, coefficients=17), _nan_where_masked),
            ),
            Case("long and short directions", _changed(_random(3, 3, 9, held=(9,)), _huge)),
            Case("many Gaussians", _random(3, 2, 5000, held=(5000,), masked=0.2), large=True),
        ),
        bad_inputs=(
            BadInput("degree 5", _changed(_random(2, 4), _set(degree=5)), ValueError, r"degree.*\[0, 4\].*5"),
            BadInput("negative degree", _changed(_random(2, 4), _set(degree=-1)), ValueError, r"degree.*\[0, 4\].*-1"),
            BadInput("degree no integer", _changed(_random(2, 4), _set(degree=2.0)), TypeError, "degree.*float"),
            BadInput(
                "dirs no tensor", _changed(_random(2, 4), _set(dirs=lambda x: x.tolist())), TypeError, "dirs.*list"
            ),
            BadInput(
                "bfloat16",
                _changed(_random(2, 4), _set(dirs=lambda x: x.bfloat16())),
                TypeError,
                "dirs.*float32 or float64.*bfloat16",
            ),
            BadInput(
                "dirs of 2", _changed(_random(2, 4), _set(dirs=lambda x: x[:, :2])), ValueError, r"dirs.*\(4, 2\)"
            ),
            BadInput(
                "coeffs of another dtype",
                _changed(_random(2, 4), _set(coeffs=lambda x: x.double())),
                TypeError,
                "coeffs.*float32.*float64",
            ),
            BadInput(
                "coeffs of another device",
                _changed(_random(2, 4), _set(coeffs=lambda x: x.to("meta"))),
                ValueError,
                "coeffs.*device.*meta",
            ),
            BadInput("too few coefficients", _random(2, 4, coefficients=8), ValueError, r"coeffs.*K >= 9.*\(4, 8, 3\)"),
            BadInput(
                "two channels",
                _changed(_random(2, 4), _set(coeffs=lambda x: x[..., :2])),
                ValueError,
                r"coeffs.*\(4, 9, 2\)",
            ),
            BadInput("coeffs of other Gaussians", _random(2, 4, held=(3,)), ValueError, r"coeffs.*\(4,\).*\(3,\)"),
            BadInput(
                "coeffs with more dimensions", _random(2, 4, held=(2, 4)), ValueError, r"coeffs.*\(4,\).*\(2, 4\)"
            ),
            BadInput(
                "masks of floats",
                _changed(_random(2, 4, masked=0.5), _set(masks=lambda x: x.float())),
                TypeError,
                "masks.*bool.*float32",
            ),
            BadInput(
                "masks of one camera",
                _changed(_random(2, 2, 4, masked=0.5), _set(masks=lambda x: x[0])),
                ValueError,
                r"masks.*\(2, 4\).*\(4,\)",
            ),
            BadInput("masks no tensor", _changed(_random(2, 4), _set(masks=True)), TypeError, "masks.*bool"),
            BadInput("unknown backend", _changed(_random(2, 4), _set(backend="cudnn")), ValueError, "backend.*'cudnn'"),
        ),
        workloads=(
            Workload("1 million, degree 3", _random(3, 1_000_000), 1_000_000),
            Workload("4 cameras, 200,000, degree 3", _random(3, 4, 200_000, held=(200_000,)), 800_000),
            Workload("1 million, degree 0 of 16", _random(0, 1_000_000, coefficients=16), 1_000_000),
        ),
        eager=lambda **arguments: (eager.spherical_harmonics(**arguments),),
        cost=_cost,
        triton_kernels=_triton_kernels,
        second_order=False,
        dtypes=dict.fromkeys(("reference", "cpu", "fibres", "cuda", "triton"), _BOTH),
    ),
)
