"""What the invertible 1x1 convolution promises, on every backend."""

import doctest
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpkernels.flows import PLU, invertible_conv1x1, plu_decompose
from mpkernels.flows.invertible_conv1x1 import api, autograd, matrix
from mpkernels.testing import compare, gradients, strategies
from mpkernels.testing.properties import OpProperties


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def moved(weight, device, dtype=None):
    """A matrix, or all of its parts, on a device."""
    if isinstance(weight, torch.Tensor):
        return weight.to(device, dtype)
    return PLU(weight.permutation.to(device), *(t.to(device, dtype) for t in weight[1:]))


class ConvolutionProperties(OpProperties):
    ops = ("invertible_conv1x1",)

    def run(self, x, weight, bias=None, **arguments):
        bias = None if bias is None else bias.to(self.device)
        return invertible_conv1x1(
            x.to(self.device), moved(weight, self.device), bias, backend=self.backend, **arguments
        )

    @pytest.mark.parametrize("inverse", [False, True])
    @pytest.mark.parametrize("parts", [False, True])
    def test_log_abs_det_is_that_of_the_jacobian(self, parts, inverse):
        x, weight = normal(1, 3, 2, dtype=torch.float64), normal(3, 3, seed=1, dtype=torch.float64)
        weight = plu_decompose(weight) if parts else weight
        jacobian = torch.autograd.functional.jacobian(lambda x: self.run(x, weight, inverse=inverse)[0], x)
        _, wanted = torch.linalg.slogdet(jacobian.reshape(6, 6))
        torch.testing.assert_close(self.run(x, weight, inverse=inverse)[1][0], wanted)

    @pytest.mark.parametrize("parts", [False, True])
    @pytest.mark.parametrize("shape", [(2, 24, 5, 9), (40, 24)])
    def test_round_trip(self, shape, parts):
        """Within C roundings of the largest number, times the condition number of the matrix."""
        x, weight, bias = normal(*shape), normal(24, 24, seed=1), normal(24, seed=2)
        condition = float(torch.linalg.cond(weight.double()))
        weight = plu_decompose(weight) if parts else weight
        y, log_abs_det = self.run(x, weight, bias)
        back, negative = self.run(y.cpu(), weight, bias, inverse=True)
        bound = 24 * torch.finfo(torch.float32).eps * condition * float(x.abs().max())
        assert float((back.cpu() - x).abs().max()) <= bound
        assert torch.equal(negative, -log_abs_det)

    def test_parts_are_the_matrix(self):
        x, weight = normal(2, 9, 30), normal(9, 9, seed=1)
        whole, parts = self.run(x, weight), self.run(x, plu_decompose(weight))
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)

    def test_outside_the_triangles_nothing_is_read(self):
        x, parts = normal(2, 5, 6).to(self.device), moved(plu_decompose(normal(5, 5, seed=1)), self.device)
        inside = torch.ones(5, 5, dtype=torch.bool, device=self.device).tril(-1)
        for inverse in (False, True):
            found = []
            for fill in (0.0, math.nan, math.inf):
                lower = torch.where(inside, parts.lower, fill).requires_grad_()
                upper = torch.where(inside.T, parts.upper, fill).requires_grad_()
                weight = parts._replace(lower=lower, upper=upper)
                y, log_abs_det = invertible_conv1x1(x, weight, inverse=inverse, backend=self.backend)
                of_lower, of_upper = torch.autograd.grad(y.square().sum() + log_abs_det.sum(), (lower, upper))
                assert not of_lower[~inside].any()
                assert not of_upper[~inside.T].any()
                found.append((y, of_lower, of_upper))
            for others in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))

    def test_a_singular_weight(self):
        x, weight = normal(2, 3, 4), torch.diag(torch.tensor([1.0, 0.0, 2.0]))
        y, log_abs_det = self.run(x, weight)
        assert bool((log_abs_det == -math.inf).all())
        assert bool(y.isfinite().all())
        for singular in (weight, plu_decompose(weight)):
            if self.device == "cpu":
                with pytest.raises(ValueError, match=r"weight.*invertible.*singular"):
                    self.run(x, singular, inverse=True)
            else:
                assert not self.run(x, singular, inverse=True)[0].isfinite().all()

    def test_a_weight_that_is_not_finite(self):
        weight = torch.eye(3)
        weight[1, 2] = math.nan
        for inverse in (False, True):
            y, log_abs_det = self.run(normal(2, 3, 4), weight, inverse=inverse)
            assert bool(y[:, 1].isnan().all())
            assert log_abs_det.shape == (2,)

    @settings(strategies.fuzz(12))
    @given(data=st.data())
    def test_random_products(self, data):
        """The product behind it, which takes any number of outputs."""
        if self.backend == "reference":
            return  # it is what others are compared with
        generator = data.draw(strategies.generators())
        batch, positions = data.draw(st.integers(1, 5)), data.draw(st.one_of(st.just(1), strategies.sizes()))
        inputs, outputs = (data.draw(strategies.sizes(zero=False, largest=70)) for _ in range(2))
        x = torch.randn((batch, inputs, positions), generator=generator)
        order = data.draw(st.sampled_from([None, 0, 1]))
        if order is not None:
            x = x.movedim(order, -1).contiguous().movedim(-1, order)
        arguments = {"x": x, "weight": torch.randn((outputs, inputs), generator=generator)}
        arguments["bias"] = torch.randn(outputs, generator=generator)
        names = data.draw(st.sampled_from([("x", "weight", "bias"), ("x",), ("weight",), ("bias",)]))

        def run(backend, device, dtype):
            own = {n: t.to(device, dtype) for n, t in arguments.items()}
            out, found = gradients(lambda **a: (autograd.run(**a, backend=backend),), own, names)
            return {"y": out[0]} | {f"grad {n}": g for n, g in found.items()}

        low, gold = run("reference", "cpu", torch.float32), run("reference", "cpu", torch.float64)
        for name, got in run(self.backend, self.device, torch.float32).items():
            row = compare(name, got, low[name], gold[name], scale=1.0)
            assert row.ok, str(row)

    def test_vmap_over_samples_and_weights(self):
        x, weight = normal(3, 2, 4, 5, dtype=torch.float64), normal(3, 4, 4, seed=1, dtype=torch.float64)
        x, weight = x.to(self.device), weight.to(self.device)

        def loss(x, weight):
            y, log_abs_det = invertible_conv1x1(x, weight, backend=self.backend)
            return y.square().sum() + log_abs_det.sum()

        for shared in (False, True):
            each = torch.func.grad(loss, argnums=(0, 1))
            weights = weight[0] if shared else weight
            found = torch.func.vmap(each, in_dims=(0, None if shared else 0))(x, weights)
            wanted = [each(x[i], weight[0 if shared else i]) for i in range(3)]
            for a, b in zip(found, zip(*wanted, strict=True), strict=True):
                torch.testing.assert_close(a, torch.stack(b))


def test_examples():
    for module in (api, matrix):
        found = doctest.testmod(module)
        assert found.attempted > 0
        assert not found.failed


def test_decomposition():
    weight = normal(8, 8, dtype=torch.float64)
    parts = plu_decompose(weight)
    whole, log_abs_det = matrix.of_weight(parts, torch.float64, False)
    torch.testing.assert_close(whole, weight)
    torch.testing.assert_close(log_abs_det, torch.linalg.slogdet(weight).logabsdet)
    torch.testing.assert_close(matrix.of_weight(parts, torch.float64, True)[0], torch.linalg.inv(weight))
    assert plu_decompose(torch.empty(0, 0)).permutation.shape == (0,)
    refused: Any = (([[1.0]], TypeError), (torch.zeros(2, 3), ValueError), (torch.eye(2).int(), TypeError))
    for bad, error in refused:
        with pytest.raises(error, match="weight"):
            plu_decompose(bad)


class TestReference(ConvolutionProperties):
    backend = "reference"
    large = False


class TestCpu(ConvolutionProperties):
    backend = "cpu"

    @pytest.mark.parametrize("case", ["many", "many channels"])
    def test_one_two_and_three_threads_are_bit_equal(self, case):
        self.check_threads(self.specs()[0], case, torch.float32)


@pytest.mark.gpu
class TestReferenceOnGpu(ConvolutionProperties):
    backend = "reference"
    device = "cuda"
    large = False
