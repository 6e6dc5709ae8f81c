"""What the modules of flows promise: nflows' contract, round trips, gradients, states."""

import copy
import io

import pytest
import torch

from mpkernels.flows import nn

CONTEXT = 3


def seeded(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class WithContext(torch.nn.Module):
    """A network that takes a context of CONTEXT features, or none."""

    def __init__(self, inputs, outputs, seed=0):
        super().__init__()
        self.first = torch.nn.Linear(inputs, 12)
        self.of_context = torch.nn.Linear(CONTEXT, 12, bias=False)
        self.last = torch.nn.Linear(12, outputs)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(0.4 * seeded(*p.shape, seed=100 * seed + i))

    def forward(self, x, context=None):
        hidden = self.first(x) if context is None else self.first(x) + self.of_context(context)
        return self.last(torch.tanh(hidden))


class OfContext(torch.nn.Module):
    def __init__(self, outputs, seed=0):
        super().__init__()
        self.network = WithContext(CONTEXT, outputs, seed)

    def forward(self, context):
        return self.network(context)


class Convolution(torch.nn.Conv2d):
    """A network of images, not small: its outputs have a standard deviation of about 0.5."""

    def __init__(self, inputs, outputs, seed=0):
        super().__init__(inputs, outputs, 3, padding=1)
        with torch.no_grad():
            self.weight.copy_(0.5 / (9 * inputs) ** 0.5 * seeded(*self.weight.shape, seed=seed))
            self.bias.copy_(0.2 * seeded(outputs, seed=seed + 1))


def moved(module, by=0.1):
    """The module with its parameters moved, so that nothing is at its first value."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator).to(p.dtype))
    return module


MASK = torch.tensor([True, False, False, True, True])

FEATURES = {  # modules on (B, 5)
    "actnorm": lambda: moved(nn.ActNorm(5)),
    "actnorm, scaled": lambda: moved(nn.ActNorm(5, shift_first=False, log_scale_factor=3.0)),
    "rotation": lambda: moved(nn.InvertibleConv1x1(5, generator=torch.Generator().manual_seed(0))),
    "matrix": lambda: moved(nn.InvertibleConv1x1(5, plu=False, generator=torch.Generator().manual_seed(0))),
    "affine": lambda: nn.AffineCoupling(WithContext(3, 4)),
    "affine, parity": lambda: nn.AffineCoupling(WithContext(2, 6), parity=1, scale="exp", layout="scale_shift"),
    "affine, checkerboard": lambda: nn.AffineCoupling(WithContext(5, 10), mask="checkerboard", scale="tanh"),
    "affine, tensor": lambda: nn.AffineCoupling(WithContext(5, 10), mask=MASK, scale="softclamp", clamp=1.5),
    "additive": lambda: nn.AdditiveCoupling(WithContext(3, 2)),
    "additive, checkerboard": lambda: nn.AdditiveCoupling(WithContext(5, 5), mask="checkerboard", parity=1),
    "spline": lambda: nn.SplineCoupling(WithContext(3, 2 * 8), bins=3),
    "spline, parity": lambda: nn.SplineCoupling(WithContext(2, 3 * 8), bins=3, parity=1, tail_bound=1.5),
    "spline, checkerboard": lambda: nn.SplineCoupling(WithContext(5, 5 * 8), bins=3, mask="checkerboard"),
    "spline, tensor": lambda: nn.SplineCoupling(WithContext(5, 5 * 8), bins=3, mask=MASK),
    "permutation": lambda: nn.Permutation(5, seed=1),
    "reverse": lambda: nn.Reverse(),
    "diagonal": lambda: moved(nn.DiagonalScale(5)),
    "glow step": lambda: moved(nn.GlowStep(5, WithContext(3, 4)), 0.05),
    "inverse": lambda: nn.Inverse(nn.AffineCoupling(WithContext(3, 4))),
    "sequential": lambda: nn.Sequential(nn.Reverse(), nn.AffineCoupling(WithContext(3, 4)), nn.DiagonalScale(5)),
    "multiscale": lambda: nn.MultiScale(
        [[nn.Permutation(4), nn.AffineCoupling(WithContext(2, 4))], nn.AffineCoupling(WithContext(1, 2))]
    ),
}
IMAGES = {  # modules on (B, 4, 6, 4)
    "squeeze": lambda: nn.Squeeze(),
    "unsqueeze": lambda: nn.Unsqueeze(),
    "affine": lambda: nn.AffineCoupling(Convolution(2, 4)),
    "affine, checkerboard": lambda: nn.AffineCoupling(Convolution(4, 8), mask="checkerboard", parity=1),
    "spline": lambda: nn.SplineCoupling(Convolution(2, 2 * 8), bins=3),
    "spline, checkerboard": lambda: nn.SplineCoupling(Convolution(4, 4 * 8), bins=3, mask="checkerboard"),
    "glow step": lambda: moved(nn.GlowStep(4, Convolution(2, 4)), 0.05),
    "multiscale": lambda: nn.MultiScale(
        [[nn.Squeeze(), nn.GlowStep(16, Convolution(8, 16))], [nn.GlowStep(8, Convolution(4, 8))]]
    ),
}


def width(name):
    return 4 if name == "multiscale" else 5


def every_module():
    return [(name, make, "features") for name, make in FEATURES.items()] + [
        (name, make, "images") for name, make in IMAGES.items()
    ]


@pytest.mark.parametrize(("name", "make", "kind"), every_module(), ids=lambda x: x if isinstance(x, str) else "")
class TestContract:
    def inputs(self, name, kind, dtype=torch.float32):
        return seeded(3, 4, 6, 4, dtype=dtype) if kind == "images" else seeded(3, width(name), dtype=dtype)

    def test_round_trip_and_jacobian(self, name, make, kind):
        torch.manual_seed(0)
        module = make().double().eval()
        x = self.inputs(name, kind, torch.float64)
        y, log_abs_det = module(x)
        back, of_inverse = module.inverse(y)
        torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
        torch.testing.assert_close(of_inverse, -log_abs_det, rtol=0, atol=1e-8)
        assert log_abs_det.shape == (3,)
        assert log_abs_det.dtype == torch.float64
        one = x[:1]
        jacobian = torch.autograd.functional.jacobian(lambda x: module(x)[0], one).reshape(y[0].numel(), one.numel())
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_abs_det[0], rtol=0, atol=1e-8)
        if isinstance(module, nn.Transform):
            assert module.output_shape(tuple(x.shape[1:])) == tuple(y.shape[1:])
            assert module.input_shape(tuple(y.shape[1:])) == tuple(x.shape[1:])

    def test_state_and_copies(self, name, make, kind):
        torch.manual_seed(0)
        module, other = make(), make()
        x = self.inputs(name, kind)
        expected = module(x)  # (in training: this sets ActNorm)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        for same in (copy.deepcopy(module), other):
            torch.testing.assert_close(same(x), expected, rtol=0, atol=0)
            assert torch.isfinite(same.inverse(expected[0])[0]).all()

    def test_rebuild_is_the_gradient_of_forward_and_of_inverse(self, name, make, kind):
        torch.manual_seed(0)
        module = make().double().eval()
        x = self.inputs(name, kind, torch.float64)
        module(x)  # MultiScale learns its shape
        parameters = list(module.parameters())
        for inverse in (False, True):
            given = (module(x)[0].detach() if inverse else x).requires_grad_()
            y, log_abs_det = module.inverse(given) if inverse else module(given)
            of_y, of_log_abs_det = seeded(*y.shape, dtype=y.dtype, seed=1), seeded(3, dtype=y.dtype, seed=2)
            expected = torch.autograd.grad(
                (y * of_y).sum() + (log_abs_det * of_log_abs_det).sum(), [given, *parameters], materialize_grads=True
            )
            inputs, gradients = module.rebuild(y.detach(), None, inverse)
            of_inputs, rest = gradients(of_y, of_log_abs_det, parameters)
            torch.testing.assert_close(inputs, given.detach(), rtol=0, atol=1e-9)
            for got, wanted in zip([of_inputs, *rest], expected, strict=True):
                torch.testing.assert_close(torch.zeros_like(wanted) if got is None else got, wanted, rtol=0, atol=1e-7)
