"""Attention in Triton: the launches, the block sizes, and the specialisations that the compile gates build.

The kernels, with formulas and decomposition: :mod:`triton_forward`, :mod:`triton_backward`,
:mod:`triton_backward_keys`, :mod:`triton_plan`.
"""

from __future__ import annotations

import functools
import math

import numpy
import torch
import triton.language as tl
from torch import Tensor

from mpkernels import checks, library
from mpkernels.attention.attention import schema
from mpkernels.attention.attention import triton_backward as backward_kernels
from mpkernels.attention.attention import triton_backward_keys as key_kernels
from mpkernels.attention.attention import triton_forward as forward_kernels
from mpkernels.attention.attention import triton_plan as plan_kernels
from mpkernels.attention.attention.triton_common import Settings
from mpkernels.spec import TritonKernel

_CHUNK = 128  # blocks that the kernels of the plan look at together

# (queries, keys, warps, stages) by kernel and bytes of an element, then by padded head size. Chosen by registers and
# shared memory: an accumulator of 128 x 128 is 64 registers a thread of 8 warps; what kernels_to_compile names spills
# nothing on the architectures that take it. No GPU has measured them yet.
_BLOCKS = {
    ("forward", 2): {64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
    ("query", 2): {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (32, 32, 8, 1)},
    ("keys", 2): {64: (32, 128, 8, 2), 128: (32, 32, 4, 1), 256: (16, 32, 8, 1)},
    ("bias", 2): {64: (32, 64, 8, 1), 128: (32, 64, 8, 1), 256: (16, 32, 8, 1)},
    ("forward", 4): {64: (64, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
    ("query", 4): {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    ("keys", 4): {64: (16, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    ("bias", 4): {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    ("forward", 8): {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    ("query", 8): {64: (16, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    ("keys", 8): {64: (16, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    ("bias", 8): {64: (16, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
}
# Where an architecture carries more. A product of Hopper has 64 rows for four warps: fewer would be done twice.
_BLOCKS_ON = {
    80: {("keys", 2): {128: (64, 64, 8, 2)}},
    90: {
        ("forward", 2): {128: (128, 128, 8, 2)},
        ("query", 2): {128: (128, 64, 8, 2)},
        ("keys", 2): {64: (64, 128, 8, 2), 128: (32, 128, 8, 2)},
    },
}
# Where a mask, a bias, a softcap or dropout wants registers for every pair.
_BLOCKS_LOADED = {
    ("forward", 2): {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
    ("query", 2): {64: (64, 32, 8, 1), 128: (64, 32, 8, 1), 256: (32, 32, 8, 1)},
    ("keys", 2): {64: (32, 64, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
}
_INTERPRETED = 16  # the least that a product of tiles takes: small inputs still have several blocks


def _padded(width: int) -> int:
    return max(16, 1 << max(width - 1, 0).bit_length())


def _blocks_of(kernel: str, element_size: int, width: int, loaded: bool, arch: int) -> tuple[int, int, int, int]:
    key = kernel, element_size
    found = {}
    for size in (64, 128, 256):
        found[size] = _BLOCKS_ON.get(arch, {}).get(key, {}).get(size, _BLOCKS[key][size])
        if loaded and key in _BLOCKS_LOADED:
            found[size] = _BLOCKS_LOADED[key][size]
    return next(found[size] for size in sorted(found) if width <= size)


@functools.lru_cache(maxsize=64)
def _arch(device: torch.device) -> int:
    """The column of the table that a GPU takes: of A100, H100 or B200."""
    major = torch.cuda.get_device_capability(device)[0]
    return {9: 90, 10: 100}.get(major, 80)


def _parts(x: float) -> tuple[float, float]:
    """A number as float32 and the rest: a float argument travels as float32."""
    narrow = float(numpy.float32(x))
    return narrow, x - narrow if math.isfinite(narrow) else 0.0


def _rows_of(x: Tensor) -> Tensor:
    """The tensor with neighbouring elements in its last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _strides(x: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """Strides of the first dimensions, 0 where a dimension has one element (and so is shared)."""
    if x is None:
        return (0,) * dimensions
    return tuple(0 if x.shape[d] == 1 else x.stride(d) for d in range(dimensions))


class _Problem:
    """What the kernels of both passes share: tensors, strides and settings."""

    def __init__(self, query, key, value, first, last, mask, bias, seed, scale, softcap, dropout_p):
        self.query, self.key, self.value = (_rows_of(x) for x in (query, key, value))
        self.batch, self.heads, self.rows, width = query.shape
        self.key_heads, self.keys, value_width = key.shape[1], key.shape[2], value.shape[3]
        self.group = self.heads // max(self.key_heads, 1)
        self.first, self.last, self.bias, self.seed = first, last, bias, seed
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.tensors = (self.query, self.key, self.value, first, last, self.mask, bias, seed)
        self.strides = (*_strides(self.query, 3), *_strides(self.key, 3), *_strides(self.value, 3))
        self.masking = (*_strides(first, 2), *_strides(self.mask, 4), *_strides(bias, 4))
        drops = seed is not None and dropout_p > 0
        kept = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        self.sizes = (self.heads, self.group, self.rows, self.keys)
        self.numbers = (*_parts(scale), *_parts(softcap), *_parts(kept), round(dropout_p * 2**32))
        self.width = max(_padded(width), _padded(value_width))
        self.loaded = mask is not None or bias is not None or softcap > 0 or drops
        self.flags = {
            "E": width,
            "F": value_width,
            "BLOCK_E": _padded(width),
            "BLOCK_F": _padded(value_width),
            "HAS_INTERVALS": first is not None,
            "HAS_MASK": mask is not None,
            "HAS_BIAS": bias is not None,
            "HAS_SOFTCAP": softcap > 0,
            "HAS_DROPOUT": drops,
            "SCALE_LAST": bias is None and not softcap > 0 and scale > 0,
            "COMPUTE": tl.float64 if self.wide == torch.float64 else tl.float32,
            "PRECISION": "tf32x3" if query.dtype == torch.float32 else "ieee",
        }

    def settings(self, kernel: str) -> tuple[Settings, dict[str, int]]:
        """What a kernel is specialised for, and its launch options."""
        if library.triton_interpreted():
            block_m = block_n = _INTERPRETED if max(self.rows, self.keys) <= 48 else 2 * _INTERPRETED
            warps, stages = 4, 1
        else:
            arch = _arch(self.query.device)
            blocks = _blocks_of(kernel, self.query.element_size(), self.width, self.loaded, arch)
            block_m, block_n, warps, stages = blocks
        ragged = self.rows % block_m != 0 if kernel == "keys" else self.keys % block_n != 0
        settings = Settings(BLOCK_M=block_m, BLOCK_N=block_n, RAGGED=ragged, **self.flags)
        return settings, {"num_warps": warps, "num_stages": stages}

    def launch(self, kernel, programs: int, *arguments, **options) -> None:
        if programs == 0:
            return
        checks.programs("attention", programs)
        with torch.cuda.device_of(self.query):
            kernel[(programs,)](*arguments, **options)

    def plan(self, settings: Settings, of_keys: bool) -> tuple[Tensor | None, Tensor | None, int, int]:
        """Lists of blocks of each block of queries (or of keys), their counts, and strides by batch and head."""
        if not (settings.HAS_MASK or (of_keys and settings.HAS_INTERVALS)):
            return None, None, 0, 0
        given = [x for x in (self.first, self.mask) if x is not None]
        batch, heads = max(x.shape[0] for x in given), max(x.shape[1] for x in given)
        row_blocks, key_blocks = -(-self.rows // settings.BLOCK_M), -(-self.keys // settings.BLOCK_N)
        lines, slots = (key_blocks, row_blocks) if of_keys else (row_blocks, key_blocks)
        states = self.query.new_empty((batch * heads, row_blocks, key_blocks), dtype=torch.int8)
        blocks = self.query.new_empty((batch * heads, lines, slots), dtype=torch.int32)
        counts = self.query.new_empty((batch * heads, lines, 2), dtype=torch.int32)
        self.launch(
            plan_kernels.attention_block_states,
            batch * heads * row_blocks * (key_blocks if settings.HAS_MASK else 1),
            self.first,
            self.last,
            self.mask,
            states,
            *self.masking[:6],
            heads,
            self.rows,
            self.keys,
            settings,
            _CHUNK,
        )
        self.launch(
            plan_kernels.attention_block_lists,
            batch * heads * lines,
            states,
            blocks,
            counts,
            row_blocks * key_blocks,
            1 if of_keys else key_blocks,
            key_blocks if of_keys else 1,
            lines,
            slots,
            _CHUNK,
        )
        return blocks, counts, heads if batch > 1 else 0, 1 if heads > 1 else 0


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    heads_last: bool,
) -> tuple[Tensor, Tensor]:
    """The op ``attention`` of schema.py: out (B, H, L, F) and lse (B, H, L)."""
    problem = _Problem(query, key, value, first, last, mask, bias, seed, scale, softcap, dropout_p)
    batch, heads, rows = problem.batch, problem.heads, problem.rows
    out = schema.new_heads(query, batch, heads, rows, value.shape[3], heads_last)
    lse = query.new_empty((batch, heads, rows), dtype=problem.wide)
    if lse.numel() == 0:
        return out, lse
    settings, options = problem.settings("forward")
    blocks, counts, *plan_strides = problem.plan(settings, of_keys=False)
    problem.launch(
        forward_kernels.attention_forward,
        batch * heads * -(-rows // settings.BLOCK_M),
        *problem.tensors,
        blocks,
        counts,
        out,
        lse,
        *problem.strides,
        *_strides(out, 3),
        *problem.masking,
        *plan_strides,
        *problem.sizes,
        *problem.numbers,
        settings,
        **options,
    )
    return out, lse


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    heads_last: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``attention_backward`` of schema.py: gradients of query, key, value and bias."""
    problem = _Problem(query, key, value, first, last, mask, bias, seed, scale, softcap, dropout_p)
    batch, heads, rows = problem.batch, problem.heads, problem.rows
    of_query, of_key, of_value = (
        schema.new_heads(x, x.shape[0], x.shape[1], x.shape[2], x.shape[3], heads_last) for x in (query, key, value)
    )
    of_bias = query.new_empty(bias.shape if needs_bias and bias is not None else (0,))
    grad_out = torch.zeros_like(out) if grad_out is None else _rows_of(grad_out)
    out, lse = _rows_of(out), lse.contiguous()
    head_of_grad = _strides(grad_out, 3)

    settings, options = problem.settings("query")
    most = max(problem.settings(kernel)[0].BLOCK_M for kernel in ("query", "keys", "bias"))
    padded = -(-rows // most) * most
    top = lse.new_empty((batch, heads, padded))
    delta = torch.empty_like(top)
    row_programs = batch * heads * -(-rows // settings.BLOCK_M)
    problem.launch(
        backward_kernels.attention_backward_delta,
        batch * heads * (padded // settings.BLOCK_M),
        grad_out,
        out,
        grad_lse,
        lse,
        top,
        delta,
        *head_of_grad,
        *_strides(out, 3),
        *_strides(grad_lse, 3),
        heads,
        rows,
        padded,
        settings,
        grad_lse is not None,
    )
    blocks, counts, *plan_strides = problem.plan(settings, of_keys=False) if row_programs else (None, None, 0, 0)
    problem.launch(
        backward_kernels.attention_backward_query,
        row_programs,
        *problem.tensors,
        blocks,
        counts,
        grad_out,
        top,
        delta,
        of_query,
        *problem.strides,
        *head_of_grad,
        *_strides(of_query, 3),
        *problem.masking,
        *plan_strides,
        *problem.sizes,
        padded,
        *problem.numbers,
        settings,
        **options,
    )

    settings, options = problem.settings("keys")
    key_programs = batch * problem.key_heads * -(-problem.keys // settings.BLOCK_N)
    blocks, counts, *plan_strides = problem.plan(settings, of_keys=True) if key_programs else (None, None, 0, 0)
    problem.launch(
        key_kernels.attention_backward_keys,
        key_programs,
        *problem.tensors,
        blocks,
        counts,
        grad_out,
        top,
        delta,
        of_key,
        of_value,
        *problem.strides,
        *head_of_grad,
        *_strides(of_key, 3),
        *_strides(of_value, 3),
        *problem.masking,
        *plan_strides,
        *problem.sizes,
        padded,
        *problem.numbers,
        settings,
        **options,
    )
    if of_bias.numel():
        _backward_bias(problem, grad_out, top, delta, of_bias)
    return of_query, of_key, of_value, of_bias


def _backward_bias(problem: _Problem, grad_out: Tensor, top: Tensor, delta: Tensor, of_bias: Tensor) -> None:
    settings, options = problem.settings("bias")
    bias_batch, bias_heads, bias_rows, keys = of_bias.shape
    sum_rows = bias_rows == 1
    tiles = (1 if sum_rows else -(-bias_rows // settings.BLOCK_M)) * -(-keys // settings.BLOCK_N)
    problem.launch(
        key_kernels.attention_backward_bias,
        bias_batch * bias_heads * tiles,
        *problem.tensors,
        grad_out,
        top,
        delta,
        of_bias,
        *problem.strides,
        *_strides(grad_out, 3),
        *problem.masking,
        bias_heads,
        problem.batch // bias_batch,
        problem.heads // bias_heads,
        *problem.sizes,
        top.shape[-1],
        *problem.numbers,
        settings,
        sum_rows,
        **options,
    )


def kernels_to_compile() -> tuple[TritonKernel, ...]:
    """The specialisations that the compile gates build, each for the architectures that take its blocks."""
    everything = ("MASK", "BIAS", "SOFTCAP", "DROPOUT")
    forward, query = forward_kernels.attention_forward, backward_kernels.attention_backward_query
    keys, bias = key_kernels.attention_backward_keys, key_kernels.attention_backward_bias
    found = [
        *_compiled("forward", forward, "bf16", 64, "INTERVALS"),
        *_compiled("forward", forward, "bf16", 128),
        *_compiled("forward", forward, "bf16", 128, "INTERVALS"),
        *_compiled("forward", forward, "bf16", 128, *everything),
        *_compiled("forward", forward, "fp32", 64, "INTERVALS"),
        *_compiled("query", query, "bf16", 128, "INTERVALS"),
        *_compiled("query", query, "bf16", 128, "MASK", "BIAS"),
        *_compiled("query", query, "fp32", 64, "INTERVALS"),
        *_compiled("keys", keys, "bf16", 64, "INTERVALS"),
        *_compiled("keys", keys, "bf16", 128, "INTERVALS"),
        *_compiled("keys", keys, "bf16", 128, "MASK", "BIAS"),
        *_compiled("keys", keys, "fp32", 64, "INTERVALS"),
        *_compiled("bias", bias, "bf16", 128, "BIAS", "INTERVALS"),
        *_compiled("query", backward_kernels.attention_backward_delta, "fp32", 128),
        *_compiled("bias", plan_kernels.attention_block_states, "bf16", 64, "INTERVALS", "MASK"),
        *_compiled("bias", plan_kernels.attention_block_lists, "bf16", 64),
    ]
    return tuple(found)


def _compiled(blocks: str, function, dtype: str, width: int, *has: str) -> list[TritonKernel]:
    size = 2 if dtype == "bf16" else 4
    loaded = bool({"MASK", "BIAS", "SOFTCAP", "DROPOUT"} & set(has))
    by_blocks: dict[tuple[int, int, int, int], list[int]] = {}
    for arch in (80, 90, 100):
        by_blocks.setdefault(_blocks_of(blocks, size, width, loaded, arch), []).append(arch)
    return [_specialised(found, tuple(archs), function, dtype, width, *has) for found, archs in by_blocks.items()]


def _specialised(
    blocks: tuple[int, int, int, int], architectures: tuple[int, ...], function, dtype: str, width: int, *has: str
) -> TritonKernel:
    """A specialisation with the optional inputs that ``has`` names."""
    block_m, block_n, warps, stages = blocks
    flags = {f"HAS_{name}": name in has for name in ("INTERVALS", "MASK", "BIAS", "SOFTCAP", "DROPOUT")}
    settings = Settings(
        E=width,
        F=width,
        BLOCK_E=width,
        BLOCK_F=width,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        RAGGED=False,
        SCALE_LAST=not (flags["HAS_BIAS"] or flags["HAS_SOFTCAP"]),
        COMPUTE=tl.float32,
        PRECISION="tf32x3" if dtype == "fp32" else "ieee",
        **flags,
    )
    constexprs = {"S": settings, "CHUNK": _CHUNK, "HAS_GRAD_LSE": True, "SUM_ROWS": False}
    constexprs |= {"mask_key": 1, "bias_key": 1, "grad_lse_row": 1}  # what the launcher makes a constant
    absent = [("first", "last"), ("mask",), ("bias",), ("seed",)]
    for present, names in zip(("INTERVALS", "MASK", "BIAS", "DROPOUT"), absent, strict=True):
        constexprs |= {} if present in has else dict.fromkeys(names)
    if (
        not ("MASK" in has or ("INTERVALS" in has and "grad_key" in function.arg_names))
        and "states" not in function.arg_names
    ):
        constexprs |= {"blocks": None, "counts": None}
    constexprs = {name: value for name, value in constexprs.items() if name in function.arg_names}
    wide = ("scale", "scale_rest", "softcap", "softcap_rest", "kept", "kept_rest")
    kinds = {"seed": "*i64", "states": "*i8", "mask": "*u8", "threshold": "i64"} | dict.fromkeys(wide, "fp32")
    kinds |= dict.fromkeys(("first", "last", "blocks", "counts"), "*i32")
    kinds |= dict.fromkeys(("lse", "grad_lse", "top", "delta"), "*fp32")
    kinds |= dict.fromkeys(("query", "key", "value", "bias", "out", "grad_out"), f"*{dtype}")
    kinds |= dict.fromkeys(("grad_query", "grad_key", "grad_value", "grad_bias"), f"*{dtype}")
    kinds |= dict.fromkeys(("heads", "group", "rows", "keys", "padded", "lines", "slots", "plan_heads"), "i32")
    kinds |= dict.fromkeys(("bias_heads", "batch_share", "head_share"), "i32")

    def kind(argument: str) -> str:
        return "constexpr" if argument in constexprs else kinds.get(argument, "i64")  # the rest are strides

    signature = {argument: kind(argument) for argument in function.arg_names}
    words = [dtype, str(width), f"{block_m}x{block_n}", *(name.lower() for name in has)]
    return TritonKernel(
        name=f"{function.fn.__name__}[{', '.join(words)}]",
        function=function,
        signature=signature,
        constexprs=constexprs,
        num_warps=warps,
        num_stages=stages,
        divisible=tuple(name for name, kind in signature.items() if kind == "i64" and name != "threshold"),
        architectures=architectures,
    )
