"""Glow: its levels, rebuilt activations and settings; what is true of all flows is in test_flow_training.py."""

import pytest
import torch

from mpkernels.flows import nn as flows
from python_models import glow
from python_models.flow_training import dequantize


def small(memory="store", depth=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = glow.Glow(glow.Config(3, 8, levels=2, depth=depth, hidden=6, memory=memory))
        x = dequantize(torch.randint(256, (4, 3, 8, 8)), torch.Generator().manual_seed(0))
        with torch.no_grad():
            model.train().log_prob(x)
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape)
    return model, x


@pytest.mark.parametrize(("levels", "depth"), [(1, 1), (2, 3), (3, 2)])
def test_any_number_of_levels_and_steps(levels, depth):
    model = glow.Glow(glow.Config(3, 8, levels=levels, depth=depth, hidden=4))
    steps = [module for module in model.modules() if isinstance(module, flows.GlowStep)]
    assert len(steps) == levels * depth
    parts = model.flow.transform.parts(model.latent(torch.rand(2, 3, 8, 8) - 0.5))
    assert [tuple(part.shape[1:]) for part in parts] == [(6 * 2**i, 4 >> i, 4 >> i) for i in range(levels - 1)] + [
        (12 * 2 ** (levels - 1), 8 >> levels, 8 >> levels)
    ]


def test_rebuilt_activations_give_the_same_gradients():
    found = []
    for memory in glow.MEMORY:
        model, x = small(memory)
        loss = -model.log_prob(x).mean()
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for stored, rebuilt in zip(*found, strict=True):
        torch.testing.assert_close(rebuilt, stored, atol=1e-4 * float(stored.abs().max()) + 1e-6, rtol=1e-4)


def test_a_part_that_leaves_is_predicted_from_what_goes_on():
    """The last coupling of a level takes mean and scale off the half that leaves, and changes no other."""
    model, _ = small()
    level = model.flow.transform.levels[0]
    last = level[len(level) - 1]
    x = torch.randn(2, 12, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y, _ = last(x)
        other, _ = last(x + torch.cat([torch.ones(2, 6, 4, 4), torch.zeros(2, 6, 4, 4)], dim=1))
    assert torch.equal(y[:, :6], x[:, :6])
    assert not torch.allclose(y[:, 6:], x[:, 6:])
    assert not torch.allclose(y[:, 6:], other[:, 6:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "faces"}, "data: .*'photographs'.*'faces'"),
        ({"memory": "none"}, "memory: .*'recompute'.*'none'"),
        ({"data": "digits", "levels": 3}, "levels: .*28, got 3"),
        ({"depth": 0}, "depth: .*at least 1, got 0"),
        ({"temperature": 0.0}, "temperature: .*positive.*0"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        glow.fit(**{"output": None, "steps": 0} | arguments)
