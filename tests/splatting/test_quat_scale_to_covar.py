"""What covariances from quaternions and scales promise, on every backend."""

import math

import pytest
import torch

from mpkernels import spec
from mpkernels.splatting.quat_scale_to_covar import quat_scale_to_covar
from mpkernels.testing.properties import OpProperties


class QuatScaleToCovarProperties(OpProperties):
    ops = ("quat_scale_to_covar",)

    def covar(self, quats, scales, **settings):
        return quat_scale_to_covar(quats, scales, **settings, backend=self.backend)

    def arguments(self, dtype=torch.float64):
        found = spec.find("quat_scale_to_covar").case("five").arguments(dtype, self.device)
        return found["quats"], found["scales"]

    def test_a_turn_about_z_in_closed_form(self):
        """By 30 degrees: xx = a^2 cos^2 + b^2 sin^2, xy = (a^2 - b^2) sin cos."""
        half = math.radians(15)
        quats = torch.tensor([math.cos(half), 0, 0, math.sin(half)], dtype=torch.float64, device=self.device)
        scales = torch.tensor([2.0, 1, 3], dtype=torch.float64, device=self.device)
        s, c = 0.5, math.sqrt(0.75)
        wanted = torch.tensor([4 * c * c + s * s, 3 * s * c, 0, 4 * s * s + c * c, 0, 9], dtype=torch.float64)
        torch.testing.assert_close(self.covar(quats, scales, triu=True).cpu(), wanted)

    def test_the_inverse_is_the_inverse(self):
        quats, scales = self.arguments()
        product = self.covar(quats, scales) @ self.covar(quats, scales, inverse=True)
        torch.testing.assert_close(product, torch.eye(3).to(product).expand_as(product))

    @pytest.mark.parametrize("inverse", [False, True])
    def test_triangles_are_those_of_the_matrices(self, inverse):
        quats, scales = (x.requires_grad_() for x in self.arguments())
        whole = self.covar(quats, scales, inverse=inverse)
        triangle = self.covar(quats, scales, inverse=inverse, triu=True)
        assert torch.equal(whole[..., (0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)], triangle)
        assert torch.equal(whole, whole.mT)
        a = torch.autograd.grad(whole[..., 0, 1].sum() + 3 * whole[..., 2, 1].sum() + whole[..., 2, 2].sum(), scales)
        b = torch.autograd.grad(triangle[..., 1].sum() + 3 * triangle[..., 4].sum() + triangle[..., 5].sum(), scales)
        torch.testing.assert_close(a, b)

    def test_a_quaternion_has_no_length(self):
        quats, scales = self.arguments()
        factors = torch.tensor([1e-200, 1e-20, -1e-3, 1e20, 1e200], dtype=torch.float64, device=self.device)
        torch.testing.assert_close(self.covar(quats * factors[:, None], scales), self.covar(quats, scales))
        quats = quats.requires_grad_()
        (gradient,) = torch.autograd.grad(self.covar(quats, scales)[..., 0].sum(), quats)
        torch.testing.assert_close((gradient * quats).sum(-1), torch.zeros_like(quats[:, 0]))

    def test_a_zero_quaternion_is_the_identity(self):
        quats = torch.zeros(2, 4, device=self.device, requires_grad=True)
        scales = torch.tensor([[1.0, 2, 3], [0, 1, 0]], device=self.device)
        covars = self.covar(quats, scales)
        assert torch.equal(covars.detach(), torch.diag_embed(scales**2))
        (gradient,) = torch.autograd.grad(covars.sum(), quats)
        assert torch.equal(gradient, torch.zeros_like(gradient))

    def test_nan_stays_in_its_gaussian(self):
        quats, scales = self.arguments()
        quats[1, 2], quats[2, 0], scales[3, 1] = torch.nan, torch.inf, torch.nan
        leaves = [quats.requires_grad_(), scales.requires_grad_()]
        out = self.covar(*leaves)
        for x in (out, *torch.autograd.grad(out.pow(2).sum(), leaves)):
            assert x.isnan().flatten(1).any(1).tolist() == [False, True, True, True, False]

    def test_vmap_is_more_gaussians(self):
        quats, scales = self.arguments()
        quats, scales = (
            quats.expand(3, 5, 4) + 0.1,
            scales.expand(3, 5, 3) * torch.arange(1, 4).to(scales)[:, None, None],
        )

        def loss(quats, scales):
            return (self.covar(quats, scales, triu=True) ** 2).sum()

        each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(quats, scales)
        for a, b in zip(each, torch.func.grad(loss, argnums=(0, 1))(quats, scales), strict=True):
            torch.testing.assert_close(a, b)

    def test_a_second_derivative_is_refused(self):
        if self.backend == "reference":
            return
        quats, scales = self.arguments()
        scales.requires_grad_()
        (gradient,) = torch.autograd.grad(self.covar(quats, scales).sum(), scales, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(gradient.sum(), scales)


class TestReference(QuatScaleToCovarProperties):
    backend = "reference"
    large = False


class TestCpu(QuatScaleToCovarProperties):
    backend = "cpu"

    def test_one_two_and_three_threads_are_bit_equal(self):
        arguments = spec.find("quat_scale_to_covar").case("many").arguments(torch.float32)
        leaves = [x.requires_grad_() for x in arguments.values()]
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                out = self.covar(*leaves)
                found.append([out, *torch.autograd.grad(out.pow(2).sum(), leaves)])
        finally:
            torch.set_num_threads(threads)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


class TestFibres(QuatScaleToCovarProperties):
    """The CUDA kernels, a fibre per thread, on the CPU."""

    backend = "fibres"
    slow = True
    large = False


@pytest.mark.gpu
class TestCuda(QuatScaleToCovarProperties):
    backend = "cuda"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(QuatScaleToCovarProperties):
    backend = "reference"
    device = "cuda"
    large = False
