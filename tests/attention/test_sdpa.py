"""scaled_dot_product_attention beside torch's own function: its documented behaviours, side by side."""

import inspect

import pytest
import torch

from mpkernels.attention import scaled_dot_product_attention as ours

theirs = torch.nn.functional.scaled_dot_product_attention


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensors(*lead, rows=5, keys=7, width=8, value_width=8, dtype=torch.float32):
    return (
        normal(*lead, rows, width, dtype=dtype),
        normal(*lead, keys, width, seed=1, dtype=dtype),
        normal(*lead, keys, value_width, seed=2, dtype=dtype),
    )


def check(*arguments, tolerance=1e-6, **settings):
    """Outputs and gradients of both are close."""
    results = []
    for function in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() if _floats(x) else x for x in arguments]
        out = function(*leaves, **settings)
        grad = normal(*out.shape, seed=9, dtype=out.dtype)
        wanted = [x for x in leaves if _floats(x)]
        results.append([out, *torch.autograd.grad(out, wanted, grad)])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


def _floats(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def test_the_signature_is_torchs():
    parameters = inspect.signature(ours).parameters.values()
    names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert names == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal"]
    assert [p.name for p in parameters if p.kind == p.KEYWORD_ONLY] == ["scale", "enable_gqa"]
    for name in (*names, "scale", "enable_gqa"):  # torch's is built in: its documentation has the names
        assert name in (theirs.__doc__ or "")
    with pytest.raises(TypeError):
        theirs(*tensors(1), None, 0.0, False, 0.5)
    with pytest.raises(TypeError):
        ours(*tensors(1), None, 0.0, False, 0.5)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)])
def test_any_number_of_dimensions(lead):
    check(*tensors(*lead))
    check(*tensors(*lead, value_width=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}.get(dtype, torch.finfo(dtype).eps)
    check(*tensors(2, 3, dtype=dtype), tolerance=tolerance)
    check(*tensors(2, 3, dtype=dtype), is_causal=True, tolerance=tolerance)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 7), (7, 5), (1, 6)])
def test_is_causal_is_aligned_to_the_upper_left(lengths):
    check(*tensors(2, 3, rows=lengths[0], keys=lengths[1]), is_causal=True)


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (5, 1), (3, 5, 7), (2, 1, 5, 7), (2, 3, 1, 1)])
def test_masks_broadcast(shape):
    check(*tensors(2, 3), normal(*shape, seed=3))
    visible = normal(*shape, seed=3) > -0.5
    # one key at least, for torch's kernels differ in rows without any
    check(*tensors(2, 3), visible | (torch.arange(shape[-1]) == 0))


def test_true_takes_part():
    query, key, value = tensors(1, 1)
    visible = torch.zeros(5, 7, dtype=torch.bool)
    visible[:, 3] = True
    for function in (ours, theirs):
        torch.testing.assert_close(function(query, key, value, visible), value[..., 3:4, :].expand(1, 1, 5, 8))


def test_a_row_without_keys_is_zero():
    query, key, value = tensors(2, 3)
    visible = torch.ones(5, 7, dtype=torch.bool)
    visible[2] = False
    added = torch.zeros(5, 7).masked_fill(~visible, -torch.inf)
    for mask in (visible, added):
        torch.testing.assert_close(ours(query, key, value, mask), theirs(query, key, value, mask))
        assert not ours(query, key, value, mask)[..., 2, :].any()
    check(query, key, value, added)


def test_a_mask_of_the_lowest_number_hides():
    """As in torch, but for rows that are hidden as a whole: their scores drown in it, and torch gives the mean."""
    query, key, value = tensors(1, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = [x.to(dtype) for x in (query, key, value)]
        mask = torch.zeros(5, 7)
        mask[:, 4:] = torch.finfo(torch.float32).min
        torch.testing.assert_close(ours(*low, mask), theirs(*low, mask), rtol=2e-2, atol=2e-2)
        mask[2] = torch.finfo(torch.float32).min
        assert not ours(*low, mask)[..., 2, :].any()
    mean = value.mean(-2)
    torch.testing.assert_close(theirs(query, key, value, mask)[..., 2, :], mean)


def test_float32_masks_of_narrow_inputs():
    query, key, value = tensors(2, 3, dtype=torch.bfloat16)
    check(query, key, value, normal(5, 7, seed=3), tolerance=2e-3)
    narrow = [x.detach().to(torch.float16) for x in (query, key, value)]
    mask = torch.full((5, 7), -1e5)  # no number of float16, and no reason to hide a row
    torch.testing.assert_close(ours(*narrow, mask), theirs(*narrow, mask), rtol=2e-2, atol=0.3)
    assert ours(*narrow, mask).all()


def test_scale():
    for scale in (0.3, -1.0, 0.0, None):
        check(*tensors(2, 3), scale=scale)


def test_grouped_queries():
    query = normal(2, 4, 5, 8)
    for heads in (1, 2, 4):
        _, key, value = tensors(2, heads)
        check(query, key, value, enable_gqa=True)
    _, key, value = tensors(2, 2)
    check(query, key, value, is_causal=True, enable_gqa=True)


def test_heads_and_batches_broadcast():
    query, key, value = tensors(2, 3)
    check(query, key[:, :1], value[:, :1])
    check(query[:, :1], key, value)
    check(query, key[:, :1], value)
    check(query, key[:1], value[:1])
    check(query, key[0], value[0])


def test_dropout_drops_and_rescales_whatever_the_mode():
    query, key, _ = tensors(1, 1, rows=16, keys=64)
    value = torch.eye(64).expand(1, 1, 64, 64)
    weights = theirs(query, key, value)
    for function in (ours, theirs):
        torch.manual_seed(0)
        dropped = function(query, key, value, dropout_p=0.25)
        stays = dropped != 0
        torch.testing.assert_close(dropped, torch.where(stays, weights / 0.75, 0.0))
        assert abs(stays.float().mean().item() - 0.75) < 0.05
        assert not function(query, key, value, dropout_p=1.0).any()


def test_empty_inputs():
    query, key, value = tensors(2, 3)
    for arguments in (
        (query, key[:, :, :0], value[:, :, :0]),
        (query[:, :, :0], key, value),
        (query[:0], key[:0], value[:0]),
    ):
        assert torch.equal(ours(*arguments), theirs(*arguments))


def test_what_torch_refuses_is_refused():
    query, key, value = tensors(2, 3)
    refused = [
        ((query, key, value.double()), {}),
        ((query.long(), key.long(), value.long()), {}),
        ((query, key, value, torch.zeros(5, 7).int()), {}),
        ((query, key, value, torch.zeros(5, 7).double()), {}),
        ((query, key, value, torch.zeros(4, 7)), {}),
        ((query, key[:, :2], value[:, :2]), {}),
        ((query, key[:, :2], value[:, :2]), {"enable_gqa": True}),
        ((query, key, value), {"dropout_p": 1.5}),
        ((query[0, 0, 0], key, value), {}),
    ]
    for arguments, settings in refused:
        with pytest.raises(RuntimeError):
            theirs(*arguments, **settings)
        with pytest.raises((TypeError, ValueError)):
            ours(*arguments, **settings)
    with pytest.raises(ValueError, match=r"value.*length of key, 7, got 4"):  # torch reads past the end
        ours(query, key, value[:, :, :4])
    # documented as an error, though some of torch's kernels let it pass
    with pytest.raises(ValueError, match=r"attn_mask.*is_causal"):
        ours(query, key, value, torch.zeros(5, 7), is_causal=True)
    with pytest.raises(ValueError, match=r"attn_mask.*\(2, 3, 5, 7\).*\(4, 7\)"):
        ours(query, key, value, torch.zeros(4, 7))


def test_it_compiles_and_has_second_derivatives():
    small = tensors(1, 1, rows=2, keys=3, width=2, value_width=1, dtype=torch.float64)
    query, key, value = (x.requires_grad_() for x in small)
    mask = normal(2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(ours, (query, key, value, mask), fast_mode=True)
    compiled = torch.compile(lambda *x: ours(*x, is_causal=True), fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(query, key, value), ours(query, key, value, is_causal=True))
    torch._dynamo.reset()
