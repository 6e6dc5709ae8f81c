"""RealNVP: its logit, its halves and settings; what is true of all flows is in test_flow_training.py."""

import pytest
import torch

from mpkernels.flows import nn as flows
from python_models import realnvp


def test_logit_and_its_volume():
    x = torch.linspace(-0.5, 0.5, 11, dtype=torch.float64).view(1, -1).requires_grad_()
    logit = realnvp.Logit()
    y, log_abs_det = logit(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_abs_det, slope.log().sum(dim=1))
    back, inverse = logit.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse, -log_abs_det)
    far, _ = logit.inverse(torch.tensor([[-1e4, 1e4]]))
    assert (far.abs() <= 0.5 + 0.06).all()


def test_log_scales_are_bounded_by_a_learned_factor():
    network = realnvp.Bounded(torch.nn.Conv2d(2, 6, 1), 3)
    x = 1e3 * torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network.factor.copy_(torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1))
        found, plain = network(x), network.network(x)
    assert torch.equal(found[:, :3], plain[:, :3])
    peaks = found[:, 3:].abs().amax(dim=(0, 2, 3))
    torch.testing.assert_close(peaks, torch.tensor([0.5, 1.0, 2.0]), atol=0.05, rtol=0)


def test_checkerboards_then_channels():
    model = realnvp.RealNvp(realnvp.Config(3, 8, levels=3, hidden=4))
    couplings = [module for module in model.modules() if isinstance(module, flows.AffineCoupling)]
    assert len(couplings) == 6 + 6 + 4
    parts = model.flow.transform.parts(model.latent(torch.rand(2, 3, 8, 8) - 0.5))
    assert [tuple(part.shape[1:]) for part in parts] == [(6, 4, 4), (12, 2, 2), (12, 2, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "faces"}, "data: .*'photographs'.*'faces'"),
        ({"memory": "none"}, "memory: .*'recompute'.*'none'"),
        ({"data": "digits", "levels": 4}, "levels: .*28, got 4"),
        ({"blocks": 0}, "blocks: .*at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        realnvp.fit(**{"output": None, "steps": 0} | arguments)
