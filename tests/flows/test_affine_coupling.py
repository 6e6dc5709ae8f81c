"""What the affine coupling promises, on every backend."""

import doctest
import importlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpkernels.flows import affine_coupling, affine_injector, split_parameters
from mpkernels.flows.affine_coupling import api
from mpkernels.testing import compare, gradients, strategies
from mpkernels.testing.properties import OpProperties

FUZZ = strategies.fuzz(12, interpreted=5)
SCALES = ("exp", "sigmoid", "tanh", "softclamp", "additive")
LAYOUTS = ("shift_scale", "scale_shift", "shift_scale_interleaved", "scale_shift_interleaved")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def problems(draw) -> dict[str, Any]:
    """Arguments of the coupling in float32: any shape, scale, mask, layout and strides."""
    generator = draw(strategies.generators())
    dims = draw(st.sampled_from([1, 2, 2, 3, 4, 4, 5]))
    small = [1, 2, 3, 5, 8, 17]
    shape = [draw(st.sampled_from([1, 2, 3, 18])), *(draw(st.sampled_from(small)) for _ in range(dims - 1))]
    while math.prod(shape) > 6000:
        shape = [max(1, n // 2) for n in shape]
    scale = draw(st.sampled_from(SCALES))
    masks = ["none", "tensor"] + ["checkerboard"] * (dims < 5) + ["channel"] * (dims > 1)
    mask, parity = draw(st.sampled_from(masks)), draw(st.sampled_from([0, 1]))
    channels = shape[1] if dims > 1 else 1
    if mask == "channel":
        channels = (channels + 1) // 2 if parity else channels // 2

    def values(*sizes):
        order = draw(st.sampled_from(["contiguous", "step", "last"]))
        if order == "step":
            return torch.randn([2 * n for n in sizes], generator=generator)[tuple(slice(None, None, 2) for _ in sizes)]
        x = torch.randn(sizes, generator=generator)
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if order == "last" and len(sizes) > 2 else x

    arguments: dict[str, Any] = {"x": values(*shape), "scale": scale, "mask": mask, "parity": parity}
    if mask == "tensor":
        arguments["mask"] = torch.rand(shape[draw(st.sampled_from([0, 1])) :], generator=generator) < 0.5
    spread = draw(st.sampled_from([0.3, 1.0, 4.0]))
    layout = draw(st.sampled_from([None, *LAYOUTS])) if scale != "additive" else None
    if layout is not None:
        arguments |= {"log_scale_or_raw": spread * values(shape[0], 2 * channels, *shape[2:]), "layout": layout}
    else:
        sizes = [shape[0], *([channels] if dims > 1 else []), *shape[2:]]
        raw = None if scale == "additive" else spread * values(*sizes)
        arguments |= {"log_scale_or_raw": raw, "shift": values(*sizes)}
    if scale == "sigmoid" and draw(st.booleans()):
        arguments["epsilon"] = 1e-3
    return arguments | {"shift_first": draw(st.booleans())}


class AffineProperties(OpProperties):
    ops = ("affine_coupling",)

    def run(self, x, raw, shift=None, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
        def move(x) -> Any:
            return x.to(self.device) if isinstance(x, torch.Tensor) else x

        moved: dict[str, Any] = {name: move(x) for name, x in arguments.items()}
        return affine_coupling(move(x), move(raw), move(shift), backend=self.backend, **moved)

    def has_dtype(self, dtype) -> bool:
        if self.backend == "fibres":
            return dtype in (torch.float32, torch.float64)
        return not (self.backend == "triton" and self.device == "cpu" and dtype == torch.bfloat16)

    @pytest.mark.parametrize("inverse", [False, True])
    def test_log_abs_det_is_that_of_the_jacobian(self, inverse):
        if self.backend not in ("reference", "cpu"):
            return  # a matrix of derivatives costs interpreters seconds; the others are compared with the reference
        for scale in SCALES:
            for mask in ("none", "checkerboard", "channel", normal(3, 2, 2, seed=5) > 0):
                channels = 1 if isinstance(mask, str) and mask == "channel" else 3
                x, raw, shift = (
                    normal(1, c, 2, 2, seed=i, dtype=torch.float64) for i, c in enumerate([3] + [channels] * 2)
                )
                raw = None if scale == "additive" else raw

                def transform(x, raw=raw, shift=shift, **settings):
                    return self.run(x, raw, shift, inverse=inverse, **settings)

                options = {"scale": scale, "mask": mask, "shift_first": scale == "tanh"}
                jacobian = torch.func.jacrev(lambda x: transform(x, **options)[0].flatten())(x)  # noqa: B023
                wanted = torch.linalg.slogdet(jacobian.reshape(12, 12))[1]
                torch.testing.assert_close(transform(x, **options)[1][0], wanted)

    @settings(FUZZ)
    @given(arguments=problems())
    def test_round_trip_is_within_its_bound(self, arguments):
        """8 eps (|x| + |t| + (|y| + |t|) / e^l), as the docstring says, in both orders."""
        raw, shift = arguments["log_scale_or_raw"], arguments.get("shift")
        if "layout" in arguments:
            raw, shift = split_parameters(raw, arguments["layout"])
            raw, shift = (p[:, 0] if arguments["x"].dim() == 1 else p for p in (raw, shift))
        others = {n: a for n, a in arguments.items() if n not in ("x", "log_scale_or_raw", "shift", "layout")}
        for first in (False, True):
            x = arguments["x"]
            y, there = self.run(**(_renamed(arguments) | {"inverse": first}))
            back, again = self.run(**(_renamed(arguments) | {"inverse": not first, "x": y}))
            assert torch.equal(again, -there)
            # e^l and t where they are, by the same coupling of 1s and 0s in float64
            wide = [None if p is None else p.double() for p in (raw, shift)]
            like = torch.zeros_like(x, dtype=torch.float64)
            at_0, at_1 = (
                affine_coupling(like + v, *wide, **(others | {"inverse": first}), backend="reference")[0]
                for v in (0, 1)
            )
            slope = (at_1 - at_0).abs()
            t = at_0.abs() / slope if first != arguments["shift_first"] else at_0.abs()
            bound = 8 * torch.finfo(x.dtype).eps * (x.abs() + t + (y.cpu().abs() + t) / slope)
            assert bool(((back.cpu().double() - x.double()).abs() <= bound).all())

    @settings(FUZZ)
    @given(arguments=problems(), inverse=st.booleans())
    def test_random_problems(self, arguments, inverse):
        if self.backend == "reference":
            return  # it is what others are compared with
        names = ("x", "log_scale_or_raw", "shift")

        def run(backend, device, dtype):
            moved = {
                n: x.to(device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, torch.Tensor) else x
                for n, x in arguments.items()
            }
            found = gradients(lambda **a: affine_coupling(**a, inverse=inverse, backend=backend), moved, names)
            return dict(zip(("y", "log_abs_det"), found[0], strict=True)) | {
                f"grad {n}": g for n, g in found[1].items()
            }

        low, gold = run("reference", "cpu", torch.float32), run("reference", "cpu", torch.float64)
        for name, got in run(self.backend, self.device, torch.float32).items():
            row = compare(name, got, low[name], gold[name], scale=1.0)
            assert row.ok, str(row)

    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("mask", ["checkerboard", "tensor"])
    def test_what_is_kept_may_have_any_parameters(self, scale, mask):
        """NaN and infinities there change no bit of outputs and gradients; a kept NaN in x stays where it is."""
        x = normal(2, 3, 5, 3)
        kept = (torch.arange(5)[:, None] + torch.arange(3)) % 2 == 1
        kept = kept.expand(3, 5, 3) if mask == "checkerboard" else normal(3, 5, 3, seed=4) > 0
        found = []
        for fill in (0.0, math.nan, math.inf):
            raw, shift = normal(2, 3, 5, 3, seed=1), normal(2, 3, 5, 3, seed=2)
            raw[:, kept], shift[:, kept] = fill, fill
            if fill != 0:
                x[0, kept] = math.nan
            leaves = [t.to(self.device, copy=True).requires_grad_() for t in (x, raw, shift)]
            own = None if scale == "additive" else leaves[1]
            y, log_abs_det = self.run(
                leaves[0], own, leaves[2], scale=scale, mask=mask if mask == "checkerboard" else kept
            )
            used = [leaf for leaf in leaves if leaf is not leaves[1] or own is not None]
            total = y.sum() + (log_abs_det * 2).sum()
            assert torch.equal(y.cpu()[0, kept].isnan(), torch.full_like(x[0, kept], fill != 0, dtype=torch.bool))
            y = y.detach().clone()
            y[0, kept.to(y.device)] = 0
            found.append([y, log_abs_det.detach(), *torch.autograd.grad(total, used)])
            assert not found[-1][-1].cpu()[:, kept].any()
        for others in found[1:]:
            for a, b in zip(found[0], others, strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("scale", SCALES[:4])
    @pytest.mark.parametrize("inverse", [False, True])
    def test_a_nan_stays_in_its_element_and_its_sample(self, scale, inverse):
        raw, shift = normal(3, 4, 5, seed=1), normal(3, 4, 5, seed=2)
        raw[1, 2, 3] = math.nan
        y, log_abs_det = self.run(normal(3, 4, 5), raw, shift, scale=scale, inverse=inverse)
        wanted = torch.zeros(3, 4, 5, dtype=torch.bool)
        wanted[1, 2, 3] = True
        assert torch.equal(y.isnan().cpu(), wanted)
        assert log_abs_det.isnan().tolist() == [False, True, False]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    def test_sigmoid_of_what_rounds_to_0(self, dtype):
        """log(sigmoid(s + 2)) is -inf at s = -110 in float32, and in float16 at -20; the inverse never is 0 / 0."""
        if not self.has_dtype(dtype):
            return
        raw = torch.tensor([[-110.0, -20.0, 0.0, 110.0, -1000.0]], dtype=dtype)
        x, shift = torch.ones(1, 5, dtype=dtype), torch.full((1, 5), 0.5, dtype=dtype)
        y, log_abs_det = self.run(x, raw, shift, scale="sigmoid")
        wanted = torch.nn.functional.logsigmoid(raw.double() + 2).sum(1)
        assert log_abs_det.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(log_abs_det.cpu().double(), wanted, rtol=1e-6, atol=0)
        raw, y = raw.to(self.device).requires_grad_(), y.detach().requires_grad_()
        back, minus = self.run(y, raw, shift, scale="sigmoid", inverse=True)
        assert bool(back.isfinite().all())
        for found in torch.autograd.grad([back, minus], [y, raw], [torch.zeros_like(back), torch.ones_like(minus)]):
            assert bool(found.isfinite().all())

    def test_closed_form_of_many_equal_factors(self):
        """Logarithms that are taken of products: 2,000 factors of 2 are more than a float holds."""
        y, log_abs_det = self.run(
            torch.ones(2, 2000), torch.full((2, 2000), -2.0), torch.zeros(2, 2000), scale="sigmoid"
        )
        assert bool((y == 0.5).all())
        torch.testing.assert_close(log_abs_det.cpu(), torch.full((2,), -2000 * math.log(2)), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("inverse", [False, True])
    def test_factors_are_limited(self, inverse):
        raw = torch.tensor([[-math.inf, -100.0, 100.0, math.inf]], device=self.device).requires_grad_()
        y, log_abs_det = self.run(torch.ones(1, 4), raw, torch.zeros(1, 4), inverse=inverse)
        factors = torch.tensor([[-87.0, -87.0, 87.0, 87.0]]).double().exp()
        torch.testing.assert_close(y.cpu().double(), 1 / factors if inverse else factors, rtol=2e-6, atol=0)
        assert log_abs_det.isnan().all()  # inf - inf
        (found,) = torch.autograd.grad([y, log_abs_det], raw, [torch.ones_like(y), torch.ones_like(log_abs_det)])
        assert found.tolist() == [[-1.0] * 4 if inverse else [1.0] * 4]

    @pytest.mark.parametrize("shape", [(2, 6, 5, 3), (8, 7), (3, 4, 9)])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_layout_equals_contiguous_parameters_bit_for_bit(self, shape, layout):
        """Outputs and gradients: of the whole output of a network, of its parts as views, and of copies of them."""
        h = normal(shape[0], 2 * (shape[1] // 2), *shape[2:], seed=1).to(self.device)
        x = normal(*shape).to(self.device)
        options: dict[str, Any] = {"scale": "sigmoid", "mask": "channel", "backend": self.backend}
        found = []
        for kind in ("joint", "views", "copies"):
            leaves = [x.clone().requires_grad_(), h.clone().requires_grad_()]
            if kind == "joint":
                out = affine_coupling(*leaves, layout=layout, **options)
            else:
                raw, shift = split_parameters(leaves[1], layout)
                if kind == "copies":
                    raw, shift = raw.contiguous(), shift.contiguous()
                out = affine_coupling(leaves[0], raw, shift, **options)
            found.append([*out, *torch.autograd.grad([out[0].pow(2).sum(), out[1].sum()], leaves)])
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))

    @pytest.mark.parametrize("mask", ["checkerboard", "channel"])
    def test_parities_transform_all_elements_once(self, mask):
        for shape in ((2, 5, 3, 4), (2, 5, 4, 3), (3, 4, 1, 1), (3, 6, 5), (7, 3)):
            x = torch.full(shape, 2.0)
            moved = []
            for parity in (0, 1):
                channels = shape[1] if mask != "channel" else (shape[1] + 1) // 2 if parity else shape[1] // 2
                p = torch.ones(shape[0], channels, *shape[2:])
                y, log_abs_det = self.run(x, p, p, mask=mask, parity=parity)
                moved.append((y != 2).cpu())
                assert torch.equal(log_abs_det.cpu(), moved[-1].flatten(1).sum(1).float())
            assert torch.equal(moved[0], ~moved[1])
            assert mask == "channel" or bool(moved[0].flatten(1)[0, 0])

    def test_half_parameters_beside_float32(self):
        x = normal(2, 4)
        for dtype in (torch.bfloat16, torch.float16):
            h = normal(2, 8, seed=1, dtype=dtype).to(self.device).requires_grad_()
            y, log_abs_det = self.run(x, h, layout="scale_shift")
            (found,) = torch.autograd.grad(y.sum() + log_abs_det.sum(), h)
            assert (y.dtype, log_abs_det.dtype, found.dtype) == (torch.float32, torch.float32, dtype)
            torch.testing.assert_close(y.cpu(), x * h.detach().cpu()[:, :4].float().exp() + h.detach().cpu()[:, 4:])

    def test_vmap_is_more_samples(self):
        if self.backend == "triton" and self.device == "cpu":
            return  # what folds a mapped dimension is the same on every backend; the interpreter is slow
        x, h = (normal(3, 2, 4, 2, 2, seed=i, dtype=torch.float64).to(self.device) for i in range(2))
        mask = (normal(4, 2, 2, seed=3) > 0).to(self.device)

        def loss(x, h, mask):
            y, log_abs_det = affine_coupling(x, h, h.flip(1), mask=mask, scale="tanh", backend=self.backend)
            return y.pow(2).sum() - log_abs_det.sum()

        each = torch.func.grad(loss, argnums=(0, 1))
        found = torch.func.vmap(each, in_dims=(0, 0, None))(x, h, mask)
        wanted = zip(*(each(x[i], h[i], mask) for i in range(3)), strict=True)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, torch.stack(b))

    def test_injector_transforms_everything(self):
        h, u = normal(2, 3, 4), normal(2, 6, 4, seed=1)
        out, log_abs_det = affine_injector(
            h.to(self.device), u.to(self.device), layout="scale_shift", backend=self.backend
        )
        torch.testing.assert_close(out.cpu(), h * u[:, :3].exp() + u[:, 3:])
        torch.testing.assert_close(log_abs_det.cpu(), u[:, :3].sum((1, 2)))


def _renamed(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"raw" if name == "log_scale_or_raw" else name: x for name, x in arguments.items()}


class TestReference(AffineProperties):
    backend = "reference"
    large = False


class TestCpu(AffineProperties):
    backend = "cpu"

    @pytest.mark.parametrize("case", ["typical", "nflows", "Glow", "many"])
    def test_one_two_and_three_threads_are_bit_equal(self, case):
        self.check_threads(self.specs()[0], case, torch.float32)

    def test_log_determinants_of_many_elements(self):
        """Sums in a fixed order, as near to float64 as torch's own."""
        raw = normal(2, 3, 200, 200).to(torch.float32)
        _, found = self.run(raw, raw, raw)
        torch.testing.assert_close(found.double(), raw.double().sum((1, 2, 3)), rtol=0, atol=5e-4)

    def test_functions_of_the_vector_layer(self):
        """Relative errors over all arguments: what a log-determinant of tiny terms needs."""
        raw = torch.cat([torch.linspace(-86, 86, 4001), torch.logspace(-30, 8, 500), -torch.logspace(-30, 8, 500)])
        for dtype, bound in ((torch.float32, 4e-7), (torch.float64, 4e-15)):
            values = raw.to(dtype)[:, None]
            exact = values.double() if dtype == torch.float32 else values
            wanted = {
                "sigmoid": torch.nn.functional.logsigmoid(
                    exact + 2 if dtype == torch.float64 else (values + 2).double()
                ),
                "tanh": torch.tanh(exact),
                "softclamp": 2 * 0.636 * torch.atan(exact),
            }
            for scale, gold in wanted.items():
                _, found = self.run(torch.ones_like(values), values, torch.zeros_like(values), scale=scale)
                error = (found.double() - gold[:, 0]).abs() / gold[:, 0].abs().clamp(min=1e-30)
                assert float(error.max()) <= bound, (scale, dtype, float(error.max()))
            for epsilon in (1e-6, 1e-3):
                _, found = self.run(
                    torch.ones_like(values), values, torch.zeros_like(values), scale="sigmoid", epsilon=epsilon
                )
                gold = torch.log(torch.sigmoid(exact + 2) + epsilon)[:, 0]
                torch.testing.assert_close(found.double(), gold, rtol=bound, atol=bound)


class TestFibres(AffineProperties):
    """The CUDA kernels, a fibre per thread, on the CPU."""

    backend = "fibres"
    slow = True
    large = False


@pytest.mark.triton_interpreted
class TestTriton(AffineProperties):
    backend = "triton"
    slow = True
    large = False


@pytest.mark.gpu
class TestCuda(AffineProperties):
    backend = "cuda"
    device = "cuda"


@pytest.mark.gpu
class TestTritonOnGpu(AffineProperties):
    backend = "triton"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(AffineProperties):
    backend = "reference"
    device = "cuda"
    large = False


def test_examples():
    for module in (api, importlib.import_module(affine_injector.__module__)):
        found = doctest.testmod(module)
        assert found.attempted > 0
        assert not found.failed
