"""The C x C algebra of the invertible 1x1 convolution: matrices, their inverses and determinants.

It costs O(C^3) a call, whatever the number of positions. Inverses and determinants are computed in float64, so that a
round trip loses what the two products round.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mpkernels import checks


class PLU(NamedTuple):
    """An invertible matrix in the parts that Glow trains: W = P L (U + diag(sign e^log_scale)).

    Row i of W is row ``permutation[i]`` of the rest. What stands outside the strict triangles is never read.
    """

    permutation: Tensor  # (C,) int64
    lower: Tensor  # (C, C), read below the diagonal; L has ones on it
    upper: Tensor  # (C, C), read above the diagonal
    sign: Tensor  # (C,), -1 or 1; a constant
    log_scale: Tensor  # (C,)


def plu_decompose(weight: Tensor) -> PLU:
    """The parts of a matrix: W = P L (U + diag(sign e^log_scale)) by LU decomposition with partial pivoting.

    No gradient: this is how parameters begin.

    Args:
        weight: (C, C) float32, float64, bfloat16 or float16; decomposed in float64.

    Returns:
        :class:`PLU`, in float32 (float64 for float64). A singular matrix has a log_scale of -inf (and then the sign 0).

    Raises:
        TypeError: ``weight`` is no floating-point tensor.
        ValueError: ``weight`` is not a square matrix.

    Example:
        >>> import torch
        >>> from mpkernels.flows import plu_decompose
        >>> parts = plu_decompose(torch.tensor([[0.0, 2.0], [-4.0, 8.0]]))
        >>> parts.permutation, parts.sign, parts.log_scale
        (tensor([1, 0]), tensor([-1.,  1.]), tensor([1.3863, 0.6931]))
    """
    checks.floating("weight", weight)
    if weight.dim() != 2 or weight.shape[0] != weight.shape[1]:
        raise ValueError(f"weight: expected shape (C, C), got {tuple(weight.shape)}")
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        permutation, lower, upper = torch.linalg.lu(weight.double())
        diagonal = upper.diagonal()
        order = permutation.argmax(1) if weight.numel() else permutation.new_empty((0,), dtype=torch.int64)
        return PLU(
            order,
            lower.tril(-1).to(wide),
            upper.triu(1).to(wide),
            diagonal.sign().to(wide),
            diagonal.abs().log().to(wide),
        )


def of_weight(weight: Tensor | PLU, wide: torch.dtype, inverse: bool) -> tuple[Tensor, Tensor]:
    """(W or its inverse in the dtype ``wide``, log |det W| in float64), differentiable."""
    return _of_parts(weight, wide, inverse) if isinstance(weight, PLU) else _of_matrix(weight, wide, inverse)


def _of_matrix(weight: Tensor, wide: torch.dtype, inverse: bool) -> tuple[Tensor, Tensor]:
    matrix = weight.to(torch.float64)
    log_abs_det = torch.linalg.slogdet(matrix).logabsdet
    if not inverse:
        return weight.to(wide), log_abs_det
    _refuse_singular(log_abs_det)
    return torch.linalg.inv_ex(matrix).inverse.to(wide), log_abs_det  # (inv_ex waits for no GPU)


def _of_parts(parts: PLU, wide: torch.dtype, inverse: bool) -> tuple[Tensor, Tensor]:
    log_abs_det = parts.log_scale.sum(dtype=torch.float64)
    computed = torch.float64 if inverse else wide
    lower = parts.lower.to(computed).tril(-1)
    diagonal = parts.sign.detach().to(computed) * parts.log_scale.to(computed).exp()
    upper = parts.upper.to(computed).triu(1) + diagonal.diag()
    if not inverse:
        return torch.addmm(upper, lower, upper).index_select(0, parts.permutation), log_abs_det
    _refuse_singular(log_abs_det)
    identity = torch.eye(lower.shape[0], dtype=computed, device=lower.device)
    solved = torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)
    solved = torch.linalg.solve_triangular(upper, solved, upper=True)
    return solved.to(wide).index_select(1, parts.permutation), log_abs_det


def _refuse_singular(log_abs_det: Tensor) -> None:
    if readable(log_abs_det) and log_abs_det.item() == -torch.inf:
        raise ValueError("weight: expected an invertible matrix for the inverse, got a singular one")


def readable(x: Tensor) -> bool:
    """Whether values may be looked at: not while compiling or mapping, and not where it waits for a GPU."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not isinstance(x, torch._subclasses.FakeTensor)
    )
