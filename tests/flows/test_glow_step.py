"""What a step of Glow promises, on every backend."""

import doctest
import math
from typing import Any

import pytest
import torch

from mpkernels.flows import PLU, glow_step, plu_decompose
from mpkernels.flows.glow_step import api
from mpkernels.testing import compare, poisoned_memory


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(*shape, dtype=torch.float64, parts=False, parity=0, parameters=2) -> Any:
    """x, bias, log_scale, a weight and the weight of the network, a 1x1 convolution with tanh behind it."""
    channels = shape[1]
    first = (channels + 1) // 2
    kept = channels - first if parity else first
    weight = torch.linalg.qr(normal(channels, channels, seed=1)).Q + 0.1 * torch.eye(channels)
    return (
        normal(*shape, dtype=dtype),
        normal(channels, seed=2, dtype=dtype),
        (0.3 * normal(channels, seed=3)).to(dtype),
        plu_decompose(weight.to(dtype)) if parts else weight.to(dtype),
        (normal(parameters * (channels - kept), kept, seed=4) / math.sqrt(kept)).to(dtype),
    )


def of_network(of_weight):
    def network(kept, context=None):
        found = torch.tanh(torch.einsum("oc,bc...->bo...", of_weight.to(kept.dtype), kept))
        return found if context is None else found + context

    return network


def slow(x, bias, log_scale, weight, of_weight, parity=0, shift_first=False, epsilon=0.0, context=None):
    """The three transforms one after another, as flows are written in torch: the parameters are [shift; scale]."""
    channels, positions = x.shape[1], math.prod(x.shape[2:])
    if isinstance(weight, PLU):
        identity = torch.eye(channels, dtype=x.dtype)
        upper = weight.upper.triu(1) + (weight.sign * weight.log_scale.exp()).diag()
        weight = identity[weight.permutation] @ (weight.lower.tril(-1) + identity) @ upper
    z = (x + bias.view(-1, *(1,) * (x.dim() - 2))) * log_scale.exp().view(-1, *(1,) * (x.dim() - 2))
    z = torch.einsum("oc,bc...->bo...", weight, z)
    kept, other = z.split([(channels + 1) // 2, channels // 2], 1)[:: -1 if parity else 1]
    shift, raw = of_network(of_weight)(kept, context).chunk(2, 1)
    factor = torch.sigmoid(raw + 2) + epsilon
    other = (other + shift) * factor if shift_first else other * factor + shift
    y = torch.cat([other, kept] if parity else [kept, other], 1)
    constant = positions * (
        log_scale.sum() + torch.linalg.slogdet(weight.to(torch.promote_types(weight.dtype, torch.float32))).logabsdet
    )
    return y, constant + factor.log().flatten(1).sum(1)


class GlowStepProperties:
    backend = ""
    device = "cpu"
    dtypes = (torch.float64, torch.float32, torch.bfloat16)

    @pytest.fixture(autouse=True)
    def _poisoned(self):
        with poisoned_memory():
            yield

    def run(self, x, bias, log_scale, weight, of_weight, **settings):
        return glow_step(x, bias, log_scale, weight, of_network(of_weight), backend=self.backend, **settings)

    def moved(self, tensors) -> Any:
        return [PLU(*(p.to(self.device) for p in t)) if isinstance(t, PLU) else t.to(self.device) for t in tensors]

    @pytest.mark.parametrize(
        ("shape", "settings"),
        [
            ((2, 6, 4, 5), {}),
            ((2, 5, 9), {"parity": 1, "shift_first": True}),
            ((7, 4), {"epsilon": 1e-3}),
            ((2, 2, 3), {"context": 0.25}),
        ],
    )
    @pytest.mark.parametrize("parts", [False, True])
    def test_is_its_parts_one_after_another(self, shape, settings, parts):
        """Outputs and gradients of everything, within the bound of the ops."""
        parity = settings.get("parity", 0)
        for dtype in self.dtypes:
            *tensors, of_weight = problem(*shape, dtype=torch.float64, parts=parts, parity=parity)
            tensors = [*tensors[:3], *(tensors[3] if parts else [tensors[3]]), of_weight]
            rounded = [t.to(dtype) if t.is_floating_point() else t for t in tensors]

            def found(function, dtype, device, rounded=rounded):
                own = [t.to(device, dtype if t.is_floating_point() else t.dtype) for t in rounded]
                leaves = [
                    t.requires_grad_() for i, t in enumerate(own) if i not in ((3, 6) if parts else ())
                ]  # (buffers)
                weight = PLU(*own[3:8]) if parts else own[3]
                y, log_abs_det = function(*own[:3], weight, own[-1], **settings)
                loss = (y.double() * torch.linspace(0.5, 1, y.shape[1]).to(y).view(-1, *(1,) * (y.dim() - 2))).sum()
                return [
                    y,
                    log_abs_det,
                    *torch.autograd.grad(loss + log_abs_det.double().sum(), leaves),
                ]

            gold = found(slow, torch.float64, "cpu")
            low = found(slow, dtype, "cpu")
            for i, (got, a, b) in enumerate(zip(found(self.run, dtype, self.device), low, gold, strict=True)):
                row = compare(str(i), got, a.to(got.dtype), b, scale=10.0)
                assert row.ok, (dtype, str(row))

    @pytest.mark.parametrize("inverse", [False, True])
    def test_log_abs_det_is_that_of_the_jacobian(self, inverse):
        x, *others = self.moved(problem(1, 3, 2, parts=True))
        jacobian = torch.autograd.functional.jacobian(lambda x: self.run(x, *others, inverse=inverse)[0], x)
        _, wanted = torch.linalg.slogdet(jacobian.reshape(6, 6))
        torch.testing.assert_close(self.run(x, *others, inverse=inverse)[1][0], wanted)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("settings", [{}, {"parity": 1, "shift_first": True}, {"scale": "additive"}])
    @pytest.mark.parametrize("parts", [False, True])
    def test_round_trip(self, parts, settings, dtype):
        """Within 300 roundings, at a matrix near a rotation and factors between 0.7 and 1."""
        parameters = 1 if settings.get("scale") == "additive" else 2
        shape = (3, 13, 4, 4)
        parity = settings.get("parity", 0)
        x, *others = self.moved(problem(*shape, dtype=dtype, parts=parts, parity=parity, parameters=parameters))
        y, log_abs_det = self.run(x, *others, **settings)
        back, negative = self.run(y, *others, inverse=True, **settings)
        assert float((back - x).abs().max()) <= 300 * torch.finfo(dtype).eps * float(x.abs().max())
        torch.testing.assert_close(negative, -log_abs_det)

    def test_second_order(self):
        if self.backend == "triton" and self.device == "cpu":
            return  # the ops' own tests have it; the interpreter is slow
        tensors = [t.requires_grad_() for t in self.moved(problem(1, 2, 2))]
        assert torch.autograd.gradcheck(self.run, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(self.run, tensors, fast_mode=True)

    def test_compiles_whole(self):
        if self.backend == "reference" or (self.backend == "triton" and self.device == "cpu"):
            return
        tensors = [t.requires_grad_() for t in self.moved(problem(2, 4, 3, dtype=torch.float32))]

        def loss(*tensors):
            y, log_abs_det = self.run(*tensors)
            return y.square().sum() + log_abs_det.sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
        found = torch.autograd.grad(compiled(*tensors), tensors)
        for a, b in zip(found, torch.autograd.grad(loss(*tensors), tensors), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()

    def test_no_samples(self):
        *tensors, of_weight = self.moved(problem(0, 4, 3, 3, dtype=torch.float32))
        leaves = [t.requires_grad_() for t in tensors]
        y, log_abs_det = self.run(*leaves, of_weight)
        assert y.shape == (0, 4, 3, 3)
        assert log_abs_det.shape == (0,)
        assert all(not g.any() for g in torch.autograd.grad(y.sum() + log_abs_det.sum(), leaves))

    def test_a_singular_weight(self):
        x, bias, log_scale, weight, of_weight = self.moved(problem(2, 4, 3, dtype=torch.float32))
        weight[1] = 0
        y, log_abs_det = self.run(x, bias, log_scale, weight, of_weight)
        assert bool((log_abs_det == -math.inf).all())
        assert bool(y.isfinite().all())
        if self.device == "cpu":
            with pytest.raises(ValueError, match=r"weight.*invertible.*singular"):
                self.run(x, bias, log_scale, weight, of_weight, inverse=True)

    @pytest.mark.parametrize(
        ("place", "change", "error", "message"),
        [
            (0, torch.zeros(3), ValueError, r"x.*\(B, C, ...\).*\(3,\)"),
            (0, torch.zeros(2, 1, 4), ValueError, r"x.*C >= 2.*\(2, 1, 4\)"),
            (1, torch.zeros(3), ValueError, r"bias.*\(4,\).*\(3,\)"),
            (2, torch.zeros(4).double(), TypeError, r"log_scale.*float32.*float64"),
            (3, torch.eye(3), ValueError, r"weight.*\(4, 4\).*\(3, 3\)"),
            (4, torch.eye(2), ValueError, r"network.*\(2, 4, 3\) \(B, 2 T, ...\).*\(2, 2, 3\)"),
        ],
    )
    def test_bad_input_is_refused(self, place, change, error, message):
        tensors = problem(2, 4, 3, dtype=torch.float32)
        tensors = [change if i == place else t for i, t in enumerate(tensors)]
        with pytest.raises(error, match=message):
            self.run(*self.moved(tensors))

    def test_a_network_that_is_none(self):
        *tensors, _ = self.moved(problem(2, 4, 3, dtype=torch.float32))
        for network, message in ((3, "network.*function.*int"), (lambda _: 3, r"network.*returns.*Tensor.*int")):
            with pytest.raises(TypeError, match=message):
                glow_step(*tensors, network, backend=self.backend)  # pyright: ignore[reportArgumentType]


def test_examples():
    found = doctest.testmod(api)
    assert found.attempted > 0
    assert not found.failed


class TestReference(GlowStepProperties):
    backend = "reference"


class TestCpu(GlowStepProperties):
    backend = "cpu"


class TestFibres(GlowStepProperties):
    """The coupling's CUDA kernels, a fibre per thread, on the CPU."""

    backend = "fibres"
    dtypes = (torch.float64, torch.float32)


@pytest.mark.triton_interpreted
class TestTriton(GlowStepProperties):
    backend = "triton"
    dtypes = (torch.float32,)


@pytest.mark.gpu
class TestCuda(GlowStepProperties):
    backend = "cuda"
    device = "cuda"


@pytest.mark.gpu
class TestTritonOnGpu(GlowStepProperties):
    backend = "triton"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(GlowStepProperties):
    backend = "reference"
    device = "cuda"
