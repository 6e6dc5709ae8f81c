"""The public functions of NADE: they check their input and choose a backend."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.convolution.nade import autograd, reference, schema

MOST_COUNTED = 2**32  # samples and dimensions: each is a word of a counter


def nade_log_prob(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    order: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-likelihoods under a neural autoregressive distribution estimator of binary vectors, in nats.

    p(x) = prod_d Bernoulli(x_d; sigmoid(b_d + V_d . h_d)), h_d = sigmoid(c + sum_{e<d} W[:, e] x_e)
    (Larochelle & Murray 2011, "The neural autoregressive distribution estimator", eqs. 3 and 4), by a recurrence over d
    of O(D H) operations a sample, in which a dimension that is 0 leaves the hidden units as they are. The logarithms
    stay finite where probabilities round to 0 or 1. Exact gradients of any order to all arguments; those of the
    parameters need memory of O(N D), that of ``x`` of O(N D H / 64), and second derivatives of O(N D H). The same bits
    in every run and for any number of threads; a sample has the same log-likelihood alone or in a batch.

    Args:
        x: (N, D), zeros and ones. Numbers between (which is not checked) give sum_d x_d log p_d +
            (1 - x_d) log(1 - p_d), of which gradients to ``x`` are. float32, float64, bfloat16 or float16 (computed
            in float32).
        in_weight: W, (H, D). The last column (in ``order``) does not matter, and has gradient 0.
        in_bias: c, (H,).
        out_weight: V, (D, H).
        out_bias: b, (D,).
        order: (D,) int64, a permutation: the dimension that comes first, that which comes second, and so on. Default:
            0, 1, ..., D - 1. Not checked on a GPU.
        backend: "reference" or "cpu"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        (N,), in float32 for bfloat16 and float16, else in the dtype of ``x``.

    Raises:
        TypeError: an argument is no tensor, or has an integer or a different dtype.
        ValueError: shapes or devices do not match, or ``order`` is no permutation.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.convolution import nade_log_prob
        >>> x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
        >>> nade_log_prob(x, torch.randn(4, 3), torch.zeros(4), torch.zeros(3, 4), torch.zeros(3))  # 3 ln(1/2)
        tensor([-2.0794, -2.0794])
    """
    checks.floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (N, D), got {tuple(x.shape)}")
    checks.same_kind("in_weight", in_weight, "x", x)
    if in_weight.dim() != 2 or in_weight.shape[1] != x.shape[1]:
        raise ValueError(f"in_weight: expected shape ('H', {x.shape[1]}), that of x, got {tuple(in_weight.shape)}")
    _check_parameters(in_weight, in_bias, out_weight, out_bias)
    if order is not None:
        order = _checked_order(order, in_weight)
        x, in_weight, out_weight, out_bias = x[:, order], in_weight[:, order], out_weight[order], out_bias[order]
    chosen = backends.choose(schema.FORWARD, x.device.type, backend)
    if chosen == "reference":
        return reference.nade_log_prob(x, in_weight, in_bias, out_weight, out_bias)
    return autograd.run(x, in_weight, in_bias, out_weight, out_bias, chosen)[0]


@overload
def nade_sample(
    n: int,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    seed: int,
    temperature: float = 1.0,
    order: Tensor | None = None,
    return_log_prob: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def nade_sample(
    n: int,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    seed: int,
    temperature: float = 1.0,
    order: Tensor | None = None,
    return_log_prob: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def nade_sample(
    n: int,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    seed: int,
    temperature: float = 1.0,
    order: Tensor | None = None,
    return_log_prob: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draws binary vectors from the distribution of :func:`nade_log_prob`, one dimension after another.

    Dimension d of sample n is 1 where u < sigmoid(logit / temperature), u = ((word >> 8) + 1/2) 2^-24, and ``word`` is
    the first of Philox-4x32-10 (Salmon et al. 2011) with the counter (d, n, 0, 0), d counted in ``order``, and the key
    ``seed``: sample n is the same in any batch and on any number of threads, and equal on all backends but where they
    round a probability to different sides of u. Samples carry no gradient.

    Args:
        n: how many samples, at least 0.
        in_weight, in_bias, out_weight, out_bias, order: as in :func:`nade_log_prob`.
        seed: an integer in [0, 2^63).
        temperature: above 0; logits are divided by it.
        return_log_prob: whether to return the log-likelihoods of the samples too, under the distribution that was
            drawn from (at temperature 1 that of :func:`nade_log_prob`, bit for bit on the same backend).
        backend: "reference" or "cpu"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        (n, D) zeros and ones in the dtype of the weights; with ``return_log_prob`` a pair of these and (n,) numbers in
        nats, in float32 for bfloat16 and float16, else in the dtype of the weights.

    Raises:
        TypeError: an argument is no tensor or number of the kind described.
        ValueError: shapes or devices do not match, or a number is out of its range.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.convolution import nade_sample
        >>> out_bias = torch.tensor([50.0, -50.0, 50.0])  # always 1, 0, 1
        >>> nade_sample(2, torch.zeros(4, 3), torch.zeros(4), torch.zeros(3, 4), out_bias, seed=0)
        tensor([[1., 0., 1.],
                [1., 0., 1.]])
    """
    checks.floating("in_weight", in_weight)
    if in_weight.dim() != 2:
        raise ValueError(f"in_weight: expected shape (H, D), got {tuple(in_weight.shape)}")
    _check_parameters(in_weight, in_bias, out_weight, out_bias)
    for name, value, end in (("n", n, MOST_COUNTED + 1), ("seed", seed, 2**63)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
        if not 0 <= value < end:
            raise ValueError(f"{name}: expected an integer in [0, {end}), got {value}")
    if in_weight.shape[1] > MOST_COUNTED:
        raise ValueError(f"in_weight: expected at most {MOST_COUNTED} dimensions, got {tuple(in_weight.shape)}")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature: expected a number, got {type(temperature).__name__}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    if order is not None:
        order = _checked_order(order, in_weight)
        in_weight, out_weight, out_bias = in_weight[:, order], out_weight[order], out_bias[order]
    in_weight, in_bias, out_weight, out_bias = (
        x.detach().contiguous() for x in (in_weight, in_bias, out_weight, out_bias)
    )
    chosen = backends.choose(schema.SAMPLE, in_weight.device.type, backend)
    draw = reference.nade_sample if chosen == "reference" else backends.call(chosen, schema.SAMPLE)
    x, log_prob = draw(n, in_weight, in_bias, out_weight, out_bias, seed, float(temperature))
    if order is not None:
        x = torch.empty_like(x).index_copy(1, order, x)
    return (x, log_prob) if return_log_prob else x


def _check_parameters(in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> None:
    hidden, dimensions = in_weight.shape
    for name, value, expected in (
        ("in_bias", in_bias, (hidden,)),
        ("out_weight", out_weight, (dimensions, hidden)),
        ("out_bias", out_bias, (dimensions,)),
    ):
        checks.same_kind(name, value, "in_weight", in_weight)
        checks.shape(name, value, expected, f"in_weight has shape {tuple(in_weight.shape)}")


def _checked_order(order: Tensor, in_weight: Tensor) -> Tensor:
    checks.tensor("order", order)
    dimensions = in_weight.shape[1]
    if order.dtype != torch.int64:
        raise TypeError(f"order: expected int64, got {order.dtype}")
    if order.device != in_weight.device:
        raise ValueError(f"order: expected the device of in_weight, {in_weight.device}, got {order.device}")
    checks.shape("order", order, (dimensions,), "the dimensions of in_weight")
    checked = order.device.type == "cpu" and not torch.compiler.is_compiling()
    if checked and not torch.equal(order.sort().values, torch.arange(dimensions)):
        raise ValueError(f"order: expected a permutation of 0 ... {dimensions - 1}, got {order.tolist()}")
    return order
