"""What SSIM promises, on every backend."""

import math

import pytest
import torch
from skimage import data, metrics

from mpkernels import spec
from mpkernels.splatting.ssim import ssim
from mpkernels.testing import gradients
from mpkernels.testing.properties import OpProperties


class SsimProperties(OpProperties):
    ops = ("ssim",)

    def ssim(self, image, target, **settings):
        return ssim(image.to(self.device), target.to(self.device), **settings, backend=self.backend)

    def random(self, *shape, seed=0):
        return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def test_equals_scikit_image_on_a_photograph(self):
        """Inside, where no padding is seen; and its mean, which scikit-image takes over the inside alone."""
        photograph = torch.from_numpy(data.camera())[96:126, 200:240].double() / 255
        noisy = (photograph + 0.05 * self.random(30, 40) - 0.02).clamp(0, 1)
        mean, wanted = metrics.structural_similarity(
            photograph.numpy(),
            noisy.numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            full=True,
        )
        wanted = torch.from_numpy(wanted)[5:-5, 5:-5]
        for padding, inside in (("same", slice(5, -5)), ("valid", slice(None))):
            found = self.ssim(photograph[None], noisy[None], padding=padding, reduction="none").cpu()
            torch.testing.assert_close(found[0, inside, inside], wanted)
        found = self.ssim(photograph[None], noisy[None], padding="valid")
        torch.testing.assert_close(found.item(), float(mean))

    def test_constant_images_in_closed_form(self):
        """Without variance, inside: (2 a b + C1) / (a^2 + b^2 + C1)."""
        a, b = 0.75, 0.5
        x, y = (torch.full((1, 1, 13, 12), value, dtype=torch.float64) for value in (a, b))
        found = self.ssim(x, y, padding="valid")
        assert found.item() == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), rel=1e-10)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equal_images_are_alike_and_pull_nothing(self, dtype):
        for scale in (1.0, 0.0, 1e4):
            image = (self.random(1, 1, 3, 14) * scale).to(dtype).to(self.device)
            arguments = {"image": image, "target": image.clone(), "reduction": "none"}
            (found,), pulls = gradients(lambda **a: (ssim(**a, backend=self.backend),), arguments, ("image", "target"))
            if self.backend == "reference":
                if scale <= 1:
                    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-3, atol=1e-3)
            else:
                assert torch.equal(found, torch.ones_like(found))
                assert not any(x.any() for x in pulls.values())

    def test_symmetric(self):
        x, y = self.random(1, 1, 4, 20), self.random(1, 1, 4, 20, seed=1)
        torch.testing.assert_close(self.ssim(x, y, reduction="none"), self.ssim(y, x, reduction="none"))

    def test_scale_of_values_and_range_cancel(self):
        x, y = self.random(1, 1, 4, 20), self.random(1, 1, 4, 20, seed=1)
        torch.testing.assert_close(self.ssim(x, y), self.ssim(255 * x, 255 * y, data_range=255.0))
        assert self.ssim(x, y).item() != pytest.approx(self.ssim(x, y, data_range=2.0).item(), rel=1e-3)

    def test_pixels_see_their_window_alone(self):
        """A NaN makes the windows that hold it NaN, and no other."""
        image = self.random(1, 1, 30, 40)
        image[0, 0, 14, 21] = math.nan
        found = self.ssim(image, self.random(1, 1, 30, 40, seed=1), reduction="none").cpu().isnan()[0, 0]
        wanted = torch.zeros(30, 40, dtype=torch.bool)
        wanted[9:20, 16:27] = True
        assert torch.equal(found, wanted)

    def test_gradients_reach_their_window_alone(self):
        """A NaN in the map's gradient reaches the pixels of its window, and no other."""
        image, target = (
            x.to(self.device).requires_grad_() for x in (self.random(1, 1, 30, 40), self.random(1, 1, 30, 40))
        )
        seed = torch.ones(1, 1, 30, 40, dtype=torch.float64, device=self.device)
        seed[0, 0, 14, 21] = math.nan
        found = self.ssim(image, target, reduction="none")
        wanted = torch.zeros(30, 40, dtype=torch.bool)
        wanted[9:20, 16:27] = True
        for x in torch.autograd.grad(found, (image, target), seed):
            assert torch.equal(x.cpu().isnan()[0, 0], wanted)

    def test_layouts_agree(self):
        arguments = spec.find("ssim").case("channels last").arguments(torch.float64, self.device)
        image, target = arguments["image"], arguments["target"]
        assert not image.is_contiguous()
        for reduction in ("mean", "none"):
            found = self.ssim(image, target, reduction=reduction)
            torch.testing.assert_close(found, self.ssim(image.contiguous(), target.contiguous(), reduction=reduction))
        if self.backend != "reference":
            assert found.is_contiguous(memory_format=torch.channels_last)

    def test_gradient_of_one_image_alone(self):
        x, y = (self.random(1, 1, 6, 9, seed=i).to(self.device) for i in (0, 1))
        both = torch.func.grad(lambda *xs: self.ssim(*xs), argnums=(0, 1))(x, y)
        torch.testing.assert_close(torch.func.grad(lambda x: self.ssim(x, y))(x), both[0])
        torch.testing.assert_close(torch.func.grad(lambda y: self.ssim(x, y))(y), both[1])

    def test_no_pixels_have_mean_zero(self):
        for shape in ((0, 3, 4, 4), (1, 0, 4, 4), (1, 3, 0, 4)):
            assert self.ssim(torch.ones(shape), torch.ones(shape)).item() == 0

    def test_second_derivative_is_refused(self):
        if self.backend == "reference":
            return
        x = self.random(1, 1, 4, 5).to(self.device).requires_grad_()
        (first,) = torch.autograd.grad(self.ssim(x, x.detach() + 0.1).square(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


class TestReference(SsimProperties):
    backend = "reference"
    large = False


class TestCpu(SsimProperties):
    backend = "cpu"

    def test_one_and_two_threads_are_bit_equal(self):
        op = spec.find("ssim")
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append([])
                for name in ("several tiles", "typical map"):
                    arguments = op.case(name).arguments(torch.float32)
                    outputs, of_inputs = gradients(lambda **a: self.call(op, **a), arguments, op.differentiable)
                    found[-1] += [*outputs, *of_inputs.values()]
        finally:
            torch.set_num_threads(threads)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


class TestFibres(SsimProperties):
    """The CUDA kernels, a fibre per thread, on the CPU."""

    backend = "fibres"
    slow = True
    large = False


@pytest.mark.triton_interpreted
class TestTriton(SsimProperties):
    backend = "triton"
    slow = True
    large = False


@pytest.mark.gpu
class TestCuda(SsimProperties):
    backend = "cuda"
    device = "cuda"


@pytest.mark.gpu
class TestTritonOnGpu(SsimProperties):
    backend = "triton"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(SsimProperties):
    backend = "reference"
    device = "cuda"
    large = False
