"""What tile intersection promises, on every backend."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpkernels import spec
from mpkernels.splatting import intersect_tiles
from mpkernels.splatting.intersect_tiles import reference
from mpkernels.testing import properties, strategies
from mpkernels.testing.properties import OpProperties

FUZZ = strategies.fuzz(20)


@st.composite
def scenes(draw):
    """A few Gaussians with conics that a projection could give (variances of 0.3 and more)."""
    width, height = draw(strategies.sizes(zero=False, largest=70)), draw(strategies.sizes(zero=False, largest=70))
    count, generator = draw(st.integers(1, 12)), draw(strategies.generators())
    largest = draw(st.sampled_from([0.5, 3.0, 30.0, 300.0]))
    u = torch.rand(count, 8, generator=generator, dtype=torch.float64)
    deviations = 0.55 + u[:, :2] * largest
    cos, sin = (u[:, 2] * 6.3).cos(), (u[:, 2] * 6.3).sin()
    inverse = deviations.square().reciprocal()
    a = cos**2 * inverse[:, 0] + sin**2 * inverse[:, 1]
    b = cos * sin * (inverse[:, 0] - inverse[:, 1])
    c = sin**2 * inverse[:, 0] + cos**2 * inverse[:, 1]
    arguments = {
        "means2d": (u[:, 3:5] * 2 - 0.5) * torch.tensor([width, height]),
        "depths": (u[:, 5] * 4).ceil(),  # some are equal
        "conics": torch.stack([a, b, c], dim=-1),
        "opacities": u[:, 6].clone(),
    }
    return {name: x.float() for name, x in arguments.items()} | {
        "radii": torch.full((count, 2), 10**6, dtype=torch.int32),
        "width": width,
        "height": height,
        "tile_size": draw(st.sampled_from([1, 3, 4, 8, 16, 20, 64])),
    }


def lists_of(found):
    """The ids of every tile, as a list in the order of isect_offsets."""
    begins = [*found.isect_offsets.flatten().tolist(), found.flatten_ids.numel()]
    ids = found.flatten_ids.tolist()
    return [ids[begin:end] for begin, end in itertools.pairwise(begins)]


class IntersectTilesProperties(OpProperties):
    ops = ("intersect_tiles",)

    def intersect(self, **arguments):
        moved = {name: x.to(self.device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        return intersect_tiles(**moved, backend=self.backend)

    def boxes(self, means2d, radii, depths, width, height, **settings):
        means2d, depths = torch.tensor(means2d, dtype=torch.float32), torch.tensor(depths, dtype=torch.float32)
        radii = torch.tensor(radii, dtype=torch.int32).expand(means2d.shape)
        return self.intersect(means2d=means2d, radii=radii, depths=depths, width=width, height=height, **settings)

    def test_boxes_by_hand(self):
        """Boxes end at floor and ceil, as in gsplat: a box that touches a tile's edge from outside is not in it."""
        found = self.boxes([[16.0, 16.0], [8.0, 24.0], [40.0, 8.0]], [4, 4], [3.0, 1.0, 2.0], 48, 32)
        assert lists_of(found) == [[0], [0], [2], [1, 0], [0], []]
        assert found.tiles_per_gauss.tolist() == [4, 1, 1]
        assert self.boxes([[8.0, 8.0]], [8, 8], [1.0], 48, 32).tiles_per_gauss.tolist() == [1]
        assert self.boxes([[24.0, 8.0]], [9, 8], [1.0], 48, 32).tiles_per_gauss.tolist() == [3]

    def test_keys_are_those_of_gsplat(self):
        found = self.boxes([[[8.0, 8.0]], [[24.0, 8.0]]], [4, 4], [[2.0], [0.5]], 48, 32)  # 6 tiles: 3 bits
        bits = torch.tensor([2.0, 0.5]).view(torch.int32).tolist()
        assert found.isect_ids.tolist() == [bits[0], 1 << 35 | 1 << 32 | bits[1]]
        assert found.isect_offsets.shape == (2, 2, 3)

    def test_order_is_depth_then_index(self):
        found = self.boxes([[8.0, 8.0]] * 6, [2, 2], [3.0, 1.0, 3.0, 2.0, 1.0, 3.0], 16, 16)
        assert found.flatten_ids.tolist() == [1, 4, 3, 0, 2, 5]

    def test_depths_in_double_are_ordered_as_float32(self):
        arguments = spec.find("intersect_tiles").case("typical").arguments(torch.float64)
        count = arguments["depths"].numel()
        arguments["depths"] = 1 + torch.arange(count, 0, -1, dtype=torch.float64) * 1e-12  # all 1 in float32
        for ids in lists_of(self.intersect(**arguments)):
            assert ids == sorted(ids)

    @FUZZ
    @given(scenes())
    def test_exact_lists_hold_every_pixel_that_is_drawn(self, arguments):
        """A superset of the tiles with a pixel of alpha >= 1/255 (in float32), and nothing beyond the slack."""
        width, height, size = arguments["width"], arguments["height"], arguments["tile_size"]
        columns = -(-width // size)
        found = self.intersect(**arguments)
        listed = torch.zeros(arguments["depths"].numel(), found.isect_offsets.numel(), dtype=torch.bool)
        for tile, ids in enumerate(lists_of(found)):
            listed[ids, tile] = True

        def quadratic(x):
            dx = torch.arange(width) + 0.5 - x["means2d"][:, 0, None, None]
            dy = (torch.arange(height) + 0.5)[:, None] - x["means2d"][:, 1, None, None]
            a, b, c = (v[:, None, None] for v in x["conics"].unbind(-1))
            return 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy

        alpha = arguments["opacities"][:, None, None] * torch.exp(-quadratic(arguments))
        drawn = (alpha >= 1 / 255).nonzero()
        assert listed[drawn[:, 0], drawn[:, 1] // size * columns + drawn[:, 2] // size].all()

        wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        a, b, c = wide["conics"].unbind(-1)
        least = reference.least_over_tiles(wide["means2d"], a, b, c, width, height, size).flatten(1)
        slack = 1.001e-4 + 2.0**-21 * a * c / (a * c - b * b)
        bound = torch.log(255 * wide["opacities"]) * (1 + slack) + slack
        assert (least <= bound[:, None])[listed].all()

    @FUZZ
    @given(scenes(), st.integers(1, 3), st.booleans())
    def test_random_scenes_equal_the_reference(self, arguments, images, exact):
        count = arguments["depths"].numel()
        arguments |= {"image_ids": torch.arange(count) * 7 % (images + 1), "n_images": images}  # one out of range
        arguments["radii"] = (arguments["means2d"].abs() % 9).ceil().int()
        if not exact:
            arguments |= {"conics": None, "opacities": None}
        for got, wanted in zip(
            self.intersect(**arguments), intersect_tiles(**arguments, backend="reference"), strict=True
        ):
            assert torch.equal(got.cpu(), wanted)

    @pytest.mark.parametrize("elongation", [1.0, 100.0])
    def test_slack(self, elongation):
        """A disc, and a tilted needle, that reach the next tile's pixel centres with 0.9 of the slack, and with 1.1."""
        shear = (1 - elongation**-2) ** 0.5  # ac/det = elongation^2
        slack = 1e-4 + 2.0**-21 * elongation**2
        for part, tiles in ((0.9, 2), (1.1, 1)):
            least = math.log(255) * (1 + part * slack) + part * slack  # det/c dx^2 / 2, at dx = 8.5
            a = 2 * least / 8.5**2 * elongation**2
            found = self.intersect(
                means2d=torch.tensor([[8.0, 12.0]], dtype=torch.float64),
                radii=torch.full((1, 2), 50, dtype=torch.int32),
                depths=torch.ones(1, dtype=torch.float64),
                conics=torch.tensor([[a, a * shear, a]], dtype=torch.float64),
                opacities=torch.ones(1, dtype=torch.float64),
                width=32,
                height=16,
            )
            assert found.tiles_per_gauss.tolist() == [tiles]

    def test_ellipses_are_in_fewer_tiles_than_boxes(self):
        arguments = spec.find("intersect_tiles").case("needles").arguments(torch.float32)
        exact = self.intersect(**arguments).tiles_per_gauss
        boxes = self.intersect(**arguments | {"conics": None, "opacities": None}).tiles_per_gauss
        assert (exact <= boxes).all()
        assert 4 * exact[0] < boxes[0]
        assert torch.equal(exact[-2:], boxes[-2:])  # too thin: the box

    def test_opcheck(self, op, smooth_case):
        """As OpProperties has it, but with symbolic sizes: the number of intersections is only known by looking."""
        if self.backend == "reference":
            return
        arguments = smooth_case.arguments(torch.float32, self.device)
        for name, recorded in properties._recorded_ops(lambda: self.call(op, **arguments)):
            utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
            torch.library.opcheck(name, recorded, test_utils=utils)

    @pytest.mark.parametrize("name", ["every second one unusable", "every second box unusable"])
    def test_what_is_not_usable_is_not_listed(self, name):
        arguments = spec.find("intersect_tiles").case(name).arguments(torch.float32)
        tiles = self.intersect(**arguments).tiles_per_gauss
        unusable = len(tiles) // 2 if "one" in name else 10  # boxes know nothing of conics and opacities
        assert (tiles[0 : 2 * unusable : 2] == 0).all()
        assert (tiles[1::2] > 0).all()

    def test_no_gradient_is_asked_for(self):
        arguments = spec.find("intersect_tiles").case("a few").arguments(torch.float32, self.device)
        arguments["means2d"].requires_grad_()
        assert not any(x.requires_grad for x in self.intersect(**arguments))

    def test_more_than_memory_is_refused_at_once(self):
        """1e11 entries: the error comes before anything of that size is allocated, and says what to do."""
        if self.backend == "reference":
            return
        arguments = {
            "means2d": torch.full((1000, 2), 5000.0),
            "radii": torch.full((1000, 2), 9000, dtype=torch.int32),
            "depths": torch.ones(1000),
            "width": 10000,
            "height": 10000,
            "tile_size": 1,
        }
        with pytest.raises(RuntimeError, match=r"100000000000 intersections.*GiB.*Use fewer.*larger tile_size"):
            self.intersect(**arguments)
        arguments |= {"conics": torch.tensor([[1e-8, 0, 1e-8]]).expand(1000, 3), "opacities": torch.ones(1000)}
        if not self.slow:
            with pytest.raises(RuntimeError, match=r"100000000000 intersections.*GiB"):
                self.intersect(**arguments)


class TestReference(IntersectTilesProperties):
    backend = "reference"


class TestCpu(IntersectTilesProperties):
    backend = "cpu"

    @pytest.mark.parametrize("name", ["typical", "many", "many in many rows"])
    def test_threads_do_not_change_a_bit(self, name):
        arguments = spec.find("intersect_tiles").case(name).arguments(torch.float32)
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(self.intersect(**arguments))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class TestFibres(IntersectTilesProperties):
    backend = "fibres"
    slow = True
    large = False

    def test_more_gaussians_than_one_round_of_prefix_sums(self):
        """A block scans the sums of 256 tiles of 2,048 counts at a time: 524,288 Gaussians and more take two rounds."""
        count = 256 * 2048 + 5000
        radii = torch.zeros(count, 2, dtype=torch.int32)
        radii[:: count // 30] = 3
        radii[-1] = 3
        arguments = {
            "means2d": torch.arange(2 * count, dtype=torch.float32).reshape(count, 2) % 37,
            "radii": radii,
            "depths": 1 + torch.arange(count, dtype=torch.float32) % 11,
            "width": 40,
            "height": 40,
        }
        for got, wanted in zip(self.intersect(**arguments), intersect_tiles(**arguments, backend="cpu"), strict=True):
            assert torch.equal(got, wanted)

    @pytest.mark.parametrize("order", ["reverse", "random:1"])
    def test_order_of_threads_does_not_change_a_bit(self, order, monkeypatch):
        arguments = spec.find("intersect_tiles").case("needles").arguments(torch.float32)
        wanted = self.intersect(**arguments)
        monkeypatch.setenv("MPKERNELS_FIBRES_ORDER", order)
        for a, b in zip(self.intersect(**arguments), wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
class TestCuda(IntersectTilesProperties):
    backend = "cuda"
    device = "cuda"
