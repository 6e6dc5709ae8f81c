"""Cases, workloads and cost of covariances from quaternions and scales."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpkernels.spec import BadInput, Case, Cost, OpSpec, Workload
from mpkernels.splatting.quat_scale_to_covar import api, eager, schema


def _run(**arguments) -> tuple[Tensor]:
    return (api.quat_scale_to_covar(**arguments),)


def _random(*lead: int, **settings):
    def make(dtype, device, generator):
        quats = torch.randn(*lead, 4, generator=generator, dtype=torch.float64)
        scales = torch.rand(*lead, 3, generator=generator, dtype=torch.float64) + 0.2
        return {"quats": quats.to(device, dtype), "scales": scales.to(device, dtype)} | settings

    return make


def _changed(make, change):
    def changed(dtype, device, generator):
        arguments = make(dtype, device, generator)
        change(arguments)
        return arguments

    return changed


def _hard(arguments: dict) -> None:
    """Zero, long and short quaternions, half turns; zero and negative scales: one each."""
    quats, scales = arguments["quats"], arguments["scales"]
    quats[0] = 0
    quats[1] *= 1e15
    quats[2] *= 1e-3
    quats[3] = quats.new_tensor([0, 0, -2, 0])
    scales[4] = 0
    scales[5, 1] = 0
    scales[6, 2] = -0.5


def _expanded(arguments: dict) -> None:
    arguments["quats"] = arguments["quats"][:1].expand_as(arguments["quats"])
    arguments["scales"] = arguments["scales"].repeat_interleave(2, -1)[..., ::2]


_CASES = (
    Case("five", _random(5), second_order=True),
    Case("five triangles of inverses", _random(5, triu=True, inverse=True), second_order=True),
    Case("batch dimensions", _random(2, 3, 7, inverse=True)),
    Case("odd size", _random(123, triu=True)),
    Case("one", _random()),
    Case("none", _random(3, 0, triu=True)),
    Case("hard", _changed(_random(19), _hard)),
    Case("expanded", _changed(_random(6, 5), _expanded)),
    Case("many", _random(9001), large=True),
)


def _bad(change):
    return _changed(_random(5), change)


def _replace(name: str, function):
    def change(arguments: dict) -> None:
        arguments[name] = function(arguments.get(name))

    return change


_BAD = (
    BadInput("quats is no tensor", _bad(_replace("quats", lambda x: x.tolist())), TypeError, "quats.*Tensor.*list"),
    BadInput("quats of float16", _bad(_replace("quats", lambda x: x.half())), TypeError, "quats.*float32 or float64"),
    BadInput("quats of 3", _bad(_replace("quats", lambda x: x[:, :3])), ValueError, r"quats.*\(\.\.\., 4\).*\(5, 3\)"),
    BadInput("scales of 4", _bad(_replace("scales", lambda x: x.repeat(1, 2))), ValueError, r"scales.*\(5, 3\)"),
    BadInput("scales of 4 rows", _bad(_replace("scales", lambda x: x[1:])), ValueError, r"scales.*\(5, 3\).*\(4, 3\)"),
    BadInput("scales of float64", _bad(_replace("scales", lambda x: x.double())), TypeError, "scales.*float64"),
    BadInput("scales elsewhere", _bad(_replace("scales", lambda x: x.to("meta"))), ValueError, "scales.*device.*meta"),
    BadInput("unknown backend", _bad(_replace("backend", lambda _: "cudnn")), ValueError, "backend.*'cudnn'"),
)


def _cost(arguments: dict, backward: bool) -> Cost:
    quats = arguments["quats"]
    n = math.prod(quats.shape[:-1])
    covar = 6 if arguments.get("triu") else 9
    numbers = 7 + covar + (7 if backward else 0)
    return Cost(n * (160 if backward else 75), n * numbers * quats.element_size())


_BOTH = (torch.float32, torch.float64)

SPECS = (
    OpSpec(
        name="quat_scale_to_covar",
        family="splatting",
        op=schema.FORWARD,
        function=_run,
        formula="Sigma = R S S^T R^T, or its inverse",
        differentiable=("quats", "scales"),
        outputs=("covars",),
        cases=_CASES,
        bad_inputs=_BAD,
        workloads=(Workload("1,000,000 Gaussians", _random(1000000, triu=True), 1000000),),
        eager=eager.quat_scale_to_covar,
        cost=_cost,
        second_order=False,
        dtypes={"reference": _BOTH, "cpu": _BOTH, "fibres": _BOTH, "cuda": _BOTH},
    ),
)
