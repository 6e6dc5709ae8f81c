"""Cases, workloads and cost of attention of few queries to many keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpkernels import masks
from mpkernels.attention.decode_attention import api, schema
from mpkernels.spec import Arguments, BadInput, Case, Cost, OpSpec, Workload


def _decode(
    batch: int,
    heads: int,
    groups: int,
    queries: int,
    keys: int,
    width: int,
    value_width: int | None = None,
    *,
    lengths: list[int] | int | None = None,
    bias: tuple[int, ...] | None = None,
    seen: tuple[int, ...] | None = None,
    poison: bool = False,
    transposed: bool = False,
    **settings,
):
    """Normal queries, keys and values.

    ``bias`` and ``seen`` (a dense mask) are shapes; ``poison`` fills what is behind the lengths with NaN;
    ``transposed`` keeps all three as (B, S, H, E) in memory.
    """

    def make(dtype, device, generator):
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def rows(heads: int, count: int, width: int) -> Tensor:
            x = normal(batch, count, heads, width).to(device, dtype)
            return x.transpose(1, 2) if transposed else x.transpose(1, 2).contiguous()

        arguments: Arguments = {
            "query": rows(heads, queries, width),
            "key": rows(groups, keys, width),
            "value": rows(groups, keys, width if value_width is None else value_width),
        }
        if lengths is not None:
            arguments["lengths"] = torch.tensor(lengths, device=device) if isinstance(lengths, list) else lengths
        if poison and isinstance(lengths, list):
            for b, length in enumerate(lengths):
                arguments["key"][b, :, length:] = math.nan
                arguments["value"][b, :, length:] = math.nan
        if bias is not None:
            arguments["bias"] = normal(*bias).to(device, dtype)
        if seen is not None:
            arguments["mask"] = (torch.rand(seen, generator=generator) < 0.5).to(device)
        return arguments | settings

    return make


def _alibi(make):
    """A bias of -slope distance (Press et al. 2022), the slopes 2^(-8 h / H) of H heads."""

    def with_alibi(dtype, device, generator):
        arguments = make(dtype, device, generator)
        heads, queries, keys = *arguments["query"].shape[1:3], arguments["key"].shape[2]
        slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
        distance = (torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)).abs()
        return arguments | {"bias": (-slopes[:, None, None] * distance).to(device, dtype)}

    return with_alibi


_CASES = (
    Case("one query, grouped heads", _decode(2, 8, 2, 1, 70, 64), second_order=True),
    Case("three queries, one key head", _decode(1, 4, 1, 3, 17, 40, 72), second_order=True),
    Case("several pieces", _decode(1, 4, 2, 1, 1100, 16)),
    Case("nine rows over pieces", _decode(1, 9, 3, 3, 530, 24, 8)),
    Case("widest", _decode(1, 2, 1, 1, 33, 256)),
    Case("width one", _decode(1, 2, 2, 2, 5, 1, 1)),
    Case("one key", _decode(2, 2, 1, 1, 1, 16)),
    Case("sixteen queries", _decode(1, 4, 2, 16, 19, 32)),
    Case(
        "lengths, with NaN behind", _decode(4, 4, 2, 2, 600, 16, lengths=[600, 1, 0, 513], poison=True, transposed=True)
    ),
    Case("one length for all", _decode(2, 4, 2, 3, 40, 32, lengths=21)),
    Case("window", _decode(1, 4, 2, 2, 700, 16, mask=masks.window(40, 0, align="lower_right"))),
    Case("dense mask", _decode(2, 4, 2, 3, 90, 32, seen=(2, 1, 3, 90)), second_order=True),
    Case("dense mask of keys", _decode(2, 4, 2, 1, 300, 16, seen=(1, 300))),
    Case("softcap", _decode(1, 4, 2, 2, 50, 32, softcap=2.0, scale=1.0), second_order=True),
    Case("alibi", _alibi(_decode(1, 4, 2, 2, 90, 32)), second_order=True),
    Case("bias of a key", _decode(2, 4, 2, 1, 45, 32, bias=(2, 1, 1, 1), softcap=5.0)),
    Case("transposed", _decode(2, 6, 2, 3, 60, 48, transposed=True)),
    Case("no keys", _decode(2, 4, 2, 1, 0, 32)),
    Case("no queries", _decode(2, 4, 2, 0, 9, 32)),
    Case("no sequences", _decode(0, 4, 2, 1, 9, 32)),
    Case("many", _decode(1, 8, 4, 1, 1300, 32), large=True),
)


def _bad(**changes):
    def make(dtype, device, generator):
        return _decode(2, 4, 2, 1, 9, 32)(dtype, device, generator) | changes

    return make


def _bad_shape(*arguments: int, **settings):
    return _decode(*arguments, **settings)


_BAD = (
    BadInput("query is no tensor", _bad(query=[1.0]), TypeError, "query.*Tensor.*list"),
    BadInput("integer query", _bad(query=torch.zeros(2, 4, 1, 32, dtype=torch.int64)), TypeError, "query.*int64"),
    BadInput("query of three dimensions", _bad(query=torch.zeros(4, 1, 32)), ValueError, r"query.*\(B, H, L, E\)"),
    BadInput("too many queries", _bad_shape(1, 2, 1, 17, 20, 8), ValueError, "query.*16.*attention.attention"),
    BadInput("too wide", _bad_shape(1, 2, 1, 1, 20, 257), ValueError, "query.*256.*257"),
    BadInput("values too wide", _bad_shape(1, 2, 1, 1, 20, 8, 300), ValueError, "value.*256.*300"),
    BadInput("heads that do not divide", _bad_shape(1, 4, 3, 1, 20, 8), ValueError, "key.*divides.*4"),
    BadInput("key of another dtype", _bad(key=torch.zeros(2, 2, 9, 32).double()), TypeError, "key.*dtype of query"),
    BadInput("key of another width", _bad(key=torch.zeros(2, 2, 9, 16)), ValueError, "key.*32"),
    BadInput("value of another length", _bad(value=torch.zeros(2, 2, 8, 32)), ValueError, "value.*9.*8"),
    BadInput("lengths past the keys", _bad(lengths=10), ValueError, r"lengths.*\[0, 9\].*10"),
    BadInput("negative lengths", _bad(lengths=-1), ValueError, "lengths.*-1"),
    BadInput("lengths of floats", _bad(lengths=torch.ones(2)), TypeError, "lengths.*int.*float32"),
    BadInput("lengths of no tensor", _bad(lengths=[9, 9]), TypeError, "lengths.*list"),
    BadInput("mask that does not broadcast", _bad(mask=torch.ones(3, 1, 9, dtype=torch.bool)), ValueError, "mask"),
    BadInput("bias that does not broadcast", _bad(bias=torch.zeros(8)), ValueError, "bias.*broadcasts.*8"),
    BadInput("bias of another dtype", _bad(bias=torch.zeros(9).double()), TypeError, "bias.*dtype of query"),
    BadInput("scale is not a number", _bad(scale=math.nan), ValueError, "scale.*finite.*nan"),
    BadInput("scale of a string", _bad(scale="1"), TypeError, "scale.*number.*str"),
    BadInput("negative softcap", _bad(softcap=-1.0), ValueError, "softcap.*above 0.*-1"),
    BadInput("gradients", _bad(key=torch.zeros(2, 2, 9, 32).requires_grad_()), ValueError, "key.*attention.attention"),
    BadInput("unknown backend", _bad(backend="cudnn"), ValueError, "backend.*'reference'.*'cudnn'"),
)


def _function(return_lse: bool = True, **arguments) -> tuple[Tensor, ...]:
    out = api.decode_attention(**arguments, return_lse=return_lse)
    return out if isinstance(out, tuple) else (out,)


def _eager(
    query, key, value, lengths=None, mask=None, bias=None, scale=None, softcap=None, return_lse=True
) -> tuple[Tensor, ...]:
    """What a generation loop calls: torch's own attention, with the mask that it needs as a tensor."""
    rows, keys = query.shape[2], key.shape[2]
    position = torch.arange(keys, device=query.device)
    ends = torch.as_tensor(keys if lengths is None else lengths, device=query.device).reshape(-1, 1, 1, 1)
    seen = position < ends - rows + 1 + torch.arange(rows, device=query.device)[:, None]
    if mask is not None:
        seen = seen & masks.to_dense(mask, (*query.shape[:3], keys), query.device)
    whole = rows == 1 and lengths is None and mask is None
    added = None if whole else torch.where(seen, 0.0, -math.inf).to(query.dtype)
    if bias is not None:
        added = bias if added is None else added + bias
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if not softcap and not return_lse:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=added, scale=scale, enable_gqa=True
        )
        return (out,)
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(-2, -1) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores if added is None else scores + added
    weights = torch.softmax(scores, -1).nan_to_num(nan=0.0)
    out = weights @ value.repeat_interleave(group, 1)
    return (out, torch.logsumexp(scores, -1)) if return_lse else (out,)


def _cost(arguments: Arguments, backward: bool) -> Cost:
    """Bytes: keys and values once (of the lengths, where they are given). A multiply-add counts as 2 operations."""
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    batch, heads, rows, width = query.shape
    lengths = arguments.get("lengths")
    if isinstance(lengths, Tensor):
        keys = int(lengths.sum())
    else:
        keys = batch * (key.shape[2] if lengths is None else lengths)
    widths = width + value.shape[-1]
    flops = 2 * heads * rows * keys * widths
    size = query.element_size()
    return Cost(flops, size * (keys * key.shape[1] * widths + batch * heads * rows * widths))


def _workload(name: str, *shape: int, **settings) -> Workload:
    batch, _, groups, _, keys, _ = shape
    return Workload(name, _decode(*shape, return_lse=False, **settings), batch * groups * keys, backward=False)


SPECS = (
    OpSpec(
        name="decode_attention",
        family="attention",
        op=schema.FORWARD,
        function=_function,
        formula="out_i = sum_j softmax_j(scale q_i . k_j + bias_ij) v_j, over a cache of keys",
        differentiable=(),
        outputs=("out", "lse"),
        cases=_CASES,
        bad_inputs=_BAD,
        workloads=(
            _workload("16,384 keys x 128, 32 heads on 8", 1, 32, 8, 1, 16384, 128),
            _workload("16,384 keys x 128, 32 heads on 8, (B, S, G, E)", 1, 32, 8, 1, 16384, 128, transposed=True),
            _workload("16,384 keys x 128, 8 heads", 1, 8, 8, 1, 16384, 128),
            _workload("call overhead: 16 keys x 64, 1 head", 1, 1, 1, 1, 16, 64),
        ),
        eager=_eager,
        cost=_cost,
        second_order=False,
        batched=False,
        dtypes={
            "reference": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
            "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
            "cuda": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
            "fibres": (torch.float32, torch.float64),
        },
    ),
)
