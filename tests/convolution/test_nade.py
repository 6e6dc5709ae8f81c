"""What NADE promises, on every backend."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpkernels import backends, spec
from mpkernels.convolution import nade_log_prob, nade_sample
from mpkernels.convolution.nade import schema
from mpkernels.testing import compare, gradients, upcast
from mpkernels.testing.properties import OpProperties

WEIGHTS = ("in_weight", "in_bias", "out_weight", "out_bias")


def weights(dimensions, hidden, dtype=torch.float64, spread=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((hidden, dimensions), (hidden,), (dimensions, hidden), (dimensions,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).mul(spread).to(dtype) for shape in shapes]


def binary(samples, dimensions, dtype=torch.float64, share=0.4):
    x = torch.rand(samples, dimensions, generator=torch.Generator().manual_seed(samples), dtype=torch.float64)
    return (x < share).to(dtype)


class NadeProperties(OpProperties):
    ops = ("nade_log_prob", "nade_sample")

    def log_prob(self, x, parameters, **more):
        return nade_log_prob(x, *parameters, **more, backend=self.backend)

    def sample(self, n, parameters, **more):
        return nade_sample(n, *parameters, **({"seed": 3} | more), backend=self.backend)

    def test_probabilities_sum_to_one(self):
        every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=7)), dtype=torch.float64)
        torch.testing.assert_close(self.log_prob(every, weights(7, 5)).exp().sum(), torch.ones((), dtype=torch.float64))

    def test_without_connections_pixels_are_independent(self):
        x, parameters = binary(4, 9), weights(9, 6)
        parameters[2].zero_()
        wanted = torch.distributions.Bernoulli(logits=parameters[3]).log_prob(x).sum(1)
        torch.testing.assert_close(self.log_prob(x, parameters), wanted)

    def test_logarithms_stay_finite(self):
        parameters = weights(6, 4, torch.float32)
        parameters[3] = torch.tensor([1e4, -1e4, 100.0, -100.0, 3e38, 0.0])
        x = torch.tensor([[1.0, 0, 1, 0, 1, 1], [0, 1, 0, 1, 1, 1]])
        leaf = parameters[3].requires_grad_()
        log_prob = self.log_prob(x, parameters)
        assert log_prob.isfinite().all()
        assert log_prob[0] > -2
        torch.testing.assert_close(log_prob[1], torch.tensor(-20200.0), rtol=0, atol=4)
        assert torch.autograd.grad(log_prob.sum(), leaf)[0].isfinite().all()

    def test_order_is_a_permutation_of_everything(self):
        x, (w, c, v, b), order = binary(5, 8), weights(8, 3), torch.randperm(8)
        ordered = self.log_prob(x, (w, c, v, b), order=order)
        by_hand = self.log_prob(x[:, order], (w[:, order], c, v[order], b[order]))
        torch.testing.assert_close(ordered, by_hand)
        drawn, log_prob = self.sample(6, (w, c, v, b), order=order, return_log_prob=True)
        torch.testing.assert_close(self.log_prob(drawn, (w, c, v, b), order=order), log_prob)

    def test_what_comes_after_the_last_dimension_never_matters(self):
        """The last column of W, and x where W is not reached: NaN stays out, and the gradient is exactly 0."""
        x, parameters = binary(5, 35).bernoulli(0.5), weights(35, 7)
        wanted = self.log_prob(x, parameters)
        clean = [p.clone().requires_grad_() for p in parameters]
        of_clean = torch.autograd.grad(self.log_prob(x, clean).sum(), clean)
        parameters[0][:, -1] = float("nan")
        leaves = [p.requires_grad_() for p in parameters]
        got = self.log_prob(x, leaves)
        assert torch.equal(got, wanted)
        of_leaves = torch.autograd.grad(got.sum(), leaves)
        assert torch.equal(of_leaves[0][:, -1], torch.zeros(7, dtype=torch.float64))
        for a, b in zip(of_leaves, of_clean, strict=True):
            assert torch.equal(a, b)
        x[:, -1] = float("inf")
        (of_last,) = torch.autograd.grad(self.log_prob(x, leaves).sum(), leaves[0])
        assert torch.equal(of_last[:, -1], torch.zeros(7, dtype=torch.float64))

    def test_samples_have_the_probabilities_that_are_said(self):
        parameters = weights(3, 4, spread=0.9)
        drawn, log_prob = self.sample(4000, parameters, return_log_prob=True)
        assert set(drawn.unique().tolist()) == {0.0, 1.0}
        torch.testing.assert_close(log_prob, self.log_prob(drawn, parameters))
        every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)
        shares = (drawn[:, None] == every).all(-1).double().mean(0)
        likely = self.log_prob(every, parameters).exp()
        assert ((shares - likely).abs() < 4 * (likely * (1 - likely) / 4000).sqrt()).all()

    def test_samples_depend_on_their_number_and_the_seed_alone(self):
        parameters = weights(20, 9, torch.float32)
        whole = self.sample(11, parameters)
        assert torch.equal(self.sample(3, parameters), whole[:3])
        assert not torch.equal(self.sample(11, parameters, seed=4), whole)
        assert not torch.equal(self.sample(11, parameters, seed=3 + 2**32), whole)

    def test_no_temperature_takes_the_likelier_value(self):
        parameters = weights(12, 5)
        drawn, log_prob = self.sample(3, parameters, temperature=1e-9, return_log_prob=True)
        assert (drawn == drawn[0]).all()
        torch.testing.assert_close(log_prob, torch.zeros_like(log_prob))

    def test_samples_carry_no_gradient(self):
        parameters = [p.requires_grad_() for p in weights(4, 3)]
        assert not any(x.requires_grad for x in self.sample(2, parameters, return_log_prob=True))

    def test_vmap_over_weights(self):
        x, (w, c, v, b) = binary(3, 5), weights(5, 4)
        stacked = torch.stack([w, 2 * w, -w])
        got = torch.func.vmap(lambda one: self.log_prob(x, (one, c, v, b)))(stacked)
        for one, row in zip(stacked, got, strict=True):
            torch.testing.assert_close(self.log_prob(x, (one, c, v, b)), row)

    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
    )
    @given(
        st.integers(0, 19), st.integers(0, 70), st.integers(0, 70), st.sampled_from([None, 0.1, 0.9]), st.integers(0, 9)
    )
    def test_any_size(self, samples, dimensions, hidden, share, seed):
        op = spec.find("nade_log_prob")
        x = binary(samples, dimensions, torch.float32, share or 0.4)
        x = x if share is not None else x * torch.linspace(0, 1, samples)[:, None]
        arguments = {"x": x} | dict(zip(WEIGHTS, weights(dimensions, hidden, torch.float32, 0.3, seed), strict=True))
        rows = []
        for function, given_ in (
            (self.call, arguments),
            (lambda op, **a: op.function(**a, backend="reference"), arguments),
            (lambda op, **a: op.function(**a, backend="reference"), upcast(arguments)),
        ):
            outputs, found = gradients(lambda **a: function(op, **a), given_, op.differentiable)  # noqa: B023
            rows.append({"log_prob": outputs[0]} | found)
        got, low, gold = rows
        assert not [str(c) for name in got if not (c := compare(name, got[name], low[name], gold[name])).ok]


class TestReference(NadeProperties):
    backend = "reference"


class TestCpu(NadeProperties):
    backend = "cpu"

    def test_samples_are_those_of_the_reference(self):
        parameters = weights(50, 30)
        assert torch.equal(self.sample(20, parameters), nade_sample(20, *parameters, seed=3, backend="reference"))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_log_prob_of_samples_is_that_of_log_prob(self, dtype):
        parameters = weights(90, 33, dtype, 0.2)
        drawn, log_prob = self.sample(13, parameters, return_log_prob=True)
        assert torch.equal(self.log_prob(drawn, parameters), log_prob)

    def test_a_sample_alone_or_in_a_batch_and_any_number_of_threads(self):
        x, parameters = binary(37, 70, torch.float32), [p.requires_grad_() for p in weights(70, 150, torch.float32)]
        threads, found = torch.get_num_threads(), []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                log_prob = self.log_prob(x, parameters)
                found.append([log_prob, *torch.autograd.grad(log_prob.sum(), parameters)])
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        alone = torch.cat([self.log_prob(row[None], parameters) for row in x])
        assert torch.equal(alone, found[0][0])

    def test_logits_depend_on_what_came_before_alone(self):
        """x_e, NaN even, reaches the logits of the dimensions behind e, and no other."""
        x, parameters = binary(9, 70, torch.float32), weights(70, 20, torch.float32)
        forward = backends.call("cpu", schema.FORWARD)
        clean = forward(x, *parameters)[1]
        for e in (0, 31, 32, 69):
            logits = forward(x.index_fill(1, torch.tensor(e), float("nan")), *parameters)[1]
            assert torch.equal(logits[:, : e + 1], clean[:, : e + 1])
            assert logits[:, e + 1 :].isnan().all()
