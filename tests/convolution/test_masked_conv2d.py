"""What the masked convolution and the two stacks promise, on every backend."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpkernels import spec
from mpkernels.convolution import horizontal_stack, masked_conv2d, pixelcnn_mask, vertical_stack
from mpkernels.testing import gradients, strategies
from mpkernels.testing.properties import OpProperties

FUZZ = strategies.fuzz(6)
SIDE = 3  # of the pictures in which every output is asked what it sees


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sees(function, channels: int, device: str) -> torch.Tensor:
    """(D, pixels, C, pixels) bool: whether the gradient of an output to an input is other than 0."""
    x = normal(1, channels, SIDE, SIDE, seed=1).to(device)
    filters, pixels = function(x).shape[1], SIDE * SIDE
    asked = x.expand(filters * pixels, -1, -1, -1).detach().clone().requires_grad_()  # a picture for every output
    one = torch.eye(filters * pixels, dtype=x.dtype, device=device).view(-1, filters, SIDE, SIDE)
    (found,) = torch.autograd.grad(function(asked), asked, one)
    assert bool(found.isfinite().all())
    return (found != 0).view(filters, pixels, channels, pixels).cpu()


def earlier(filters: int, channels: int, colors: int, inclusive: bool) -> torch.Tensor:
    """(D, pixels, C, pixels) bool: the order in which colours of pixels are generated."""
    pixel = torch.arange(SIDE * SIDE)
    of_out = torch.arange(filters) // (filters // colors)
    of_in = torch.arange(channels) // (channels // colors)
    out = pixel[None, :] * colors + of_out[:, None]
    into = pixel[None, :] * colors + of_in[:, None]
    difference = out[:, :, None, None] - into[None, None]
    return difference >= 0 if inclusive else difference > 0


class MaskedConv2dProperties(OpProperties):
    ops = ("masked_conv2d", "vertical_stack", "horizontal_stack")

    def weight(self, *shape: int, seed: int = 0) -> torch.Tensor:
        return normal(*shape, seed=seed).to(self.device)

    def masked(self, x, weight, mask_type, colors=1, **settings):
        return masked_conv2d(x, weight, mask_type=mask_type, colors=colors, **settings, backend=self.backend)

    def horizontal(self, x, weight, mask_type, colors=1):
        return horizontal_stack(x, weight, mask_type=mask_type, colors=colors, backend=self.backend)

    def vertical(self, x, weight, mask_type):
        return vertical_stack(x, weight, mask_type=mask_type, backend=self.backend)

    @pytest.mark.parametrize(("mask_type", "colors"), list(itertools.product("AB", (1, 3))))
    def test_an_output_sees_what_comes_before_it_and_no_more(self, mask_type, colors):
        """A 5 x 5 kernel on 3 x 3 pixels reaches everything, so it sees all that the order allows."""
        weight = self.weight(2 * colors, colors, 5, 5)
        found = sees(lambda x: self.masked(x, weight, mask_type, colors), colors, self.device)
        assert torch.equal(found, earlier(2 * colors, colors, colors, mask_type == "B"))

    @pytest.mark.parametrize(("mask_type", "colors"), list(itertools.product("AB", (1, 3))))
    def test_the_horizontal_stack_sees_its_row_to_the_left(self, mask_type, colors):
        weight = self.weight(2 * colors, colors, 1, 5)
        found = sees(lambda x: self.horizontal(x, weight, mask_type, colors), colors, self.device)
        row = torch.arange(SIDE * SIDE) // SIDE
        same = (row[:, None] == row)[None, :, None]
        assert torch.equal(found, earlier(2 * colors, colors, colors, mask_type == "B") & same)

    @pytest.mark.parametrize("mask_type", ["A", "B"])
    def test_the_vertical_stack_sees_the_rows_above(self, mask_type):
        weight = self.weight(2, 3, 5, 5)
        found = sees(lambda x: self.vertical(x, weight, mask_type), 3, self.device)
        row = torch.arange(SIDE * SIDE) // SIDE
        above = row[:, None] > row if mask_type == "A" else row[:, None] >= row
        assert torch.equal(found, above[None, :, None].expand_as(found))

    def test_layers_have_a_blind_spot(self):
        """What lies above, and to the right of the diagonal through the kernel's corner, is never seen."""

        def layers(x):
            x = self.masked(x, self.weight(2, 1, 3, 3), "A")
            for seed in range(2):
                x = self.masked(x, self.weight(2, 2, 3, 3, seed=seed), "B")
            return x

        found = sees(layers, 1, self.device).any(2)  # (D, pixels, pixels)
        order = earlier(1, 1, 1, False)[0, :, 0]
        assert not bool((found & ~order).any())
        at, hidden = 1 * SIDE, 2
        assert bool(order[at, hidden])
        assert not bool(found[:, at, hidden].any())

    @pytest.mark.parametrize("colors", [1, 3])
    def test_the_two_stacks_have_none(self, colors):
        """A gated PixelCNN's order of layers, gates left out, sees exactly what comes before."""
        width = colors

        def layers(x):
            v = self.vertical(x, self.weight(width, colors, 3, 3), "A")
            h = self.horizontal(x, self.weight(width, colors, 1, 3), "A", colors)
            for seed in range(2):
                mixed = torch.einsum("oc,bcyx->boyx", self.weight(width, width, seed=seed), v)
                h = h + mixed
                h = h + self.masked(h, self.weight(width, width, 1, 1, seed=seed), "B", colors)
                v = self.vertical(v, self.weight(width, width, 3, 3, seed=seed), "B")
                h = self.horizontal(h, self.weight(width, width, 1, 3, seed=seed), "B", colors)
            return h + torch.einsum("oc,bcyx->boyx", self.weight(width, width), v)

        found = sees(layers, colors, self.device)
        assert torch.equal(found, earlier(width, colors, colors, False))

    def test_what_is_hidden_may_be_nan(self):
        """NaN from one pixel on, in raster order, and in the later colours of the one before: nothing earlier knows."""
        x, weight = normal(1, 6, 6, 7).float().to(self.device), normal(9, 6, 3, 5).float().to(self.device)
        flat = x.clone().flatten(2)
        flat[:, :, 24:] = torch.nan
        flat[:, 2:, 23] = torch.nan
        dirty = flat.view_as(x).requires_grad_()
        out = self.masked(dirty, weight, "A", colors=3).flatten(2)
        wanted = self.masked(x, weight, "A", colors=3).flatten(2)
        assert torch.equal(out[:, :, :23], wanted[:, :, :23])
        assert torch.equal(out[:, :6, 23], wanted[:, :6, 23])
        assert bool(out[:, 6:, 23].isnan().all())
        # and the gradient that earlier outputs give them is a number
        (found,) = torch.autograd.grad(out[:, :, :23].sum(), dirty)
        assert bool(found.isfinite().all())
        assert int(found.flatten(2)[:, :, 23:].count_nonzero()) == 0

    def test_hidden_weights_have_gradient_zero(self):
        for mask_type, colors in itertools.product("AB", (1, 3)):
            x, weight = self.weight(2, 3, 4, 5), self.weight(6, 3, 3, 3, seed=1).requires_grad_()
            (found,) = torch.autograd.grad(self.masked(x, weight, mask_type, colors).square().sum(), weight)
            seen = pixelcnn_mask(3, 3, 6, 3, mask_type, colors)
            assert torch.equal(found.cpu() != 0, seen)

    def test_vmap_over_pictures_and_weights(self):
        x, weight, bias = self.weight(3, 2, 3, 4, 4), self.weight(3, 6, 3, 3, 3), self.weight(3, 6)

        def call(x, weight, bias):
            return masked_conv2d(x, weight, bias, mask_type="B", colors=3, backend=self.backend)

        for dims in ((0, None, None), (0, 0, 0), (None, 0, None)):
            chosen = [t if dim is not None else t[0] for t, dim in zip((x, weight, bias), dims, strict=True)]
            each = [
                call(*(t[i] if dim is not None else t for t, dim in zip(chosen, dims, strict=True))) for i in range(3)
            ]
            torch.testing.assert_close(torch.func.vmap(call, dims)(*chosen), torch.stack(each))

    def test_gradients_of_each_picture(self):
        x, weight = self.weight(3, 1, 2, 4, 4), self.weight(2, 2, 3, 3)

        def loss(weight, x):
            return masked_conv2d(x, weight, mask_type="B", backend=self.backend).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
        wanted = torch.stack([torch.func.grad(loss)(weight, one) for one in x])
        torch.testing.assert_close(each, wanted)

    @FUZZ
    @given(
        batch=st.integers(1, 2),
        colors=st.sampled_from([1, 2, 3]),
        blocks=st.tuples(st.integers(1, 4), st.integers(1, 6)),
        size=st.tuples(st.integers(1, 9), st.integers(1, 20)),
        kernel=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 7])),
        strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        dilations=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        mask_type=st.sampled_from("AB"),
    )
    def test_equals_a_masked_weight(self, batch, colors, blocks, size, kernel, strides, dilations, mask_type):
        op = spec.find("masked_conv2d")
        arguments = {
            "x": self.weight(batch, colors * blocks[0], *size),
            "weight": self.weight(colors * blocks[1], colors * blocks[0], *kernel, seed=1),
            "bias": self.weight(colors * blocks[1], seed=2),
            "mask_type": mask_type,
            "colors": colors,
            "stride": strides,
            "dilation": dilations,
        }
        got = gradients(lambda **a: self.call(op, **a), arguments, op.differentiable)
        wanted = gradients(op.eager, arguments, op.differentiable)
        torch.testing.assert_close(got[0], wanted[0])
        for name, found in got[1].items():
            torch.testing.assert_close(found, wanted[1][name], msg=name)


class TestReference(MaskedConv2dProperties):
    backend = "reference"


class TestCpu(MaskedConv2dProperties):
    backend = "cpu"

    def test_any_number_of_threads_gives_the_same_bits(self):
        for name in ("MNIST's first layer", "typical"):
            self.check_threads(spec.find("masked_conv2d"), name, torch.float32)

    @pytest.mark.parametrize(
        ("shape", "filters", "kernel", "settings"),
        [
            ((1, 2, 3, 1500), 3, (3, 3), {}),  # rows wider than a piece
            ((1, 2, 70, 3), 3, (5, 3), {"stride": (2, 3)}),
            ((1, 2, 6, 130), 130, (3, 3), {"dilation": (1, 40)}),
            ((1, 80, 9, 33), 10, (3, 3), {"dilation": 4}),
            ((1, 3, 5, 5), 3, (3, 3), {"dilation": 2**30}),
        ],
    )
    def test_shapes_that_cut_pieces_differently(self, shape, filters, kernel, settings):
        op = spec.find("masked_conv2d")
        arguments = {"x": normal(*shape), "weight": normal(filters, shape[1], *kernel), "mask_type": "B", **settings}
        got = gradients(lambda **a: self.call(op, **a), arguments, ("x", "weight"))
        # (torch pads a copy by the dilation)
        far = settings.get("dilation") == 2**30
        wanted = gradients(op.eager, arguments | ({"dilation": 7} if far else {}), ("x", "weight"))
        torch.testing.assert_close(got, wanted)


@pytest.mark.triton_interpreted
class TestTriton(MaskedConv2dProperties):
    backend = "triton"
    slow = True
    large = False


@pytest.mark.gpu
class TestTritonOnGpu(MaskedConv2dProperties):
    backend = "triton"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(MaskedConv2dProperties):
    backend = "reference"
    device = "cuda"
    large = False


def test_masks_refuse_what_has_no_centre():
    with pytest.raises(ValueError, match=r"kw.*odd.*4"):
        pixelcnn_mask(3, 4, 3, 3, "A")
    with pytest.raises(ValueError, match=r"in_channels.*colors = 3.*4"):
        pixelcnn_mask(3, 3, 3, 4, "A", colors=3)
    with pytest.raises(ValueError, match=r"mask_type.*'C'"):
        pixelcnn_mask(3, 3, 3, 3, "C")
