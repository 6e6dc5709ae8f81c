"""What attention of few queries to a long cache of keys promises, on every backend."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpkernels import masks, spec
from mpkernels.attention import attention, decode_attention
from mpkernels.testing import compare, strategies
from mpkernels.testing.properties import OpProperties

FUZZ = strategies.fuzz(10, interpreted=4)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class DecodeAttentionProperties(OpProperties):
    ops = ("decode_attention",)

    def decode(self, query, key, value, **arguments):
        def move(x) -> Any:
            return x.to(self.device) if isinstance(x, torch.Tensor) else x

        arguments = {"return_lse": True, "backend": self.backend} | {n: move(x) for n, x in arguments.items()}
        return decode_attention(move(query), move(key), move(value), **arguments)

    def test_each_query_alone_in_closed_form(self):
        """With lengths: what exp and sums give for the keys that one query sees, taken one by one."""
        query, key, value = normal(2, 4, 3, 16), normal(2, 2, 11, 16, seed=1), normal(2, 2, 11, 8, seed=2)
        out, lse = (x.cpu() for x in self.decode(query, key, value, lengths=torch.tensor([11, 4])))
        for b, length in enumerate((11, 4)):
            for h in range(4):
                for i in range(3):
                    seen = length - 3 + i + 1
                    e = torch.exp(key[b, h // 2, :seen] @ query[b, h, i] / 4)
                    torch.testing.assert_close(lse[b, h, i], e.sum().log())
                    torch.testing.assert_close(out[b, h, i], (e / e.sum()) @ value[b, h // 2, :seen])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_rows_that_see_nothing_are_zero(self, dtype):
        arguments = spec.find("decode_attention").case("lengths, with NaN behind").arguments(dtype, self.device)
        out, lse = self.decode(**arguments)
        empty = torch.zeros(4, 4, 2, dtype=torch.bool)
        empty[1, :, 0] = empty[2] = True  # length 1 of two queries, and length 0
        assert torch.equal((lse == -math.inf).cpu(), empty)
        assert torch.equal((out == 0).all(-1).cpu(), empty)
        assert bool(out.isfinite().all())

    @pytest.mark.parametrize("how", ["lengths", "interval", "dense", "bias", "lowest bias"])
    def test_hidden_keys_may_hold_anything(self, how):
        """NaN and infinity in what no query, or not this query, sees; and the same bits as with zeros there."""
        query, key, value = normal(1, 4, 2, 40), normal(1, 2, 300, 40, seed=1), normal(1, 2, 300, 24, seed=2)
        hidden = torch.arange(300) >= 290 if how == "lengths" else (torch.arange(300) % 70 < 9)
        arguments: dict[str, Any] = {
            "lengths": {"lengths": torch.tensor([290])},
            "interval": {"mask": masks.window(200, 0, align="lower_right")},
            "dense": {"mask": ~hidden},
            "bias": {"bias": torch.zeros(300).masked_fill(hidden, -math.inf).double()},
            "lowest bias": {"bias": hidden.double() * -1e30},
        }[how]
        if how == "interval":
            hidden = torch.arange(300) < 98  # query 0 sees the keys from 98 on, query 1 those from 99 on
        found = []
        for fill in (0.0, math.nan, math.inf, -math.inf):
            k, v = key.clone(), value.clone()
            k[:, :, hidden], v[:, :, hidden] = fill, fill
            found.append(self.decode(query, k, v, **arguments))
        for out, lse in found:
            assert bool(out.isfinite().all())
            assert bool(lse.isfinite().all())
            assert torch.equal(out, found[0][0])
            assert torch.equal(lse, found[0][1])

    def test_a_value_hidden_from_one_query_alone(self):
        """The newest key holds NaN: the last query sees it, the ones before it do not."""
        query, key, value = normal(1, 2, 3, 20), normal(1, 1, 50, 20, seed=1), normal(1, 1, 50, 20, seed=2)
        whole, lse = self.decode(query, key, value)
        key[:, :, -1], value[:, :, -1] = math.nan, math.nan
        out, found = self.decode(query, key, value)
        assert torch.equal(out[:, :, :2], whole[:, :, :2])
        assert torch.equal(found[:, :, :2], lse[:, :, :2])
        assert bool(out[:, :, 2].isnan().all())
        assert bool(found[:, :, 2].isnan().all())

    def test_a_nan_that_is_seen_is_not_lost(self):
        query, key, value = normal(1, 1, 1, 8), normal(1, 1, 600, 8, seed=1), normal(1, 1, 600, 8, seed=2)
        value[0, 0, 555, 3] = math.nan
        out, _ = self.decode(query, key, value)
        assert out[0, 0, 0].isnan().tolist() == [False] * 3 + [True] + [False] * 4
        key[:] = math.nan
        out, lse = self.decode(query, key, value)
        assert bool(out.isnan().all())
        assert bool(lse.isnan().all())

    def test_large_scores_neither_overflow_nor_vanish(self):
        key = torch.linspace(-1, 1, 530).reshape(1, 1, 530, 1)
        out, lse = self.decode(torch.ones(1, 1, 1, 1), key, key.clone(), scale=1e6)
        torch.testing.assert_close(out.cpu(), torch.ones(1, 1, 1, 1))
        torch.testing.assert_close(lse.cpu(), torch.full((1, 1, 1), 1e6))

    def test_a_sequence_alone_and_in_a_batch_are_bit_equal(self):
        arguments = spec.find("decode_attention").case("lengths, with NaN behind").arguments(torch.float32, self.device)
        whole = self.decode(**arguments)
        for b in range(4):
            alone = self.decode(**{name: x[b : b + 1] for name, x in arguments.items()})
            for x, y in zip(alone, whole, strict=True):
                assert torch.equal(x[0], y[b])

    def test_layouts_are_bit_equal_and_out_keeps_that_of_query(self):
        case = spec.find("decode_attention").case("transposed")
        arguments = case.arguments(torch.float32, self.device)
        out, lse = self.decode(**arguments)
        other, other_lse = self.decode(**{name: x.contiguous() for name, x in arguments.items()})
        assert torch.equal(out, other)
        assert torch.equal(lse, other_lse)
        assert other.is_contiguous()
        if self.backend != "reference":
            assert out.transpose(1, 2).is_contiguous()

    def test_strided_last_dimensions(self):
        query, key, value = (normal(1, 2, n, 32, seed=n, dtype=torch.float32) for n in (2, 30, 31))
        value = value[:, :, :30]
        wanted = self.decode(query[..., ::2], key[..., ::2], value[..., ::2])
        got = self.decode(*(x[..., ::2].contiguous() for x in (query, key, value)))
        assert all(torch.equal(x, y) for x, y in zip(wanted, got, strict=True))

    def test_compiles_whole_with_a_mask_and_lengths(self):
        if self.backend in ("reference", "fibres"):
            return
        query, key, value = (normal(2, 2, n, 8, seed=n, dtype=torch.float32).to(self.device) for n in (2, 30, 31))
        value, lengths = value[:, :, :30], torch.tensor([30, 12], device=self.device)

        def function(query, key, value, lengths):
            return self.decode(query, key, value, lengths=lengths, mask=masks.window(9, 0))

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
        wanted = function(query, key, value, lengths)
        for got, x in zip(compiled(query, key, value, lengths), wanted, strict=True):
            assert torch.equal(got, x)
        torch._dynamo.reset()

    @settings(FUZZ)
    @given(data=st.data())
    def test_random_problems(self, data):
        if self.backend == "reference" and self.device == "cpu":
            return  # it is what others are compared with
        generator = data.draw(strategies.generators())
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
        batch, groups, group = data.draw(st.sampled_from([(1, 1, 1), (2, 1, 5), (1, 2, 4), (2, 2, 2), (1, 1, 9)]))
        queries, keys = data.draw(st.integers(1, 5)), data.draw(strategies.sizes(largest=600))
        width, value_width = (data.draw(st.sampled_from([1, 8, 20, 32, 64, 100])) for _ in range(2))

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        arguments: dict[str, Any] = {
            "query": draw(batch, groups * group, queries, width),
            "key": draw(batch, groups, keys, width),
            "value": draw(batch, groups, keys, value_width),
        }
        if data.draw(st.booleans()):
            arguments["lengths"] = torch.randint(0, keys + 1, (batch,), generator=generator)
        mask = data.draw(st.sampled_from([None, "window", "dense", "both"]))
        window = masks.window(data.draw(st.integers(0, 300)), 0, align="lower_right")
        dense = masks.dense(torch.rand(batch, 1, queries, keys, generator=generator) < 0.7)
        if mask is not None:
            arguments["mask"] = {"window": window, "dense": dense, "both": window & dense}[mask]
        if data.draw(st.booleans()):
            arguments["bias"] = draw(groups * group, 1, keys)
        if data.draw(st.booleans()):
            arguments["softcap"] = 3.0
        got = self.decode(**self._on_device(arguments))
        low = decode_attention(**arguments, return_lse=True, backend="reference")
        wide: dict[str, Any] = {
            n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in arguments.items()
        }
        gold = decode_attention(**wide, return_lse=True, backend="reference")
        for row in zip(("out", "lse"), got, low, gold, strict=True):
            row = compare(*row, scale=1.0)
            assert row.ok, str(row)
        assert torch.equal(got[1].cpu() == -math.inf, gold[1] == -math.inf)

    def _on_device(self, arguments):
        """The arguments with a mask whose tensors lie where the others do (masks are not moved)."""
        if self.device == "cpu" or not isinstance(arguments.get("mask"), masks.Mask):
            return arguments
        query, key = arguments["query"], arguments["key"]
        shape = (*query.shape[:3], key.shape[2])
        return arguments | {"mask": masks.to_dense(arguments["mask"], shape, "cpu").contiguous()}


class TestReference(DecodeAttentionProperties):
    backend = "reference"
    large = False

    def test_equals_torch_without_a_mask(self):
        query, key, value = normal(2, 8, 1, 32), normal(2, 2, 50, 32, seed=1), normal(2, 2, 50, 32, seed=2)
        wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        torch.testing.assert_close(decode_attention(query, key, value, backend="reference"), wanted)

    def test_equals_attention(self):
        """Causal from the lower right over the keys in use, a mask and a bias: the two references agree."""
        query, key, value = normal(1, 4, 3, 16), normal(1, 2, 40, 16, seed=1), normal(1, 2, 40, 24, seed=2)
        bias = normal(4, 1, 40, seed=3)
        mask = masks.causal(align="lower_right") & masks.window(20, 0, align="lower_right")
        wanted = attention(
            query, key, value, mask=mask, bias=bias, softcap=4.0, enable_gqa=True, return_lse=True, backend="reference"
        )
        got = self.decode(query, key, value, mask=mask, bias=bias, softcap=4.0)
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x, y)


class TestCpu(DecodeAttentionProperties):
    backend = "cpu"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_two_and_three_threads_are_bit_equal(self, dtype):
        arguments = spec.find("decode_attention").case("many").arguments(dtype)
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(self.decode(**arguments))
        finally:
            torch.set_num_threads(threads)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))

    @pytest.mark.parametrize("width", [8, 40, 64, 100, 256])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_types_at_every_width(self, dtype, width):
        """bfloat16 rows are kept in another order inside the kernel, by pairs of vectors and what is left."""
        query, key, value = (
            normal(1, 3, 1, width, dtype=dtype),
            *(normal(1, 3, 40, width, seed=s, dtype=dtype) for s in (1, 2)),
        )
        got, low = self.decode(query, key, value), self.decode(query, key, value, backend="reference")
        gold = self.decode(query.double(), key.double(), value.double(), backend="reference")
        for row in zip(("out", "lse"), got, low, gold, strict=True):
            row = compare(*row)
            assert row.ok, str(row)


class TestFibres(DecodeAttentionProperties):
    """The CUDA kernels, a fibre per thread, on the CPU."""

    backend = "fibres"
    slow = True
    large = False

    def test_more_rows_than_a_block_takes(self):
        arguments = spec.find("decode_attention").case("sixteen queries").arguments(torch.float32)
        for got, wanted in zip(self.decode(**arguments), self.decode(**arguments, backend="reference"), strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.gpu
class TestCuda(DecodeAttentionProperties):
    backend = "cuda"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(DecodeAttentionProperties):
    backend = "reference"
    device = "cuda"
    large = False
