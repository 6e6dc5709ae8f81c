"""Modules of flows inside nflows', zuko's and torch's own containers, and in our own density."""

import copy
import math

import pytest
import torch
from torch.distributions import Independent, Laplace, Normal, TransformedDistribution

from mpkernels.flows import nn


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Network(torch.nn.Module):
    def __init__(self, inputs, outputs, context=0):
        super().__init__()
        self.first = torch.nn.Linear(inputs + context, 16)
        self.last = torch.nn.Linear(16, outputs)

    def forward(self, x, context=None):
        return self.last(torch.tanh(self.first(x if context is None else torch.cat([x, context], -1))))


def steps(context=0):
    torch.manual_seed(0)
    return [
        nn.ActNorm(4),
        nn.AffineCoupling(Network(2, 4, context)),
        nn.InvertibleConv1x1(4),
        nn.SplineCoupling(Network(2, 2 * 14, context), bins=5),
        nn.GlowStep(4, Network(2, 4, context)),
    ]


def ring(number=128):
    """Correlated data that no standard normal fits."""
    x = seeded(number, 4)
    return torch.stack([2 * x[:, 0], x[:, 0] ** 2 + 0.3 * x[:, 1], 0.5 * x[:, 2] - 1, x[:, 3] + x[:, 0]], 1)


def training(loss, parameters, number=15):
    """The loss before and after some steps of training."""
    optimizer = torch.optim.Adam(parameters, 0.03)
    losses = []
    for _ in range(number):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("context", [0, 3])
def test_nflows_containers(memory, context):
    from nflows.distributions.normal import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, InverseTransform, ReversePermutation

    flow = Flow(
        CompositeTransform(
            [
                nn.Sequential(*steps(context), memory=memory),
                ReversePermutation(4),
                InverseTransform(nn.Sequential(nn.AffineCoupling(Network(2, 4, context)), memory=memory)),
            ]
        ),
        StandardNormal([4]),
    )
    x = ring()
    of_context = seeded(128, 3, seed=1) if context else None
    before, after = training(lambda: -flow.log_prob(x, of_context).mean(), flow.parameters())
    assert after < before - 0.5
    with torch.no_grad():
        assert flow.log_prob(x, of_context).shape == (128,)
        samples, log_prob = flow.sample_and_log_prob(7, None if of_context is None else of_context[:2])
        assert samples.shape == ((2, 7, 4) if context else (7, 4))
        again = flow.log_prob(
            samples.reshape(-1, 4), None if of_context is None else of_context[:2].repeat_interleave(7, 0)
        )
        torch.testing.assert_close(again.reshape(log_prob.shape), log_prob, rtol=1e-3, atol=1e-3)


def test_nflows_transforms_in_our_chain():
    from nflows.transforms import LULinear

    for memory in ("store", "recompute"):
        torch.manual_seed(0)
        flow = nn.Flow(nn.Sequential(LULinear(4), nn.Inverse(LULinear(4)), *steps(), memory=memory))
        before, after = training(lambda flow=flow: -flow.log_prob(ring()).mean(), flow.parameters())
        assert after < before - 0.5


def test_zuko_containers():
    from zuko.distributions import DiagNormal, NormalizingFlow
    from zuko.transforms import ComposedTransform

    modules = steps(3)
    of_context = seeded(128, 3, seed=1)
    module = torch.nn.ModuleList(modules)
    x = ring()

    def density(context):
        transforms = [nn.as_distribution_transform(m, event_dim=1, context=context) for m in modules]
        return NormalizingFlow(ComposedTransform(*transforms), DiagNormal(torch.zeros(4), torch.ones(4)))

    before, after = training(lambda: -density(of_context).log_prob(x).mean(), module.parameters())
    assert after < before - 0.5
    with torch.no_grad():
        chosen = density(of_context[0])
        assert chosen.event_shape == (4,)
        samples, log_prob = chosen.rsample_and_log_prob((6, 2))
        assert samples.shape == (6, 2, 4)
        torch.testing.assert_close(chosen.log_prob(samples), log_prob, rtol=1e-3, atol=1e-3)
        assert chosen.sample((3,)).shape == (3, 4)


def test_torch_containers():
    module = nn.Sequential(*steps())
    transform = nn.as_distribution_transform(module)
    density = TransformedDistribution(Independent(Normal(torch.zeros(4), torch.ones(4)), 1), [transform.inv])
    x = ring()
    before, after = training(lambda: -density.log_prob(x).mean(), module.parameters())
    assert after < before - 0.5
    with torch.no_grad():
        assert density.sample((5, 2)).shape == (5, 2, 4)
        expected = nn.Flow(module).log_prob(x)
        torch.testing.assert_close(density.log_prob(x), expected)
        torch.testing.assert_close(density.log_prob(x.reshape(2, 64, 4)), expected.reshape(2, 64))


class Counted(nn.DiagonalScale):
    runs = 0

    def forward(self, inputs, context=None):
        self.runs += 1
        return super().forward(inputs, context)

    def inverse(self, inputs, context=None):
        self.runs += 1
        return super().inverse(inputs, context)


def test_a_value_and_its_log_abs_det_take_one_evaluation():
    module = Counted(4)
    torch.nn.init.constant_(module.log_scale, 0.3)
    transform = nn.as_distribution_transform(module)
    x = seeded(6, 4)
    for one in (transform, transform.inv):
        module.runs = 0
        y = one(x)
        ladj = one.log_abs_det_jacobian(x, y)
        assert module.runs == 1
        torch.testing.assert_close(one.inv.log_abs_det_jacobian(y, x), -ladj)
        assert module.runs == 1
        value, same = one.call_and_ladj(x)
        assert module.runs == 2
        torch.testing.assert_close((value, same), (y, ladj))
        one.log_abs_det_jacobian(x.clone(), y)
        assert module.runs == 3
    assert transform.inv.inv is transform
    # a changed parameter is seen, though x is the same tensor
    before = transform(x)
    torch.nn.init.constant_(module.log_scale, 0.5)
    assert not torch.equal(transform(x), before)
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, transform(x)), torch.full((6,), 2.0))
    copied = copy.deepcopy(transform)
    torch.testing.assert_close(copied(x), transform(x))


def test_shapes_of_a_transform_that_flattens():
    flow = nn.MultiScale([[nn.Squeeze()], [nn.Squeeze()]], input_shape=(1, 4, 4))
    transform = nn.as_distribution_transform(flow, event_dim=3)
    assert (transform.domain.event_dim, transform.codomain.event_dim) == (3, 1)
    assert transform.forward_shape((7, 1, 4, 4)) == (7, 16)
    assert transform.inverse_shape((7, 16)) == (7, 1, 4, 4)
    density = TransformedDistribution(Independent(Normal(torch.zeros(16), torch.ones(16)), 1), [transform.inv])
    assert density.event_shape == (1, 4, 4)
    x = density.sample((2, 3))
    assert x.shape == (2, 3, 1, 4, 4)
    torch.testing.assert_close(density.log_prob(x), Normal(0.0, 1.0).log_prob(x).sum((2, 3, 4)))


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("standard normal", Normal(0.0, 1.0)),
        ("logistic", None),
        (Laplace(torch.zeros(4), torch.ones(4)), Laplace(0.0, 1.0)),
        (Independent(Laplace(torch.zeros(4), torch.ones(4)), 1), Laplace(0.0, 1.0)),
    ],
    ids=str,
)
def test_densities(base, expected):
    flow = nn.Flow(nn.Sequential(*steps()), base)
    x = ring()
    with pytest.raises(ValueError, match=r"shape: .*log_prob to run first"):
        flow.sample(2)
    z, log_abs_det = flow.transform(x)
    each = expected.log_prob(z) if expected else torch.log(torch.sigmoid(z) * torch.sigmoid(-z))
    torch.testing.assert_close(flow.log_prob(x), each.sum(1) + log_abs_det)
    assert flow.sample(9).shape == (9, 4)
    torch.manual_seed(0)
    first = flow.noise(4000)
    assert abs(first.mean()) < 0.1
    deviation = {"standard normal": 1.0, "logistic": math.pi / 3**0.5}.get(str(base), 2**0.5)
    assert first.std() == pytest.approx(deviation, abs=0.1)
    copied = nn.Flow(nn.Sequential(*steps()), base)
    copied.load_state_dict(flow.state_dict())
    assert copied.sample(2, temperature=0.0).shape == (2, 4)
    torch.testing.assert_close(copied.sample(2, temperature=0.0)[0], flow.sample(3, temperature=0.0)[0])


def test_a_density_with_context():
    flow = nn.Flow(nn.Sequential(*steps(3)), shape=(4,)).eval()
    one = seeded(1, 3)
    generator = torch.Generator()
    alone = flow.sample(5, one, generator=generator.manual_seed(0))
    torch.testing.assert_close(flow.sample(5, one.expand(5, 3), generator=generator.manual_seed(0)), alone)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"base: .*'standard normal'.*'cauchy'"):
        nn.Flow(nn.Reverse(), "cauchy")
    with pytest.raises(TypeError, match=r"base: .*int"):
        nn.Flow(nn.Reverse(), 3)
    with pytest.raises(TypeError, match=r"transform: .*Linear"):
        nn.Flow(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"module: .*str"):
        nn.as_distribution_transform("flow")
    with pytest.raises(ValueError, match=r"event_dim: .*got 0"):
        nn.as_distribution_transform(nn.Reverse(), event_dim=0)
