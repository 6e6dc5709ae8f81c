"""What volume compositing promises, on every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mpkernels
from mpkernels import spec
from mpkernels.testing import compare, gradients, strategies, upcast
from mpkernels.testing.properties import OpProperties

FUZZ = strategies.fuzz(12, interpreted=4)


class CompositeProperties(OpProperties):
    ops = ("composite", "composite_from_alphas")

    def composite(self, *arguments, **settings):
        return mpkernels.composite(*arguments, **settings, backend=self.backend)

    def tensor(self, x, dtype=torch.float64):
        return torch.tensor(x, dtype=dtype, device=self.device)

    def test_constant_density_is_beer_lambert(self):
        t = torch.linspace(2, 5, 34, dtype=torch.float64, device=self.device).expand(2, 34)
        sigmas = self.tensor([0.7, 2.0])[:, None].expand(2, 33)
        out = self.composite(sigmas, torch.ones_like(sigmas)[..., None], t[:, :-1], t[:, 1:])
        wanted = 1 - torch.exp(-3 * self.tensor([0.7, 2.0]))
        torch.testing.assert_close(out.opacity, wanted)
        torch.testing.assert_close(out.values[:, 0], wanted)
        torch.testing.assert_close(out.weights.sum(-1), wanted)

    def test_a_split_interval_changes_nothing(self):
        generator = torch.Generator().manual_seed(1)
        sigmas, colors = (
            torch.rand(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 20), (3, 20, 3))
        )
        edges = torch.cumsum(torch.rand(3, 21, generator=generator, dtype=torch.float64), -1)
        middle = (edges[:, :-1] + edges[:, 1:]) / 2
        whole = self.composite(*(x.to(self.device) for x in (sigmas, colors, edges[:, :-1], edges[:, 1:])))
        starts = torch.stack([edges[:, :-1], middle], -1).flatten(1)
        ends = torch.stack([middle, edges[:, 1:]], -1).flatten(1)
        twice = [x.repeat_interleave(2, 1) for x in (sigmas, colors)]
        halves = self.composite(*(x.to(self.device) for x in (*twice, starts, ends)))
        torch.testing.assert_close(halves.values, whole.values)
        torch.testing.assert_close(halves.opacity, whole.opacity)
        torch.testing.assert_close(halves.weights.unflatten(1, (20, 2)).sum(-1), whole.weights)

    def test_gradient_at_alpha_one_in_closed_form(self):
        """value = a c0 + (1 - a) b c1 at a = 1, where a quotient of products would divide by zero."""
        alphas = self.tensor([[1.0, 0.25]]).requires_grad_()
        values = self.tensor([[[3.0], [8.0]]])
        out = mpkernels.composite_from_alphas(alphas, values, torch.zeros_like(alphas), backend=self.backend)
        (gradient,) = torch.autograd.grad(out.values.sum(), alphas)
        torch.testing.assert_close(gradient, self.tensor([[3.0 - 0.25 * 8.0, 0.0]]))

    def test_nothing_leaks_from_behind_an_opaque_sample(self):
        """A last interval of 1e10, as NeRF appends, gets gradient 0 behind an opaque sample: nothing cancels there."""
        sigmas = self.tensor([[0.3, 1e9, 0.5, 2.0]], torch.float32).requires_grad_()
        starts, ends = self.tensor([[0.0, 1, 2, 3]], torch.float32), self.tensor([[1.0, 2, 3, 1e10]], torch.float32)
        colors = torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(0)).to(self.device)
        out = self.composite(sigmas, colors, starts, ends)
        (gradient,) = torch.autograd.grad(out.values.sum() + out.depth.sum() + out.opacity.sum(), sigmas)
        assert torch.equal(gradient[0, 2:].cpu(), torch.zeros(2))
        assert torch.equal(out.weights[0, 2:].detach().cpu(), torch.zeros(2))

    @pytest.mark.parametrize("packed", [False, True])
    def test_stopped_samples_weigh_and_pull_nothing(self, packed):
        op = spec.find("composite")
        case = op.case("packed, NaN behind an early stop" if packed else "NaN behind an early stop")
        arguments = case.arguments(torch.float32, self.device)
        leaves = [arguments[name].requires_grad_() for name in ("sigmas", "values", "t_starts", "t_ends")]
        out = mpkernels.composite(**arguments, backend=self.backend)
        found = torch.autograd.grad(sum(x.sum() for x in out), leaves)
        dead = arguments["sigmas"].isnan()
        assert bool(dead.any())
        assert not out.weights[dead].any()
        for x in found:
            assert not x[dead].any()
            assert bool(x.isfinite().all())

    def test_packed_rays_equal_dense_ones(self):
        arguments = spec.find("composite").case("typical").arguments(torch.float32, self.device)
        dense = mpkernels.composite(**arguments, backend=self.backend)
        rays, samples = arguments["sigmas"].shape
        first = torch.arange(rays, device=self.device) * samples
        flat = {name: x.flatten(0, 1) if name != "background" else x for name, x in arguments.items()}
        info = torch.stack([first, torch.full_like(first, samples)], -1)
        order = torch.randperm(rays, generator=torch.Generator().manual_seed(0)).to(self.device)
        packed = mpkernels.composite(**flat, packed_info=info[order], backend=self.backend)
        torch.testing.assert_close(packed.values, dense.values[order], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(packed.weights.view(rays, samples), dense.weights, rtol=1e-6, atol=1e-6)

    def test_vmap_is_more_rays(self):
        arguments = spec.find("composite").case("batch dimensions").arguments(torch.float64, self.device)
        tensors = [arguments[name] for name in ("sigmas", "values", "t_starts", "t_ends", "background")]

        def one(sigmas, values, t_starts, t_ends, background):
            out = mpkernels.composite(sigmas, values, t_starts, t_ends, background=background, backend=self.backend)
            return out.values.pow(2).sum() + out.weights.pow(3).sum() + out.depth.sum()

        each = torch.func.vmap(torch.func.grad(one, argnums=(0, 1, 2, 3, 4)))(*tensors)
        whole = torch.func.grad(lambda *xs: sum(one(*x) for x in zip(*xs, strict=True)), argnums=(0, 1, 2, 3, 4))(
            *tensors
        )
        for a, b in zip(each, whole, strict=True):
            torch.testing.assert_close(a, b)

    def test_second_derivative_through_vmap(self):
        arguments = spec.find("composite").case("one ray of 8 samples").arguments(torch.float64, self.device)

        def loss(sigmas, backend):
            out = mpkernels.composite(
                sigmas, arguments["values"][0], arguments["t_starts"][0], arguments["t_ends"][0], backend=backend
            )
            return out.values.pow(2).sum() + out.depth

        ours = torch.func.hessian(lambda x: loss(x, self.backend))(arguments["sigmas"][0])
        torch.testing.assert_close(ours, torch.func.hessian(lambda x: loss(x, "reference"))(arguments["sigmas"][0]))

    @settings(FUZZ)
    @given(data=st.data())
    def test_random_dense_rays(self, data):
        rays, samples = data.draw(strategies.sizes(largest=9)), data.draw(strategies.sizes())
        channels = data.draw(st.sampled_from([1, 2, 3, 4, 7, 16]))
        eps = data.draw(st.sampled_from([0.0, 1e-30]))
        generator = data.draw(strategies.generators())
        scale = 10 ** data.draw(st.floats(-4, 3))
        edges = torch.cumsum(torch.rand(rays, samples + 1, generator=generator), -1)
        arguments = {
            "sigmas": torch.rand(rays, samples, generator=generator) * scale,
            "values": torch.randn(rays, samples, channels, generator=generator),
            "t_starts": edges[:, :-1],
            "t_ends": edges[:, 1:],
            "background": torch.randn(channels, generator=generator),
        }
        self.check_random(arguments, eps)

    @settings(FUZZ)
    @given(info=strategies.packed_infos(), generator=strategies.generators(), channels=st.sampled_from([1, 3, 5]))
    def test_random_packed_rays(self, info, generator, channels):
        packed_info, samples = info
        arguments = {
            "sigmas": torch.rand(samples, generator=generator) * 4,
            "values": torch.randn(samples, channels, generator=generator),
            "t_starts": torch.rand(samples, generator=generator),
            "t_ends": 1 + torch.rand(samples, generator=generator),
            "packed_info": packed_info,
        }
        self.check_random(arguments, 0.0)

    def check_random(self, arguments, eps):
        arguments = {name: x.to(self.device) for name, x in arguments.items()} | {"early_stop_eps": eps}
        names = spec.find("composite").differentiable

        def run(arguments, backend):
            out, found = gradients(lambda **a: mpkernels.composite(**a, backend=backend), arguments, names)
            return dict(zip(mpkernels.CompositeOutput._fields, out, strict=True)) | {
                f"grad {n}": g for n, g in found.items()
            }

        low, gold = run(arguments, "reference"), run(upcast(arguments), "reference")
        for name, got in run(arguments, self.backend).items():
            row = compare(name, got, low.get(name, got), gold.get(name, torch.zeros_like(got)), scale=1.0)
            assert row.ok, str(row)


class TestReference(CompositeProperties):
    backend = "reference"
    large = False


class TestCpu(CompositeProperties):
    backend = "cpu"

    def test_one_and_two_threads_are_bit_equal(self):
        arguments = spec.find("composite").case("many rays").arguments(torch.float32)
        leaves = [arguments[name].requires_grad_() for name in ("sigmas", "values")]
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                out = mpkernels.composite(**arguments, backend="cpu")
                found.append([*out, *torch.autograd.grad(sum(x.sum() for x in out), leaves)])
        finally:
            torch.set_num_threads(threads)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))

    def test_many_factors_are_not_biased(self):
        """A scan of factors just below one must not lose their products, always in the same direction."""
        generator = torch.Generator().manual_seed(0)
        edges = torch.cumsum(torch.rand(50, 2501, generator=generator, dtype=torch.float64) / 2500, -1).float()
        arguments = (torch.rand(50, 2500, generator=generator), torch.ones(50, 2500, 1), edges[:, :-1], edges[:, 1:])
        gold = mpkernels.composite(*(x.double() for x in arguments), backend="reference").opacity
        bias = (mpkernels.composite(*arguments, backend="cpu").opacity.double() - gold).mean()
        assert abs(bias) < 3e-8


class TestFibres(CompositeProperties):
    """The CUDA kernels, a fibre per thread, on the CPU."""

    backend = "fibres"
    slow = True
    large = False


@pytest.mark.triton_interpreted
class TestTriton(CompositeProperties):
    backend = "triton"
    slow = True
    large = False


@pytest.mark.gpu
class TestCuda(CompositeProperties):
    backend = "cuda"
    device = "cuda"


@pytest.mark.gpu
class TestTritonOnGpu(CompositeProperties):
    backend = "triton"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(CompositeProperties):
    backend = "reference"
    device = "cuda"
    large = False
