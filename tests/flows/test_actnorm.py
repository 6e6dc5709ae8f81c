"""What ActNorm promises, on every backend."""

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpkernels.flows import actnorm, actnorm_statistics
from mpkernels.flows.actnorm import api
from mpkernels.testing import compare, gradients, strategies
from mpkernels.testing.properties import OpProperties

FUZZ = strategies.fuzz(8, interpreted=3)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class ActNormProperties(OpProperties):
    ops = ("actnorm",)

    def run(self, x, bias, log_scale, **arguments):
        tensors = (t.to(self.device) for t in (x, bias, log_scale))
        return actnorm(*tensors, backend=self.backend, **arguments)

    @pytest.mark.parametrize("inverse", [False, True])
    @pytest.mark.parametrize("shift_first", [False, True])
    def test_log_abs_det_is_that_of_the_jacobian(self, shift_first, inverse):
        x, bias, log_scale = (
            normal(1, 2, 3, dtype=torch.float64),
            normal(2, seed=1).double(),
            normal(2, seed=2).double(),
        )
        settings = {"shift_first": shift_first, "inverse": inverse}
        jacobian = torch.autograd.functional.jacobian(lambda x: self.run(x, bias, log_scale, **settings)[0], x)
        _, wanted = torch.linalg.slogdet(jacobian.reshape(6, 6))
        torch.testing.assert_close(self.run(x, bias, log_scale, **settings)[1][0], wanted)

    @pytest.mark.parametrize("shift_first", [False, True])
    def test_round_trip(self, shift_first):
        """Within 4 roundings of the largest number that occurs."""
        x, bias, log_scale = normal(3, 20, 6, 7), 3 * normal(20, seed=1), normal(20, seed=2)
        y, log_abs_det = self.run(x, bias, log_scale, shift_first=shift_first)
        back, negative = self.run(y.cpu(), bias, log_scale, shift_first=shift_first, inverse=True)
        terms = x.abs() + bias.abs()[:, None, None] * (1 if shift_first else log_scale.neg().exp()[:, None, None])
        assert bool(((back.cpu() - x).abs() <= 4 * torch.finfo(torch.float32).eps * terms).all())
        assert torch.equal(negative, -log_abs_det)

    def test_memory_orders_are_bit_equal(self):
        x, bias, log_scale = normal(2, 18, 5, 7), normal(18, seed=1), normal(18, seed=2)
        first, log_abs_det = self.run(x, bias, log_scale)
        for other in (x.movedim(1, -1).contiguous().movedim(-1, 1), x.transpose(0, 3).contiguous().transpose(0, 3)):
            y, again = self.run(other, bias, log_scale)
            assert y.is_contiguous()
            torch.testing.assert_close(
                y, first, rtol=0 if self.backend == "cpu" else None, atol=0 if self.backend == "cpu" else None
            )
            assert torch.equal(again, log_abs_det)

    def test_what_is_not_finite_stays_in_its_channel(self):
        x, bias, log_scale = normal(2, 3, 5), normal(3, seed=1), torch.tensor([math.nan, 0.5, math.inf])
        y, log_abs_det = self.run(x, bias, log_scale)
        assert y[:, 0].isnan().all()
        assert not y[:, 2].isfinite().any()
        torch.testing.assert_close(y[:, 1].cpu(), (x[:, 1] + bias[1]) * math.exp(0.5))
        assert log_abs_det.isnan().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_float32_parameters_beside_a_half_type(self, dtype):
        if self.backend == "triton" and self.device == "cpu" and dtype == torch.bfloat16:
            return
        x, bias, log_scale = normal(2, 4, 9, dtype=dtype), normal(4, seed=1), 0.2 * normal(4, seed=2)
        parameters = [t.to(self.device).requires_grad_() for t in (bias, log_scale)]
        y, log_abs_det = actnorm(x.to(self.device), *parameters, backend=self.backend)
        assert y.dtype == dtype
        assert log_abs_det.dtype == torch.float32
        found = torch.autograd.grad(y.float().sum() + log_abs_det.sum(), parameters)
        scale = log_scale.double().exp()
        inside = (x.double() + bias.double()[:, None]).sum((0, 2))
        torch.testing.assert_close(found[0].cpu(), (18 * scale).float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1].cpu(), (scale * inside + 18).float(), rtol=1e-4, atol=1e-3)

    @settings(FUZZ)
    @given(data=st.data())
    def test_random_problems(self, data):
        if self.backend == "reference":
            return  # it is what others are compared with
        generator = data.draw(strategies.generators())
        batch, channels = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 3, 16, 33]))
        positions = data.draw(st.one_of(st.just(1), strategies.sizes(largest=70)))
        order = data.draw(st.sampled_from([None, 1, 0]))
        x = torch.randn((batch, channels, positions), generator=generator)
        if order is not None:
            x = x.movedim(order, -1).contiguous().movedim(-1, order)
        arguments = {
            "x": x,
            "bias": torch.randn(channels, generator=generator),
            "log_scale": 0.5 * torch.randn(channels, generator=generator),
        }
        flags = {name: data.draw(st.booleans()) for name in ("shift_first", "inverse")}

        def run(backend, device, dtype):
            moved = {n: t.to(device, dtype) for n, t in arguments.items()}
            out, found = gradients(lambda **a: actnorm(**a, **flags, backend=backend), moved, tuple(arguments))
            return {"y": out[0], "log_abs_det": out[1]} | {f"grad {n}": g for n, g in found.items()}

        low, gold = run("reference", "cpu", torch.float32), run("reference", "cpu", torch.float64)
        for name, got in run(self.backend, self.device, torch.float32).items():
            row = compare(name, got, low[name], gold[name], scale=1.0)
            assert row.ok, str(row)


def test_examples():
    found = doctest.testmod(api)
    assert found.attempted > 0
    assert not found.failed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_make_zero_mean_and_unit_variance(dtype):
    x = (normal(16, 5, 9, 4, dtype=torch.float64) * torch.tensor([1e-3, 1, 4, 50, 9])[:, None, None] + 7).to(dtype)
    bias, log_scale = actnorm_statistics(x, epsilon=1e-9)
    assert bias.dtype == log_scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    y, _ = actnorm(x.double(), bias.double(), log_scale.double())
    atol = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(5).double(), rtol=0, atol=atol)
    deviation = x.double().std((0, 2, 3), correction=0)
    wanted = (deviation / (deviation + 1e-9)).square()
    torch.testing.assert_close(y.square().mean((0, 2, 3)), wanted, rtol=0, atol=atol)


def test_statistics_are_defined_for_a_constant_channel():
    bias, log_scale = actnorm_statistics(torch.full((3, 2), 4.0, requires_grad=True))
    assert torch.equal(bias, torch.full((2,), -4.0))
    torch.testing.assert_close(log_scale, torch.full((2,), -math.log(1e-6)))
    assert not log_scale.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(0, 3, 4)}, ValueError, r"x.*at least one number.*\(0, 3, 4\)"),
        ({"x": torch.zeros(2, 3, 0)}, ValueError, r"x.*at least one number.*\(2, 3, 0\)"),
        ({"x": torch.zeros(3)}, ValueError, r"x.*\(B, C, ...\).*\(3,\)"),
        ({"x": torch.zeros(2, 3).int()}, TypeError, "x.*int32"),
        ({"x": torch.zeros(2, 3), "epsilon": 0.0}, ValueError, "epsilon.*above 0.*0.0"),
        ({"x": torch.zeros(2, 3), "epsilon": "1"}, TypeError, "epsilon.*number.*str"),
    ],
)
def test_statistics_refuse(arguments, error, message):
    with pytest.raises(error, match=message):
        actnorm_statistics(**arguments)


class TestReference(ActNormProperties):
    backend = "reference"
    large = False


class TestCpu(ActNormProperties):
    backend = "cpu"

    @pytest.mark.parametrize("case", ["many", "channels last", "features, many samples"])
    def test_one_two_and_three_threads_are_bit_equal(self, case):
        self.check_threads(self.specs()[0], case, torch.float32)


@pytest.mark.triton_interpreted
class TestTriton(ActNormProperties):
    backend = "triton"
    slow = True
    large = False


@pytest.mark.gpu
class TestTritonOnGpu(ActNormProperties):
    backend = "triton"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(ActNormProperties):
    backend = "reference"
    device = "cuda"
    large = False
