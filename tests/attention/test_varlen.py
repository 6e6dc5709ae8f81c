"""attention_varlen: every sequence as if it were alone."""

import pytest
import torch

from mpkernels import masks
from mpkernels.attention import attention, attention_varlen

QUERIES, KEYS = (0, 3, 3, 4, 15, 17), (0, 5, 8, 8, 17, 30)  # of lengths 3 0 1 11 2, and 5 3 0 9 13


def packed(heads=(4, 2), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (QUERIES[-1], heads[0], 6), (KEYS[-1], heads[1], 6), (KEYS[-1], heads[1], 5)
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return (
        [x.requires_grad_() for x in tensors],
        torch.tensor(QUERIES, dtype=torch.int32),
        torch.tensor(KEYS, dtype=torch.int32),
    )


def one_by_one(query, key, value, mask, **settings):
    """A loop over the sequences."""
    outs, lses = [], []
    for i in range(len(QUERIES) - 1):
        rows, keys = slice(QUERIES[i], QUERIES[i + 1]), slice(KEYS[i], KEYS[i + 1])
        out, lse = attention(
            *(x.transpose(0, 1) for x in (query[rows], key[keys], value[keys])),
            mask=mask,
            enable_gqa=True,
            return_lse=True,
            backend="reference",
            **settings,
        )
        outs.append(out.transpose(0, 1))
        lses.append(lse.transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("causal", [None, "upper_left", "lower_right"])
@pytest.mark.parametrize("window", [None, (2, 1), (None, 0), (4, -1)])
def test_sequences_are_alone(backend, causal, window):
    tensors, queries, keys = packed()
    mask = None if causal is None else masks.causal(causal)
    if window is not None:
        near = masks.window(*window, causal or "lower_right")
        mask = near if mask is None else mask & near
    got = attention_varlen(
        *tensors,
        queries,
        keys,
        causal=causal,
        window=window,
        enable_gqa=True,
        softcap=2.0,
        return_lse=True,
        backend=backend,
    )
    wanted = one_by_one(*tensors, mask, softcap=2.0)
    grads = [torch.ones_like(x) * torch.arange(x.shape[0]).view(-1, *[1] * (x.dim() - 1)) for x in wanted]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    found = (torch.autograd.grad(x, tensors, grads) for x in (got, wanted))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_outputs_are_packed_as_the_queries_are():
    (query, key, value), queries, keys = packed()
    out, lse = attention_varlen(query, key, value, queries, keys, enable_gqa=True, return_lse=True)
    assert out.shape == (17, 4, 5)
    assert lse.shape == (17, 4)
    assert out.is_contiguous()
    assert not out[3].any()  # the sequence without keys
    assert bool((lse[3] == -torch.inf).all())
    alone = attention_varlen(query, key, value, queries.long(), keys.long(), enable_gqa=True)
    assert torch.equal(alone, out)


def test_a_bias_and_dropout():
    tensors, queries, keys = packed(heads=(2, 2), dtype=torch.float32)
    bias = torch.randn(2, 17, 30, generator=torch.Generator().manual_seed(1)).requires_grad_()
    results = []
    for backend in ("reference", "cpu"):
        out = attention_varlen(*tensors, queries, keys, bias=bias, dropout_p=0.3, seed=4, backend=backend)
        results.append([out, *torch.autograd.grad(out.pow(2).sum(), [*tensors, bias])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not results[0][-1][:, :3, 5:].any()  # what is hidden has no gradient


def test_nan_stays_in_its_sequence():
    tensors, queries, keys = packed()
    clean = attention_varlen(*tensors, queries, keys, enable_gqa=True)
    query, key, value = (x.detach().clone() for x in tensors)
    key[8:17], value[8:17] = torch.nan, torch.inf
    out = attention_varlen(query, key, value, queries, keys, enable_gqa=True)
    torch.testing.assert_close(out[:4], clean[:4])
    torch.testing.assert_close(out[15:], clean[15:])


def test_it_compiles_whole():
    tensors, queries, keys = packed(dtype=torch.float32)

    def loss(query, key, value):
        return attention_varlen(query, key, value, queries, keys, causal="lower_right", enable_gqa=True).pow(2).sum()

    found = []
    for function in (torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False), loss):
        found.append(torch.autograd.grad(function(*tensors), tensors))
    torch._dynamo.reset()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"cu_seqlens_q": [0, 17]}, TypeError, "cu_seqlens_q.*Tensor.*list"),
        ({"cu_seqlens_q": torch.tensor([0.0, 17.0])}, TypeError, "cu_seqlens_q.*int32.*float32"),
        ({"cu_seqlens_q": torch.tensor([[0, 17]])}, ValueError, r"cu_seqlens_q.*\(N \+ 1,\).*\(1, 2\)"),
        ({"cu_seqlens_q": torch.tensor([0])}, ValueError, "cu_seqlens_q.*N >= 1"),
        ({"cu_seqlens_q": torch.tensor([1, 3, 3, 4, 15, 17])}, ValueError, "cu_seqlens_q.*start at 0.*got 1 and 17"),
        ({"cu_seqlens_k": torch.tensor([0, 3, 3, 4, 15, 31])}, ValueError, "cu_seqlens_k.*end at 30.*got 0 and 31"),
        ({"cu_seqlens_q": torch.tensor([0, 9, 3, 4, 15, 17])}, ValueError, r"cu_seqlens_q.*decrease.*\[9, 3\] at 1"),
        ({"cu_seqlens_k": torch.tensor([0, 30])}, ValueError, r"cu_seqlens_k.*cu_seqlens_q.*\(6,\).*\(2,\)"),
        ({"cu_seqlens_q": torch.zeros(6, device="meta").int()}, ValueError, "cu_seqlens_q.*device.*meta"),
        ({"causal": True}, ValueError, "causal.*'upper_left'.*True"),
        ({"window": 3}, TypeError, "window.*left, right.*3"),
        ({"window": (1.5, 0)}, TypeError, "window.*integers.*1.5"),
        ({"window": (-2, 0)}, ValueError, "window.*-2"),
        ({"query": torch.zeros(1, 17, 4, 6)}, ValueError, "query.*tokens.*"),
        ({"key": torch.zeros(30, 2, 6).long()}, TypeError, "key.*floating"),
        ({"bias": torch.zeros(1, 4, 17, 30).double()}, ValueError, "bias.*H, T, U"),
    ],
)
def test_bad_input_is_refused(changed, error, message):
    (query, key, value), queries, keys = packed()
    arguments = {"query": query, "key": key, "value": value, "cu_seqlens_q": queries, "cu_seqlens_k": keys}
    with pytest.raises(error, match=f"(?s){message}"):
        attention_varlen(**(arguments | {"enable_gqa": True} | changed))


def test_sequences_that_are_checked_once_are_checked_again_when_written_to():
    (query, key, value), queries, keys = packed()
    for _ in range(2):
        attention_varlen(query, key, value, queries, keys, enable_gqa=True)
    queries[0] = 1
    with pytest.raises(ValueError, match="start at 0"):
        attention_varlen(query, key, value, queries, keys, enable_gqa=True)
