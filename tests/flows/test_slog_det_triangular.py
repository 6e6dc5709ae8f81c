"""What the log-determinant of triangular matrices promises, on every backend."""

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpkernels.flows import slog_det_triangular
from mpkernels.flows.slog_det_triangular import api
from mpkernels.testing import strategies
from mpkernels.testing.properties import OpProperties


class SlogDetProperties(OpProperties):
    ops = ("slog_det_triangular",)

    def run(self, matrix):
        return slog_det_triangular(matrix.to(self.device), backend=self.backend)

    def test_nothing_off_the_diagonal_is_read(self):
        matrix = torch.full((5, 4, 4), math.nan).diagonal_scatter(torch.full((5, 4), -2.0), 0, 1, 2)
        matrix = matrix.to(self.device).requires_grad_()
        sign, log_abs_det = slog_det_triangular(matrix, backend=self.backend)
        assert bool((sign == 1).all())
        torch.testing.assert_close(log_abs_det.detach().cpu(), torch.full((5,), 4 * math.log(2)))
        (found,) = torch.autograd.grad(log_abs_det.sum(), matrix)
        torch.testing.assert_close(found.cpu(), torch.diag_embed(torch.full((5, 4), -0.5)), rtol=0, atol=0)

    def test_a_determinant_near_one_keeps_its_digits(self):
        diagonal = torch.tensor([1 + 2**-20, 4.0, -0.25, 1.0, 2**100, 2**-100], device=self.device)
        sign, log_abs_det = self.run(torch.diag(diagonal))
        assert sign.item() == -1
        assert log_abs_det.item() == pytest.approx(math.log1p(2**-20), rel=1e-6 if self.backend != "reference" else 10)

    @pytest.mark.parametrize(
        ("diagonal", "sign", "log_abs_det"),
        [
            ([3.0, 0.0], 0, -math.inf),
            ([-0.0, 5.0, -1.0], 0, -math.inf),
            ([math.inf, -2.0], -1, math.inf),
            ([math.inf, 0.0], 0, math.nan),
            ([math.nan, 1.0], math.nan, math.nan),
            ([1e-45, 1e-45], 1, 2 * math.log(2**-149)),
            ([3e38] * 40, 1, 40 * math.log(3e38)),
        ],
    )
    def test_edges(self, diagonal, sign, log_abs_det):
        found = self.run(torch.diag(torch.tensor(diagonal)))
        for got, wanted in zip(found, (sign, log_abs_det), strict=True):
            assert got.item() == pytest.approx(wanted, rel=1e-5, nan_ok=True)

    def test_tiny_numbers_in_float64(self):
        found = self.run(torch.diag(torch.tensor([5e-324, -1e-310, 1e308], dtype=torch.float64)))
        assert found[0].item() == -1
        assert found[1].item() == pytest.approx(math.log(5e-324) + math.log(1e-310) + math.log(1e308), rel=1e-12)

    def test_the_gradient_at_zero_is_infinite(self):
        matrix = torch.diag(torch.tensor([0.0, 2.0])).to(self.device).requires_grad_()
        (found,) = torch.autograd.grad(slog_det_triangular(matrix, backend=self.backend)[1], matrix)
        assert found.tolist() == [[math.inf, 0.0], [0.0, 0.5]]

    @settings(strategies.fuzz(12))
    @given(data=st.data())
    def test_random_problems(self, data):
        generator = data.draw(strategies.generators())
        batch, n = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 20))
        matrix = torch.randn((batch, n, n), generator=generator, dtype=torch.float64)
        matrix = matrix.tril() if data.draw(st.booleans()) else matrix.triu()
        wanted = torch.linalg.slogdet(matrix)
        if data.draw(st.booleans()):
            matrix = matrix.transpose(0, 2).contiguous().transpose(0, 2)
        found = self.run(matrix)
        assert torch.equal(found[0].cpu(), wanted[0])
        torch.testing.assert_close(found[1].cpu(), wanted[1])


def test_examples():
    found = doctest.testmod(api)
    assert found.attempted > 0
    assert not found.failed


class TestReference(SlogDetProperties):
    backend = "reference"
    large = False


class TestCpu(SlogDetProperties):
    backend = "cpu"


@pytest.mark.gpu
class TestReferenceOnGpu(SlogDetProperties):
    backend = "reference"
    device = "cuda"
    large = False
