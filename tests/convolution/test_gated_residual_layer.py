"""What WaveNet's layer promises, on every backend."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpkernels import spec
from mpkernels.convolution import dilated_conv1d, gated_residual_layer
from mpkernels.testing import compare, gradients, strategies, upcast
from mpkernels.testing.properties import OpProperties


def channels_last(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def flatten(found):
    """The tensors that a layer returned."""
    return [x for x in found if x is not None]


class GatedResidualLayerProperties(OpProperties):
    ops = ("gated_residual_layer",)

    def layer(self, **arguments):
        return gated_residual_layer(**arguments, backend=self.backend)

    def normal(self, *shape, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed + math.prod(shape))
        return torch.randn(*shape, generator=generator, dtype=dtype).to(self.device)

    def arguments(self, length=70, batch=1, channels=3, gates=4, skips=5, taps=2, dtype=torch.float32):
        """A layer with both conditions, and all its biases."""
        shapes = {
            "x": (batch, channels, length),
            "weight": (2 * gates, channels, taps),
            "bias": (2 * gates,),
            "residual_weight": (channels, gates),
            "residual_bias": (channels,),
            "skip_weight": (skips, gates),
            "skip_bias": (skips,),
            "condition": (batch, 2, length),
            "condition_weight": (2 * gates, 2),
            "global_condition": (batch, 3),
            "global_weight": (2 * gates, 3),
        }
        return {name: self.normal(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}

    def assert_same(self, got, wanted):
        """Equal bits of the kernels; plain torch may sum in another order where shapes differ."""
        if self.backend == "reference":
            torch.testing.assert_close(got, wanted)
        else:
            assert torch.equal(got, wanted)

    def test_is_made_of_its_parts(self):
        """The layer equals the dilated convolution and plain torch; what is left out changes nothing."""
        given = self.arguments(length=40)
        z = dilated_conv1d(given["x"], given["weight"], given["bias"], dilation=5, backend=self.backend)
        z = z + given["condition_weight"] @ given["condition"]
        z = z + (given["global_condition"] @ given["global_weight"].T)[..., None]
        h = torch.tanh(z[:, :4]) * torch.sigmoid(z[:, 4:])
        residual = 0.3 * (given["x"] + given["residual_weight"] @ h + given["residual_bias"][:, None])
        skip = given["skip_weight"] @ h + given["skip_bias"][:, None]
        found = self.layer(**given, dilation=5, residual_scale=0.3)
        torch.testing.assert_close(found.residual, residual)
        torch.testing.assert_close(found.skip, skip)
        assert found.state is None
        alone = self.layer(**(given | {"skip_weight": None, "skip_bias": None}), dilation=5, residual_scale=0.3)
        assert alone.skip is None
        self.assert_same(alone.residual, found.residual)
        alone = self.layer(**(given | {"residual_weight": None, "residual_bias": None}), dilation=5)
        assert alone.residual is None
        self.assert_same(alone.skip, found.skip)

    def test_closed_forms(self):
        """A gate that is shut leaves x and the biases; one that is open leaves tanh."""
        given = self.arguments(length=20)
        zero = {name: torch.zeros_like(given[name]) for name in ("weight", "condition_weight", "global_weight")}
        for opening, wide in ((-1e4, 0.0), (1e4, 1.0)):
            bias = torch.cat([torch.linspace(-2, 2, 4), torch.full((4,), opening)]).to(self.device)
            found = self.layer(**(given | zero | {"bias": bias}), residual_scale=math.sqrt(0.5))
            h = wide * torch.tanh(bias[:4])
            residual = math.sqrt(0.5) * (given["x"] + (given["residual_weight"] @ h + given["residual_bias"])[:, None])
            skip = (given["skip_weight"] @ h + given["skip_bias"])[:, None].expand(1, 5, 20)
            torch.testing.assert_close(found.residual, residual)
            torch.testing.assert_close(found.skip, skip)

    @pytest.mark.parametrize("outputs", ["residual", "skip", "both"])
    def test_gradients_of_some_outputs(self, outputs):
        """A loss may use one of the outputs, or both."""
        found = []
        for backend in (self.backend, "reference"):
            given = {name: x.requires_grad_() for name, x in self.arguments(length=9, dtype=torch.float64).items()}
            out = gated_residual_layer(**given, dilation=2, backend=backend)
            loss = sum(getattr(out, name).pow(2).sum() for name in ("residual", "skip") if outputs in (name, "both"))
            found.append(torch.autograd.grad(loss, list(given.values()), allow_unused=True))
        for got, wanted in zip(*found, strict=True):
            if got is None or wanted is None:
                assert not any(bool(g.any()) for g in (got, wanted) if g is not None)
            else:
                torch.testing.assert_close(got, wanted)

    def test_a_gradient_of_one_argument(self):
        """Each alone equals all together: what is not needed is left out."""
        given = self.arguments(length=9, batch=2, dtype=torch.float64)
        given["initial_state"] = self.normal(2, 3, 2, seed=77, dtype=torch.float64)

        def gradients_of(names):
            leaves = {name: given[name].clone().requires_grad_() for name in names}
            out = self.layer(**(given | leaves), dilation=2)
            return torch.autograd.grad(out.residual.pow(2).sum() + out.skip.pow(3).sum(), list(leaves.values()))

        together = dict(zip(given, gradients_of(given), strict=True))
        for name in ("weight", "condition", "skip_bias") if self.slow else given:
            torch.testing.assert_close(gradients_of([name])[0], together[name])

    def test_nothing_reads_the_future(self):
        given = self.arguments(length=80, taps=3)
        clean = self.layer(**given, dilation=4)
        for name, reach in (("x", (0, 4, 8)), ("condition", (0,))):
            for bad in (0, 41, 79):
                poisoned = given[name].clone()
                poisoned[..., bad] = torch.nan
                found = self.layer(**(given | {name: poisoned}), dilation=4)
                reached = [bad + r for r in reach if bad + r < 80]
                others = [t for t in range(80) if t not in reached]
                for got, wanted in zip(found[:2], clean[:2], strict=True):
                    assert bool(got[..., reached].isnan().all())
                    assert torch.equal(got[..., others], wanted[..., others])

    def test_a_gradient_reaches_what_its_output_read(self):
        given = self.arguments(length=80, taps=3)
        leaves = [given["x"].requires_grad_(), given["condition"].requires_grad_()]
        out = self.layer(**given, dilation=4)
        seeds = [self.normal(*out.residual.shape), self.normal(*out.skip.shape)]
        clean = torch.autograd.grad(out[:2], leaves, seeds, retain_graph=True)
        seeds[1][..., 41] = torch.nan
        found = torch.autograd.grad(out[:2], leaves, seeds)
        for got, wanted, reached in zip(found, clean, ([33, 37, 41], [41]), strict=True):
            others = [t for t in range(80) if t not in reached]
            assert bool(got[..., reached].isnan().all())
            assert torch.equal(got[..., others], wanted[..., others])

    def test_taps_that_meet_no_position(self):
        """They may hold anything, and their gradient is exactly 0."""
        given = self.arguments(length=5, taps=3)
        poisoned = given["weight"].clone()
        poisoned[..., :2] = torch.tensor([torch.nan, torch.inf], device=self.device)
        found = []
        for weight in (given["weight"].clone(), poisoned):
            leaves = [given["x"].clone().requires_grad_(), weight.requires_grad_()]
            out = self.layer(**(given | dict(zip(("x", "weight"), leaves, strict=True))), dilation=5)
            of_leaves = torch.autograd.grad(out.residual.sum() + out.skip.pow(2).sum(), leaves)
            found.append([out.residual, out.skip, *of_leaves])
        for got, wanted in zip(*found, strict=True):
            assert torch.equal(got, wanted)
        assert not found[0][3][..., :2].any()

    @pytest.mark.parametrize("row", [0, 4])
    def test_a_tap_matters_where_it_reads(self, row):
        """A NaN in a tap of a filter or a gate that reads outside for some positions and inside for others."""
        given = self.arguments(length=40, taps=3)
        given["weight"] = given["weight"].clone()
        given["weight"][row, :, 0] = torch.nan
        out = self.layer(**given, dilation=4)
        for found in (out.residual, out.skip):
            assert torch.equal(found.isfinite().all(1)[0], torch.arange(40, device=self.device) < 8)

    def test_a_sequence_can_be_cut_anywhere(self):
        """Results, and gradients through the states; parts are shorter than the receptive field of 27 too."""
        given = self.arguments(length=80, taps=4, batch=2)
        given["initial_state"] = self.normal(2, 3, 27)
        leaves = [x.requires_grad_() for x in given.values()]
        seeds = [self.normal(2, size, length) for size, length in ((3, 80), (5, 80), (3, 27))]

        def run(*cuts):
            before, found = given["initial_state"], []
            for begin, end in zip((0, *cuts), (*cuts, 80), strict=True):
                part = {name: given[name][..., begin:end] for name in ("x", "condition")}
                out = self.layer(**(given | part | {"initial_state": before}), dilation=9, return_state=True)
                before = out.state
                found.append(out)
            outputs = [torch.cat([getattr(out, name) for out in found], 2) for name in ("residual", "skip")]
            return [*outputs, before], torch.autograd.grad([*outputs, before], leaves, seeds)

        whole, wanted = run()
        every = ((13, 64), (1, 2, 3, 40, 65, 79), tuple(range(20, 26)))
        for cuts in every[: 1 if self.slow else None]:
            parts, found = run(*cuts)
            for got, of_whole in zip(parts, whole, strict=True):
                self.assert_same(got, of_whole)
            for got, of_whole in zip(found, wanted, strict=True):
                torch.testing.assert_close(got, of_whole, rtol=1e-4, atol=1e-4)

    def test_a_position_at_a_time(self):
        given = self.arguments(length=9, batch=2)
        whole = self.layer(**given, dilation=4)
        for order in (torch.Tensor.contiguous, channels_last):
            state = None
            for t in range(9):
                part = {name: order(given[name][..., t : t + 1]) for name in ("x", "condition")}
                out = self.layer(**(given | part), initial_state=state, dilation=4, return_state=True)
                state = out.state
                self.assert_same(out.residual[..., 0], whole.residual[..., t])
                self.assert_same(out.skip[..., 0], whole.skip[..., t])

    def test_memory_order(self):
        """Channels last in gives channels last out, with the same bits; the condition may lie in either order."""
        length = 20 if self.slow else 80
        given = self.arguments(length=length, batch=1 if self.slow else 2, channels=17, gates=18, skips=20)

        def run(order, condition_order):
            changed = {"x": order(given["x"]), "condition": condition_order(given["condition"])}
            leaves = {name: x.detach().requires_grad_() for name, x in (given | changed).items()}
            out = self.layer(**leaves, dilation=5)
            seeds = [self.normal(*x.shape) for x in out[:2]]
            return [*out[:2], *torch.autograd.grad(out[:2], list(leaves.values()), seeds)]

        first = run(torch.clone, torch.clone)
        every = ((channels_last, channels_last), (torch.clone, channels_last), (channels_last, torch.clone))
        for orders in every[: 1 if self.slow else None]:
            last = run(*orders)
            for a, b in zip(first, last, strict=True):
                if self.backend == "cpu":
                    assert torch.equal(a, b)
                else:
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            if self.backend != "reference" and orders[0] is channels_last:
                assert all(x.transpose(1, 2).is_contiguous() for x in last[:3])

    def test_a_batch_is_its_sequences(self):
        given = self.arguments(length=70, batch=3)
        out = self.layer(**given, dilation=6)
        for b in range(3):
            part = {name: given[name][b : b + 1] for name in ("x", "condition", "global_condition")}
            for got, wanted in zip(self.layer(**(given | part), dilation=6)[:2], out[:2], strict=True):
                self.assert_same(got, wanted[b : b + 1])

    def test_transforms(self):
        """vmap over inputs and weights, gradients a sample, derivatives of derivatives."""
        samples = 2
        given = self.arguments(length=4, channels=2, gates=1, skips=2, dtype=torch.float64)
        batched = {name: torch.stack([x, x.flip(-1) + 0.1]) for name, x in given.items()}

        def loss(arguments):
            return sum(x.pow(3).sum() for x in self.layer(**arguments, dilation=2)[:2])

        inputs, every = ("x", "condition", "global_condition"), tuple(given)
        for mapped, wanted in ((inputs, inputs), (("x",), every), (("x",), ("bias",)), (every, every))[
            : 1 if self.slow else None
        ]:

            def gradient(chosen, mapped=mapped, wanted=wanted):
                full = given | dict(zip(mapped, chosen, strict=True))
                leaves = {name: full[name] for name in wanted}
                found = torch.func.grad(lambda leaves, full=full: loss(full | leaves))(leaves)
                return tuple(found[name] for name in wanted)

            columns = tuple(batched[name] for name in mapped)
            each = torch.func.vmap(gradient)(columns)
            one = [gradient(tuple(x[v] for x in columns)) for v in range(samples)]
            for a, b in zip(each, zip(*one, strict=True), strict=True):
                torch.testing.assert_close(a, torch.stack(b))

        if self.slow:
            return
        given["initial_state"] = self.normal(1, 2, 2, dtype=torch.float64)

        def of(backend):
            def loss(*leaves):
                arguments = dict(zip(given, leaves, strict=True))
                out = gated_residual_layer(**arguments, dilation=2, residual_scale=0.5, backend=backend)
                return out.residual.pow(2).sum() + out.skip.pow(3).sum()

            return torch.func.hessian(loss, argnums=tuple(range(len(given))))(*given.values())

        for row, wanted in zip(of(self.backend), of("reference"), strict=True):
            for a, b in zip(row, wanted, strict=True):
                torch.testing.assert_close(a, b)

    def test_gates_are_kept_for_a_gradient_alone(self):
        """Inference allocates no (B, 2 G, T) of float32; a backward that comes anyway computes it again."""
        if self.backend == "reference":
            return
        from mpkernels.convolution.gated_residual_layer import autograd

        given = self.arguments(length=9)
        tensors = [given["x"], given["weight"], None, None, None, given["residual_weight"], None, None]
        assert not autograd._keeps(tensors)
        leaves = [x if x is None else x.clone().requires_grad_() for x in tensors]
        assert autograd._keeps(leaves)
        with torch.no_grad():
            assert not autograd._keeps(leaves)
        wanted = [x for x in leaves if x is not None]
        found = []
        for keep in (True, False):
            out, _, gates = autograd._Layer.apply(*leaves, 2, True, 1.0, False, keep, self.backend)
            assert gates.numel() == (8 * 9 if keep else 0)
            found.append(torch.autograd.grad(out.pow(2).sum(), wanted))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)

    @settings(
        max_examples=4,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(data=st.data())
    def test_random_shapes(self, data):
        generator = data.draw(strategies.generators())
        small = st.integers(1, 9 if self.slow else 20)
        batch, channels, gates, skips, local = (data.draw(small) for _ in range(5))
        taps, dilation = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 30))
        batch, length = min(batch, 3), data.draw(st.integers(0, 20 if self.slow else 150))
        shapes = {"x": (batch, channels, length), "weight": (2 * gates, channels, taps)}
        residual = data.draw(st.booleans())
        if residual:
            shapes["residual_weight"] = (channels, gates)
        if not residual or data.draw(st.booleans()):
            shapes["skip_weight"] = (skips, gates)
        if data.draw(st.booleans()):
            shapes |= {"condition": (batch, local, length), "condition_weight": (2 * gates, local)}
        optional = {"bias": (2 * gates,), "initial_state": (batch, channels, (taps - 1) * dilation)}
        if residual:
            optional["residual_bias"] = (channels,)
        for name, shape in optional.items():
            if data.draw(st.booleans()):
                shapes[name] = shape
        arguments = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for name in ("x", "condition"):
            if name in arguments and data.draw(st.booleans()):
                arguments[name] = channels_last(arguments[name])
        arguments = {name: x.to(self.device) for name, x in arguments.items()}

        def run(arguments, backend):
            outputs, found = gradients(
                lambda **a: flatten(gated_residual_layer(**a, dilation=dilation, backend=backend)),
                arguments,
                tuple(shapes),
            )
            return dict(enumerate(outputs)) | {f"grad {n}": g for n, g in found.items()}

        low, gold = run(arguments, "reference"), run(upcast(arguments, device=self.device), "reference")
        for name, got in run(arguments, self.backend).items():
            row = compare(str(name), got, low[name], gold[name], scale=1.0)
            assert row.ok, str(row)


class TestReference(GatedResidualLayerProperties):
    backend = "reference"
    large = False


class TestCpu(GatedResidualLayerProperties):
    backend = "cpu"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_any_number_of_threads_gives_the_same_bits(self, dtype):
        for name in ("many", "many, channels last"):
            self.check_threads(spec.find("gated_residual_layer"), name, dtype)


@pytest.mark.triton_interpreted
class TestTriton(GatedResidualLayerProperties):
    backend = "triton"
    slow = True
    large = False


@pytest.mark.gpu
class TestTritonOnGpu(GatedResidualLayerProperties):
    backend = "triton"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(GatedResidualLayerProperties):
    backend = "reference"
    device = "cuda"
    large = False
