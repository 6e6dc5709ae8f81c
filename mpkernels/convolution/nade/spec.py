"""Cases, workloads and cost of NADE."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels.convolution.nade import api, schema
from mpkernels.philox import key_of, philox
from mpkernels.spec import Arguments, BadInput, Case, Cost, OpSpec, Workload

_WEIGHTS = ("in_weight", "in_bias", "out_weight", "out_bias")
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {"reference": _FLOATING, "cpu": _FLOATING}


def _weights(dimensions: int, hidden: int, spread: float, generator: torch.Generator) -> dict[str, Tensor]:
    shapes = ((hidden, dimensions), (hidden,), (dimensions, hidden), (dimensions,))
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * spread
        for name, shape in zip(_WEIGHTS, shapes, strict=True)
    }


def _binary(
    samples: int,
    dimensions: int,
    hidden: int,
    *,
    share: float | None = 0.4,
    spread: float = 0.5,
    rearranged: bool = False,
):
    """Normal weights; x is 1 for this share of dimensions, or uniform in [0, 1] where None; or strided, in an order."""

    def make(dtype, device, generator) -> Arguments:
        found = _weights(dimensions, hidden, spread, generator)
        x = torch.rand(samples, dimensions, generator=generator, dtype=torch.float64)
        found["x"] = x if share is None else (x < share).double()
        made = {name: value.to(device, dtype) for name, value in found.items()}
        if rearranged:
            made |= {name: value.T.contiguous().T for name, value in made.items() if value.dim() == 2}
            made["order"] = torch.randperm(dimensions, generator=generator).to(device)
        return made

    return make


def _with(**changes):
    return lambda dtype, device, generator: _binary(3, 5, 4)(dtype, device, generator) | changes


def _draws(n: int, dimensions: int, hidden: int, *, spread: float = 0.5, shuffled: bool = False, **settings):
    def make(dtype, device, generator) -> Arguments:
        made: Arguments = {
            name: value.to(device, dtype) for name, value in _weights(dimensions, hidden, spread, generator).items()
        }
        if shuffled:
            made["order"] = torch.randperm(dimensions, generator=generator).to(device)
        return made | {"n": n, "seed": 7} | settings

    return make


def _draws_with(**changes):
    return lambda dtype, device, generator: _draws(3, 5, 4)(dtype, device, generator) | changes


def _eager_log_prob(x, in_weight, in_bias, out_weight, out_bias, order=None) -> tuple[Tensor, ...]:
    """As users write it: the recurrence of the paper, a Python loop over the dimensions."""
    if order is not None:
        x, in_weight, out_weight, out_bias = x[:, order], in_weight[:, order], out_weight[order], out_bias[order]
    activation, logits = in_bias, []
    for d in range(x.shape[1]):
        logits.append((torch.sigmoid(activation) @ out_weight[d]).expand(x.shape[0]))
        activation = activation + x[:, d, None] * in_weight[:, d]
    scores = torch.stack(logits, dim=1) + out_bias
    return (-torch.nn.functional.binary_cross_entropy_with_logits(scores, x, reduction="none").sum(1),)


def _eager_sample(n, in_weight, in_bias, out_weight, out_bias, seed, temperature=1.0, order=None) -> tuple[Tensor, ...]:
    """The same loop, with the random numbers of the op, so that samples can be compared."""
    if order is not None:
        in_weight, out_weight, out_bias = in_weight[:, order], out_weight[order], out_bias[order]
    dimensions = in_weight.shape[1]
    counts = torch.arange(n)[:, None], torch.arange(dimensions)
    zero = torch.zeros((), dtype=torch.int64)
    words = philox((counts[1], counts[0], zero, zero), key_of(torch.tensor(seed)))[0].expand(n, dimensions)
    uniform = (((words >> 8).double() + 0.5) * 2.0**-24).to(in_weight.device)
    activation = in_bias.expand(n, -1)
    x, total = in_weight.new_zeros(n, dimensions), in_weight.new_zeros(n)
    for d in range(dimensions):
        logit = (torch.sigmoid(activation) @ out_weight[d] + out_bias[d]) / temperature
        x[:, d] = (uniform[:, d] < torch.sigmoid(logit)).to(x.dtype)
        total -= torch.nn.functional.binary_cross_entropy_with_logits(logit, x[:, d], reduction="none")
        activation = activation + x[:, d, None] * in_weight[:, d]
    return (x if order is None else torch.empty_like(x).index_copy(1, order, x)), total


def _cost(arguments: Arguments, backward: bool) -> Cost:
    """A multiply-add and a sigmoid a sample, dimension and unit, a multiply-add as 2 operations and a sigmoid as 20."""
    weight = arguments["in_weight"]
    hidden, dimensions = weight.shape
    samples = arguments["n"] if "n" in arguments else arguments["x"].shape[0]
    size = weight.element_size()
    every = samples * dimensions * hidden
    if backward:
        return Cost(flops=28 * every, bytes=size * 4 * weight.numel() + (size + 8) * samples * dimensions)
    return Cost(flops=24 * every, bytes=size * (2 * weight.numel() + samples * dimensions) + 4 * samples * dimensions)


_LOG_PROB_BAD = (
    BadInput("x is no tensor", _with(x=[1.0]), TypeError, "x.*Tensor.*list"),
    BadInput("integer x", _with(x=torch.zeros(3, 5, dtype=torch.int64)), TypeError, "x.*floating.*int64"),
    BadInput("x of one dimension", _with(x=torch.zeros(5)), ValueError, r"x.*\(N, D\)"),
    BadInput("in_weight of other dimensions", _with(in_weight=torch.zeros(4, 6)), ValueError, "in_weight.*5.*6"),
    BadInput("in_weight of another dtype", _with(in_weight=torch.zeros(4, 5).double()), TypeError, "in_weight.*dtype"),
    BadInput("in_bias of other units", _with(in_bias=torch.zeros(5)), ValueError, r"in_bias.*\(4,\).*\(5,\)"),
    BadInput("out_weight transposed", _with(out_weight=torch.zeros(4, 5)), ValueError, r"out_weight.*\(5, 4\)"),
    BadInput("out_bias of other dimensions", _with(out_bias=torch.zeros(4)), ValueError, r"out_bias.*\(5,\)"),
    BadInput("order is no permutation", _with(order=torch.tensor([0, 1, 2, 3, 3])), ValueError, "order.*permutation"),
    BadInput("order of floats", _with(order=torch.arange(5.0)), TypeError, "order.*int64.*float32"),
    BadInput("order too short", _with(order=torch.arange(4)), ValueError, r"order.*\(5,\)"),
    BadInput("unknown backend", _with(backend="cudnn"), ValueError, "backend.*'reference'.*'cudnn'"),
)

_SAMPLE_BAD = (
    BadInput("n of a float", _draws_with(n=2.0), TypeError, "n.*integer.*float"),
    BadInput("negative n", _draws_with(n=-1), ValueError, "n.*-1"),
    BadInput("negative seed", _draws_with(seed=-1), ValueError, "seed.*-1"),
    BadInput("seed of a string", _draws_with(seed="1"), TypeError, "seed.*integer.*str"),
    BadInput("temperature 0", _draws_with(temperature=0), ValueError, "temperature.*above 0"),
    BadInput("temperature of a string", _draws_with(temperature="1"), TypeError, "temperature.*number.*str"),
    BadInput("in_weight of one dimension", _draws_with(in_weight=torch.zeros(4)), ValueError, r"in_weight.*\(H, D\)"),
    BadInput("out_weight transposed", _draws_with(out_weight=torch.zeros(4, 5)), ValueError, r"out_weight.*\(5, 4\)"),
    BadInput("order is no permutation", _draws_with(order=torch.zeros(5).long()), ValueError, "order.*permutation"),
)

SPECS = (
    OpSpec(
        name="nade_log_prob",
        family="convolution",
        op=schema.FORWARD,
        function=lambda **arguments: (api.nade_log_prob(**arguments),),
        formula="sum_d log Bernoulli(x_d; sigmoid(b_d + V_d . sigmoid(c + sum_{e<d} W_e x_e)))",
        differentiable=("x", *_WEIGHTS),
        outputs=("log_prob",),
        cases=(
            Case("typical", _binary(20, 70, 90, spread=0.2)),
            Case("small", _binary(3, 4, 5), second_order=True),
            Case("grey, shuffled, strided", _binary(2, 4, 3, share=None, rearranged=True), second_order=True),
            Case("odd sizes", _binary(17, 67, 65, share=None)),
            Case("one of each", _binary(1, 1, 1)),
            Case("nothing is drawn", _binary(9, 40, 8, share=0.0)),
            Case("everything is drawn", _binary(9, 65, 8, share=1.1)),
            Case("far from even", _binary(5, 33, 20, spread=4.0)),
            Case("no samples", _binary(0, 6, 4)),
            Case("no dimensions", _binary(3, 0, 4)),
            Case("no hidden units", _binary(3, 6, 0)),
            Case("many", _binary(19, 210, 140, share=0.13, spread=0.1), large=True),
        ),
        bad_inputs=_LOG_PROB_BAD,
        workloads=(
            Workload("100 digits, 784 x 500", _binary(100, 784, 500, share=0.13, spread=0.05), 100, devices=("cpu",)),
            Workload("100 grey digits", _binary(100, 784, 500, share=None, spread=0.05), 100, devices=("cpu",)),
        ),
        eager=_eager_log_prob,
        cost=_cost,
        trained=_WEIGHTS,
        demo="python_models.nade",
        demo_name="nade",
        dtypes=_DTYPES,
    ),
    OpSpec(
        name="nade_sample",
        family="convolution",
        op=schema.SAMPLE,
        function=lambda **arguments: api.nade_sample(**arguments, return_log_prob=True),
        formula="x_d = 1 where u_d < sigmoid(b_d + V_d . sigmoid(c + sum_{e<d} W_e x_e))",
        differentiable=(),
        outputs=("x", "log_prob"),
        cases=(
            Case("typical", _draws(20, 70, 90, spread=0.2)),
            Case("small", _draws(3, 4, 5), second_order=True),
            Case("shuffled", _draws(9, 33, 20, shuffled=True)),
            Case("colder", _draws(5, 40, 8, temperature=0.5)),
            Case("no samples", _draws(0, 6, 4)),
            Case("no dimensions", _draws(3, 0, 4)),
            Case("no hidden units", _draws(3, 6, 0)),
        ),
        bad_inputs=_SAMPLE_BAD,
        workloads=(
            Workload(
                "100 digits, 784 x 500", _draws(100, 784, 500, spread=0.05), 100, devices=("cpu",), backward=False
            ),
        ),
        eager=_eager_sample,
        cost=_cost,
        second_order=False,
        batched=False,
        dtypes=_DTYPES,
    ),
)
