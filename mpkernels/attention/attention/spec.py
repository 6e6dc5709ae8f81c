"""Cases, workloads and cost of attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpkernels import masks
from mpkernels.attention.attention import api, eager, schema
from mpkernels.spec import BadInput, Case, Cost, OpSpec, TritonKernel, Workload

Change = Callable[[dict, torch.Generator], None]


def _attention(*, visible: Tensor | None = None, **arguments) -> tuple[Tensor, ...]:
    """The op; ``visible`` is a dense mask that composes with ``mask``."""
    if visible is not None:
        mask = arguments.get("mask")
        arguments["mask"] = visible if mask is None else mask & masks.dense(visible)
    given: dict[str, Any] = {"return_lse": True} | arguments
    found = api.attention(**given)
    return found if isinstance(found, tuple) else (found,)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _case(
    *lead: int,
    heads: int | tuple[int, int] = 1,
    lengths: tuple[int, int],
    sizes: tuple[int, int],
    bias: tuple[int, ...] | None = None,
    change: Change | None = None,
    **settings,
):
    """Normal tensors: ``heads`` H or (H, G), ``lengths`` (L, S), ``sizes`` (E, F); ``bias`` a shape."""
    query_heads, key_heads = (heads, heads) if isinstance(heads, int) else heads

    def make(dtype, device, generator):
        (rows, keys), (width, value_width) = lengths, sizes
        arguments: dict = {
            "query": _normal(generator, *lead, query_heads, rows, width),
            "key": _normal(generator, *lead, key_heads, keys, width),
            "value": _normal(generator, *lead, key_heads, keys, value_width),
        }
        if bias is not None:
            arguments["bias"] = _normal(generator, *bias)
        arguments |= settings
        if query_heads != key_heads:
            arguments["enable_gqa"] = True
        if change is not None:
            change(arguments, generator)
        for name, x in arguments.items():
            if isinstance(x, Tensor):
                arguments[name] = x.to(device, dtype if x.is_floating_point() else x.dtype)
        return arguments

    return make


def _visible(share: float, *shape: int, hidden: tuple = ()) -> Change:
    """A dense mask that lets about ``share`` of the pairs through, and nothing at the indices ``hidden``."""

    def change(arguments: dict, generator: torch.Generator) -> None:
        visible = torch.rand(*shape, generator=generator) < share
        for index in hidden:
            visible[index] = False
        arguments["visible"] = visible

    return change


def _poisoned(keys: slice, *, rows: slice | None = None) -> Change:
    """NaN and Inf in hidden keys and values, and in queries that see nothing."""

    def change(arguments: dict, generator: torch.Generator) -> None:
        del generator
        arguments["key"][..., keys, :] = torch.nan
        arguments["key"][..., keys, ::2] = torch.inf
        arguments["value"][..., keys, :] = torch.inf
        arguments["value"][..., keys, ::2] = torch.nan
        if rows is not None:
            arguments["query"][..., rows, :] = torch.nan

    return change


_all_poisoned = _poisoned(slice(None), rows=slice(None))


def _padded_and_poisoned(arguments: dict, generator: torch.Generator) -> None:
    """Batch items of 17 and 5 real keys, with NaN in what is padded."""
    del generator
    for i, length in enumerate((17, 5)):
        arguments["key"][i, :, length:] = torch.nan
        arguments["value"][i, :, length:] = torch.nan


def _diagonal_and_poison(arguments: dict, generator: torch.Generator) -> None:
    """A NaN key that all but the last rows are hidden from, in a block that every row has a part of."""
    del generator
    arguments["key"][..., -1, :] = torch.nan
    arguments["value"][..., -1, :] = torch.nan
    arguments["query"] = arguments["query"][..., :-1, :].clone()


def _heads_last(arguments: dict, generator: torch.Generator) -> None:
    """(B, L, H, E) in memory."""
    del generator
    for name in ("query", "key", "value"):
        arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)


def _strided(arguments: dict, generator: torch.Generator) -> None:
    """Every second row of every second column of a larger tensor, and features that are not contiguous."""
    del generator
    arguments["query"] = arguments["query"].transpose(-1, -2).contiguous().transpose(-1, -2)
    for name in ("key", "value"):
        arguments[name] = arguments[name].repeat_interleave(2, -2).repeat_interleave(2, -1)[..., ::2, ::2]


def _expanded(arguments: dict, generator: torch.Generator) -> None:
    """All batch items share the keys, and all heads the bias."""
    del generator
    shape = arguments["key"].shape
    arguments["key"] = arguments["key"][:1].expand(shape)
    arguments["value"] = arguments["value"][:1, :1].expand(*shape[:-1], arguments["value"].shape[-1])
    arguments["bias"] = arguments["bias"].expand(-1, shape[1], -1, -1)


def _huge(arguments: dict, generator: torch.Generator) -> None:
    """Scores up to about 1e4 of either sign; keys that lie on a line keep them exact in any dtype."""
    del generator
    rows, keys = arguments["query"].shape[-2], arguments["key"].shape[-2]
    arguments["query"] = torch.zeros_like(arguments["query"])
    arguments["key"] = torch.zeros_like(arguments["key"])
    arguments["query"][..., 0] = (128.0 * (torch.arange(rows) % 3 - 1))[:rows]
    arguments["key"][..., 0] = 16.0 * (torch.arange(keys) % 11 - 5)


def _hides_by_bias(arguments: dict, generator: torch.Generator) -> None:
    """-inf in a bias takes a weight away, and a whole row of it all of them."""
    bias = arguments["bias"]
    bias[torch.rand(bias.shape, generator=generator) < 0.3] = -torch.inf
    bias[..., 2, :] = -torch.inf


_SMALL: dict[str, Any] = {"lengths": (2, 3), "sizes": (2, 1)}

_CASES = (
    Case("small", _case(1, **_SMALL), second_order=True),
    Case(
        "small, causal, grouped, a learnable bias",
        _case(1, heads=(2, 1), lengths=(2, 3), sizes=(1, 2), bias=(2, 1, 3), mask=masks.causal("lower_right")),
        second_order=True,
    ),
    Case(
        "small, soft cap, dropout, a bias a row and a key",
        _case(1, **_SMALL, bias=(2, 3), softcap=1.5, dropout_p=0.4, seed=3),
        second_order=True,
    ),
    Case("typical", _case(1, heads=2, lengths=(64, 64), sizes=(64, 64))),
    Case("causal", _case(1, lengths=(67, 67), sizes=(16, 16), mask=masks.causal())),
    Case("odd sizes", _case(1, heads=1, lengths=(123, 5), sizes=(17, 33))),
    Case(
        "more keys than queries, soft cap",
        _case(1, lengths=(5, 130), sizes=(40, 24), softcap=2.0, scale=0.4, mask=masks.causal("lower_right")),
    ),
    Case("more queries than keys", _case(1, lengths=(20, 7), sizes=(5, 9), mask=masks.causal("lower_right"))),
    Case("across blocks", _case(1, lengths=(130, 129), sizes=(16, 16), mask=masks.window(20, 5))),
    Case("head size 1", _case(1, heads=2, lengths=(9, 17), sizes=(1, 1))),
    Case("head size 256", _case(1, lengths=(5, 18), sizes=(256, 256), mask=masks.causal("lower_right"))),
    Case("one key", _case(1, lengths=(19, 1), sizes=(8, 8), bias=(1, 19, 1))),
    Case("grouped queries", _case(1, heads=(4, 2), lengths=(17, 33), sizes=(16, 8), mask=masks.causal())),
    Case("one key head for all", _case(1, heads=(3, 1), lengths=(18, 18), sizes=(8, 8), bias=(3, 1, 18))),
    Case("batch dimensions", _case(2, 3, heads=2, lengths=(5, 9), sizes=(8, 8), bias=(3, 1, 5, 1))),
    Case("one head without a dimension", lambda *a: _without_heads(_case(lengths=(9, 11), sizes=(8, 8))(*a))),
    Case(
        "heads last in memory",
        _case(2, heads=(2, 1), lengths=(15, 20), sizes=(16, 16), mask=masks.causal(), change=_heads_last),
    ),
    Case("strided", _case(2, heads=2, lengths=(17, 18), sizes=(8, 12), change=_strided)),
    Case("expanded", _case(2, heads=2, lengths=(5, 18), sizes=(8, 8), bias=(2, 1, 5, 18), change=_expanded)),
    Case("strictly causal", _case(1, lengths=(35, 35), sizes=(8, 8), mask=masks.strictly_causal())),
    Case(
        "padding, NaN in what is padded",
        _case(2, heads=2, lengths=(6, 33), sizes=(8, 8), mask=masks.padding([17, 5]), change=_padded_and_poisoned),
    ),
    Case(
        "documents, no keys for one of them",
        _case(1, lengths=(12, 21), sizes=(8, 8), mask=masks.documents([0] * 4 + [1] * 4 + [2] * 4, [0] * 9 + [2] * 12)),
    ),
    Case(
        "dense mask with empty rows and blocks",
        _case(
            1,
            lengths=(35, 70),
            sizes=(8, 8),
            change=_visible(0.3, 35, 70, hidden=((slice(0, 16),), (20,), (slice(None), slice(32, 64)))),
        ),
    ),
    Case(
        "dense mask, causal, window and a bias",
        _case(
            1,
            heads=2,
            lengths=(33, 34),
            sizes=(8, 8),
            bias=(1, 1, 34),
            mask=masks.causal() & masks.window(12, 3),
            change=_visible(0.7, 2, 33, 34),
        ),
    ),
    Case("dense mask a key", _case(2, lengths=(5, 18), sizes=(8, 8), change=_visible(0.5, 2, 1, 1, 18))),
    Case(
        "nothing is visible",
        _case(
            1,
            heads=2,
            lengths=(5, 18),
            sizes=(8, 8),
            mask=masks.padding(0),
            change=_all_poisoned,
        ),
    ),
    Case(
        "NaN behind the window",
        _case(
            1,
            heads=2,
            lengths=(20, 36),
            sizes=(8, 9),
            bias=(2, 1, 36),
            mask=masks.causal() & masks.window(9, 0) & masks.documents([0] * 10 + [1] * 10, [0] * 10 + [3] * 26),
            change=_poisoned(slice(10, None), rows=slice(10, None)),
        ),
    ),
    Case(
        "NaN in a key on the diagonal's far end",
        _case(1, lengths=(34, 34), sizes=(8, 8), mask=masks.causal(), change=_diagonal_and_poison),
    ),
    Case("bias", _case(2, heads=2, lengths=(17, 20), sizes=(8, 8), bias=(17, 20))),
    Case("bias a batch item", _case(2, heads=2, lengths=(9, 20), sizes=(8, 8), bias=(2, 1, 9, 20))),
    Case("bias that hides", _case(1, heads=2, lengths=(9, 20), sizes=(8, 8), bias=(2, 9, 20), change=_hides_by_bias)),
    Case(
        "dropout",
        _case(2, heads=(4, 2), lengths=(9, 21), sizes=(8, 8), dropout_p=0.3, seed=2**40 + 7, mask=masks.window(30, 9)),
    ),
    Case("everything dropped", _case(1, lengths=(5, 18), sizes=(8, 8), dropout_p=1.0, seed=1)),
    Case("negative scale", _case(1, lengths=(9, 20), sizes=(8, 8), scale=-0.7)),
    Case("scores of 1e4", _case(1, lengths=(9, 20), sizes=(8, 8), scale=1.0, change=_huge)),
    Case("no queries", _case(2, lengths=(0, 9), sizes=(8, 4), mask=masks.causal())),
    Case("no keys", _case(2, heads=2, lengths=(5, 0), sizes=(8, 4), bias=(5, 0))),
    Case("no batch", _case(0, heads=2, lengths=(5, 6), sizes=(8, 4), bias=(2, 5, 6))),
    Case(
        "large",
        _case(
            1, heads=2, lengths=(150, 280), sizes=(20, 20), bias=(280,), mask=masks.causal() & masks.window(100, None)
        ),
        large=True,
    ),
)


def _without_heads(arguments: dict) -> dict:
    return {name: x[0] if isinstance(x, Tensor) else x for name, x in arguments.items()}


def _bad(**changes):
    """A good call of 4 queries, 6 keys and 2 heads, with arguments that are replaced (by a function of the tensor)."""

    def make(dtype, device, generator):
        arguments = _case(1, heads=2, lengths=(4, 6), sizes=(8, 8))(dtype, device, generator)
        for name, change in changes.items():
            arguments[name] = change(arguments.get(name)) if callable(change) else change
        return arguments

    return make


def _long(length: int, width: int):
    return lambda _: torch.zeros(1).expand(1, 2, length, width)


_BAD = (
    BadInput("query is no tensor", _bad(query=lambda x: x.tolist()), TypeError, "query.*Tensor.*list"),
    BadInput("integer query", _bad(query=lambda x: x.long()), TypeError, "query.*floating.*int64"),
    BadInput("key of another dtype", _bad(key=lambda x: x.double()), TypeError, "key.*float32.*float64"),
    BadInput("value of another device", _bad(value=lambda x: x.to("meta")), ValueError, "value.*device.*meta"),
    BadInput("query of one dimension", _bad(query=lambda x: x[0, 0, 0]), ValueError, r"query.*\(8,\)"),
    BadInput("head size 257", _bad(query=_long(4, 257), key=_long(6, 257)), ValueError, "query.*1 to 256.*257"),
    BadInput("values of size 257", _bad(value=_long(6, 257)), ValueError, "value.*1 to 256.*257"),
    BadInput("head size 0", _bad(query=_long(4, 0), key=_long(6, 0)), ValueError, "query.*1 to 256.*0"),
    BadInput("another head size in key", _bad(key=lambda x: x[..., :7]), ValueError, "key.*head size.*8.*7"),
    BadInput("value too short", _bad(value=lambda x: x[..., :5, :]), ValueError, "value.*length of key, 6, got 5"),
    BadInput("value of other heads", _bad(value=lambda x: x[:, :1]), ValueError, "value.*heads of key, 2, got 1"),
    BadInput("no heads", _bad(query=lambda x: x[:, :0]), ValueError, "query.*one head or more"),
    BadInput(
        "heads that do not match",
        _bad(query=lambda x: x.repeat(1, 2, 1, 1)),
        ValueError,
        "query.*enable_gqa.*2.*4 heads",
    ),
    BadInput(
        "heads that do not divide",
        _bad(query=lambda x: x.repeat(1, 2, 1, 1)[:, :3], enable_gqa=True),
        ValueError,
        "query.*multiple.*2.*3 heads",
    ),
    BadInput(
        "batches that do not broadcast",
        _bad(query=lambda x: x.repeat(2, 1, 1, 1), key=lambda x: x.repeat(3, 1, 1, 1)),
        ValueError,
        r"query.*broadcast.*\(2,\).*\(3,\)",
    ),
    BadInput(
        "length 2^31",
        _bad(key=_long(2**31, 8), value=_long(2**31, 8)),
        ValueError,
        r"key.*below 2\^31.*2147483648",
    ),
    BadInput("scale NaN", _bad(scale=math.nan), ValueError, "scale.*finite.*nan"),
    BadInput("scale infinite", _bad(scale=math.inf), ValueError, "scale.*finite.*inf"),
    BadInput("scale a string", _bad(scale="1"), TypeError, "scale.*number.*str"),
    BadInput("softcap 0", _bad(softcap=0.0), ValueError, r"softcap.*positive.*0\.0"),
    BadInput("softcap NaN", _bad(softcap=math.nan), ValueError, "softcap.*positive.*nan"),
    BadInput("dropout_p 1.5", _bad(dropout_p=1.5), ValueError, r"dropout_p.*\[0, 1\].*1\.5"),
    BadInput("dropout_p negative", _bad(dropout_p=-0.1), ValueError, r"dropout_p.*\[0, 1\].*-0\.1"),
    BadInput("seed a float", _bad(dropout_p=0.5, seed=1.5), TypeError, "seed.*int.*float"),
    BadInput("seed of two", _bad(dropout_p=0.5, seed=torch.zeros(2).long()), TypeError, r"seed.*\(\).*\(2,\)"),
    BadInput("seed past 64 bits", _bad(dropout_p=0.5, seed=2**63), ValueError, "seed.*64 bits"),
    BadInput("mask of floats", _bad(mask=torch.zeros(4, 6)), TypeError, "mask.*bool.*float32"),
    BadInput("mask a string", _bad(mask="causal"), TypeError, "mask.*str"),
    BadInput("mask too narrow", _bad(visible=torch.ones(4, 5).bool()), ValueError, r"mask.*\(1, 2, 4, 6\).*\(4, 5\)"),
    BadInput("mask of too many dimensions", _bad(visible=torch.ones(1, 1, 1, 4, 6).bool()), ValueError, "mask.*5?"),
    BadInput("mask of another device", _bad(visible=torch.ones(4, 6, device="meta").bool()), ValueError, "mask.*meta"),
    BadInput("padding past S", _bad(mask=masks.padding([7])), ValueError, "7"),
    BadInput("documents of 5 ids", _bad(mask=masks.documents([0] * 5)), ValueError, "ids"),
    BadInput("bias of another dtype", _bad(bias=torch.zeros(4, 6).double()), TypeError, "bias.*float32.*float64"),
    BadInput("bias too long", _bad(bias=torch.zeros(5, 6)), ValueError, r"bias.*\(1, 2, 4, 6\).*\(5, 6\)"),
    BadInput("bias is no tensor", _bad(bias=1.0), TypeError, "bias.*Tensor.*float"),
    BadInput("unknown backend", _bad(backend="cudnn"), ValueError, "backend.*'reference'.*'cudnn'"),
)


def _sized(length: int, *, heads: int = 8, width: int = 64, **settings):
    return _case(1, heads=heads, lengths=(length, length), sizes=(width, width), return_lse=False, **settings)


def _causal_as_bool(arguments: dict, generator: torch.Generator) -> None:
    del generator
    length = arguments["query"].shape[-2]
    arguments["mask"] = torch.ones(length, length, dtype=torch.bool).tril()


_DOCUMENTS = masks.documents([i // 512 for i in range(4096)])
_LONG = ("cuda",)
_WORKLOADS = (
    Workload("B1 H8 S4096 D64, full", _sized(4096), 8 * 4096),
    Workload("B1 H8 S4096 D64, causal", _sized(4096, mask=masks.causal()), 8 * 4096),
    Workload("B1 H8 S4096 D64, window 256", _sized(4096, mask=masks.causal() & masks.window(255, 0)), 8 * 4096),
    Workload("B1 H8 S4096 D64, documents of 512", _sized(4096, mask=_DOCUMENTS), 8 * 4096),
    Workload("B1 H8 S4096 D64, causal as a bool tensor", _sized(4096, change=_causal_as_bool), 8 * 4096),
    Workload("B1 H1 S4096 D64, causal", _sized(4096, heads=1, mask=masks.causal()), 4096),
    Workload("B1 H8 S2048 D64, bias (L, S)", _sized(2048, bias=(2048, 2048)), 8 * 2048),
    Workload("call overhead: B1 H1 S8 D8", _sized(8, heads=1, width=8), 8),
    Workload("B1 H16 S8192 D128, full", _sized(8192, heads=16, width=128), 16 * 8192, devices=_LONG),
    Workload(
        "B1 H16 S8192 D128, causal", _sized(8192, heads=16, width=128, mask=masks.causal()), 16 * 8192, devices=_LONG
    ),
)


def _cost(arguments: dict, backward: bool) -> Cost:
    """Bytes: each input read once, each output written once. Operations: of the pairs that are visible alone.

    A pair costs 2 E (score) and 2 F (value) forward; 2 (3 E + 2 F) backward: the score again, dP, dV, dQ and dK.
    """
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    bias = arguments.get("bias")
    scores = (*query.shape[:-1], key.shape[-2])
    mask, visible = arguments.get("mask"), arguments.get("visible")
    if visible is not None:
        mask = masks.dense(visible) if mask is None else mask & masks.dense(visible)
    pairs = masks.visible_pairs(mask, scores)
    width, value_width = query.shape[-1], value.shape[-1]
    inputs = query.numel() + key.numel() + value.numel()
    out = query.numel() // width * value_width
    extra = 0 if bias is None else bias.numel()
    lse = 4 * (query.numel() // width)
    if backward:
        moved = 2 * inputs + 2 * out + 2 * extra  # and the gradients of the inputs; out and its gradient are read
        return Cost(2 * pairs * (3 * width + 2 * value_width), moved * query.element_size() + lse)
    return Cost(2 * pairs * (width + value_width), (inputs + out + extra) * query.element_size() + lse)


def _triton_kernels() -> tuple[TritonKernel, ...]:
    from mpkernels.attention.attention import triton

    return triton.kernels_to_compile()


SPECS = (
    OpSpec(
        name="attention",
        family="attention",
        op=schema.FORWARD,
        function=_attention,
        formula="out_i = sum_j softmax_j(scale q_i . k_j + bias_ij) v_j over the keys that a mask leaves",
        differentiable=("query", "key", "value", "bias"),
        outputs=("out", "lse"),
        cases=_CASES,
        bad_inputs=_BAD,
        workloads=_WORKLOADS,
        eager=eager.attention,
        cost=_cost,
        triton_kernels=_triton_kernels,
        fastest_on_cuda="triton",
        trained=("query", "key", "value", "bias"),
        demo="python_models.transformer",
        demo_name="transformer",
    ),
)
