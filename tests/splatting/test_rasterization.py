"""What the whole pipeline promises: gsplat's meaning, on every backend."""

import pytest
import torch

from mpkernels import spec
from mpkernels.splatting import rasterization
from mpkernels.splatting.rasterization.reference import rasterization as every_pixel_against_every_gaussian
from mpkernels.testing.properties import OpProperties

META = (
    *("batch_ids", "camera_ids", "gaussian_ids", "radii", "means2d", "depths", "conics", "opacities", "tile_width"),
    *("tile_height", "tiles_per_gauss", "isect_ids", "flatten_ids", "isect_offsets", "width", "height", "tile_size"),
    *("n_batches", "n_cameras"),
)


class RasterizationProperties(OpProperties):
    ops = ("rasterization",)

    def arguments(self, name, dtype=torch.float32):
        return spec.find("rasterization").case(name).arguments(dtype, self.device)

    test_opcheck = None  # done for each step by itself

    def test_compiles_whole(self, op):
        """How many Gaussians are seen, and intersections there are, depends on values: the compiler has to allow it."""
        if self.backend == "reference" or self.slow:
            return
        arguments = spec.find(op.name).case("two cameras, harmonics").arguments(torch.float32, self.device)
        leaves = [arguments["means"].requires_grad_(), arguments["colors"].requires_grad_()]

        def loss(arguments):
            return self.render(arguments)[0].square().sum()

        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
            got = torch.autograd.grad(compiled(arguments), leaves)
        for a, b in zip(got, torch.autograd.grad(loss(arguments), leaves), strict=True):
            torch.testing.assert_close(a, b)
        torch._dynamo.reset()

    def test_gradcheck(self, op, smooth_case):
        """In a random direction: each step has its whole Jacobian checked."""
        function, leaves = self._as_function(op, smooth_case)
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)

    def render(self, arguments, **changes):
        return rasterization(**(arguments | {"backend": self.backend} | changes))

    def test_equals_plain_torch_everywhere(self, op, case):
        """Tiles, lists and culling change nothing: every pixel against every Gaussian."""
        arguments = case.arguments(torch.float64, self.device)
        if "not finite" in case.name:
            keep = torch.arange(16) > 10  # of the others the plain code makes NaN, and ours nothing
            changed = {n: arguments[n][keep] for n in ("means", "quats", "scales", "opacities", "colors")}
            wanted = every_pixel_against_every_gaussian(**(arguments | changed))
            arguments["opacities"][8:10] = 0.0  # those are drawn: no rotation, no extent
        else:
            wanted = every_pixel_against_every_gaussian(**arguments)
        for got, plain in zip(self.render(arguments)[:2], wanted, strict=True):
            torch.testing.assert_close(got, plain)

    @pytest.mark.parametrize("name", ["not finite", "not finite, dense", "everything behind the camera"])
    def test_images_and_gradients_are_finite(self, name):
        arguments = self.arguments(name)
        leaves = [
            arguments[n].requires_grad_() for n in ("means", "quats", "scales", "opacities", "colors", "viewmats")
        ]
        image, alphas, _ = self.render(arguments)
        assert image.isfinite().all()
        for gradient in torch.autograd.grad(image.sum() + alphas.sum(), leaves):
            assert gradient.isfinite().all()

    def test_packed_and_dense_are_equal(self):
        arguments = self.arguments("harmonics of degree 3")
        packed, dense = (self.render(arguments, packed=packed) for packed in (True, False))
        assert torch.equal(packed[0], dense[0])
        assert packed[2]["means2d"].dim() == 2
        assert dense[2]["means2d"].shape == (2, 30, 2)
        rows = packed[2]["camera_ids"], packed[2]["gaussian_ids"]
        assert torch.equal(dense[2]["means2d"][rows], packed[2]["means2d"])

    @pytest.mark.parametrize("packed", [False, True])
    def test_meta(self, packed):
        arguments = self.arguments("typical")
        arguments["means"].requires_grad_()
        image, _, meta = self.render(arguments, packed=packed, absgrad=self.backend != "reference")
        assert set(meta) == set(META)
        assert (meta["gaussian_ids"] is None) is not packed
        meta["means2d"].retain_grad()
        image.sum().backward()
        assert meta["means2d"].grad.shape == meta["means2d"].shape
        if self.backend != "reference":
            assert (meta["means2d"].absgrad >= meta["means2d"].grad.abs() * 0.999).all()
        assert meta["radii"].dtype == torch.int32
        assert (meta["tile_width"], meta["tile_height"]) == (3, 3)

    def test_batch_dimensions(self):
        """A batch is its scenes one after the other."""
        scenes = [self.arguments(name) for name in ("two cameras, harmonics",) * 2]
        scenes[1] = scenes[1] | {"means": scenes[1]["means"].flip(0)}
        batch = {n: torch.stack([s[n] for s in scenes]) if torch.is_tensor(x) else x for n, x in scenes[0].items()}
        for packed in (False, True):
            image = self.render(batch, packed=packed)[0]
            for got, scene in zip(image, scenes, strict=True):
                assert torch.equal(got, self.render(scene)[0])


class TestReference(RasterizationProperties):
    backend = "reference"


class TestCpu(RasterizationProperties):
    backend = "cpu"

    def test_one_and_two_threads_are_bit_equal(self):
        arguments = self.arguments("typical")
        leaves = [
            arguments[n].requires_grad_()
            for n in ("means", "quats", "scales", "opacities", "colors", "viewmats", "Ks", "backgrounds")
        ]
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 2) * 5:
                torch.set_num_threads(count)
                image, alphas, _ = self.render(arguments)
                found.append([image, alphas, *torch.autograd.grad(image.square().sum(), leaves)])
        finally:
            torch.set_num_threads(threads)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


class TestFibres(RasterizationProperties):
    """The CUDA kernels, a fibre per thread, on the CPU."""

    backend = "fibres"
    slow = True


@pytest.mark.gpu
class TestCuda(RasterizationProperties):
    backend = "cuda"
    device = "cuda"
