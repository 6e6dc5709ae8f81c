"""Cases, workloads and cost of the triangular log-determinant."""

from __future__ import annotations

import torch
from torch import Tensor

from mpkernels.flows.slog_det_triangular import api, schema
from mpkernels.spec import Arguments, BadInput, Case, Cost, OpSpec, Workload


def _triangular(*shape: int, hidden: float = 0.0, spread: float = 1.0, change=lambda x: x):
    """Lower triangles with diagonals of either sign; ``hidden`` stands above them, ``change`` makes them strided."""

    def make(dtype, device, generator):
        matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
        signs = torch.where(matrix.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
        sizes = torch.rand(shape[:-1], generator=generator, dtype=torch.float64) * 2 * spread - spread
        matrix = torch.where(torch.ones_like(matrix, dtype=torch.bool).tril(), matrix, hidden)
        return {"matrix": change(torch.diagonal_scatter(matrix, signs * sizes.exp(), 0, -2, -1).to(device, dtype))}

    return make


def _cost(arguments: Arguments, backward: bool) -> Cost:
    """Bytes: the diagonals, forward; backward the whole gradient, which is 0 off them."""
    matrix: Tensor = arguments["matrix"]
    diagonal = matrix.numel() // max(matrix.shape[-1], 1)
    return Cost(
        flops=(1 if backward else 4) * diagonal,
        bytes=(matrix.numel() + diagonal if backward else diagonal) * matrix.element_size(),
    )


def _with(**changes):
    return lambda dtype, device, generator: _triangular(3, 2, 2)(dtype, device, generator) | changes


SPECS = (
    OpSpec(
        name="slog_det_triangular",
        family="flows",
        op=schema.FORWARD,
        function=lambda **arguments: api.slog_det_triangular(**arguments)[::-1],  # (gradcheck wants constants last)
        formula="sum_i log |matrix_ii|, and the sign of their product",
        differentiable=("matrix",),
        outputs=("log_abs_det", "sign"),
        cases=(
            Case("small", _triangular(2, 3, 3), second_order=True),
            Case("one matrix, upper", _triangular(4, 4, change=lambda x: x.transpose(-1, -2)), second_order=True),
            Case("typical", _triangular(40, 12, 12, hidden=float("nan"))),
            Case("every second one of a grid", _triangular(6, 8, 5, 5, change=lambda x: x[::2, ::2])),
            Case("n = 1", _triangular(7, 1, 1)),
            Case("n = 0", _triangular(3, 0, 0)),
            Case("no matrices", _triangular(0, 3, 3)),
            Case("beyond the range of products", _triangular(2, 700, 700, spread=9.0), large=True),
            Case("many", _triangular(3000, 3, 3), large=True),
        ),
        bad_inputs=(
            BadInput("matrix is no tensor", _with(matrix=[[1.0]]), TypeError, "matrix.*Tensor.*list"),
            BadInput("a vector", _with(matrix=torch.zeros(3)), ValueError, r"matrix.*n, n.*\(3,\)"),
            BadInput("not square", _with(matrix=torch.zeros(2, 3)), ValueError, r"matrix.*n, n.*\(2, 3\)"),
            BadInput("integers", _with(matrix=torch.ones(2, 2).int()), TypeError, "matrix.*int32"),
            BadInput("unknown backend", _with(backend="cudnn"), ValueError, "backend.*'reference'.*'cudnn'"),
        ),
        workloads=(
            Workload("4096 of 16 x 16", _triangular(4096, 16, 16), 4096, backward=False),
            Workload("512 of 48 x 48", _triangular(512, 48, 48), 512, backward=False),
        ),
        eager=lambda matrix: tuple(torch.linalg.slogdet(matrix))[::-1],
        cost=_cost,
        dtypes=dict.fromkeys(("reference", "cpu"), (torch.float32, torch.float64, torch.bfloat16, torch.float16)),
    ),
)
