"""What rasterization promises, on every backend."""

import pytest
import torch

from mpkernels import spec, splatting
from mpkernels.splatting.rasterize.reference import alphas_at, over
from mpkernels.testing.properties import OpProperties


class RasterizeProperties(OpProperties):
    ops = ("rasterize",)

    def draw(self, arguments, **changes):
        return splatting.rasterize(**(arguments | {"backend": self.backend} | changes))

    def arguments(self, name, dtype=torch.float32):
        return spec.find("rasterize").case(name).arguments(dtype, self.device)

    def test_closed_form(self):
        """Two Gaussians, the second behind the first, on one pixel."""
        means2d = torch.tensor([[0.5, 0.5], [1.5, 0.5]], dtype=torch.float64, device=self.device)
        conics = means2d.new_tensor([[1.0, 0.0, 1.0], [2.0, 0.0, 2.0]])
        offsets = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        ids = torch.tensor([1, 0], dtype=torch.int32, device=self.device)
        image = splatting.rasterize(
            *(means2d, conics, means2d.new_tensor([[3.0], [7.0]]), means2d.new_tensor([0.5, 0.8]), 1, 1, offsets, ids),
            backgrounds=means2d.new_tensor([11.0]),
            backend=self.backend,
        )
        first = 0.8 * torch.e**-1.0
        wanted = first * 7 + (1 - first) * (0.5 * 3 + 0.5 * 11)
        assert image.colors.item() == pytest.approx(wanted, rel=1e-14)
        assert image.alphas.item() == pytest.approx(1 - (1 - first) * 0.5, rel=1e-14)

    def test_lists_change_nothing(self):
        """Every pixel against every Gaussian, without tiles."""
        arguments = self.arguments("one pixel wide", torch.float64)
        image = self.draw(arguments)
        ys, xs = torch.meshgrid(torch.arange(33), torch.arange(1), indexing="ij")
        pixels = torch.stack([xs, ys], -1).reshape(-1, 2).to(self.device) + 0.5
        color, behind = over(
            alphas_at(pixels, *(arguments[name] for name in ("means2d", "conics", "opacities"))), arguments["colors"]
        )
        color = color + behind[:, None] * arguments["backgrounds"]
        torch.testing.assert_close(image.colors.reshape(-1, 3), color)
        torch.testing.assert_close(image.alphas.flatten(), 1 - behind)

    def test_gradient_of_colors_alone_and_of_alphas_alone(self):
        arguments = self.arguments("small tiles, two images", torch.float64)
        for output in (0, 1):

            def gradients(backend, output=output):
                leaves = {n: arguments[n].clone().requires_grad_() for n in ("means2d", "opacities", "backgrounds")}
                image = splatting.rasterize(**(arguments | leaves), backend=backend)
                return torch.autograd.grad(image[output].square().sum(), list(leaves.values()), allow_unused=True)

            for got, wanted in zip(gradients(self.backend), gradients("reference"), strict=True):
                torch.testing.assert_close(got, torch.zeros_like(got) if wanted is None else wanted)

    def test_not_finite_gaussians_draw_nothing(self):
        arguments = self.arguments("not finite, not opaque")
        leaves = [arguments[n].requires_grad_() for n in ("means2d", "conics", "colors", "opacities")]
        image = self.draw(arguments)
        assert image.colors.isfinite().all()
        for x in torch.autograd.grad(image.colors.sum() + image.alphas.sum(), leaves):
            assert x.isfinite().all()
            assert not x[0, [3, 5, 7, 8, 9, 11, 13, 14]].any()

    def test_masked_tiles_are_background(self):
        arguments = self.arguments("tiles of 5 pixels, masked")
        mask = arguments["masks"].repeat_interleave(5, -2).repeat_interleave(5, -1)[..., :17, :23]
        image = self.draw(arguments)
        assert torch.equal(image.colors[~mask], arguments["backgrounds"].expand_as(image.colors[~mask]))
        assert not image.alphas[~mask].any()


class KernelProperties(RasterizeProperties):
    """What the reference, differentiated by torch, does not offer."""

    def test_absgrad(self):
        """The sum over pixels of |gradient|, from the gradients of one pixel after the other."""
        arguments = self.arguments("small tiles, two images", torch.float64)
        means2d = arguments["means2d"].requires_grad_()
        image = self.draw(arguments, absgrad=True)
        image.colors.sum().backward()
        wanted = torch.zeros_like(means2d)
        for pixel in self.draw(arguments).colors.sum(-1).flatten():
            wanted += torch.autograd.grad(pixel, means2d, retain_graph=True)[0].abs()
        torch.testing.assert_close(means2d.absgrad, wanted)

    @pytest.mark.parametrize("name", ["one channel", "a feature vector of 19"])
    def test_absgrad_changes_no_other_gradient(self, name):
        arguments = self.arguments(name)
        leaves = [arguments[n].requires_grad_() for n in ("means2d", "conics", "colors", "opacities")]
        found = [
            torch.autograd.grad(self.draw(arguments, absgrad=absgrad).colors.sum(), leaves) for absgrad in (False, True)
        ]
        for plain, beside in zip(*found, strict=True):
            torch.testing.assert_close(plain, beside)

    def test_absgrad_of_a_result(self):
        """As training scripts use it: means2d is no leaf, and keeps its gradient."""
        arguments = self.arguments("packed")
        leaf = arguments["means2d"].clone().requires_grad_()
        arguments["means2d"] = leaf * 1.0
        arguments["means2d"].retain_grad()
        self.draw(arguments, absgrad=True).colors.sum().backward()
        assert arguments["means2d"].absgrad.shape == leaf.shape
        assert torch.equal(arguments["means2d"].grad, leaf.grad)
        assert (arguments["means2d"].absgrad >= leaf.grad.abs() * 0.999).all()

    def test_ids_out_of_range_are_left_out(self):
        arguments = self.arguments("one Gaussian")
        image = self.draw(arguments | {"flatten_ids": torch.full_like(arguments["flatten_ids"], 12345)})
        assert not image.alphas.any()

    def test_a_second_derivative_is_refused(self):
        arguments = self.arguments("one Gaussian", torch.float64)
        arguments["colors"].requires_grad_()
        opacities = arguments["opacities"].requires_grad_()
        (first,) = torch.autograd.grad(self.draw(arguments).colors.square().sum(), opacities, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


class TestReference(RasterizeProperties):
    backend = "reference"
    large = False


class TestCpu(KernelProperties):
    backend = "cpu"

    def test_one_two_and_three_threads_are_bit_equal(self):
        arguments = self.arguments("many")
        leaves = [arguments[name].requires_grad_() for name in ("means2d", "conics", "colors", "opacities")]
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 2, 3, 1, 2, 3, 1, 2, 3, 2):
                torch.set_num_threads(count)
                image = self.draw(arguments, absgrad=True)
                found.append([*image, *torch.autograd.grad(image.colors.square().sum(), leaves)])
        finally:
            torch.set_num_threads(threads)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


class TestFibres(KernelProperties):
    """The CUDA kernels, a fibre per thread, on the CPU."""

    backend = "fibres"
    slow = True
    large = False

    @pytest.mark.parametrize("name", ["typical", "a feature vector of 19"])
    def test_order_of_threads_changes_no_bit(self, name, monkeypatch):
        arguments = self.arguments(name)
        leaves = [arguments[n].requires_grad_() for n in ("means2d", "conics", "colors", "opacities", "backgrounds")]
        found = []
        for order in ("forward", "reverse", "random:1"):
            monkeypatch.setenv("MPKERNELS_FIBRES_ORDER", order)
            image = self.draw(arguments, absgrad=True)
            gradients = torch.autograd.grad(image.colors.square().sum() + image.alphas.sum(), leaves)
            found.append([*image, *gradients, arguments["means2d"].absgrad])
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))

    @pytest.mark.parametrize("name", ["typical", "a feature vector of 19"])
    def test_gradients_that_are_not_finite_stay_with_what_their_pixel_shows(self, name):
        arguments = self.arguments(name)
        leaves = {n: arguments[n].clone().requires_grad_() for n in ("means2d", "conics", "colors", "opacities")}
        image = self.draw(arguments | leaves)
        of_colors = torch.ones_like(image.colors)
        plain = torch.autograd.grad(image.colors, list(leaves.values()), of_colors, retain_graph=True)
        of_colors[..., 3, 4, :] = torch.nan
        changed = torch.autograd.grad(image.colors, list(leaves.values()), of_colors)
        shown = (
            alphas_at(torch.tensor([[4.5, 3.5]]), *(arguments[n] for n in ("means2d", "conics", "opacities")))[0] > 0
        )
        for without, beside in zip(plain, changed, strict=True):
            assert torch.equal(without[~shown], beside[~shown])
            assert beside[shown].isnan().any()


@pytest.mark.gpu
class TestCuda(KernelProperties):
    backend = "cuda"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(RasterizeProperties):
    backend = "reference"
    device = "cuda"
    large = False
