"""The public function of the triangular log-determinant: checks its input and chooses a backend."""

from __future__ import annotations

from torch import Tensor

from mpkernels import backends, checks
from mpkernels.flows.slog_det_triangular import autograd, reference, schema


def slog_det_triangular(matrix: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Sign and log |det| of triangular matrices, from their diagonals alone: O(n) a matrix.

    sign = prod_i sign(matrix[..., i, i]), log_abs_det = sum_i log |matrix[..., i, i]|: what ``torch.linalg.slogdet``
    gives in O(n^3), for upper and lower triangular matrices alike. What stands off the diagonal is never read, so that
    it may hold anything (both factors of an LU decomposition, NaN). The logarithm of the product is taken once a
    matrix, in float64, of numbers kept in range. Gradients of any order, to the diagonal alone: 1 / diagonal, infinite
    where that is 0.

    Args:
        matrix: (..., n, n) of any strides; float32, float64, bfloat16 or float16.
        backend: "reference" or "cpu"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        (sign, log_abs_det), both (...): sign is -1, 0 or 1 in the dtype of matrix, log_abs_det float32 (float64 for
        float64). A zero on a diagonal gives 0 and -inf, a NaN gives NaN; n = 0 gives 1 and 0.

    Raises:
        TypeError: ``matrix`` is no floating-point tensor.
        ValueError: ``matrix`` is not square.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.flows import slog_det_triangular
        >>> slog_det_triangular(torch.tensor([[-1.0, float("nan")], [9.0, 2.0]]))
        (tensor(-1.), tensor(0.6931))
    """
    checks.floating("matrix", matrix)
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix: expected shape (..., n, n), got {tuple(matrix.shape)}")
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    batch = diagonal.shape[:-1]
    diagonal = diagonal.reshape(batch.numel(), diagonal.shape[-1])
    chosen = backends.choose(schema.FORWARD, matrix.device.type, backend)
    if chosen == "reference":
        sign, log_abs_det = reference.slog_det_triangular(diagonal)
    else:
        sign, log_abs_det = autograd.run(diagonal, backend=chosen)
    return sign.reshape(batch), log_abs_det.reshape(batch)
