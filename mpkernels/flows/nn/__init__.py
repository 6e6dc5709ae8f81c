"""Modules of normalizing flows, with nflows' contract: ``forward`` and ``inverse`` return (outputs, logabsdet).

>>> import torch
>>> from mpkernels.flows import nn
>>> def network():
...     return torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> steps = [nn.Sequential(nn.AffineCoupling(network()), nn.Reverse()) for _ in range(4)]
>>> flow = nn.Flow(nn.Sequential(*steps, memory="recompute"), "standard normal", shape=(4,))
>>> loss = -flow.log_prob(torch.randn(32, 4)).mean()
>>> loss.backward()
>>> flow.sample(3).shape
torch.Size([3, 4])
"""

from mpkernels.flows.nn.base import Inverse, Rebuilt, Transform
from mpkernels.flows.nn.coupling import Coupling
from mpkernels.flows.nn.couplings import AdditiveCoupling, AffineCoupling, AffineInjector, SplineCoupling
from mpkernels.flows.nn.distributions import DistributionTransform, as_distribution_transform
from mpkernels.flows.nn.flow import Flow
from mpkernels.flows.nn.glow import GlowStep
from mpkernels.flows.nn.layers import (
    ActNorm,
    DiagonalScale,
    InvertibleConv1x1,
    Permutation,
    Reverse,
    Squeeze,
    Unsqueeze,
)
from mpkernels.flows.nn.multiscale import MultiScale
from mpkernels.flows.nn.sequential import Sequential

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "AffineInjector",
    "Coupling",
    "DiagonalScale",
    "DistributionTransform",
    "Flow",
    "GlowStep",
    "Inverse",
    "InvertibleConv1x1",
    "MultiScale",
    "Permutation",
    "Rebuilt",
    "Reverse",
    "Sequential",
    "SplineCoupling",
    "Squeeze",
    "Transform",
    "Unsqueeze",
    "as_distribution_transform",
]
