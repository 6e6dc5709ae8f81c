"""What spherical harmonics promise, on every backend."""

import math

import pytest
import torch

from mpkernels import spec
from mpkernels.splatting.spherical_harmonics import eager, reference, spherical_harmonics
from mpkernels.testing import gradients
from mpkernels.testing.properties import OpProperties


def directions(count: int) -> torch.Tensor:
    """Directions spread over the sphere, with weights that integrate polynomials up to degree 2 count - 1 exactly."""
    nodes, weights = torch.linalg.eigh(torch.diag(gauss_legendre_offdiagonal(count), 1) * 1.0, UPLO="U")
    azimuth = torch.arange(2 * count, dtype=torch.float64) * (math.pi / count)
    radius = (1 - nodes**2).sqrt()[:, None]
    points = torch.stack([radius * azimuth.cos(), radius * azimuth.sin(), nodes[:, None].expand(-1, 2 * count)], -1)
    areas = (2 * weights[0] ** 2)[:, None].expand(-1, 2 * count) * (math.pi / count)
    return torch.cat([points, areas[..., None]], -1).flatten(0, 1)


def gauss_legendre_offdiagonal(count: int) -> torch.Tensor:
    k = torch.arange(1, count, dtype=torch.float64)
    return k / (4 * k * k - 1).sqrt()


class SphericalHarmonicsProperties(OpProperties):
    ops = ("spherical_harmonics",)

    def evaluate(self, degree, dirs, coeffs, **settings):
        return spherical_harmonics(
            degree, dirs.to(self.device), coeffs.to(self.device), **settings, backend=self.backend
        )

    def basis(self, degree, dirs):
        """All Y_k of the op, (..., K), by coefficients that are 1 in one place."""
        k = (degree + 1) ** 2
        coeffs = torch.eye(k, dtype=torch.float64)[:, None, :, None].expand(k, len(dirs), k, 3)
        found = self.evaluate(degree, dirs.expand(k, -1, 3), coeffs)
        assert torch.equal(found[..., 0], found[..., 1])
        assert torch.equal(found[..., 0], found[..., 2])
        return found[..., 0].T.cpu()

    def test_each_term_is_its_closed_form(self):
        dirs = directions(5)[:, :3]
        wanted = eager.basis(4, *dirs.unbind(-1))
        for degree in range(5):
            torch.testing.assert_close(self.basis(degree, 3 * dirs), wanted[:, : (degree + 1) ** 2])

    def test_orthonormal(self):
        points = directions(6)
        y = self.basis(4, points[:, :3])
        gram = torch.einsum("ni,nj,n->ij", y, y, points[:, 3])
        torch.testing.assert_close(gram, torch.eye(25, dtype=torch.float64))

    def test_sum_of_squares_is_constant(self):
        """The addition theorem: sum_m Y_l^m(d)^2 = (2 l + 1) / (4 pi) in every direction."""
        y = self.basis(4, torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        for degree in range(5):
            total = y[:, degree**2 : (degree + 1) ** 2].square().sum(-1)
            torch.testing.assert_close(total, torch.full_like(total, (2 * degree + 1) / (4 * math.pi)))

    def test_length_of_a_direction_is_immaterial(self):
        """Even where squares overflow or vanish in float32, or the numbers themselves are subnormal."""
        generator = torch.Generator().manual_seed(0)
        dirs, coeffs = torch.randn(7, 3, generator=generator), torch.randn(7, 25, 3, generator=generator)
        wanted = self.evaluate(4, dirs, coeffs)
        for scale in (2.0**100, 2.0**-100, 2.0**-130):
            torch.testing.assert_close(self.evaluate(4, dirs * scale, coeffs), wanted, rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("scale", [2.0**-80, 2.0**90])
    def test_gradient_of_long_and_short_directions(self, scale):
        generator = torch.Generator().manual_seed(0)
        coeffs = torch.randn(7, 16, 3, generator=generator).to(self.device)
        found = []
        for factor in (1.0, scale):
            dirs = (torch.randn(7, 3, generator=torch.Generator().manual_seed(1)) * factor).to(self.device)
            colors = self.evaluate(3, dirs.requires_grad_(), coeffs)
            found.append(torch.autograd.grad(colors.sum(), dirs)[0] * factor)
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)

    def test_gradient_has_no_part_along_the_direction(self):
        arguments = spec.find("spherical_harmonics").case("degree 4").arguments(torch.float64, self.device)
        dirs = arguments["dirs"].requires_grad_()
        (found,) = torch.autograd.grad(self.evaluate(4, dirs, arguments["coeffs"]).sum(), dirs)
        along = (found * dirs).sum(-1)
        torch.testing.assert_close(along, torch.zeros_like(along))

    def test_no_direction_leaves_the_constant_term(self):
        bad = torch.zeros(6, 3)
        bad[1, 0], bad[2, 1], bad[3, 2], bad[4, :] = math.nan, math.inf, -math.inf, math.nan
        coeffs = torch.randn(6, 25, 3, generator=torch.Generator().manual_seed(0))
        coeffs[5, 1:] = math.nan
        arguments = {"degree": 4, "dirs": bad.to(self.device), "coeffs": coeffs.to(self.device)}
        (colors,), found = gradients(
            lambda **a: (spherical_harmonics(**a, backend=self.backend),), arguments, ("dirs", "coeffs")
        )
        torch.testing.assert_close(colors.cpu(), 0.28209479177387814 * coeffs[:, 0])
        assert not found["dirs"].any()
        assert not found["coeffs"][:, 1:].any()
        assert bool(found["coeffs"][:, 0].all())

    def test_masked_colors_are_zero_and_pull_nothing(self):
        op = spec.find("spherical_harmonics")
        arguments = op.case("NaN where masked").arguments(torch.float32, self.device)
        (colors,), found = gradients(lambda **a: self.call(op, **a), arguments, op.differentiable)
        dead = ~arguments["masks"]
        assert bool(dead.all(0).any())
        assert bool((~dead).any(0).any())
        assert not colors[dead].any()
        assert not found["dirs"][dead].any()
        assert not found["coeffs"][dead.all(0)].any()
        for x in (colors, *found.values()):
            assert bool(x.isfinite().all())
        assert bool(found["coeffs"][~dead.all(0), :16].any(-1).any(-1).all())
        assert not found["coeffs"][:, 16:].any()

    def test_no_gradient_leaks_from_a_masked_color(self):
        arguments = spec.find("spherical_harmonics").case("degree 3").arguments(torch.float32, self.device)
        leaves = [arguments[name].requires_grad_() for name in ("dirs", "coeffs")]
        masks = torch.tensor([True, False, True], device=self.device)
        colors = self.evaluate(3, *leaves, masks=masks)
        seed = torch.where(masks[:, None], 1.0, math.nan).expand(3, 3)
        for x in torch.autograd.grad(colors, leaves, seed):
            assert bool(x.isfinite().all())
            assert not x[1].any()

    def test_cameras_share_coefficients(self):
        arguments = spec.find("spherical_harmonics").case("batches of cameras").arguments(torch.float64, self.device)
        dirs, coeffs = arguments["dirs"], arguments["coeffs"].requires_grad_()
        together = self.evaluate(2, dirs, coeffs)
        apart = self.evaluate(2, dirs, coeffs.expand(2, 3, 19, 9, 3))
        assert torch.equal(together, apart)
        (a,), (b,) = (torch.autograd.grad(x.square().sum(), coeffs) for x in (together, apart))
        torch.testing.assert_close(a, b)

    def test_second_derivative_is_refused(self):
        if self.backend == "reference":
            return
        coeffs = torch.randn(2, 4, 3, device=self.device, requires_grad=True)
        colors = self.evaluate(1, torch.ones(2, 3), coeffs)
        (first,) = torch.autograd.grad(colors.square().sum(), coeffs, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


class TestReference(SphericalHarmonicsProperties):
    backend = "reference"
    large = False

    def test_basis_is_the_closed_form(self):
        x, y, z = directions(4)[:, :3].unbind(-1)
        torch.testing.assert_close(torch.stack(reference.basis(4, x, y, z), -1), eager.basis(4, x, y, z))


class TestCpu(SphericalHarmonicsProperties):
    backend = "cpu"

    def test_one_and_two_threads_are_bit_equal(self):
        op = spec.find("spherical_harmonics")
        arguments = op.case("many Gaussians").arguments(torch.float32)
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                outputs, of_inputs = gradients(lambda **a: self.call(op, **a), arguments, op.differentiable)
                found.append([*outputs, *of_inputs.values()])
        finally:
            torch.set_num_threads(threads)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


class TestFibres(SphericalHarmonicsProperties):
    """The CUDA kernels, a fibre per thread, on the CPU."""

    backend = "fibres"
    slow = True
    large = False


@pytest.mark.triton_interpreted
class TestTriton(SphericalHarmonicsProperties):
    backend = "triton"
    slow = True
    large = False


@pytest.mark.gpu
class TestCuda(SphericalHarmonicsProperties):
    backend = "cuda"
    device = "cuda"


@pytest.mark.gpu
class TestTritonOnGpu(SphericalHarmonicsProperties):
    backend = "triton"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(SphericalHarmonicsProperties):
    backend = "reference"
    device = "cuda"
    large = False
