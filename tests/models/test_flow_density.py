"""The density of a flow is one: over the plane it integrates to 1, after some steps of training on two moons."""

import math

import pytest
import torch

from mpkernels.flows import nn as flows
from python_models.flow_networks import Mlp


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only wait for each other where tensors are as small as here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def two_moons(count, generator):
    """Points (count, 2) near two half circles, of which one turns up and the other down."""
    angle = math.pi * torch.rand(count, generator=generator)
    up = torch.rand(count, generator=generator) < 0.5
    x = torch.where(up, torch.cos(angle), 1 - torch.cos(angle)) - 0.5
    y = torch.where(up, torch.sin(angle), 0.5 - torch.sin(angle)) - 0.25
    return torch.stack([x, y], dim=1) + 0.1 * torch.randn(count, 2, generator=generator)


def affine(parity):
    return flows.AffineCoupling(Mlp(1, 2, 24), scale="softclamp", clamp=1.5, parity=parity)


def spline(parity):
    return flows.SplineCoupling(Mlp(1, 3 * 6 - 1, 24), bins=6, tail_bound=3.0, parity=parity)


def additive(parity):
    return flows.AdditiveCoupling(Mlp(1, 1, 24), parity=parity)


CHAINS = {
    "affine": (lambda: [affine(i % 2) for i in range(4)], "standard normal"),
    "spline": (lambda: [spline(0), spline(1), flows.DiagonalScale(2)], "standard normal"),
    "both": (lambda: [flows.ActNorm(2), spline(0), affine(1), spline(1)], "standard normal"),
    "additive, logistic": (lambda: [*(additive(i % 2) for i in range(3)), flows.DiagonalScale(2)], "logistic"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_density_integrates_to_one(name):
    make, base = CHAINS[name]
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = flows.Flow(flows.Sequential(*make()), base)
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = -flow.log_prob(two_moons(256, generator)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    side = 12.0 if base == "logistic" else 7.0
    line = torch.linspace(-side, side, round(2 * side / 0.035) + 1)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        density = torch.cat([flow.eval().log_prob(part) for part in grid.split(65536)]).double().exp()
    area = (line[1] - line[0]).double() ** 2
    assert (density.sum() * area).item() == pytest.approx(1, abs=1e-3)
