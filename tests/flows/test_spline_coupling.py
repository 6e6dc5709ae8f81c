"""What the spline coupling promises, on every backend."""

import doctest
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpkernels import spec
from mpkernels.flows import pack_spline_parameters, spline_coupling
from mpkernels.flows.spline_coupling import api
from mpkernels.testing import strategies
from mpkernels.testing.properties import OpProperties

FUZZ = strategies.fuzz(8)


def normal(*shape, seed=0, spread=1.0, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread).to(dtype)


def uniform(*shape, bound=3.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return ((torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * bound).to(dtype)


def slopes(x, parameters, **settings):
    """f' of every element, in float64."""
    logs = spline_coupling(
        x.double().reshape(-1), parameters.double().reshape(-1, parameters.shape[-1]), backend="reference", **settings
    )[1]
    return logs.exp().reshape(x.shape)


class SplineProperties(OpProperties):
    ops = ("spline_coupling",)
    slow = False

    def run(self, x, parameters, **settings):
        low = settings.pop("low", None)
        low = None if low is None else low.to(self.device)
        x, parameters = x.to(self.device), parameters.to(self.device)
        return spline_coupling(x, parameters, low=low, backend=self.backend, **settings)

    def gradients(self, x, parameters, **settings):
        """y, log_abs_det and the gradients of a weighted sum of both."""
        leaves = [t.detach().clone().to(self.device).requires_grad_() for t in (x, parameters)]
        y, log_abs_det = self.run(*leaves, **settings)
        kept = torch.where(y.isfinite(), y, 0.0) * normal(*y.shape, seed=9).to(y)
        return [y.detach(), log_abs_det.detach(), *torch.autograd.grad(kept.sum() + log_abs_det.sum(), leaves)]

    @pytest.mark.parametrize("inverse", [False, True])
    def test_equals_nflows(self, inverse):
        from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

        x, parameters = uniform(6, 11, bound=4.0, dtype=torch.float64), normal(6, 11, 23, dtype=torch.float64)
        wanted, logs = unconstrained_rational_quadratic_spline(
            x, *parameters.split([8, 8, 7], -1), inverse=inverse, tail_bound=2.5
        )
        y, log_abs_det = self.run(x, parameters, inverse=inverse, tail_bound=2.5)
        torch.testing.assert_close(y.cpu(), wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(log_abs_det.cpu(), logs.sum(1), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("inverse", [False, True])
    def test_log_abs_det_is_that_of_the_jacobian(self, inverse):
        x, parameters = uniform(1, 5, bound=4.0, dtype=torch.float64), normal(1, 5, 11, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(
            lambda x: self.run(x[None], parameters, inverse=inverse)[0][0], x[0].to(self.device)
        )
        wanted = torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(self.run(x, parameters, inverse=inverse)[1][0], wanted)

    @FUZZ
    @given(st.sampled_from([2, 3, 8, 32]), st.sampled_from([1.0, 3.0]), st.booleans(), st.integers(0, 99))
    def test_round_trip_with_low(self, bins, bound, inverse, seed):
        """Within 1e-6 in float32, whatever the slopes."""
        parameters = normal(4, 24, 3 * bins - 1, seed=seed, spread=5.0)
        x = uniform(4, 24, bound=1.1 * bound, seed=seed)
        y, log_abs_det, low = self.run(x, parameters, tail_bound=bound, inverse=inverse, return_low=True)
        back, of_back, rest = self.run(y, parameters, tail_bound=bound, inverse=not inverse, low=low, return_low=True)
        assert (back.cpu() - x).abs().max() <= 1e-6
        assert (back.cpu().double() + rest.cpu() - x).abs().max() <= 1e-6
        torch.testing.assert_close(of_back, -log_abs_det, rtol=1e-3, atol=1e-3)

    @FUZZ
    @given(st.sampled_from([2, 8, 32]), st.sampled_from([1.0, 3.0, 10.0]), st.booleans(), st.integers(0, 99))
    def test_round_trip_without_low(self, bins, bound, inverse, seed):
        """As far off as rounding y makes it, ulp(y) / 2 over the least slope between; f(x') is y again."""
        parameters = normal(4, 24, 3 * bins - 1, seed=seed, spread=5.0)
        x = uniform(4, 24, bound=1.1 * bound, seed=seed)
        y = self.run(x, parameters, tail_bound=bound, inverse=inverse)[0].cpu()
        back = self.run(y, parameters, tail_bound=bound, inverse=not inverse)[0].cpu()
        again = self.run(back, parameters, tail_bound=bound, inverse=inverse)[0].cpu()
        assert back.isfinite().all()
        error = (back - x).abs()
        assert ((error <= 1e-4) | ((again - y).abs() <= 1e-4)).all()
        between = torch.lerp(x, back, torch.linspace(0, 1, 33)[:, None, None])
        least = slopes(between, parameters.expand(33, *parameters.shape), tail_bound=bound, inverse=inverse).amin(0)
        ulp = 2.0**-23 * torch.maximum(y.abs(), torch.tensor(2.0**-20))
        # (half an ulp, doubled for the slopes between the 33 that were looked at)
        assert (error <= ulp / least + 1e-6 + 2.0**-23 * x.abs()).all()

    def test_low_goes_through_layers(self):
        layers = [normal(2, 40, 23, seed=seed, spread=5.0) for seed in range(3)]
        x = uniform(2, 40)
        y, low = x, torch.zeros_like(x)
        for parameters in layers:
            y, _, low = self.run(y, parameters, low=low, return_low=True)
        for parameters in reversed(layers):
            y, _, low = self.run(y, parameters, low=low, return_low=True, inverse=True)
        near = (y.cpu() - x).abs() <= 1e-6
        # (three layers as flat as 1e-7 each take more than the 48 bits of y + low)
        assert near.float().mean() > 0.7
        assert (y.isfinite() & low.isfinite()).all()

    def test_low_is_what_rounding_lost(self):
        x, parameters = uniform(2, 30, bound=3.3), normal(2, 30, 14)
        exact = self.run(x.double(), parameters.double())[0].cpu()
        y, _, low = (t.cpu() for t in self.run(x, parameters, return_low=True))
        assert torch.equal((y.double() + low.double()).float(), y)
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5)
        outside = x.abs() > 3
        assert torch.equal(y[outside], x[outside])
        assert not low[outside].any()
        kept = self.run(x, parameters, low=torch.full_like(x, 2.0**-30), return_low=True)[2].cpu()
        assert bool((kept[outside] == 2.0**-30).all())

    @pytest.mark.parametrize("inverse", [False, True])
    def test_bounds_and_beyond(self, inverse):
        """On the bounds the slope is 1; one ulp outside, far away and NaN are as they came."""
        ulp = torch.tensor(3.0).nextafter(torch.tensor(4.0)).item()
        x = torch.tensor([[3.0, -3.0, ulp, -ulp, 1e30, math.inf, -math.inf, math.nan]])
        parameters = normal(1, 8, 23, spread=2.0)
        y, log_abs_det, of_x, of_parameters = (t.cpu() for t in self.gradients(x, parameters, inverse=inverse))
        torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(log_abs_det, torch.zeros(1), rtol=0, atol=1e-6)
        assert of_x.isfinite().all()
        assert not of_parameters[0, 2:].any()
        # (on a bound neither y nor the slope depends on any parameter)
        torch.testing.assert_close(of_parameters[0, :2], torch.zeros(2, 23), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("inverse", [False, True])
    def test_parameters_outside_may_hold_anything(self, inverse):
        x, parameters = uniform(3, 20, bound=6.0), normal(3, 20, 11)
        outside = x.abs() > 3
        found = []
        for fill in (0.0, math.nan, math.inf, -math.inf):
            parameters[outside] = fill
            found.append(self.gradients(x, parameters, inverse=inverse))
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
        assert not found[0][3].cpu()[outside].any()

    @pytest.mark.parametrize("inverse", [False, True])
    @pytest.mark.parametrize("fill", [math.nan, math.inf])
    def test_nan_inside_stays_in_its_element(self, inverse, fill):
        x, parameters = uniform(3, 20), normal(3, 20, 11)
        clean = self.gradients(x, parameters, inverse=inverse)
        parameters[1, 7, :8] = fill
        y, log_abs_det, of_x, of_parameters = self.gradients(x, parameters, inverse=inverse)
        assert y[1, 7].isnan()
        assert log_abs_det[1].isnan()
        keep = torch.ones(3, 20, dtype=torch.bool, device=y.device)
        keep[1, 7] = False
        for a, b in zip((clean[0], clean[2], clean[3]), (y, of_x, of_parameters), strict=True):
            assert torch.equal(a[keep], b[keep])
        assert torch.equal(clean[1][[0, 2]], log_abs_det[[0, 2]])

    def test_minus_infinity_closes_a_bin(self):
        parameters = normal(1, 16, 11)
        parameters[..., 1], parameters[..., 6] = -math.inf, -math.inf
        x = uniform(1, 16)
        y, log_abs_det, low = self.run(x, parameters, return_low=True)
        assert log_abs_det.isfinite().all()
        back = self.run(y, parameters, inverse=True, low=low)[0]
        torch.testing.assert_close(back.cpu(), x, rtol=0, atol=1e-6)
        assert all(t.isfinite().all() for t in self.gradients(x, parameters))

    @pytest.mark.parametrize("inverse", [False, True])
    def test_on_knots(self, inverse):
        """Equal widths and heights are the identity at knots; there the slope is that of the parameters."""
        raw = normal(1, 3, 3, dtype=torch.float64)
        parameters = torch.cat([torch.zeros(1, 3, 8, dtype=torch.float64), raw], -1)
        x = torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64)
        y, log_abs_det = self.run(x, parameters, tail_bound=2.0, inverse=inverse)
        torch.testing.assert_close(y.cpu(), x)
        at_knots = 1e-3 + torch.nn.functional.softplus(raw[0].diagonal())
        wanted = at_knots.log().sum() * (-1 if inverse else 1)
        torch.testing.assert_close(log_abs_det.cpu()[0], wanted)

    def test_steep_end_of_a_flat_bin(self):
        """Where one form of the inverse's root subtracts numbers that differ in their last digits."""
        parameters = torch.tensor([9.0, -9.0, -9.0, 9.0, 1e6], dtype=torch.float64).expand(1, 20, 5)
        y = torch.linspace(-2.999, -2.995, 20, dtype=torch.float64)[None]
        x, log_abs_det = self.run(y, parameters, inverse=True)
        again, of_again = self.run(x, parameters)
        torch.testing.assert_close(again.cpu(), y, rtol=0, atol=1e-8)
        torch.testing.assert_close(of_again, -log_abs_det, rtol=1e-5, atol=0)

    def test_narrow_bins(self):
        """Nothing of the interval is lost where bins may almost vanish."""
        parameters = normal(2, 32, 23, spread=12.0)
        x = uniform(2, 32)
        settings = {"min_bin_width": 1e-9, "min_bin_height": 1e-9}
        y, log_abs_det = self.run(x, parameters, **settings)
        assert y.isfinite().all()
        assert (y.cpu().abs() <= 3).all()
        assert log_abs_det.isfinite().all()

    def test_memory_orders(self):
        """A convolution's parameters, the same as the last dimension: the same numbers, gradients in the same order."""
        x, last = uniform(2, 3, 5, 7), normal(2, 3, 5, 7, 11)
        first = last.movedim(-1, 2).contiguous().flatten(1, 2)
        wanted = self.gradients(x, last)
        found = self.gradients(x, first, parameters_dim=1)
        by_last = found[3].unflatten(1, (3, 11)).movedim(2, -1)
        for a, b in zip(wanted, (*found[:3], by_last), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert found[3].is_contiguous()
        channels_last = self.gradients(x, first.contiguous(memory_format=torch.channels_last), parameters_dim=1)
        torch.testing.assert_close(channels_last[3], found[3], rtol=1e-6, atol=1e-6)

    def test_strided_and_expanded(self):
        x, parameters = uniform(6, 10, 4), normal(6, 10, 4, 14)
        wanted = self.gradients(x[::2, 1::3], parameters[::2, 1::3])
        for a, b in zip(wanted, self.gradients(x[::2, 1::3].clone(), parameters[::2, 1::3].clone()), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        one = parameters[:1, :1]
        a, b = self.run(x, one.expand_as(parameters)), self.run(x, one.expand_as(parameters).contiguous())
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
        reordered = self.run(x.transpose(0, 1), parameters.transpose(0, 1))[0]
        torch.testing.assert_close(reordered.transpose(0, 1), self.run(x, parameters)[0], rtol=1e-6, atol=1e-6)

    def test_rows_are_elements(self):
        x, parameters = uniform(5, 37, bound=4.0), normal(5, 37, 23)
        y, log_abs_det = self.run(x, parameters)
        each, logs = self.run(x.reshape(-1, 1), parameters.reshape(-1, 1, 23))
        assert torch.equal(each.reshape(5, 37), y)
        torch.testing.assert_close(logs.reshape(5, 37).sum(1), log_abs_det, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_types(self, dtype):
        if self.backend == "fibres":
            return
        x, parameters = uniform(3, 16, dtype=dtype), normal(3, 16, 23, dtype=dtype)
        y, log_abs_det, low = self.run(x, parameters, return_low=True)
        assert (y.dtype, log_abs_det.dtype, low.dtype) == (dtype, torch.float32, dtype)
        exact, logs = spline_coupling(x.double(), parameters.double(), backend="reference")
        torch.testing.assert_close(log_abs_det.cpu().double(), logs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close((y.float() + low.float()).cpu().double(), exact, rtol=0, atol=1e-4)

    def test_vmap(self):
        x, parameters = uniform(3, 2, 4, dtype=torch.float64), normal(2, 3, 4, 8, dtype=torch.float64)
        x, parameters = x.to(self.device), parameters.to(self.device)

        def loss(x, parameters):
            y, log_abs_det = spline_coupling(x, parameters, backend=self.backend)
            return y.square().sum() + log_abs_det.sum()

        found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(1, 0))(x, parameters)
        for i in range(2):
            for a, b in zip(found, torch.func.grad(loss, argnums=(0, 1))(x[:, i], parameters[i]), strict=True):
                torch.testing.assert_close(a[i], b)

    @pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3, 0)])
    @pytest.mark.parametrize("first", [False, True])
    def test_empty(self, shape, first):
        x = torch.zeros(shape)
        raw = torch.zeros(shape[0], shape[1] * 8, *shape[2:]) if first else torch.zeros(*shape, 8)
        y, log_abs_det, of_x, of_parameters = self.gradients(x, raw, parameters_dim=1 if first else -1)
        assert (y.shape, of_x.shape, of_parameters.shape) == (x.shape, x.shape, raw.shape)
        assert torch.equal(log_abs_det.cpu(), torch.zeros(shape[0]))

    @pytest.mark.parametrize("wanted", ["x", "parameters"])
    def test_one_gradient_alone(self, wanted):
        x, parameters = uniform(2, 9).to(self.device), normal(2, 9, 11).to(self.device)
        both = self.gradients(x, parameters)
        leaf = (x if wanted == "x" else parameters).requires_grad_()
        y, log_abs_det = self.run(x, parameters)
        (found,) = torch.autograd.grad((y * normal(2, 9, seed=9).to(y)).sum() + log_abs_det.sum(), leaf)
        assert torch.equal(found, both[2 if wanted == "x" else 3])


class TestReference(SplineProperties):
    backend = "reference"


class TestCpu(SplineProperties):
    backend = "cpu"

    @pytest.mark.parametrize("case", ["many", "typical, inverse"])
    def test_threads(self, case):
        self.check_threads(spec.find("spline_coupling"), case, torch.float32)


class TestFibres(SplineProperties):
    backend = "fibres"
    slow = True
    large = False


@pytest.mark.gpu
class TestCuda(SplineProperties):
    backend = "cuda"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(SplineProperties):
    backend = "reference"
    device = "cuda"
    large = False


def test_pack_spline_parameters():
    widths, heights, derivatives = normal(2, 4), normal(2, 4, seed=1), normal(2, 3, seed=2)
    assert torch.equal(pack_spline_parameters(widths, heights, derivatives).split([4, 4, 3], -1)[2], derivatives)
    with pytest.raises(ValueError, match=r"derivatives.*\(2, 3\).*\(2, 4\)"):
        pack_spline_parameters(widths, heights, widths)
    with pytest.raises(ValueError, match=r"heights.*widths"):
        pack_spline_parameters(widths, heights[:1], derivatives)
    with pytest.raises(TypeError, match=r"widths.*Tensor"):
        pack_spline_parameters([1.0], heights, derivatives)  # pyright: ignore[reportArgumentType]


def test_docstrings():
    assert doctest.testmod(api).failed == 0
