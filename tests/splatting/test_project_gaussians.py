"""What the projection of Gaussians promises, on every backend."""

import pytest
import torch

from mpkernels import spec
from mpkernels.splatting.project_gaussians import project_gaussians
from mpkernels.testing.properties import OpProperties


class ProjectGaussiansProperties(OpProperties):
    ops = ("project_gaussians",)

    def arguments(self, name, dtype=torch.float64, **others):
        found = spec.find("project_gaussians").case(name).arguments(dtype, self.device)
        return {"quats": None, "scales": None} | found | others

    def project(self, **arguments):
        return project_gaussians(**arguments, backend=self.backend)

    def on_axis(self, means, dtype=torch.float64, **others):
        """Unit rotations, scale 0.1, seen from the origin along z by a 64 x 48 camera with f = 100."""
        means = torch.tensor(means, dtype=dtype, device=self.device)
        n = len(means)
        K = torch.tensor([[100.0, 0, 32], [0, 100, 24], [0, 0, 1]], dtype=dtype, device=self.device)
        return {
            "means": means,
            "quats": torch.tensor([[1.0, 0, 0, 0]], dtype=dtype, device=self.device).expand(n, 4),
            "scales": torch.full((n, 3), 0.1, dtype=dtype, device=self.device),
            "viewmats": torch.eye(4, dtype=dtype, device=self.device)[None],
            "Ks": K[None],
            "width": 64,
            "height": 48,
        } | others

    def test_a_sphere_on_the_axis_in_closed_form(self):
        out = self.project(**self.on_axis([[0.0, 0, 2]]))
        variance = (100 / 2 * 0.1) ** 2
        assert out.means2d.tolist() == [[[32.0, 24.0]]]
        assert out.depths.tolist() == [[2.0]]
        wanted = torch.tensor([1 / (variance + 0.3), 0, 1 / (variance + 0.3)], dtype=torch.float64)
        torch.testing.assert_close(out.conics[0, 0].cpu(), wanted)
        assert out.radii.tolist() == [[[17, 17]]]  # 3.33 sqrt(25.3) = 16.7
        assert abs(out.compensations.item() - variance / (variance + 0.3)) < 1e-12

    def test_what_is_culled(self):
        """Each row: a Gaussian, and whether it is drawn. The Gaussian on the axis has radii of 17 pixels."""
        rows = [
            ([0.0, 0, 2], True),
            ([0.0, 0, -2], False),
            ([0.0, 0, 0.0099], False),
            ([0.0, 0, 10.5], False),
            ([-0.9, 0, 2], True),  # 13 pixels left of the image, with a radius of 18
            ([-1.3, 0, 2], False),
            ([1.3, 0, 2], False),
            ([0.0, -0.9, 2], False),  # 21 pixels above
            ([0.0, -0.7, 2], True),
            ([0.0, 0.9, 2], False),
        ]
        out = self.project(**self.on_axis([row[0] for row in rows], far_plane=10.0))
        assert [bool(r.any()) for r in out.radii[0]] == [row[1] for row in rows]
        for x in out:
            assert not x[0][torch.tensor([not row[1] for row in rows], device=self.device)].any()

    def test_opacity_shortens_the_extent(self):
        """alpha falls to 1/255 at sqrt(2 ln(255 o)) standard deviations."""
        opacities = torch.tensor([1.0, 0.1, 0.02, 0.0041, 0.0039], dtype=torch.float64, device=self.device)
        arguments = self.on_axis([[0.0, 0, 2]] * 5)
        radii = self.project(**arguments, opacities=opacities).radii[0, :, 0].tolist()
        wanted = [17, *((2 * (255 * o).log()).sqrt() * 25.3**0.5 for o in opacities[1:4])]
        assert radii == [17, *(int(torch.ceil(x)) for x in wanted[1:]), 0]

    def test_antialiased_opacity_is_what_is_compared(self):
        arguments = self.on_axis(
            [[0.0, 0, 2]] * 2, scales=torch.full((2, 3), 1e-3, dtype=torch.float64).to(self.device)
        )
        opacities = torch.tensor([0.9, 0.1], dtype=torch.float64, device=self.device)
        assert bool((self.project(**arguments, opacities=opacities).radii > 0).all())
        out = self.project(**arguments, opacities=opacities, antialiased=True)
        # a compensation of 0.0025 / 0.3025 leaves 0.0074 and 0.0008
        assert out.radii[0].tolist() == [[1, 1], [0, 0]]

    def test_radius_clip_wants_one_radius_above(self):
        arguments = self.on_axis([[0.0, 0, 2]])
        assert self.project(**arguments, radius_clip=16.5).radii.tolist() == [[[17, 17]]]
        assert self.project(**arguments, radius_clip=17.0).radii.tolist() == [[[0, 0]]]
        flat = self.on_axis([[0.0, 0, 2]], scales=torch.tensor([[0.1, 0.001, 0.1]]).double().to(self.device))
        assert self.project(**flat, radius_clip=16.5).radii.tolist() == [[[17, 2]]]

    def test_huge_radii_fit_int32(self):
        flat = self.on_axis([[0.0, 0, 1]], scales=torch.full((1, 3), 1e12, dtype=torch.float64).to(self.device))
        assert self.project(**flat).radii.tolist() == [[[10**9, 10**9]]]

    def test_a_quaternion_has_no_length(self):
        arguments = self.arguments("two cameras")
        longer = arguments["quats"] * torch.tensor([1e-200, 1e-20, 1e-3, 0.5, 7, 1e20, 1e200], dtype=torch.float64)[
            :, None
        ].to(arguments["quats"])
        for a, b in zip(self.project(**arguments), self.project(**(arguments | {"quats": longer})), strict=True):
            torch.testing.assert_close(a, b)

    def test_covars_equal_quats_and_scales(self):
        arguments = self.arguments("two cameras")
        ours = self.project(**arguments)
        q = arguments["quats"] / arguments["quats"].norm(dim=-1, keepdim=True)
        w, x, y, z = q.unbind(-1)
        turn = torch.stack([w, -x, -y, -z, x, w, -z, y, y, z, w, -x, z, -y, x, w], -1).unflatten(-1, (4, 4))  # q p
        back = torch.stack([w, x, y, z, -x, w, -z, y, -y, z, w, -x, -z, -y, x, w], -1).unflatten(-1, (4, 4))  # p q^*
        half = (back @ turn)[:, 1:, 1:] * arguments["scales"][:, None, :]
        other = self.project(**(arguments | {"quats": None, "scales": None, "covars": half @ half.mT}))
        for a, b in zip(ours, other, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("name", ["hard Gaussians", "hard cameras", "antialiased"])
    def test_culled_gaussians_get_no_gradient(self, name):
        for dtype in (torch.float32,) if self.slow else (torch.float32, torch.float64):
            arguments = self.arguments(name, dtype)
            names = [
                n for n in ("means", "quats", "scales", "covars", "viewmats", "Ks") if arguments.get(n) is not None
            ]
            leaves = {n: arguments[n].requires_grad_() for n in names}
            out = self.project(**arguments)
            for x in out:
                assert bool(x.isfinite().all())
            drawn = (out.radii > 0).any(-1)
            assert bool(drawn.any())
            assert not bool(drawn.all())
            found = torch.autograd.grad(sum((x * x).sum() for x in out[1:]), list(leaves.values()))
            for n, x in zip(names, found, strict=True):
                assert bool(x.isfinite().all()), n
                lost = ~drawn.any(1) if n in ("viewmats", "Ks") else ~drawn.any(0)
                assert not x[lost].any(), n

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_what_overflows_is_culled(self, dtype):
        largest = torch.finfo(dtype).max
        arguments = self.on_axis([[0.0, 0, 2]] * 4, dtype)
        scales = arguments["scales"].clone()
        # the covariance overflows, or (the third) only its determinant
        scales[0], scales[1, 0], scales[2] = largest**0.75, largest**0.75, largest**0.375
        scales.requires_grad_()
        out = self.project(**(arguments | {"scales": scales}))
        assert out.radii[0].tolist() == [[0, 0], [0, 0], [0, 0], [17, 17]]
        (gradient,) = torch.autograd.grad(sum(x.sum() for x in out[1:]), scales)
        assert bool(gradient.isfinite().all())
        assert not gradient[:3].any()

    def test_a_depth_or_a_conic_that_overflows_is_culled(self):
        for model in ("pinhole", "ortho"):
            arguments = self.on_axis([[0.0, 0, 1e308]], far_plane=torch.inf, camera_model=model)
            assert self.project(**arguments).radii.any()
            arguments["viewmats"] = arguments["viewmats"] * 10
            assert not self.project(**arguments).radii.any()
        arguments = self.on_axis([[0.0, 0, 2]] * 2, eps2d=0.0)
        arguments["scales"] = arguments["scales"].new_tensor([[1e-156, 1e10, 1], [1e10, 1e-156, 1]])
        assert not self.project(**arguments).radii.any()

    def test_gradient_of_a_zero_quaternion(self):
        arguments = self.on_axis([[0.1, 0.2, 2]], scales=torch.tensor([[0.1, 0.2, 0.3]]).double().to(self.device))
        same = self.project(**arguments)
        quats = torch.zeros_like(arguments["quats"]).requires_grad_()
        out = self.project(**(arguments | {"quats": quats}))
        for a, b in zip(out, same, strict=True):
            torch.testing.assert_close(a, b)
        (gradient,) = torch.autograd.grad(out.conics.sum(), quats)
        assert not gradient.any()

    def test_compensation_of_a_needle(self):
        """det before the blur keeps its digits in float32, where a difference of products would have none."""
        arguments = self.on_axis([[0.0, 0, 2]] * 2, torch.float32)
        arguments["scales"] = arguments["scales"].new_tensor([[1.0, 1e-4, 1e-4], [1.0, 1e-3, 1e-3]])
        arguments["quats"] = arguments["quats"].new_tensor([[0.9, 0, 0, 0.4], [0.8, 0, 0, -0.5]])
        if self.backend == "reference":
            return
        got = self.project(**arguments).compensations
        wide = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
        wanted = project_gaussians(**wide, backend="reference").compensations
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=0)

    def test_only_what_is_asked_for_is_differentiated(self):
        """Gradients to the Gaussians alone, or to the cameras alone, equal those of both; some outputs unused."""
        arguments = self.arguments("two cameras")
        names = ("means", "quats", "scales", "viewmats", "Ks")

        def gradients(wanted, pick):
            leaves = [arguments[n].detach().clone().requires_grad_() for n in wanted]
            out = self.project(**(arguments | dict(zip(wanted, leaves, strict=True))))
            return dict(zip(wanted, torch.autograd.grad(pick(out), leaves, materialize_grads=True), strict=True))

        for pick, wanted in (
            (lambda o: o.conics.sum(), names[:3]),
            (lambda o: o.compensations.sum(), names[3:]),
            (lambda o: o.means2d.sum(), names[:1]),
            (lambda o: (o.depths * o.depths).sum() + o.conics.sum(), names[4:]),
        ):
            every = gradients(names, pick)
            for name, x in gradients(wanted, pick).items():
                torch.testing.assert_close(x, every[name])


class CallProperties(ProjectGaussiansProperties):
    """What comes from how every backend is called; run on those that take little time."""

    def test_packed_is_what_is_drawn_in_order(self):
        arguments = self.arguments("batch dimensions")
        arguments["means"][0, 1, 2] = torch.nan
        arguments["means"].requires_grad_()
        dense, packed = self.project(**arguments), self.project(**arguments, packed=True)
        drawn = (dense.radii > 0).any(-1).flatten(0, 1)
        wanted = drawn.nonzero()
        assert len(wanted) < drawn.numel()
        ids = torch.stack([packed.batch_ids, packed.camera_ids, packed.gaussian_ids], -1)
        assert torch.equal(ids, wanted)
        for a, b in zip(packed[3:], dense, strict=True):
            assert torch.equal(a, b.flatten(0, 1)[drawn])
        (a,) = torch.autograd.grad((packed.conics**2).sum() + packed.means2d.sum(), arguments["means"])
        (b,) = torch.autograd.grad((dense.conics**2).sum() + dense.means2d.sum(), arguments["means"])
        torch.testing.assert_close(a, b)

    def test_batches_and_cameras_are_independent(self):
        arguments = self.arguments("batch dimensions")
        whole = self.project(**arguments)
        one = {n: x[1, 2] if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
        one |= {n: one[n][1:] for n in ("viewmats", "Ks")}
        for a, b in zip(whole, self.project(**one), strict=True):
            torch.testing.assert_close(a[1, 2, 1:], b)

    def test_vmap_is_more_batches(self):
        arguments = self.arguments("batch dimensions")
        names = [n for n, x in arguments.items() if isinstance(x, torch.Tensor)]
        tensors = [arguments[n][0] for n in names]
        settings = {n: x for n, x in arguments.items() if n not in names}

        def loss(*xs):
            out = self.project(**dict(zip(names, xs, strict=True)), **settings)
            return sum((x * x).sum() for x in out[1:])

        which = tuple(i for i, n in enumerate(names) if n != "opacities")
        each = torch.func.vmap(torch.func.grad(loss, argnums=which))(*tensors)
        whole = torch.func.grad(loss, argnums=which)(*tensors)
        for a, b in zip(each, whole, strict=True):
            torch.testing.assert_close(a, b)

    def test_a_second_derivative_is_refused(self):
        if self.backend == "reference":
            return
        arguments = self.arguments("two cameras")
        means = arguments["means"].requires_grad_()
        (gradient,) = torch.autograd.grad(self.project(**arguments).means2d.pow(2).sum(), means, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(gradient.sum(), means)


class TestReference(CallProperties):
    backend = "reference"
    large = False


class TestCpu(CallProperties):
    backend = "cpu"

    def test_one_two_and_three_threads_are_bit_equal(self):
        arguments = self.arguments("many", torch.float32)
        names = ("means", "quats", "scales", "viewmats", "Ks")
        leaves = [arguments[name].requires_grad_() for name in names]
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                out = self.project(**arguments)
                found.append([*out, *torch.autograd.grad(sum(x.sum() for x in out[1:]), leaves)])
        finally:
            torch.set_num_threads(threads)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


class TestFibres(CallProperties):
    """The CUDA kernels, a fibre per thread, on the CPU."""

    backend = "fibres"
    slow = True
    large = False

    def test_no_order_of_threads_changes_a_bit(self, monkeypatch):
        arguments = self.arguments("several tiles")
        names = ("means", "quats", "scales", "viewmats", "Ks")
        leaves = [arguments[name].requires_grad_() for name in names]
        found = []
        for order in ("forward", "reverse", "random:1", "random:2"):
            monkeypatch.setenv("MPKERNELS_FIBRES_ORDER", order)
            out = self.project(**arguments)
            found.append([*out, *torch.autograd.grad(sum(x.pow(2).sum() for x in out[1:]), leaves)])
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))

    def test_many_tiles_are_summed(self):
        """More tiles of 256 Gaussians than the sum over tiles has strides."""
        arguments = self.on_axis([[0.0, 0, 2]] * (256 * 33 + 1))
        found = []
        for backend in ("fibres", "reference"):
            leaves = [arguments[name].clone().requires_grad_() for name in ("viewmats", "Ks")]
            out = project_gaussians(**(arguments | dict(zip(("viewmats", "Ks"), leaves, strict=True))), backend=backend)
            found.append(torch.autograd.grad(out.means2d.sum() + out.depths.sum() + out.conics.sum(), leaves))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.triton_interpreted
class TestTriton(ProjectGaussiansProperties):
    backend = "triton"
    slow = True
    large = False

    @classmethod
    def cases(cls, op):
        """Without those that only repeat others: a program takes the interpreter some 20 ms."""
        repeat = ("two cameras", "covars", "matrices of covariances", "odd sizes", "a pixel", "opacities", "expanded")
        return [case for case in super().cases(op) if case.name not in repeat]

    @pytest.mark.parametrize("tiles", [1, 64, 135])
    def test_sums_of_cameras(self, tiles):
        """The second kernel alone: so many programs of the first would take the interpreter seconds."""
        from mpkernels.splatting.project_gaussians import triton, triton_kernels

        of_tiles = torch.rand(2, tiles, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        of_viewmats, of_Ks = torch.full((2, 3, 4, 4), torch.nan).double(), torch.full((2, 3, 3, 3), torch.nan).double()
        triton_kernels.sum_cameras[(6,)](of_tiles, of_viewmats, of_Ks, 3, tiles, STRIDES=triton._STRIDES)
        sums = of_tiles.sum(1)
        viewmats, Ks = torch.zeros(2, 3, 4, 4).double(), torch.zeros(2, 3, 3, 3).double()
        viewmats[..., :3, :3], viewmats[..., :3, 3] = sums[..., :9].unflatten(-1, (3, 3)), sums[..., 9:12]
        Ks[..., 0, 0], Ks[..., 1, 1], Ks[..., 0, 2], Ks[..., 1, 2] = sums[..., 12:].unbind(-1)
        torch.testing.assert_close(of_viewmats, viewmats)
        torch.testing.assert_close(of_Ks, Ks)


@pytest.mark.gpu
class TestTritonOnGpu(ProjectGaussiansProperties):
    backend = "triton"
    device = "cuda"


@pytest.mark.gpu
class TestCuda(CallProperties):
    backend = "cuda"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(CallProperties):
    backend = "reference"
    device = "cuda"
    large = False
