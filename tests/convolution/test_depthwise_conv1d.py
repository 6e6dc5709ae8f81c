"""What the depthwise convolution over time and its step of generation promise, on every backend."""

import doctest
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpkernels.convolution import depthwise_conv1d, depthwise_conv1d_update
from mpkernels.convolution.depthwise_conv1d import api
from mpkernels.testing import compare, gradients, strategies
from mpkernels.testing.properties import OpProperties

FUZZ = strategies.fuzz(8, interpreted=4)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def last(x):
    """The same values, with channels side by side in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


class DepthwiseProperties(OpProperties):
    ops = ("depthwise_conv1d",)

    def same(self, a, b):
        """Bit for bit on the CPU; elsewhere up to how a compiler fuses, or torch vectorises."""
        exact: dict[str, Any] = {"rtol": 0.0, "atol": 0.0} if self.backend == "cpu" else {}
        torch.testing.assert_close(a, b, **exact)

    def run(self, x, weight, bias=None, **arguments) -> Any:
        def move(x) -> Any:
            return x.to(self.device) if isinstance(x, torch.Tensor) else x

        moved: dict[str, Any] = {name: move(x) for name, x in arguments.items()}
        return depthwise_conv1d(move(x), move(weight), move(bias), backend=self.backend, **moved)

    @pytest.mark.parametrize("order", [torch.clone, last])
    @pytest.mark.parametrize(("taps", "dilation"), [(4, 1), (3, 5)])
    def test_a_sequence_may_be_cut_anywhere(self, taps, dilation, order):
        x, weight, bias = normal(2, 20, 47), normal(20, taps, seed=1), normal(20, seed=2)
        settings = {"dilation": dilation, "activation": "silu"}
        whole, end = self.run(order(x), weight, bias, return_state=True, **settings)
        pieces, state = [], None
        for first, stop in ((0, 1), (1, 18), (18, 18), (18, 20), (20, 47)):
            piece = order(x[:, :, first:stop])
            out, state = self.run(piece, weight, bias, initial_state=state, return_state=True, **settings)
            pieces.append(out)
        self.same(torch.cat(pieces, -1), whole)
        assert torch.equal(state, end)

    def test_memory_orders_are_bit_equal_and_kept(self):
        x, weight, bias, state = normal(2, 36, 29), normal(36, 4, seed=1), normal(36, seed=2), normal(2, 36, 3, seed=3)
        first = self.run(x, weight, bias, initial_state=state, activation="silu")
        other = self.run(last(x), weight, bias, initial_state=last(state), activation="silu")
        self.same(first, other)
        if self.backend != "reference":
            assert first.is_contiguous()
            assert other.transpose(1, 2).is_contiguous()

    @pytest.mark.parametrize("order", [torch.clone, last])
    def test_sequences_in_a_row_are_sequences_alone(self, order):
        x, weight, bias = normal(1, 18, 40), normal(18, 4, seed=1), normal(18, seed=2)
        lengths = (3, 1, 20, 9)
        numbers = [5 * i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * 7
        seq_idx = torch.tensor([numbers], dtype=torch.int32)
        together = self.run(order(x), weight, bias, seq_idx=seq_idx, activation="silu").cpu()
        first = 0
        for n in lengths:
            alone = self.run(order(x[:, :, first : first + n]), weight, bias, activation="silu").cpu()
            self.same(together[:, :, first : first + n], alone)
            first += n
        assert not together[:, :, first:].any()

    @pytest.mark.parametrize("order", [torch.clone, last])
    def test_what_is_not_read_may_hold_anything(self, order):
        """NaN in padding and in the state in front of it: no output or gradient sees it."""
        weight, bias = normal(17, 4, seed=1), normal(17, seed=2)
        seq_idx = torch.tensor([[-1] * 6 + [1] * 20 + [-1] * 14], dtype=torch.int32)
        hidden = seq_idx[0] != 1
        found = []
        for fill in (0.0, math.nan, math.inf):
            x, state = normal(1, 17, 40), normal(1, 17, 3, seed=3)
            x[:, :, hidden], state[:] = fill, fill
            tensors = [t.to(self.device).requires_grad_() for t in (order(x), weight, bias, order(state))]
            out = self.run(*tensors[:3], initial_state=tensors[3], seq_idx=seq_idx, activation="silu")
            found.append([out.detach(), *torch.autograd.grad(out.sum(), tensors)])
        for others in found[1:]:
            for a, b in zip(found[0], others, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)

    @pytest.mark.parametrize("order", [torch.clone, last])
    def test_nan_stays_in_its_sequence(self, order):
        x, seq_idx = normal(1, 17, 40), torch.tensor([[0] * 10 + [3] * 22 + [4] * 8], dtype=torch.int32)
        others = seq_idx[0] != 3
        x[:, :, others] = math.nan
        x = order(x).to(self.device).requires_grad_()
        out = self.run(x, normal(17, 4, seed=1), seq_idx=seq_idx, activation="silu")
        assert torch.equal(out.isnan()[0, 0].cpu(), others)
        (found,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(found.isnan()[0, 0].cpu(), others)

    def test_an_infinite_weight_of_a_tap_in_front_of_the_row_is_not_multiplied(self):
        weight = normal(3, 4, seed=1)
        weight[:, 0] = math.inf
        out = self.run(normal(1, 3, 8), weight)
        assert bool(out[:, :, :3].isfinite().all())
        assert not out[:, :, 3:].isfinite().any()

    def test_state_behind_rows_of_sequences(self):
        x = normal(2, 3, 6)
        seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1], [4, 4, 4, 4, 4, -1]], dtype=torch.int32)
        _, state = self.run(x, normal(3, 4, seed=1), seq_idx=seq_idx, return_state=True)
        wanted = x[:, :, 3:].clone()
        wanted[0, :, 0] = 0
        wanted[1] = 0
        assert torch.equal(state.cpu(), wanted)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_float32_weights_beside_a_half_type(self, dtype):
        if self.backend == "fibres" or (self.backend == "triton" and self.device == "cpu" and dtype == torch.bfloat16):
            return
        x, weight, bias = normal(2, 8, 24, dtype=dtype), normal(8, 4, seed=1), normal(8, seed=2)
        weight.requires_grad_()
        out = self.run(x, weight, bias, activation="silu")
        assert out.dtype == dtype
        (found,) = torch.autograd.grad(out.float().sum(), weight)
        wanted = depthwise_conv1d(x.double(), weight.double(), bias.double(), activation="silu", backend="reference")
        (gold,) = torch.autograd.grad(wanted.sum(), weight)
        torch.testing.assert_close(found.cpu(), gold, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            out.cpu(), wanted.to(dtype), rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-3
        )

    def test_vmap_over_inputs_and_weights(self):
        if self.backend == "triton" and self.device == "cpu":
            return  # what folds a mapped dimension is the same on every backend; the interpreter is slow
        x, weight = normal(3, 2, 4, 7, dtype=torch.float64), normal(3, 4, 3, seed=1, dtype=torch.float64)
        seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 2, 2, 2, 2, -1, -1]], dtype=torch.int32)

        def loss(x, weight, seq_idx):
            return self.run(x, weight, activation="silu", seq_idx=seq_idx).pow(2).sum()

        if self.backend != "reference":
            x, weight, seq_idx = x.to(self.device), weight.to(self.device), seq_idx.to(self.device)
        each = torch.func.grad(loss, argnums=(0, 1))
        wanted = [each(x[i], weight[i], seq_idx) for i in range(3)]
        for in_dims, sequences in (((0, 0, None), seq_idx), ((0, 0, 0), seq_idx.expand(3, 2, 7))):
            found = torch.func.vmap(each, in_dims=in_dims)(x, weight, sequences)
            for a, b in zip(found, zip(*wanted, strict=True), strict=True):
                torch.testing.assert_close(a, torch.stack(b))

    @settings(FUZZ)
    @given(data=st.data())
    def test_random_problems(self, data):
        if self.backend == "reference":
            return  # it is what others are compared with
        generator = data.draw(strategies.generators())
        batch, channels = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 5, 16, 40]))
        length, taps = data.draw(strategies.sizes(largest=90)), data.draw(st.sampled_from([1, 2, 3, 4, 6]))
        dilation = data.draw(st.sampled_from([1, 1, 2, 9]))
        order = data.draw(st.sampled_from([torch.clone, last]))

        def draw(*shape):
            return torch.randn(shape, generator=generator)

        arguments: dict[str, Any] = {
            "x": order(draw(batch, channels, length)),
            "weight": draw(channels, taps),
            "dilation": dilation,
            "activation": data.draw(st.sampled_from([None, "silu"])),
        }
        if data.draw(st.booleans()):
            arguments["bias"] = draw(channels)
        if data.draw(st.booleans()):
            arguments["initial_state"] = draw(batch, channels, (taps - 1) * dilation)
        if data.draw(st.booleans()):
            steps = torch.randint(0, 5, (batch, length), generator=generator) == 0
            arguments["seq_idx"] = steps.cumsum(-1).to(torch.int32)
        names = ("x", "weight", "bias", "initial_state")

        def run(backend, device, dtype):
            moved = {
                n: x.to(device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, torch.Tensor) else x
                for n, x in arguments.items()
            }
            out, found = gradients(lambda **a: (depthwise_conv1d(**a, backend=backend),), moved, names)
            return {"out": out[0]} | {f"grad {n}": g for n, g in found.items()}

        low, gold = run("reference", "cpu", torch.float32), run("reference", "cpu", torch.float64)
        for name, got in run(self.backend, self.device, torch.float32).items():
            row = compare(name, got, low[name], gold[name], scale=1.0)
            assert row.ok, str(row)


class UpdateProperties(OpProperties):
    ops = ("depthwise_conv1d_update",)

    def step(self, x, state, weight, bias=None, **arguments):
        return depthwise_conv1d_update(x, state, weight, bias, backend=self.backend, **arguments)

    @pytest.mark.parametrize(("size", "circular", "dilation"), [(3, False, 1), (8, False, 2), (7, True, 2)])
    def test_steps_equal_the_whole(self, size, circular, dilation):
        """Bit for bit on the CPU; elsewhere up to the order in which a compiler fuses."""
        x, weight, bias = (normal(*s, seed=i).to(self.device) for i, s in enumerate([(2, 21, 30), (21, 4), (21,)]))
        whole = depthwise_conv1d(x, weight, bias, dilation=dilation, activation="silu", backend=self.backend)
        state = torch.zeros(2, 21, size, device=self.device)
        steps, first = [], 0
        for count in (1, 4, 1, 1, 9, 14):
            known = torch.full((2,), first, dtype=torch.int32, device=self.device) if circular else None
            piece = x[:, :, first] if count == 1 else x[:, :, first : first + count]
            out = self.step(piece, state, weight, bias, dilation=dilation, activation="silu", cache_seqlens=known)
            steps.append(out.reshape(2, 21, count))
            first += count
        exact: dict[str, Any] = {"rtol": 0.0, "atol": 0.0} if self.backend == "cpu" else {}
        torch.testing.assert_close(torch.cat(steps, -1), whole, **exact)

    def test_skipped_rows_are_left_alone(self):
        x, state, weight = normal(3, 5).to(self.device), normal(4, 5, 3, seed=1).to(self.device), normal(5, 4, seed=2)
        before = state.clone()
        x[1] = math.nan
        rows = torch.tensor([2, -1, 0], dtype=torch.int32, device=self.device)
        out = self.step(x, state, weight.to(self.device), state_indices=rows)
        assert not out[1].any()
        assert torch.equal(state[[1, 3]], before[[1, 3]])
        assert torch.equal(state[[2, 0], :, :2], before[[2, 0], :, 1:])
        assert torch.equal(state[[2, 0], :, 2], x[[0, 2]])

    def test_a_step_compiles_whole(self):
        if self.backend in ("reference", "fibres"):
            return
        x, weight = normal(2, 5).to(self.device), normal(5, 4, seed=2).to(self.device)
        states = [normal(2, 5, 3, seed=1).to(self.device) for _ in range(2)]
        compiled = torch.compile(lambda x, s, w: self.step(x, s, w) + 1, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, states[0], weight), self.step(x, states[1], weight) + 1)
        assert torch.equal(states[0], states[1])
        torch._dynamo.reset()


def test_examples():
    found = doctest.testmod(api)
    assert found.attempted > 0
    assert not found.failed


def test_sequences_out_of_order_are_refused():
    seq_idx = torch.tensor([[0, 0, 1, -1, 1], [0, 2, 2, 1, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"seq_idx.*fall.*1 behind 2 at \(1, 3\)"):
        depthwise_conv1d(torch.zeros(2, 3, 5), torch.zeros(3, 4), seq_idx=seq_idx)


class TestReference(DepthwiseProperties):
    backend = "reference"
    large = False


class TestReferenceUpdate(UpdateProperties):
    backend = "reference"


class TestCpu(DepthwiseProperties):
    backend = "cpu"

    @pytest.mark.parametrize("order", [torch.clone, last])
    def test_one_two_and_three_threads_are_bit_equal(self, order):
        tensors = [order(normal(2, 40, 9000)).requires_grad_(), normal(40, 4, seed=1).requires_grad_()]
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                out = depthwise_conv1d(*tensors, activation="silu", backend="cpu")
                found.append([out, *torch.autograd.grad(out.sum(), tensors)])
        finally:
            torch.set_num_threads(threads)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))

    @pytest.mark.parametrize("order", [torch.clone, last])
    def test_a_reach_longer_than_a_piece(self, order):
        x, weight, state = normal(1, 3, 20000), normal(3, 2, seed=1), normal(1, 3, 9000, seed=2)
        tensors = [t.requires_grad_() for t in (order(x), weight, order(state))]
        found = []
        for backend in ("cpu", "reference"):
            out = depthwise_conv1d(*tensors[:2], dilation=9000, initial_state=tensors[2], backend=backend)
            found.append([out, *torch.autograd.grad(out.pow(2).sum(), tensors)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class TestCpuUpdate(UpdateProperties):
    backend = "cpu"


class TestFibres(DepthwiseProperties):
    """The CUDA kernels, a fibre per thread, on the CPU."""

    backend = "fibres"
    slow = True
    large = False

    @pytest.mark.parametrize("order", [torch.clone, last])
    def test_a_reach_longer_than_shared_memory(self, order):
        x, weight = order(normal(1, 2, 1100, dtype=torch.float64)), normal(2, 3, seed=1, dtype=torch.float64)
        tensors = [x.requires_grad_(), weight.requires_grad_()]
        found = []
        for backend in ("fibres", "reference"):
            out = depthwise_conv1d(
                *tensors, dilation=300 if order is last else 1050, activation="silu", backend=backend
            )
            found.append([out, *torch.autograd.grad(out.pow(2).sum(), tensors)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


class TestFibresUpdate(UpdateProperties):
    backend = "fibres"
    slow = True


@pytest.mark.triton_interpreted
class TestTriton(DepthwiseProperties):
    backend = "triton"
    slow = True
    large = False


@pytest.mark.gpu
class TestCuda(DepthwiseProperties):
    backend = "cuda"
    device = "cuda"


@pytest.mark.gpu
class TestCudaUpdate(UpdateProperties):
    backend = "cuda"
    device = "cuda"


@pytest.mark.gpu
class TestTritonOnGpu(DepthwiseProperties):
    backend = "triton"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(DepthwiseProperties):
    backend = "reference"
    device = "cuda"
    large = False
