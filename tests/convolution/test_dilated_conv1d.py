"""What the dilated convolution over time promises, on every backend."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpkernels import spec
from mpkernels.convolution import depthwise_conv1d, dilated_conv1d
from mpkernels.testing import compare, gradients, strategies, upcast
from mpkernels.testing.properties import OpProperties

NAMES = ("x", "weight", "bias", "initial_state")


def channels_last(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


class DilatedConvolutionProperties(OpProperties):
    ops = ("dilated_conv1d",)

    def convolution(self, *tensors, **settings):
        return dilated_conv1d(*tensors, **settings, backend=self.backend)

    def normal(self, *shape, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed + math.prod(shape))
        return torch.randn(*shape, generator=generator, dtype=dtype).to(self.device)

    def assert_same(self, got, wanted):
        """Equal bits of the kernels; plain torch may sum in another order where shapes differ."""
        if self.backend == "reference":
            torch.testing.assert_close(got, wanted)
        else:
            assert torch.equal(got, wanted)

    def test_equals_torch(self):
        for taps, dilation, groups, length in ((1, 3, 1, 5), (2, 1, 2, 20), (3, 4, 1, 6), (4, 5, 2, 66)):
            x, weight = self.normal(2, 4, length), self.normal(6, 4 // groups, taps)
            left = (taps - 1) * dilation
            padded = torch.nn.functional.pad(x, (left, 0))
            wanted = torch.nn.functional.conv1d(padded, weight, dilation=dilation, groups=groups)
            torch.testing.assert_close(self.convolution(x, weight, dilation=dilation, groups=groups), wanted)
            if taps % 2:
                wanted = torch.nn.functional.conv1d(x, weight, dilation=dilation, groups=groups, padding=left // 2)
                got = self.convolution(x, weight, dilation=dilation, groups=groups, causal=False)
                torch.testing.assert_close(got, wanted)

    @pytest.mark.parametrize("dilation", [1, 3, 512])
    def test_a_tap_of_one_shifts(self, dilation):
        x, state = self.normal(1, 3, 70), self.normal(1, 3, 2 * dilation, seed=1)
        whole = torch.cat([state, x], dim=2)
        for tap in range(3):
            weight = torch.zeros(3, 3, 3, device=self.device)
            weight[:, :, tap] = torch.eye(3)
            first = tap * dilation
            got = self.convolution(x, weight, initial_state=state, dilation=dilation)
            assert torch.equal(got, whole[..., first : first + 70])

    def test_nothing_reads_the_future(self):
        x, weight = self.normal(1, 2, 80), self.normal(3, 2, 3)
        clean = self.convolution(x, weight, dilation=4)
        for bad in (0, 41, 79):
            poisoned = x.clone()
            poisoned[..., bad] = torch.nan
            got = self.convolution(poisoned, weight, dilation=4)
            reached = [t for t in (bad, bad + 4, bad + 8) if t < 80]
            others = [t for t in range(80) if t not in reached]
            assert bool(got[..., reached].isnan().all())
            assert torch.equal(got[..., others], clean[..., others])

    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    def test_a_gradient_reaches_what_its_output_read(self, poison):
        leaves = [self.normal(1, 2, 80).requires_grad_(), self.normal(1, 2, 8).requires_grad_()]
        weight = self.normal(3, 2, 3)
        out = self.convolution(leaves[0], weight, initial_state=leaves[1], dilation=4)
        seed = self.normal(*out.shape, seed=4)
        clean = torch.autograd.grad(out, leaves, seed, retain_graph=True)
        seed[..., 41] = poison
        of_x, of_state = torch.autograd.grad(out, leaves, seed)
        others = [t for t in range(80) if t not in (33, 37, 41)]
        assert not of_x[..., [33, 37, 41]].isfinite().any()
        assert torch.equal(of_x[..., others], clean[0][..., others])
        assert torch.equal(of_state, clean[1])

    def test_taps_that_meet_no_position(self):
        """They may hold anything, and their gradient is exactly 0."""
        x, weight = self.normal(2, 3, 5), self.normal(4, 3, 3)
        poisoned = weight.clone()
        poisoned[..., :2] = torch.tensor([torch.nan, torch.inf], device=self.device)
        grad = self.normal(2, 4, 5)
        found = []
        for w in (weight, poisoned):
            leaves = [x.clone().requires_grad_(), w.requires_grad_()]
            out = self.convolution(*leaves, dilation=5)
            found.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
        for got, wanted in zip(*found, strict=True):
            assert torch.equal(got, wanted)
        assert not found[0][2][..., :2].any()
        centred = self.normal(4, 3, 3)
        centred[..., [0, 2]] = torch.nan
        got = self.convolution(x, centred, dilation=5, causal=False)
        self.assert_same(got, self.convolution(x, centred[..., 1:2]))

    def test_a_tap_matters_where_it_reads(self):
        """A NaN in a tap, or in a gradient, whose partner lies outside for some positions and inside for others."""
        x, weight, grad = self.normal(1, 2, 40), self.normal(3, 2, 3), self.normal(1, 3, 40)
        poisoned = weight.clone()
        poisoned[..., 0] = torch.nan
        leaves = [x.requires_grad_(), poisoned.requires_grad_()]
        out = self.convolution(*leaves, dilation=4)
        assert torch.equal(out.isfinite().all(1)[0], torch.arange(40, device=self.device) < 8)
        of_x = torch.autograd.grad(out, leaves, grad)[0]
        assert torch.equal(of_x.isfinite().all(1)[0], torch.arange(40, device=self.device) >= 32)
        grad[..., :8] = torch.nan  # tap 0 reads nothing there
        of_weight = torch.autograd.grad(self.convolution(x, weight.requires_grad_(), dilation=4), weight, grad)[0]
        assert bool(of_weight[..., 0].isfinite().all())
        assert not of_weight[..., 1:].isfinite().any()

    def test_the_longest_dilation(self):
        x, weight = self.normal(1, 3, 7), self.normal(2, 3, 3)
        got = self.convolution(x, weight, dilation=2**31 - 1)
        self.assert_same(got, self.convolution(x, weight[..., 2:]))

    def test_a_sequence_can_be_cut_anywhere(self):
        """Results, and gradients through the states; parts are shorter than the receptive field of 27 too."""
        x, grad = self.normal(2, 5, 80).requires_grad_(), self.normal(2, 6, 80)
        weight, bias = self.normal(6, 5, 4).requires_grad_(), self.normal(6).requires_grad_()
        state = self.normal(2, 5, 27).requires_grad_()
        leaves = (x, weight, bias, state)

        def run(*cuts):
            before, found = state, []
            for begin, end in zip((0, *cuts), (*cuts, 80), strict=True):
                out, before = self.convolution(
                    x[..., begin:end], weight, bias, initial_state=before, dilation=9, return_state=True
                )
                found.append(out)
            out = torch.cat(found, dim=2)
            return out, before, torch.autograd.grad((out, before), leaves, (grad, torch.ones_like(before)))

        whole, last, wanted = run()
        every = ((13, 64), (1, 2, 3, 40, 65, 79), tuple(range(20, 26)))
        for cuts in every[: 1 if self.slow else None]:
            out, end, found = run(*cuts)
            self.assert_same(out, whole)
            assert torch.equal(end, last)
            for got, of_whole in zip(found, wanted, strict=True):
                torch.testing.assert_close(got, of_whole, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("last", [False, True])
    def test_a_position_at_a_time(self, last):
        x, weight = self.normal(2, 3, 9), self.normal(4, 3, 2)
        whole = self.convolution(x, weight, dilation=4)
        state, order = None, channels_last if last else torch.Tensor.contiguous
        for t in range(9):
            out, state = self.convolution(
                order(x[..., t : t + 1]), weight, initial_state=state, dilation=4, return_state=True
            )
            self.assert_same(out[..., 0], whole[..., t])

    def test_a_state_has_memory_of_its_own(self):
        x = self.normal(2, 3, 9)
        _, state = self.convolution(x, self.normal(4, 3, 2), dilation=4, return_state=True)
        assert torch.equal(state, x[..., -4:])
        x.zero_()
        assert bool(state.any())
        assert state.is_contiguous()

    def test_memory_order(self):
        """Channels last in gives channels last out, with the same bits."""
        batch, length = (1, 20) if self.slow else (2, 80)
        arguments = [
            self.normal(batch, 17, length),
            self.normal(24, 17, 3),
            self.normal(24),
            self.normal(batch, 17, 10),
        ]

        def run(order):
            leaves = [order(arguments[0]).requires_grad_(), *(a.clone().requires_grad_() for a in arguments[1:])]
            out = self.convolution(*leaves[:3], initial_state=leaves[3], dilation=5)
            return [out, *torch.autograd.grad(out, leaves, self.normal(batch, 24, length))]

        first, last = run(torch.clone), run(channels_last)
        for a, b in zip(first, last, strict=True):
            if self.backend == "cpu":
                assert torch.equal(a, b)
            else:
                torch.testing.assert_close(a, b)
        if self.backend != "reference":
            for a, b in zip(first[:2], last[:2], strict=True):
                assert a.is_contiguous()
                assert b.transpose(1, 2).is_contiguous()

    def test_a_batch_is_its_sequences(self):
        x, weight, state = self.normal(3, 5, 70), self.normal(6, 5, 2), self.normal(3, 5, 6)
        out = self.convolution(x, weight, initial_state=state, dilation=6)
        for b in range(3):
            one = self.convolution(x[b : b + 1], weight, initial_state=state[b : b + 1], dilation=6)
            self.assert_same(out[b : b + 1], one)

    def test_groups_are_convolutions_of_their_own(self):
        x, weight = self.normal(2, 6, 40), self.normal(4, 3, 2)
        got = self.convolution(x, weight, dilation=3, groups=2)
        parts = [self.convolution(x[:, 3 * g : 3 * g + 3], weight[2 * g : 2 * g + 2], dilation=3) for g in range(2)]
        self.assert_same(got, torch.cat(parts, dim=1))

    def test_depthwise_is_the_op_of_that_name(self):
        x, weight, bias, state = self.normal(2, 5, 40), self.normal(5, 1, 3), self.normal(5), self.normal(2, 5, 8)
        numbers = torch.tensor([0] * 17 + [1] * 23, dtype=torch.int32).expand(2, 40).to(self.device)
        common = {"dilation": 4, "initial_state": state, "return_state": True, "activation": "silu"}
        got = self.convolution(x, weight, bias, groups=5, seq_idx=numbers, **common)
        wanted = depthwise_conv1d(x, weight[:, 0], bias, seq_idx=numbers, backend=self.backend, **common)
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b)
        dense = torch.diag_embed(weight[:, 0].T).permute(1, 2, 0).contiguous()
        for a, b in zip(
            self.convolution(x, weight, bias, groups=5, **common),
            self.convolution(x, dense, bias, **common),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
        centred = self.convolution(x, weight, bias, groups=5, causal=False)
        torch.testing.assert_close(centred, torch.nn.functional.conv1d(x, weight, bias, padding=1, groups=5))

    def test_transforms(self):
        """vmap over any argument, gradients a sample, derivatives of derivatives."""
        samples = 2
        tensors = [
            self.normal(samples, *shape, seed=i, dtype=torch.float64)
            for i, shape in enumerate([(2, 2, 4), (3, 2, 2), (3,), (2, 2, 1)])
        ]

        def loss(x, weight, bias, state):
            return self.convolution(x, weight, bias, initial_state=state).pow(3).sum()

        gradient = torch.func.grad(loss, argnums=(0, 1, 2, 3))
        for dims in ((0, None, None, 0), (0, 0, 0, 0), (None, 0, None, None))[: 1 if self.slow else 3]:
            shared = [x if dim == 0 else x[0] for x, dim in zip(tensors, dims, strict=True)]
            each = torch.func.vmap(gradient, in_dims=dims)(*shared)
            one = [
                gradient(*(x if dim is None else x[v] for x, dim in zip(shared, dims, strict=True)))
                for v in range(samples)
            ]
            for a, b in zip(each, zip(*one, strict=True), strict=True):
                torch.testing.assert_close(a, torch.stack(b))
        if self.slow:
            return
        first = [x[0, :1] if i in (0, 3) else x[0] for i, x in enumerate(tensors)]

        def of(backend):
            def loss(x, weight, bias, state):
                return dilated_conv1d(x, weight, bias, initial_state=state, backend=backend).pow(3).sum()

            return torch.func.hessian(loss, argnums=(0, 1, 2, 3))(*first)

        for row, wanted in zip(of(self.backend), of("reference"), strict=True):
            for a, b in zip(row, wanted, strict=True):
                torch.testing.assert_close(a, b)

    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(data=st.data())
    def test_random_shapes(self, data):
        generator = data.draw(strategies.generators())
        groups, taps, dilation = (data.draw(st.integers(1, most)) for most in ((2, 3, 30) if self.slow else (2, 5, 30)))
        channels, outputs = (groups * data.draw(st.integers(1, 9)) for _ in range(2))
        batch, length = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 30 if self.slow else 150))
        shapes = {"x": (batch, channels, length), "weight": (outputs, channels // groups, taps)}
        optional = {"bias": (outputs,), "initial_state": (batch, channels, (taps - 1) * dilation)}
        for name, shape in optional.items():
            if data.draw(st.booleans()):
                shapes[name] = shape
        arguments = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        if data.draw(st.booleans()):
            arguments["x"] = channels_last(arguments["x"])
        arguments = {name: x.to(self.device) for name, x in arguments.items()}

        def run(arguments, backend):
            found = gradients(
                lambda **a: dilated_conv1d(**a, dilation=dilation, groups=groups, return_state=True, backend=backend),
                arguments,
                NAMES,
            )
            return dict(zip(("out", "state"), found[0], strict=True)) | {f"grad {n}": g for n, g in found[1].items()}

        low, gold = run(arguments, "reference"), run(upcast(arguments, device=self.device), "reference")
        for name, got in run(arguments, self.backend).items():
            row = compare(name, got, low[name], gold[name], scale=1.0)
            assert row.ok, str(row)


class TestReference(DilatedConvolutionProperties):
    backend = "reference"
    large = False


class TestCpu(DilatedConvolutionProperties):
    backend = "cpu"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_any_number_of_threads_gives_the_same_bits(self, dtype):
        for name in ("many", "many, channels last"):
            self.check_threads(spec.find("dilated_conv1d"), name, dtype)


@pytest.mark.triton_interpreted
class TestTriton(DilatedConvolutionProperties):
    backend = "triton"
    slow = True
    large = False


@pytest.mark.gpu
class TestTritonOnGpu(DilatedConvolutionProperties):
    backend = "triton"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(DilatedConvolutionProperties):
    backend = "reference"
    device = "cuda"
    large = False
