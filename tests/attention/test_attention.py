"""What attention promises, on every backend."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpkernels import masks, spec
from mpkernels.attention import attention
from mpkernels.attention.attention import dropout
from mpkernels.testing import compare, gradients, strategies, upcast
from mpkernels.testing.properties import OpProperties

FUZZ = strategies.fuzz(12, interpreted=4)
NAMES = ("query", "key", "value", "bias")


class AttentionProperties(OpProperties):
    ops = ("attention",)

    def attention(self, *tensors, **settings):
        return attention(*tensors, **({"return_lse": True} | settings), backend=self.backend)

    def normal(self, *shape, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed + math.prod(shape))
        return torch.randn(*shape, generator=generator, dtype=dtype).to(self.device)

    def rows_by_rows(self, heads=2, rows=12, keys=12, width=4, dtype=torch.float32):
        """query, key and value of one batch item."""
        return (
            self.normal(1, heads, rows, width, dtype=dtype),
            self.normal(1, heads, keys, width, seed=1, dtype=dtype),
            self.normal(1, heads, keys, width, seed=2, dtype=dtype),
        )

    def gradients(self, tensors, grad_out, grad_lse=None, **settings):
        """Outputs, and gradients of the tensors for given gradients of the outputs."""
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        if len(leaves) == 4:
            settings["bias"] = leaves[3]
        out, lse = self.attention(*leaves[:3], **settings)
        outputs, seeds = ([out], [grad_out]) if grad_lse is None else ([out, lse], [grad_out, grad_lse])
        return (out.detach(), lse.detach()), torch.autograd.grad(outputs, leaves, seeds)

    def test_equal_scores_give_the_mean(self):
        query, key, value = self.rows_by_rows(rows=5, keys=19)
        out, lse = self.attention(torch.zeros_like(query), key, value)
        torch.testing.assert_close(out, value.mean(-2, keepdim=True).expand_as(out))
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(19)))

    def test_one_key_gives_its_value(self):
        query, key, value = self.rows_by_rows(rows=5, keys=1)
        out, lse = self.attention(query, key, value, scale=0.3)
        torch.testing.assert_close(out, value.expand_as(out))
        torch.testing.assert_close(lse, 0.3 * (query * key).sum(-1))

    def test_a_row_that_sees_nothing_is_zero_and_pulls_nothing(self):
        tensors = self.rows_by_rows()
        grad = self.normal(1, 2, 12, 4, seed=5)
        (out, lse), (of_query, of_key, of_value) = self.gradients(
            tensors, grad, grad[..., 0], mask=masks.strictly_causal()
        )
        assert not out[..., 0, :].any()
        assert bool((lse[..., 0] == -torch.inf).all())
        assert bool(lse[..., 1:].isfinite().all())
        torch.testing.assert_close(out[..., 1, :], tensors[2][..., 0, :])
        assert not of_query[..., 0, :].any()
        assert not of_key[..., -1, :].any()  # the last key is nobody's
        assert not of_value[..., -1, :].any()
        assert bool(of_query[..., 2:, :].any())

    def test_parts_of_the_keys_merge_by_lse(self):
        query, key, value = self.rows_by_rows(rows=6, keys=37)
        whole, lse = self.attention(query, key, value)
        parts = [self.attention(query, key[..., at, :], value[..., at, :]) for at in (slice(0, 20), slice(20, 37))]
        weights = torch.softmax(torch.stack([x for _, x in parts]), 0)
        torch.testing.assert_close(sum(w[..., None] * out for w, (out, _) in zip(weights, parts, strict=True)), whole)
        torch.testing.assert_close(torch.logaddexp(*(x for _, x in parts)), lse)

    def test_a_window_against_loops(self):
        query, key, value = self.rows_by_rows(heads=1, rows=6, keys=9)
        bias = self.normal(6, 9)
        out, lse = self.attention(
            query, key, value, mask=masks.window(2, 1, "lower_right"), bias=bias, scale=0.7, softcap=1.5
        )
        for i in range(6):
            seen = [j for j in range(9) if i + 3 - 2 <= j <= i + 3 + 1]
            products = {j: 0.7 * float(query[0, 0, i] @ key[0, 0, j]) for j in seen}
            scores = [1.5 * math.tanh(x / 1.5) + float(bias[i, j]) for j, x in products.items()]
            total = sum(math.exp(s) for s in scores)
            wanted = sum(math.exp(s) / total * value[0, 0, j] for s, j in zip(scores, seen, strict=True))
            torch.testing.assert_close(out[0, 0, i], wanted)
            assert lse[0, 0, i].item() == pytest.approx(math.log(total), abs=1e-5)

    def test_padding_is_truncation(self):
        query, key, value = self.rows_by_rows(rows=5, keys=20)
        out, lse = self.attention(query, key, value, mask=masks.padding(13))
        short, short_lse = self.attention(query, key[..., :13, :], value[..., :13, :])
        torch.testing.assert_close(out, short)
        torch.testing.assert_close(lse, short_lse)

    def test_grouped_heads_are_repeated_heads(self):
        query, key, value = self.normal(1, 4, 7, 8), self.normal(1, 2, 9, 8, seed=1), self.normal(1, 2, 9, 5, seed=2)
        grad = self.normal(1, 4, 7, 5)
        (out, _), found = self.gradients((query, key, value), grad, enable_gqa=True)
        repeated = (query, *(x.repeat_interleave(2, 1) for x in (key, value)))
        (wanted, _), wanted_gradients = self.gradients(repeated, grad)
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(found[0], wanted_gradients[0])
        for a, b in zip(found[1:], wanted_gradients[1:], strict=True):
            torch.testing.assert_close(a, b.unflatten(1, (2, 2)).sum(2))

    def test_leading_dimensions_broadcast(self):
        query, key, value = self.normal(2, 1, 1, 5, 4), self.normal(3, 1, 6, 4), self.normal(2, 1, 1, 6, 4)
        grad = self.normal(2, 3, 1, 5, 4, seed=3)
        (out, lse), found = self.gradients((query, key, value), grad)
        full = tuple(x.expand(2, 3, *x.shape[-3:]) for x in (query, key, value))
        (wanted, wanted_lse), wanted_gradients = self.gradients(full, grad)
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(lse, wanted_lse)
        for a, b, x in zip(found, wanted_gradients, (query, key, value), strict=True):
            torch.testing.assert_close(a, b.sum_to_size(x.shape))

    @pytest.mark.parametrize("dense", [False, True])
    def test_what_is_hidden_cannot_touch(self, dense):
        """NaN and Inf in a key, a value, a query or a gradient stay with those that see it, forward and backward."""
        rows, bad = (20, 14) if self.slow else (34, 20)
        tensors = self.rows_by_rows(heads=1, rows=rows, keys=rows)
        mask = torch.ones(rows, rows, dtype=torch.bool, device=self.device).tril() if dense else masks.causal()
        grad = self.normal(1, 1, rows, 4, seed=7)
        grad[..., bad:, :] = 0  # what sees the bad key pulls at nothing
        (out, lse), wanted = self.gradients(tensors, grad, grad[..., 0], mask=mask)
        for poison in (torch.nan,) if self.slow else (torch.nan, torch.inf):
            poisoned = [x.clone() for x in tensors]
            poisoned[1][..., bad, :] = poison
            poisoned[2][..., bad, :] = poison
            (found_out, found_lse), found = self.gradients(poisoned, grad, grad[..., 0], mask=mask)
            torch.testing.assert_close(found_out[..., :bad, :], out[..., :bad, :])
            torch.testing.assert_close(found_lse[..., :bad], lse[..., :bad])
            assert not bool(found_out[..., bad:, :].isfinite().all(-1).any())
            torch.testing.assert_close(found[0][..., :bad, :], wanted[0][..., :bad, :])

        # a query or a gradient reaches the keys in its window alone
        hides = masks.window(3, 0)
        mask = masks.to_dense(hides, (rows, rows), self.device).contiguous() if dense else hides
        grad = self.normal(1, 1, rows, 4, seed=8)
        _, wanted = self.gradients(tensors, grad, grad[..., 0], mask=mask)
        poisoned = [x.clone() for x in tensors]
        poisoned[0][..., bad, :] = torch.nan
        bad_grad = grad.clone()
        bad_grad[..., bad, :] = torch.inf
        for changed, pulled in ((poisoned, grad), (tensors, bad_grad)):
            _, found = self.gradients(changed, pulled, pulled[..., 0], mask=mask)
            clean = [j for j in range(rows) if not bad - 3 <= j <= bad]
            for a, b in zip(found[1:], wanted[1:], strict=True):
                torch.testing.assert_close(a[..., clean, :], b[..., clean, :])
            others = [i for i in range(rows) if i != bad]
            torch.testing.assert_close(found[0][..., others, :], wanted[0][..., others, :])

    def test_dropout_drops_what_the_counter_says(self):
        query, key, _ = self.rows_by_rows(heads=2, rows=5, keys=21)
        value = torch.eye(21, device=self.device).expand(1, 2, 21, 21)  # so that out is the weights
        weights, lse = self.attention(query, key, value)
        for seed in (0, 2**63 - 1, -5):
            dropped, same = self.attention(query, key, value, dropout_p=0.4, seed=seed)
            stays = dropout.kept(torch.tensor(seed, device=self.device), 0.4, 1, 2, 5, 21)
            torch.testing.assert_close(dropped, torch.where(stays, weights / 0.6, 0.0))
            torch.testing.assert_close(same, lse)
            assert abs(stays.float().mean().item() - 0.6) < 0.1

    def test_dropout_of_everything_or_nothing(self):
        tensors = self.rows_by_rows(rows=3, keys=5)
        nothing, _ = self.attention(*tensors)
        assert torch.equal(self.attention(*tensors, dropout_p=0.0, seed=3)[0], nothing)
        grad = torch.ones_like(nothing)
        (out, lse), found = self.gradients(tensors, grad, dropout_p=1.0)
        assert not out.any()
        assert bool(lse.isfinite().all())
        assert not any(bool(x.any()) for x in found)

    def test_the_generator_of_the_cpu_rules_dropout(self):
        tensors = self.rows_by_rows(rows=3, keys=9)
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(self.attention(*tensors, dropout_p=0.5)[0])
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])

    def test_a_bias_of_rows_moves_lse_alone(self):
        tensors = self.rows_by_rows(rows=4, keys=6)
        bias = self.normal(2, 4, 1).requires_grad_()
        out, lse = self.attention(*tensors, mask=masks.strictly_causal(), bias=bias)
        full, full_lse = self.attention(*tensors, mask=masks.strictly_causal(), bias=bias.expand(2, 4, 6))
        torch.testing.assert_close(out, full)
        torch.testing.assert_close(lse, full_lse)
        (found,) = torch.autograd.grad((out, lse), bias, (torch.ones_like(out), torch.ones_like(lse)))
        wanted = torch.ones(2, 4, 1, device=self.device)
        wanted[:, 0] = 0  # the row that sees nothing
        torch.testing.assert_close(found, wanted)

    @pytest.mark.parametrize("hides", [-torch.inf, torch.finfo(torch.float32).min, -1e30])
    def test_a_bias_that_hides_is_a_mask(self, hides):
        """In outputs and gradients; rows that it hides as a whole are empty."""
        query, key, value = self.rows_by_rows(heads=1, rows=5, keys=20)
        visible = torch.rand(5, 20, generator=torch.Generator().manual_seed(0)).to(self.device) < 0.6
        visible[1] = False
        visible[:, 7] = False
        bias = self.normal(5, 20)
        grad = self.normal(1, 1, 5, 4, seed=3)
        wanted, wanted_gradients = self.gradients((query, key, value, bias), grad, grad[..., 0], mask=visible)
        hiding = torch.where(visible, bias, hides)
        found, found_gradients = self.gradients((query, key, value, hiding), grad, grad[..., 0])
        assert not found[0][..., 1, :].any()
        for a, b in zip((*found, *found_gradients), (*wanted, *wanted_gradients), strict=True):
            torch.testing.assert_close(a, b)

    def test_gradient_of_a_bias_in_closed_form(self):
        """Of lse it is the weights; of out with the values of a basis, P (G - P G)."""
        query, key, _ = self.rows_by_rows(heads=1, rows=4, keys=5)
        value = torch.eye(5, device=self.device).expand(1, 1, 5, 5)
        bias = self.normal(4, 5).requires_grad_()
        out, lse = self.attention(query, key, value, bias=bias)
        (of_lse,) = torch.autograd.grad(lse.sum(), bias, retain_graph=True)
        torch.testing.assert_close(of_lse, out[0, 0])
        grad = self.normal(4, 5, seed=1)
        (of_out,) = torch.autograd.grad(out, bias, grad[None, None])
        weights = out[0, 0].detach()
        torch.testing.assert_close(of_out, weights * (grad - (weights * grad).sum(-1, keepdim=True)))

    def test_the_memory_order_of_the_query_is_kept(self):
        query, key, value = (self.normal(2, 9, 3, 4, seed=i).transpose(1, 2) for i in range(3))
        out, _ = self.attention(query, key, value)
        if self.backend != "reference":
            assert out.stride() == query.stride()
        torch.testing.assert_close(out, self.attention(*(x.contiguous() for x in (query, key, value)))[0])

    def test_vmap_is_more_batch_items(self):
        samples, heads = (2, 1) if self.slow else (3, 4)
        tensors = [self.normal(samples, 2, heads, 5, 3, seed=i, dtype=torch.float64) for i in range(3)]
        biases = (self.normal(samples, heads, 1, 5, dtype=torch.float64), self.normal(1, 5, 5, dtype=torch.float64))
        visible = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(0)).to(self.device) < 0.7

        def loss(query, key, value, bias, settings):
            out, lse = self.attention(query, key, value, bias=bias, **settings)
            return out.pow(3).sum() + lse.where(lse.isfinite(), 0.0).pow(2).sum()

        masked, dropped = {"mask": masks.dense(visible) & masks.causal()}, {"dropout_p": 0.5, "seed": 2}
        for bias, dim in list(zip(biases, (0, None), strict=True))[self.slow :]:
            for chosen in (masked,) if self.slow else (masked, dropped):
                each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)), in_dims=(0, 0, 0, dim, None))(
                    *tensors, bias, chosen
                )
                shared = [bias[v] if dim == 0 else bias for v in range(samples)]
                one = [
                    torch.func.grad(loss, argnums=(0, 1, 2, 3))(*(x[v] for x in tensors), shared[v], chosen)
                    for v in range(samples)
                ]
                for a, b in zip(each, zip(*one, strict=True), strict=True):
                    torch.testing.assert_close(a, torch.stack(b))

    def test_second_derivatives_through_transforms(self):
        query, key, value = (x.double()[..., :3, :2] for x in self.rows_by_rows(heads=1))

        def loss(query, backend):
            out, lse = attention(query, key, value, mask=masks.causal(), return_lse=True, backend=backend)
            return out.pow(2).sum() + lse.pow(2).sum()

        ours = torch.func.hessian(lambda x: loss(x, self.backend))(query)
        torch.testing.assert_close(ours, torch.func.hessian(lambda x: loss(x, "reference"))(query))
        _, along = torch.func.jvp(lambda x: loss(x, self.backend), (query,), (torch.ones_like(query),))
        wanted = torch.func.grad(lambda x: loss(x, "reference"))(query).sum()
        torch.testing.assert_close(along, wanted)

    @pytest.mark.once
    def test_masks_and_dropout_compile_whole(self, op):
        if self.backend == "reference":
            return
        tensors = [x.requires_grad_() for x in self.rows_by_rows(rows=5, keys=7)]

        def loss(query, key, value):
            mask = masks.causal("lower_right") & masks.window(3, None)
            out, lse = self.attention(query, key, value, mask=mask, dropout_p=0.3)
            return out.pow(2).sum() + lse.sum()

        found = []
        for function in (torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False), loss):
            torch.manual_seed(3)
            found.append(torch.autograd.grad(function(*tensors), tensors))
        torch._dynamo.reset()
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)

    @settings(FUZZ)
    @given(data=st.data())
    def test_random_masks(self, data):
        length = st.integers(1, 20 if self.slow else 40)
        rows, keys = data.draw(length), data.draw(length)
        heads, key_heads = data.draw(st.sampled_from([(1, 1), (2, 1)] + ([] if self.slow else [(4, 2)])))
        batch = 1 if self.slow else data.draw(st.integers(1, 2))
        generator = data.draw(strategies.generators())
        arguments = {
            "query": torch.randn(batch, heads, rows, 6, generator=generator),
            "key": torch.randn(batch, key_heads, keys, 6, generator=generator),
            "value": torch.randn(batch, key_heads, keys, 3, generator=generator),
        }
        shape = data.draw(st.sampled_from([None, (rows, keys), (heads, 1, keys), (batch, 1, rows, keys)]))
        if shape is not None:
            arguments["bias"] = torch.randn(shape, generator=generator)
        mask = None
        kinds = _masks(batch, heads, rows, keys, generator, self.device)
        for one in data.draw(st.lists(kinds, min_size=1, max_size=3)):
            mask = one if mask is None else mask & one
        arguments = {name: x.to(self.device) for name, x in arguments.items()} | {"enable_gqa": True}
        cap = data.draw(st.sampled_from([None, None, 1.5]))
        dropped = data.draw(st.sampled_from([0.0, 0.0, 0.3]))

        def run(arguments, backend, mask=mask):
            found = gradients(
                lambda **a: attention(
                    **a, mask=mask, softcap=cap, dropout_p=dropped, seed=1, return_lse=True, backend=backend
                ),
                arguments,
                NAMES,
            )
            return dict(zip(("out", "lse"), found[0], strict=True)) | {f"grad {n}": g for n, g in found[1].items()}

        dense = masks.to_dense(mask, (batch, heads, rows, keys), self.device)
        low, gold = run(arguments, "reference"), run(upcast(arguments, device=self.device), "reference", dense)
        for name, got in run(arguments, self.backend).items():
            row = compare(name, got, low[name], gold[name], scale=1.0)
            assert row.ok, f"{mask!r}: {row}"


def _masks(batch, heads, rows, keys, generator, device):
    """Any mask of one kind that fits."""
    align = st.sampled_from(["upper_left", "lower_right"])
    side = st.one_of(st.none(), st.integers(0, 20))

    def ids(count):
        return torch.sort(torch.randint(0, 3, (batch, count), generator=generator)).values.to(device)

    def dense(share, shape):
        return masks.dense((torch.rand(shape, generator=generator) < share).to(device))

    return st.one_of(
        st.builds(masks.causal, align),
        st.builds(masks.strictly_causal, align),
        st.builds(masks.window, side, side, align),
        st.builds(masks.prefix, st.integers(0, keys)),
        st.builds(masks.padding, st.lists(st.integers(0, keys), min_size=batch, max_size=batch)),
        st.builds(lambda: masks.documents(ids(rows), ids(keys))),
        st.builds(
            dense,
            st.sampled_from([0.0, 0.1, 0.9, 1.0]),
            st.sampled_from([(rows, keys), (batch, 1, rows, keys), (heads, rows, 1), (keys,)]),
        ),
    )


class TestReference(AttentionProperties):
    backend = "reference"
    large = False


class TestCpu(AttentionProperties):
    backend = "cpu"

    @pytest.mark.parametrize("poisoned", ["key", "value"])
    def test_hidden_numbers_pull_nothing_through_a_bias(self, poisoned):
        """Only keys, or only values, are not finite: each has products of its own in the backward."""
        query, key, value = self.rows_by_rows(rows=40, keys=50)
        bias = self.normal(40, 50)
        {"key": key, "value": value}[poisoned][..., 20:, :] = torch.nan
        visible = torch.zeros(40, 50, dtype=torch.bool)
        visible[:, :20] = True
        visible[30:] = False
        leaves = [x.requires_grad_() for x in (query, key, value, bias)]
        out, _ = self.attention(*leaves[:3], bias=bias, mask=visible)
        for x in (out, *torch.autograd.grad(out.square().sum(), leaves)):
            assert bool(x.isfinite().all())

    def test_what_a_bias_hides_may_be_nan(self):
        query, key, value = self.rows_by_rows()
        key[..., 5, :] = torch.nan
        bias = torch.zeros(12, 12)
        bias[:, 5] = -torch.inf
        out, lse = self.attention(query, key, value, bias=bias)
        assert bool(out.isfinite().all())
        assert bool(lse.isfinite().all())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_any_number_of_threads_gives_the_same_bits(self, dtype):
        for name in ("large", "grouped queries"):
            self.check_threads(spec.find("attention"), name, dtype)


@pytest.mark.triton_interpreted
class TestTriton(AttentionProperties):
    backend = "triton"
    slow = True
    large = False


@pytest.mark.gpu
class TestTritonOnGpu(AttentionProperties):
    backend = "triton"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(AttentionProperties):
    backend = "reference"
    device = "cuda"
    large = False


def test_a_mask_of_the_wrong_shape_is_refused_through_masks():
    query = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="mask"):
        attention(query, query, query, mask=masks.dense(torch.ones(3, 4, dtype=torch.bool)) & masks.causal())
