"""What scripts written for causal_conv1d find by changing the import, against the formula in plain torch."""

import doctest
import inspect

import pytest
import torch
from torch.nn import functional

from mpkernels.compat import causal_conv1d
from mpkernels.compat.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_interface,
    causal_conv1d_update,
    causal_conv1d_varlen,
    causal_conv1d_varlen_states,
)

SIGNATURES = {
    "causal_conv1d_fn": "x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, "
    "final_states_out=None, activation=None",
    "causal_conv1d_update": "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, "
    "conv_state_indices=None",
    "causal_conv1d_varlen_states": "x, cu_seqlens, state_len",
}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def formula(x, weight, bias=None, states=None, activation=None):
    """Torch's own convolution of (states, x), in float64."""
    x, weight = x.double(), weight.double()
    past = x.new_zeros((*x.shape[:2], weight.shape[1] - 1)) if states is None else states.double()
    whole = torch.cat([past, x], -1)
    bias = None if bias is None else bias.double()
    out = functional.conv1d(whole, weight[:, None], bias, groups=len(weight))
    return (functional.silu(out) if activation else out), whole[:, :, whole.shape[2] - weight.shape[1] + 1 :]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(causal_conv1d, name)).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    got = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    assert got == SIGNATURES[name]


@pytest.mark.parametrize("module", [causal_conv1d_interface, causal_conv1d_varlen])
def test_examples(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert not found.failed


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("width", [2, 4, 9])
def test_fn(width, dtype, tolerance, channel_last):
    """Weights are float32 beside half inputs, as in Mamba."""
    x, states = normal(2, 24, 20, dtype=dtype), normal(2, 24, width - 1, seed=3, dtype=dtype)
    if channel_last:
        x, states = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, states))
    weight, bias = normal(24, width, seed=1), normal(24, seed=2)
    x.requires_grad_()
    weight.requires_grad_()
    out, final = causal_conv1d_fn(x, weight, bias, initial_states=states, return_final_states=True, activation="swish")
    wanted, wanted_final = formula(x, weight, bias, states, "silu")
    assert out.dtype == final.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(final.double(), wanted_final)
    found = torch.autograd.grad(out.double().sum() + final.double().pow(2).sum(), (x, weight))
    gold = torch.autograd.grad(wanted.sum() + wanted_final.pow(2).sum(), (x, weight))
    for a, b in zip(found, gold, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2 * tolerance, atol=10 * tolerance)


def test_final_states_are_written_where_asked_and_continue():
    x, weight = normal(2, 6, 11), normal(6, 4, seed=1)
    into = torch.full((2, 3, 6), 7.0).transpose(1, 2)
    first, states = causal_conv1d_fn(x[:, :, :5], weight, return_final_states=True, final_states_out=into)
    assert states is into
    second = causal_conv1d_fn(x[:, :, 5:], weight, initial_states=into)
    assert isinstance(second, torch.Tensor)
    whole = causal_conv1d_fn(x, weight)
    assert isinstance(whole, torch.Tensor)
    assert torch.equal(torch.cat([first, second], -1), whole)


def test_seq_idx_separates_and_pads():
    x, weight = normal(1, 6, 12), normal(6, 3, seed=1)
    seq_idx = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3], dtype=torch.int32)
    out = causal_conv1d_fn(x, weight, seq_idx=seq_idx)
    assert isinstance(out, torch.Tensor)
    for piece in (slice(0, 5), slice(5, 9)):
        torch.testing.assert_close(out[:, :, piece].double(), formula(x[:, :, piece], weight)[0], rtol=1e-5, atol=1e-5)
    assert not out[:, :, 9:].any()


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("size", [3, 8])
def test_update(size, circular):
    """A longer state, a circular one, rows of a cache with a skipped one; x half and weights float32."""
    dtype = torch.bfloat16
    x, weight, bias = normal(3, 10, 9, dtype=dtype), normal(10, 4, seed=1), normal(10, seed=2).requires_grad_()
    cache = torch.zeros(7, size, 10, dtype=dtype).transpose(1, 2)
    rows = torch.tensor([4, -1, 1], dtype=torch.int32)
    wanted, final = formula(x, weight, bias, activation="silu")
    first = 0
    for count in (1, 2, 1, 5):
        known = torch.full((3,), first, dtype=torch.int32) if circular else None
        piece = x[:, :, first] if count == 1 else x[:, :, first : first + count]
        out = causal_conv1d_update(piece, cache, weight, bias, "silu", known, rows).reshape(3, 10, count)
        kept = wanted[[0, 2], :, first : first + count]
        torch.testing.assert_close(out[[0, 2]].double(), kept.detach(), rtol=2e-2, atol=2e-2)
        assert not out[1].any()
        first += count
    newest = [(first - 3 + j) % size if circular else size - 3 + j for j in range(3)]
    assert torch.equal(cache[[4, 1]][:, :, newest].double(), final[[0, 2]])
    assert not cache[[0, 2, 3, 5, 6]].any()


def test_varlen_states():
    x, lengths, size = normal(30, 5), [1, 12, 3, 0, 14], 4
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    states = causal_conv1d_varlen_states(x, starts, size)
    assert states.shape == (5, 5, size)
    for i, n in enumerate(lengths):
        last = x[starts[i] : starts[i + 1]][max(n - size, 0) :]
        assert torch.equal(states[i].T, functional.pad(last, (0, 0, size - len(last), 0)))


def test_bad_input_names_the_argument():
    with pytest.raises(ValueError, match=r"activation.*relu"):
        causal_conv1d_fn(torch.zeros(1, 2, 3), torch.zeros(2, 4), activation="relu")
    with pytest.raises(ValueError, match=r"state.*at least 3"):
        causal_conv1d_update(torch.zeros(1, 2), torch.zeros(1, 2, 2), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"final_states_out.*1, 2, 3"):
        causal_conv1d_fn(torch.zeros(1, 2, 3), torch.zeros(2, 4), None, None, None, True, torch.zeros(1, 2, 2))
    with pytest.raises(TypeError, match=r"cu_seqlens.*int32"):
        causal_conv1d_varlen_states(torch.zeros(3, 2), torch.zeros(2), 2)
