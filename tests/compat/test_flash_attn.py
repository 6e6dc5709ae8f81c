"""What scripts written for flash_attn 2.8 find by changing the import, against the formula in plain torch."""

import doctest
import inspect
import math

import pytest
import torch

import mpkernels
from mpkernels.compat import flash_attn
from mpkernels.compat.flash_attn import (
    bert_padding,
    core,
    flash_attn_func,
    flash_attn_interface,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    kvcache,
)
from mpkernels.compat.flash_attn.bert_padding import pad_input, unpad_input

COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {COMMON}",
    "flash_attn_kvpacked_func": f"q, kv, {COMMON}",
    "flash_attn_qkvpacked_func": f"qkv, {COMMON}",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    f"{COMMON}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {COMMON}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {COMMON}",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
    "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    function = getattr(flash_attn, name)
    assert getattr(flash_attn_interface, name) is function
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    got = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    assert got == SIGNATURES[name]


@pytest.mark.parametrize("module", [bert_padding, flash_attn_interface, kvcache])
def test_examples(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert not found.failed


def formula(q, k, v, causal=False, window=(-1, -1), softcap=0.0, slopes=None, scale=None, starts=None):
    """One sequence, (L, H, D) and (S, G, D): out (L, H, F) and lse (H, L), all scores written out."""
    rows, heads, width = q.shape
    keys = k.shape[0]
    k, v = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (scale or 1 / math.sqrt(width))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(keys) - (torch.arange(rows)[:, None] + keys - rows)  # how far key j is ahead of query i
    if slopes is not None:
        scores = scores - slopes[:, None, None] * ahead.abs()
    left, right = window[0], 0 if causal else window[1]
    hidden = torch.zeros(rows, keys, dtype=torch.bool)
    if right >= 0:
        hidden |= ahead > right
    if left >= 0:
        hidden |= ahead < -left
    hidden[:, :starts] |= starts is not None
    empty = hidden.all(-1, keepdim=True)  # such rows give 0, and have no gradient
    lse = scores.detach().masked_fill(hidden, -math.inf).logsumexp(-1)
    weights = torch.softmax(scores.masked_fill(hidden & ~empty, -math.inf), -1).masked_fill(empty, 0)
    return torch.einsum("hij,jhd->ihd", weights, v), lse


def batched(q, k, v, slopes=None, **options):
    slopes = slopes if slopes is None or slopes.dim() == 2 else slopes.expand(q.shape[0], -1)
    found = [formula(q[b], k[b], v[b], slopes=None if slopes is None else slopes[b], **options) for b in range(len(q))]
    return torch.stack([out for out, _ in found]), torch.stack([lse for _, lse in found])


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def tensors(batch=2, rows=5, keys=9, heads=4, groups=2, width=8, dtype=torch.float64):
    return (
        random(batch, rows, heads, width, seed=1, dtype=dtype),
        random(batch, keys, groups, width, seed=2, dtype=dtype),
        random(batch, keys, groups, width, seed=3, dtype=dtype),
    )


SLOPES = torch.tensor([0.5, 0.25, 0.125, 1.0])
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "scale": {"softmax_scale": 0.2},
    "window": {"window_size": (2, 1)},
    "left window": {"window_size": (3, -1)},
    "causal window": {"causal": True, "window_size": (2, 3)},
    "softcap": {"causal": True, "softcap": 2.0},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi of each row": {"alibi_slopes": torch.stack([SLOPES, 2 * SLOPES]), "window_size": (4, 2)},
    "causal alibi": {"causal": True, "softcap": 3.0, "alibi_slopes": SLOPES},
}


def in_the_formula(options):
    names = {"window_size": "window", "alibi_slopes": "slopes", "softmax_scale": "scale"}
    return {names.get(name, name): value for name, value in options.items()}


@pytest.mark.parametrize(("rows", "keys"), [(5, 9), (1, 9), (9, 5)])
@pytest.mark.parametrize("case", OPTIONS)
def test_function(case, rows, keys):
    options = OPTIONS[case]
    q, k, v = tensors(rows=rows, keys=keys)
    wanted, wanted_lse = batched(q, k, v, **in_the_formula(options))
    with torch.no_grad():  # up to 16 causal queries that need no gradient go to another op
        out, lse, dropped = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert dropped is None
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    assert torch.equal(flash_attn_func(q, k, v, **options), out)

    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    grad = random(*q.shape, seed=4)
    out = flash_attn_func(*inputs, **options, deterministic=True)
    torch.testing.assert_close(out.detach(), wanted)
    found = torch.autograd.grad((out * grad).sum(), inputs)
    explicit = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted, _ = batched(*explicit, **in_the_formula(options))
    for got, want in zip(found, torch.autograd.grad((wanted * grad).sum(), explicit), strict=True):
        torch.testing.assert_close(got, want)


def test_layout_and_dtypes():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        q, k, v = (x.to(dtype) for x in tensors(rows=40, keys=40))
        slopes = SLOPES if dtype == torch.float32 else None
        out, lse, _ = flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes, return_attn_probs=True)
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert lse.dtype == torch.float32
        wanted, _ = batched(q.double(), k.double(), v.double(), causal=True, slopes=slopes)
        torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)


def test_alibi_needs_no_matrix():
    bias = core._alibi(SLOPES, 300, 400, None, torch.empty(1, 4, 300, 8))
    assert bias.shape == (1, 4, 300, 400)
    assert bias.untyped_storage().nbytes() == 4 * 4 * (300 + 400 - 1)


def test_slopes_can_learn():
    q, k, v = tensors()
    slopes = SLOPES.double().requires_grad_()
    out = flash_attn_func(q, k, v, alibi_slopes=slopes)
    explicit = SLOPES.double().requires_grad_()
    wanted, _ = batched(q, k, v, slopes=explicit)
    grad = random(*out.shape, seed=5)
    found = [torch.autograd.grad((x * grad).sum(), y)[0] for x, y in ((out, slopes), (wanted, explicit))]
    torch.testing.assert_close(*found)


def test_packed():
    q, k, v = tensors(rows=9, groups=4)
    out = flash_attn_func(q, k, v, causal=True)
    qkv = torch.stack([q, k, v], 2).requires_grad_()
    torch.testing.assert_close(flash_attn_qkvpacked_func(qkv, causal=True), out)
    torch.testing.assert_close(flash_attn_kvpacked_func(q, torch.stack([k, v], 2), causal=True), out)
    (grad,) = torch.autograd.grad(flash_attn_qkvpacked_func(qkv, 0.0, None, True).sum(), qkv)
    assert grad.shape == qkv.shape

    lengths = torch.tensor([0, 9, 18], dtype=torch.int32)
    flat = qkv.detach().flatten(0, 1)
    packed = flash_attn_varlen_qkvpacked_func(flat, lengths, 9, causal=True)
    torch.testing.assert_close(packed.reshape(out.shape), out)
    packed = flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], lengths, lengths, 9, 9, causal=True)
    torch.testing.assert_close(packed.reshape(out.shape), out)


@pytest.mark.parametrize("case", OPTIONS)
def test_varlen(case):
    options = dict(OPTIONS[case])
    slopes = options.get("alibi_slopes")
    lengths = ((3, 5), (4, 4), (0, 2), (6, 3))
    if slopes is not None and slopes.dim() == 2:
        slopes = options["alibi_slopes"] = torch.cat([slopes, slopes])
    rows, keys = (sum(x) for x in zip(*lengths, strict=True))
    q, k, v = (x[0].requires_grad_() for x in tensors(batch=1, rows=rows, keys=keys))
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in zip(*lengths, strict=True))
    out, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 5, **options, return_attn_probs=True)
    assert lse.shape == (4, rows)
    wanted, wanted_lse = [], []
    for n in range(len(lengths)):
        one = {**in_the_formula(options)}
        if slopes is not None and slopes.dim() == 2:
            one["slopes"] = slopes[n]
        found = formula(q[cu_q[n] : cu_q[n + 1]], k[cu_k[n] : cu_k[n + 1]], v[cu_k[n] : cu_k[n + 1]], **one)
        wanted.append(found[0])
        wanted_lse.append(found[1])
    torch.testing.assert_close(out, torch.cat(wanted))
    torch.testing.assert_close(lse, torch.cat(wanted_lse, 1))
    grad = random(*out.shape, seed=6)
    found = torch.autograd.grad((out * grad).sum(), (q, k, v))
    expected = torch.autograd.grad((torch.cat(wanted) * grad).sum(), (q, k, v))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_varlen_from_blocks():
    q, k, v = (x[0] for x in tensors(batch=1, rows=4, keys=7))
    cu_q, cu_k = torch.tensor([0, 1, 4]), torch.tensor([0, 3, 7])
    wanted = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, 4, causal=True)
    table = torch.tensor([[4, 1], [3, 0]], dtype=torch.int32)
    blocks = torch.full((2, 5, 2, *k.shape[1:]), math.nan, dtype=k.dtype)
    for n in range(2):
        for j in range(int(cu_k[n + 1] - cu_k[n])):
            for paged, packed in zip(blocks, (k, v), strict=True):
                paged[table[n, j // 2], j % 2] = packed[cu_k[n] + j]
    out = flash_attn_varlen_func(q, *blocks, cu_q, cu_k, 3, 4, causal=True, block_table=table)
    assert torch.equal(out, wanted)


def test_padding():
    q, k, v = tensors(rows=6, keys=6)
    kept = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    packed, indices, lengths, longest, used = unpad_input(torch.cat([q, k, v], 2), kept)
    assert (lengths.tolist(), longest, used.tolist()) == ([0, 4, 8], 4, [4, 4])
    out = flash_attn_varlen_func(*packed.split([4, 2, 2], 1), lengths, lengths, longest, longest, causal=True)
    out = pad_input(out, indices, 2, 6)
    for row, part in ((0, slice(0, 4)), (1, slice(2, 6))):
        torch.testing.assert_close(out[row, part], formula(q[row, part], k[row, part], v[row, part], causal=True)[0])
    assert not out[kept == 0].any()


def rotated(x, cos, sin, position, interleaved):
    """Each pair of (L, H, D) as a complex number, times e^(i angle)."""
    half = cos.shape[1]
    pairs = [(2 * r, 2 * r + 1) if interleaved else (r, r + half) for r in range(half)]
    x = x.clone()
    for r, (one, other) in enumerate(pairs):
        turned = torch.complex(x[..., one], x[..., other]) * torch.complex(cos, sin)[position, r][:, None]
        x[..., one], x[..., other] = turned.real, turned.imag
    return x


CACHE = {
    "one query": {"rows": 1, "fresh": 1},
    "one query, nothing new": {"rows": 1, "fresh": 0, "causal": True},
    "few queries": {"rows": 3, "fresh": 3, "causal": True},
    "few queries, not causal": {"rows": 3, "fresh": 2},
    "many queries": {"rows": 18, "fresh": 18, "causal": True},
    "window": {"rows": 2, "fresh": 2, "causal": True, "window_size": (3, 0)},
    "two-sided window": {"rows": 3, "fresh": 3, "window_size": (3, 1)},
    "left padding": {"rows": 2, "fresh": 2, "causal": True, "leftpad": True},
    "rotary": {"rows": 2, "fresh": 2, "causal": True, "rotary": 6},
    "rotary of halves": {"rows": 2, "fresh": 2, "causal": True, "rotary": 8, "rotary_interleaved": False},
    "rotary, not causal": {"rows": 2, "fresh": 2, "rotary": 4},
    "alibi": {"rows": 1, "fresh": 1, "alibi_slopes": SLOPES, "causal": True},
    "alibi of many": {"rows": 3, "fresh": 3, "alibi_slopes": SLOPES, "causal": True, "softcap": 2.0},
    "rows of the cache": {"rows": 1, "fresh": 1, "rows_of": True},
    "blocks": {"rows": 2, "fresh": 2, "causal": True, "blocks": True},
}


@pytest.mark.parametrize("case", CACHE)
def test_kvcache(case):
    options = dict(CACHE[case])
    rows, fresh, rotary = options.pop("rows"), options.pop("fresh"), options.pop("rotary", 0)
    leftpad, rows_of, blocks = (options.pop(name, False) for name in ("leftpad", "rows_of", "blocks"))
    keys, size = 32, 4
    lengths = torch.tensor([5, 11], dtype=torch.int32)
    q, old_k, old_v = tensors(rows=rows, keys=keys)
    _, k, v = tensors(rows=rows, keys=fresh)
    for b in range(2):  # what is not in use yet may hold anything
        old_k[b, lengths[b] :] = old_v[b, lengths[b] :] = math.nan
    starts = torch.tensor([2, 4], dtype=torch.int32) if leftpad else None

    wanted, wanted_lse, full_k, full_v = [], [], [], []
    cos, sin = (f(random(40, rotary // 2, seed=7)) for f in (torch.cos, torch.sin)) if rotary else (None, None)
    for b in range(2):
        length = int(lengths[b])
        mine, new = q[b], k[b]
        if rotary:
            interleaved = options.get("rotary_interleaved", True)
            step = torch.arange(rows) if options.get("causal") else torch.zeros(rows, dtype=torch.int64)
            mine = rotated(mine, cos, sin, length + step, interleaved)
            new = rotated(new, cos, sin, length + torch.arange(fresh), interleaved)
        full_k.append(torch.cat([old_k[b, :length], new]))
        full_v.append(torch.cat([old_v[b, :length], v[b]]))
        explicit = in_the_formula(options)
        explicit.pop("rotary_interleaved", None)
        start = None if starts is None else int(starts[b])
        found = formula(mine, full_k[-1], full_v[-1], starts=start, **explicit)
        wanted.append(found[0])
        wanted_lse.append(found[1])

    extra = {}
    k_cache, v_cache = old_k.clone(), old_v.clone()
    if rows_of:
        extra["cache_batch_idx"] = index = torch.tensor([2, 0], dtype=torch.int32)
        k_cache, v_cache = (torch.full((3, *x.shape[1:]), math.nan, dtype=x.dtype) for x in (old_k, old_v))
        k_cache[index], v_cache[index] = old_k, old_v
    if blocks:
        extra["block_table"] = table = torch.randperm(16).reshape(2, 8).int()
        k_cache, v_cache = (torch.full((16, size, *x.shape[2:]), math.nan, dtype=x.dtype) for x in (old_k, old_v))
        for cache, old in ((k_cache, old_k), (v_cache, old_v)):
            cache[table] = old.unflatten(1, (8, size))
    if fresh:
        extra["k"], extra["v"] = k, v
    if leftpad:
        extra["cache_leftpad"] = starts
    out, lse = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=lengths,
        rotary_cos=cos,
        rotary_sin=sin,
        return_softmax_lse=True,
        **extra,
        **options,
    )
    torch.testing.assert_close(out, torch.stack(wanted))
    torch.testing.assert_close(lse, torch.stack(wanted_lse))
    if rows_of:
        k_cache, v_cache = k_cache[index], v_cache[index]
    if blocks:
        k_cache, v_cache = k_cache[table].flatten(1, 2), v_cache[table].flatten(1, 2)
    for b in range(2):
        used = int(lengths[b]) + fresh
        torch.testing.assert_close(k_cache[b, :used], full_k[b])
        assert torch.equal(v_cache[b, :used], full_v[b])
        assert k_cache[b, used:].isnan().all()


def test_kvcache_of_one_length():
    q, k, v = tensors(rows=1)
    whole = flash_attn_with_kvcache(q, k, v)
    torch.testing.assert_close(whole, flash_attn_func(q, k, v))
    torch.testing.assert_close(
        flash_attn_with_kvcache(q, k, v, cache_seqlens=4), flash_attn_func(q, k[:, :4], v[:, :4])
    )
    assert not flash_attn_with_kvcache(q.requires_grad_(), k, v).requires_grad
    empty, lse = flash_attn_with_kvcache(q.detach(), k, v, cache_seqlens=0, return_softmax_lse=True)
    assert not empty.any()
    assert (lse == -math.inf).all()


def test_dropout_follows_the_seed():
    q, k, v = tensors(rows=40, keys=40)

    def run():
        torch.manual_seed(3)
        return flash_attn_func(q, k, v, dropout_p=0.5)

    assert torch.equal(run(), run())
    assert not torch.allclose(run(), flash_attn_func(q, k, v))
    assert not flash_attn_func(q, k, v, dropout_p=1.0).any()


def test_backend_of_the_caller():
    q, k, v = tensors(rows=2)
    with mpkernels.use_backend("reference"):
        reference = flash_attn_func(q, k, v, causal=True)
    torch.testing.assert_close(flash_attn_func(q, k, v, causal=True), reference)


def test_empty():
    q, k, v = tensors(rows=0)
    assert flash_attn_func(q, k, v, alibi_slopes=SLOPES).shape == q.shape
    q, k, v = tensors(keys=0)
    out, lse, _ = flash_attn_func(q, k, v, alibi_slopes=SLOPES, causal=True, return_attn_probs=True)
    assert not out.any()
    assert (lse == -math.inf).all()


BAD = {
    "k: expected shape": {"k": torch.zeros(2, 9, 2, 7, dtype=torch.float64)},
    "v: expected shape": {"v": torch.zeros(2, 8, 2, 8, dtype=torch.float64)},
    "k: expected the dtype of q,": {"k": torch.zeros(2, 9, 2, 8)},
    "q: expected a multiple of the heads of k": {"q": torch.zeros(2, 5, 3, 8, dtype=torch.float64)},
    "q: expected a floating-point": {"q": torch.zeros(2, 5, 4, 8, dtype=torch.int64)},
    "softmax_scale: expected a finite": {"softmax_scale": math.nan},
    "dropout_p: ": {"dropout_p": 1.5},
    "softcap: ": {"softcap": -1.0},
    "window_size: expected two integers": {"window_size": (1.5, 0)},
    "window_size: expected .left, right": {"window_size": 3},
    "alibi_slopes: expected shape": {"alibi_slopes": torch.ones(3)},
}


@pytest.mark.parametrize("message", BAD)
def test_errors(message):
    q, k, v = tensors()
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        flash_attn_func(**{"q": q, "k": k, "v": v, **BAD[message]})


def test_errors_of_the_cache():
    q, k, v = tensors(rows=1)
    new = torch.zeros(2, 1, 2, 8, dtype=torch.float64)
    angles = torch.zeros(20, 4)
    for message, extra in {
        "v: expected values": {"k": new},
        "cache_seqlens: expected the length": {"k": new, "v": new},
        "cache_seqlens: expected a number in .0, 8.": {"k": new, "v": new, "cache_seqlens": 9},
        "cache_seqlens: expected numbers in .0, 9.": {"cache_seqlens": torch.tensor([3, 10])},
        "rotary_cos: expected None": {"rotary_cos": angles, "rotary_sin": angles},
        "rotary_sin: ": {"rotary_cos": angles, "k": new, "v": new, "cache_seqlens": 3},
        "rotary_cos: expected angles of all": {
            **{"k": new, "v": new, "cache_seqlens": 3},
            **{"rotary_cos": angles[:3], "rotary_sin": angles[:3]},
        },
        "k_cache: expected at least": {"k_cache": k[:1], "v_cache": v[:1]},
        "block_table: expected int32": {"block_table": angles},
        "cache_batch_idx: expected None": {"block_table": angles.int(), "cache_batch_idx": torch.zeros(2).int()},
        "cache_leftpad: expected shape": {"cache_leftpad": torch.zeros(3).int()},
    }.items():
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            flash_attn_with_kvcache(**{"q": q, "k_cache": k, "v_cache": v, **extra})


def test_errors_of_varlen():
    q, k, v = (x[0] for x in tensors(batch=1))
    good, short = torch.tensor([0, 5]), torch.tensor([0, 4])
    keys = torch.tensor([0, 9])
    for slopes in (None, SLOPES):
        with pytest.raises(ValueError, match=r"^cu_seqlens_q: "):
            flash_attn_varlen_func(q, k, v, short, keys, 5, 9, alibi_slopes=slopes)
        with pytest.raises(ValueError, match=r"^cu_seqlens_k: "):
            flash_attn_varlen_func(q, k, v, good, torch.tensor([0, 5, 9]), 5, 9, alibi_slopes=slopes)
    with pytest.raises(ValueError, match=r"^v: expected shape"):
        flash_attn_varlen_func(q, k, v[:3], good, keys, 5, 9)
    table = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^block_table: expected blocks"):
        flash_attn_varlen_func(q, k[None], v[None], good, torch.tensor([0, 40]), 5, 40, block_table=table)
