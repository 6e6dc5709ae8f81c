"""What MADE's layer promises, on every backend."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mpkernels import spec
from mpkernels.convolution import masked_linear
from mpkernels.testing import compare, strategies
from mpkernels.testing.checking import gradients
from mpkernels.testing.properties import OpProperties

FUZZ = strategies.fuzz(8)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only wait for each other where tensors are as small as here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def drawn(size, most, seed=0):
    return torch.randint(0, most + 1, (size,), generator=torch.Generator().manual_seed(seed))


class MaskedLinearProperties(OpProperties):
    ops = ("masked_linear",)

    def linear(self, *tensors, **arguments):
        moved = (x.to(self.device) if isinstance(x, torch.Tensor) else x for x in tensors)
        return masked_linear(*moved, **({"backend": self.backend} | arguments))

    @pytest.mark.parametrize("strict", [False, True])
    def test_each_output_alone_in_closed_form(self, strict):
        x, weight, bias = normal(3, 9), normal(7, 9, seed=1), normal(7, seed=2)
        ins, outs = drawn(9, 5), drawn(7, 5, seed=1)
        y = self.linear(x, weight, bias, ins, outs, strict).cpu()
        for o in range(7):
            seen = [i for i in range(9) if ins[i] < outs[o] or (ins[i] == outs[o] and not strict)]
            wanted = sum((x[:, i] * weight[o, i] for i in seen), torch.zeros(3, dtype=torch.float64))
            torch.testing.assert_close(y[:, o], wanted + bias[o])

    def test_nothing_visible_is_the_bias(self):
        x, weight = torch.full((5, 17), math.nan), torch.full((6, 17), math.inf)
        degrees = torch.ones(17, dtype=torch.int32), torch.ones(6, dtype=torch.int8)
        bias = normal(6, dtype=torch.float32)
        leaves = [t.to(self.device).requires_grad_() for t in (x, weight, bias)]
        y = self.linear(*leaves, *degrees, True)
        assert torch.equal(y.detach().cpu(), bias.expand(5, 6))
        found = torch.autograd.grad(y.sum(), leaves)
        assert not any(found[i].any() for i in (0, 1))
        assert torch.equal(found[2].cpu(), torch.full((6,), 5.0))

    def test_everything_visible_is_a_linear_layer(self):
        x, weight, bias = normal(4, 5, 23), normal(19, 23, seed=1), normal(19, seed=2)
        wanted = F.linear(x, weight, bias)
        degrees = drawn(23, 4), torch.full((19,), 5)
        torch.testing.assert_close(self.linear(x, weight, bias, *degrees).cpu(), wanted)
        torch.testing.assert_close(self.linear(x, weight, bias, *degrees, True).cpu(), wanted)

    @pytest.mark.parametrize("strict", [False, True])
    def test_what_is_hidden_may_hold_anything(self, strict):
        """NaN and infinity in each hidden weight; in each input, and each gradient of an output, one at a time."""
        ins, outs = drawn(21, 9), drawn(18, 9, seed=1)
        visible = outs[:, None] > ins if strict else outs[:, None] >= ins
        x, weight, grad = normal(3, 21), normal(18, 21, seed=1), normal(3, 18, seed=2)

        def run(x, weight, grad):
            leaves = [t.to(self.device).requires_grad_() for t in (x, weight)]
            y = self.linear(*leaves, None, ins, outs, strict)
            return [t.detach().cpu() for t in (y, *torch.autograd.grad(y, leaves, grad.to(self.device)))]

        clean = run(x, weight, grad)
        assert not clean[2][~visible].any()
        for bad in (math.nan, -math.inf):
            for a, b in zip(run(x, weight.masked_fill(~visible, bad), grad), clean, strict=True):
                assert torch.equal(a, b)
        for unit in (4, 17):
            spoiled = x.clone()
            spoiled[1, unit] = math.nan
            y, of_x, of_weight = run(spoiled, weight, grad)
            assert torch.equal(y.isnan(), torch.stack([torch.zeros(18), visible[:, unit], torch.zeros(18)]).bool())
            assert torch.equal(of_x, clean[1])
            only = torch.zeros(18, 21, dtype=torch.bool)
            only[:, unit] = visible[:, unit]
            assert torch.equal(of_weight.isnan(), only)
            spoiled = grad.clone()
            spoiled[2, unit] = math.inf
            _, of_x, of_weight = run(x, weight, spoiled)
            assert torch.equal(~of_x.isfinite(), torch.stack([torch.zeros(21)] * 2 + [visible[unit]]).bool())
            only = torch.zeros(18, 21, dtype=torch.bool)
            only[unit] = visible[unit]
            assert torch.equal(~of_weight.isfinite(), only)

    def test_three_layers_are_autoregressive(self):
        """MADE: the gradient of each output by each variable that does not come before it is exactly zero."""
        order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
        degrees = [order, drawn(20, 5), drawn(20, 5, seed=1), order]
        x = normal(7).to(self.device)

        def made(h):
            for layer in range(3):
                weight = normal(len(degrees[layer + 1]), len(degrees[layer]), seed=layer)
                h = self.linear(h.tanh(), weight, None, *degrees[layer : layer + 2], layer == 2)
            return h

        jacobian = torch.autograd.functional.jacobian(made, x).cpu()  # (outputs, inputs)
        before = order[:, None] > order[None, :]
        assert not jacobian[~before].any()
        assert (jacobian[before] != 0).double().mean() > 0.9

    def test_units_may_stand_in_any_order(self):
        """Permuted units give permuted results, to the bit: sums run in the order of degrees."""
        ins, outs = torch.arange(33), drawn(29, 32)
        x, weight = normal(5, 33, dtype=torch.float32), normal(29, 33, seed=1, dtype=torch.float32)
        bias = normal(29, seed=2, dtype=torch.float32)
        p = torch.randperm(33, generator=torch.Generator().manual_seed(0))
        wanted, got = self.linear(x, weight, bias, ins, outs), self.linear(x[:, p], weight[:, p], bias, ins[p], outs)
        if self.backend == "reference":
            torch.testing.assert_close(got, wanted)
        else:
            assert torch.equal(got, wanted)

    def test_per_sample_gradients(self):
        if self.slow:
            return
        x, weight, bias = normal(3, 5), normal(4, 5, seed=1), normal(4, seed=2)
        x, weight, bias, *degrees = (t.to(self.device) for t in (x, weight, bias, drawn(5, 3), drawn(4, 3, seed=1)))

        def loss(weight, bias, x):
            return self.linear(x, weight, bias, *degrees).square().sum()

        each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(weight, bias, x)
        for i in range(3):
            for a, b in zip(each, torch.func.grad(loss, argnums=(0, 1))(weight, bias, x[i]), strict=True):
                torch.testing.assert_close(a[i], b)
        of_x = torch.func.vmap(torch.func.grad(loss, argnums=2), in_dims=(None, None, 0))(weight, bias, x)
        torch.testing.assert_close(of_x, torch.func.grad(loss, argnums=2)(weight, bias, x))

    @settings(FUZZ)
    @given(data=st.data())
    def test_random_problems(self, data):
        if self.backend == "reference":
            return  # it is what others are compared with
        generator = data.draw(strategies.generators())
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
        sizes = st.sampled_from([1, 3, 17, 60] if self.slow else [1, 5, 17, 64, 123, 200])
        rows, inputs, outputs = (data.draw(sizes) for _ in range(3))
        most = data.draw(st.sampled_from([0, 2, inputs, 3 * inputs]))

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device, dtype)

        def degrees(size):
            return torch.randint(0, most + 1, (size,), generator=generator).to(self.device)

        arguments = {"x": draw(rows, inputs), "weight": draw(outputs, inputs), "bias": draw(outputs)}
        arguments |= {"in_degrees": degrees(inputs), "out_degrees": degrees(outputs)}
        arguments["strict"] = data.draw(st.booleans())
        wide = {
            n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in arguments.items()
        }

        def run(arguments, backend):
            (y,), found = gradients(
                lambda **a: (masked_linear(**a, backend=backend),), arguments, ("x", "weight", "bias")
            )
            return [y, *found.values()]

        got, low, gold = run(arguments, self.backend), run(arguments, "reference"), run(wide, "reference")
        for row in zip(("y", "of x", "of weight", "of bias"), got, low, gold, strict=True):
            row = compare(*row, scale=1.0)
            assert row.ok, str(row)
        inputs, outputs = arguments["in_degrees"][None], arguments["out_degrees"][:, None]
        assert not got[2][inputs >= outputs if arguments["strict"] else inputs > outputs].any()


class TestReference(MaskedLinearProperties):
    backend = "reference"


class TestCpu(MaskedLinearProperties):
    backend = "cpu"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_two_and_three_threads_are_bit_equal(self, dtype):
        self.check_threads(spec.find("masked_linear"), "large", dtype)

    def test_gradients_that_nobody_wants_are_not_made(self):
        x, weight, ins, outs = normal(3, 5), normal(4, 5, seed=1), torch.arange(5).int(), torch.arange(4).int()
        count = torch.tensor([1, 2, 3, 4], dtype=torch.int32)
        for needs in range(8):
            found = torch.ops.mpkernels.masked_linear_backward(normal(3, 4), x, weight, ins, outs, count, needs)
            assert [f.numel() > 0 for f in found] == [bool(needs >> i & 1) for i in range(3)]


@pytest.mark.triton_interpreted
class TestTriton(MaskedLinearProperties):
    backend = "triton"
    slow = True
    large = False


@pytest.mark.gpu
class TestTritonOnGpu(MaskedLinearProperties):
    backend = "triton"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(MaskedLinearProperties):
    backend = "reference"
    device = "cuda"
    large = False
