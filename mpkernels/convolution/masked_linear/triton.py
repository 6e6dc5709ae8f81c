"""MADE's layer in Triton: the launches, the block sizes, and the specialisations that the compile gates build.

The kernels, with formulas and decomposition: :mod:`triton_kernels`.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mpkernels import checks, library
from mpkernels.convolution.masked_linear import triton_kernels as kernels
from mpkernels.spec import TritonKernel

# (rows or outputs, units or inputs, depth, warps) by bytes of an element, chosen by registers: larger ones spill on
# sm_100. No GPU has measured them yet.
_BLOCKS = {2: (32, 64, 32, 4), 4: (64, 64, 16, 4), 8: (32, 32, 16, 4)}
_INTERPRETED = (16, 16, 16, 4)  # the least that a product of tiles takes: small inputs still have several blocks


def _blocks(x: Tensor) -> tuple[int, int, int, int]:
    return _INTERPRETED if library.triton_interpreted() else _BLOCKS[x.element_size()]


def _launch(kernel, like: Tensor, programs: int, *arguments, **options) -> None:
    checks.programs("masked_linear", programs)
    with torch.cuda.device_of(like):
        kernel[(programs,)](*arguments, **options)


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, unit_of: Tensor, depth_of: Tensor, limit: Tensor, forward: bool
) -> Tensor:
    """(rows, units) sums over the sorted places that ``limit`` leaves, of x (rows, depth)."""
    rows, units, depth = x.shape[0], len(unit_of), len(depth_of)
    y = x.new_empty((rows, units))
    if y.numel() == 0:
        return y
    block_n, block_u, block_d, warps = _blocks(x)
    strides = (weight.shape[1], 1) if forward else (1, weight.shape[1])
    _launch(
        kernels.masked_linear_product,
        x,
        -(-rows // block_n) * -(-units // block_u),
        x,
        weight,
        bias,
        y,
        unit_of,
        depth_of,
        limit,
        rows,
        units,
        depth,
        *strides,
        FORWARD=forward,
        HAS_BIAS=bias is not None,
        COMPUTE=tl.float64 if x.dtype == torch.float64 else tl.float32,
        BLOCK_N=block_n,
        BLOCK_U=block_u,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return y


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, order_in: Tensor, order_out: Tensor, count: Tensor
) -> Tensor:
    """The op ``masked_linear`` of schema.py: y (N, O)."""
    return _product(x, weight, bias, order_out, order_in, count, True)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, order_in: Tensor, order_out: Tensor, count: Tensor, needs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``masked_linear_backward`` of schema.py: gradients of x, weight and bias."""
    outputs, inputs = weight.shape
    of_x, of_weight, of_bias = (x.new_empty((0,)) for _ in range(3))
    if needs & 1:
        places = torch.arange(inputs, dtype=torch.int32, device=x.device)
        first = torch.searchsorted(count, places, right=True, out_int32=True)  # the first output that sees each input
        of_x = _product(grad, weight, None, order_in, order_out, first, False)
    if needs & 2:
        of_weight = torch.empty_like(weight)
        if of_weight.numel():
            block_o, block_i, block_n, warps = _blocks(x)
            _launch(
                kernels.masked_linear_of_weight,
                x,
                -(-outputs // block_o) * -(-inputs // block_i),
                grad,
                x,
                of_weight,
                order_out,
                order_in,
                count,
                x.shape[0],
                outputs,
                inputs,
                COMPUTE=tl.float64 if x.dtype == torch.float64 else tl.float32,
                BLOCK_N=block_n,
                BLOCK_O=block_o,
                BLOCK_I=block_i,
                num_warps=warps,
            )
    if needs & 4:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        of_bias = grad.sum(0, dtype=wide).to(x.dtype)
    return of_x, of_weight, of_bias


def kernels_to_compile() -> tuple[TritonKernel, ...]:
    """The specialisations that the compile gates build."""
    return tuple(
        found
        for dtype in ("bf16", "fp32")
        for found in (
            _specialised(kernels.masked_linear_product, dtype, "forward", FORWARD=True, HAS_BIAS=True),
            _specialised(kernels.masked_linear_product, dtype, "backward", FORWARD=False, HAS_BIAS=False),
            _specialised(kernels.masked_linear_of_weight, dtype, "weight"),
        )
    )


def _specialised(function, dtype: str, name: str, **flags) -> TritonKernel:
    *blocks, warps = _BLOCKS[2 if dtype == "bf16" else 4]
    of_weight = function is kernels.masked_linear_of_weight
    names = ("BLOCK_O", "BLOCK_I", "BLOCK_N") if of_weight else ("BLOCK_N", "BLOCK_U", "BLOCK_D")
    constexprs = dict(zip(names, blocks, strict=True)) | {"COMPUTE": tl.float32} | flags
    if not of_weight:  # what the launcher makes a constant
        constexprs |= {"depth_stride": 1} if flags["FORWARD"] else {"unit_stride": 1, "bias": None}
    kinds: dict[str, str] = dict.fromkeys(("x", "weight", "bias", "y", "grad", "of_weight"), f"*{dtype}")
    kinds |= dict.fromkeys(("unit_of", "depth_of", "limit", "order_in", "order_out", "count"), "*i32")

    def kind(argument: str) -> str:
        return "constexpr" if argument in constexprs else kinds.get(argument, "i32")

    return TritonKernel(
        name=f"{function.fn.__name__}[{dtype}, {name}, {'x'.join(map(str, blocks))}]",
        function=function,
        signature={argument: kind(argument) for argument in function.arg_names},
        constexprs=constexprs,
        num_warps=warps,
        divisible=tuple(a for a in function.arg_names if kind(a) == "i32"),
    )
