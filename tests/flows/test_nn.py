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


class TestActNorm:
    def test_the_first_batch_in_training_sets_it(self):
        x = 3 + 2 * seeded(64, 4, 3, 3)
        for shift_first in (True, False):
            layer = nn.ActNorm(4, shift_first=shift_first, log_scale_factor=3.0).eval()
            torch.testing.assert_close(layer(x)[0], x)  # not in evaluation
            assert not layer.initialized
            y, log_abs_det = layer.train()(x)
            assert layer.initialized
            torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
            torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(4), rtol=0, atol=1e-5)
            torch.testing.assert_close(log_abs_det, (9 * layer.log_scale.sum()).expand(64))
            torch.testing.assert_close(layer.inverse(y)[0], x, rtol=0, atol=1e-5)
            before = layer(x)[0]
            layer(x * 10)  # nor the second
            assert torch.equal(layer(x)[0], before)
            loaded = nn.ActNorm(4, shift_first=shift_first, log_scale_factor=3.0)
            loaded.load_state_dict(layer.state_dict())
            loaded(x * 10)
            assert torch.equal(loaded(x)[0], before)
            loaded.load_state_dict(nn.ActNorm(4).state_dict())
            loaded(x)  # one that was not set is set
            assert loaded.initialized

    @pytest.mark.parametrize("memory", ["store", "recompute"])
    def test_every_layer_of_a_chain_sees_the_first_batch(self, memory):
        chain = nn.Sequential(
            nn.GlowStep(4, Convolution(2, 4)), nn.Squeeze(), nn.Sequential(nn.ActNorm(16)), memory=memory
        )
        x = 3 + 2 * seeded(64, 4, 4, 4)
        y, log_abs_det = chain(x)
        (y.sum() + log_abs_det.sum()).backward()
        torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(16), rtol=0, atol=1e-4)
        assert chain[0].actnorm.initialized


class TestMultiScale:
    def flow(self, **settings):
        return nn.MultiScale([[nn.Squeeze(), nn.Reverse()], [nn.Squeeze()], [nn.Squeeze()]], **settings)

    def test_parts(self):
        x = seeded(2, 3, 8, 8)
        flow = self.flow()
        outputs, log_abs_det = flow(x)
        assert outputs.shape == (2, 192)
        assert torch.equal(log_abs_det, torch.zeros(2))
        parts = flow.parts(outputs)
        assert [tuple(part.shape) for part in parts] == [(2, 6, 4, 4), (2, 12, 2, 2), (2, 48, 1, 1)]
        assert torch.equal(torch.cat([part.flatten(1) for part in parts], 1), outputs)
        first = nn.Squeeze()(x)[0].flip(1)
        assert torch.equal(parts[0], first[:, 6:])

    def test_the_shape_comes_from_an_argument_or_a_state(self):
        z = seeded(2, 192)
        with pytest.raises(ValueError, match=r"input_shape: .*forward to run first"):
            self.flow().inverse(z)
        flow = self.flow(input_shape=(3, 8, 8))
        x, _ = flow.inverse(z)
        torch.testing.assert_close(flow(x)[0], z)
        loaded = self.flow()
        loaded.load_state_dict(flow.state_dict())
        assert torch.equal(loaded.inverse(z)[0], x)
        with pytest.raises(ValueError, match=r"outputs: expected shape \(B, 192\), got \(2, 191\)"):
            flow.inverse(z[:, 1:])
        with pytest.raises(ValueError, match=r"inputs: expected samples of shape \(3, 8, 8\), got \(3, 16, 16\)"):
            flow(seeded(1, 3, 16, 16))


def test_what_is_kept_passes_and_does_not_leak():
    x = seeded(2, 5)
    for make in (
        lambda: nn.AffineCoupling(WithContext(5, 10), mask=MASK),
        lambda: nn.SplineCoupling(WithContext(5, 5 * 8), bins=3, mask=MASK),
    ):
        coupling = make()
        y, log_abs_det = coupling(x)
        assert torch.equal(y[:, MASK], x[:, MASK])
        # what is transformed is not seen: the Jacobian of the kept half, and of the parameters, has zeros there
        changed = x + 100 * (~MASK).float()
        assert torch.equal(coupling.parameters_from(x, coupling.seen(x), None),
                           coupling.parameters_from(x, coupling.seen(changed), None))  # fmt: skip
        bad = x.clone()
        bad[0, 1] = torch.nan  # transformed
        z, found = coupling(bad)
        assert torch.equal(z[:, MASK], x[:, MASK])
        assert torch.equal(z[1], y[1])
        assert torch.equal(found[1], log_abs_det[1])


@pytest.mark.parametrize("name", ["actnorm", "matrix", "affine", "affine, checkerboard", "spline", "glow step"])
def test_context_reaches_the_network(name):
    module = moved(FEATURES[name]()).eval()
    x, context = seeded(3, 5), seeded(3, CONTEXT, seed=4).requires_grad_()
    y, log_abs_det = module(x, context)
    torch.testing.assert_close(module.inverse(y, context)[0], x, rtol=0, atol=1e-4)
    if name in ("actnorm", "matrix"):
        return
    assert not torch.equal(y, module(x)[0])
    (y.sum() + log_abs_det.sum()).backward()
    assert context.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["glow step"])
def test_compile(name):
    module = FEATURES[name]().eval()
    x = seeded(3, 5)
    expected = module(x)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_the_injector():
    x, context = seeded(3, 5), seeded(3, CONTEXT, seed=4)
    injector = nn.AffineInjector(OfContext(10), scale="exp", layout="scale_shift")
    y, log_abs_det = injector(x, context)
    log_scale, shift = injector.network(context).chunk(2, 1)
    torch.testing.assert_close(y, x * log_scale.exp() + shift)
    torch.testing.assert_close(log_abs_det, log_scale.sum(1))
    torch.testing.assert_close(injector.inverse(y, context)[0], x)
    with pytest.raises(ValueError, match=r"context: expected .*None"):
        injector(x)
    chain = nn.Sequential(nn.Reverse(), injector, memory="recompute")
    grads = []
    for module in (chain, nn.Sequential(*chain.transforms)):
        given, of_context = x.clone().requires_grad_(), context.clone().requires_grad_()
        for _ in range(2):
            out, found = module(given, of_context)
            grads.append(
                torch.autograd.grad(
                    out.square().sum() + found.sum(), [given, of_context, *chain.parameters()], materialize_grads=True
                )
            )
    for got in grads[:3]:
        torch.testing.assert_close(got, grads[3], rtol=1e-4, atol=1e-5)


BAD = {
    "network": (lambda: nn.AffineCoupling(3), TypeError, r"network: .*int"),
    "network of a step": (lambda: nn.GlowStep(4, None), TypeError, r"network: .*NoneType"),
    "output": (lambda: nn.AffineCoupling(WithContext(3, 5))(seeded(2, 5)), ValueError, r"network: .*\(B, 4, .*\(2, 5"),
    "mask": (lambda: nn.AffineCoupling(WithContext(3, 4), mask="stripes"), ValueError, r"mask: .*'stripes'"),
    "mask's type": (lambda: nn.AffineCoupling(WithContext(3, 4), mask=3), TypeError, r"mask: .*int"),
    "mask's dtype": (lambda: nn.AdditiveCoupling(WithContext(3, 4), mask=torch.ones(5)), TypeError, r"mask: .*float32"),
    "parity": (lambda: nn.AffineCoupling(WithContext(3, 4), parity=2), ValueError, r"parity: .*2"),
    "scale": (lambda: nn.AffineCoupling(WithContext(3, 4), scale="log"), ValueError, r"scale: .*'log'"),
    "layout": (lambda: nn.GlowStep(4, WithContext(2, 4), layout="mixed"), ValueError, r"layout: .*'mixed'"),
    "epsilon": (lambda: nn.GlowStep(4, WithContext(2, 4), epsilon=-1.0), ValueError, r"epsilon: .*-1"),
    "bins": (lambda: nn.SplineCoupling(WithContext(3, 4), bins=1), ValueError, r"bins: .*1"),
    "tail_bound": (lambda: nn.SplineCoupling(WithContext(3, 4), tail_bound=0.0), ValueError, r"tail_bound: .*0"),
    "channels": (lambda: nn.ActNorm(0), ValueError, r"channels: .*0"),
    "channels' type": (lambda: nn.InvertibleConv1x1(2.0), TypeError, r"channels: .*float"),
    "order": (lambda: nn.Permutation([0, 0, 1]), ValueError, r"order: .*\[0, 0, 1\]"),
    "inputs": (lambda: nn.Permutation(4)(seeded(2, 5)), ValueError, r"inputs: .*\(B, 4, \.\.\.\).*\(2, 5\)"),
    "features": (lambda: nn.DiagonalScale(4)(seeded(2, 5)), ValueError, r"inputs: .*\(B, 4\).*\(2, 5\)"),
    "factor": (lambda: nn.Squeeze(0), ValueError, r"factor: .*0"),
    "transform": (lambda: nn.Inverse(torch.nn.Linear(2, 2)), TypeError, r"transform: .*Linear"),
    "levels": (lambda: nn.MultiScale([]), ValueError, r"levels: .*empty"),
    "a level": (lambda: nn.MultiScale([nn.Reverse(), 3]), TypeError, r"levels\[1\]: .*int"),
    "levels' type": (lambda: nn.MultiScale(nn.Reverse()), TypeError, r"levels: .*Reverse"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
