"""The plane-sweep demo: its geometry, what it may look at, and what it writes."""

import json

import pytest
import torch

from python_models import plane_sweep
from python_models.plane_sweep import PlaneSweepVolume, StereoPair

NEAR, FAR = 5, 2  # disparities of the synthetic scene, in pixels


@pytest.fixture(scope="module")
def photographs():
    return plane_sweep.load_motorcycle()


@pytest.fixture(scope="module")
def two_planes():
    """A textured square in front of a textured wall; the disparities are whole pixels, and so exact."""
    height, width = 24, 40
    generator = torch.Generator().manual_seed(3)
    wall = torch.rand(height, width + NEAR, 3, generator=generator)
    square = torch.rand(height, width + NEAR, 3, generator=generator)
    in_square = torch.zeros(height, width + NEAR, dtype=torch.bool)
    in_square[6:18, 14:30] = True

    def seen(shift_wall, shift_square):
        mask = in_square[:, shift_square : shift_square + width]
        behind = wall[:, shift_wall : shift_wall + width]
        return torch.where(mask[..., None], square[:, shift_square : shift_square + width], behind)

    disparity = torch.where(in_square[:, :width], float(NEAR), float(FAR))
    return StereoPair(seen(0, 0), seen(FAR, NEAR), disparity, (0.0, 7.0))


def volume_of(pair, trained, planes):
    volume = PlaneSweepVolume(*pair.disparity.shape, pair.disparity_range, planes)
    plane_sweep.initialise(volume, pair.left, pair.right, trained)
    return volume


def fitted(pair, trained, steps=5, planes=8):
    volume = volume_of(pair, trained, planes)
    losses = plane_sweep.optimise(volume, pair, trained, steps=steps, backend=None, progress=None)
    return volume, losses


@pytest.fixture
def trained(two_planes):
    return ~plane_sweep.held_out_blocks(*two_planes.disparity.shape, seed=0)


def test_true_disparity_warps_the_left_photograph_towards_the_right(photographs):
    warped = plane_sweep.warp_left(photographs.left, plane_sweep.right_disparity(photographs.disparity))
    backwards = plane_sweep.warp_left(photographs.left, -plane_sweep.right_disparity(photographs.disparity))
    unshifted = plane_sweep.psnr(photographs.left, photographs.right)
    assert plane_sweep.psnr(warped, photographs.right) > unshifted + 5
    assert plane_sweep.psnr(backwards, photographs.right) < unshifted + 1


def test_right_disparity_keeps_the_nearest_and_fills_from_the_farther():
    disparity = torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0, float("nan")]])
    assert plane_sweep.right_disparity(disparity).tolist() == [[0, 2, 2, 0, 0, 0, 0, 0]]


def test_every_plane_shifts_by_its_disparity():
    volume = PlaneSweepVolume(2, 10, (0.0, 3.0), 5)
    ramp = torch.arange(volume.full_width).float()[None, :, None].expand(2, -1, 5)
    expected = torch.arange(10).float()[:, None] + volume.disparity
    assert torch.allclose(volume.shift(ramp), expected.expand(2, 10, 5), atol=1e-5)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_shift_has_exact_gradients(channels):
    volume = PlaneSweepVolume(2, 6, (0.5, 3.0), 7).double()
    planes = torch.rand(2, volume.full_width, 7, *channels, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(volume.shift, planes)


def test_two_planes_are_recovered(two_planes, trained):
    volume, _ = fitted(two_planes, trained, steps=60)
    with torch.no_grad():
        left, right = volume()
    error = (volume.disparity_of(left) - two_planes.disparity).abs()
    # The first columns of the left picture lie outside the right one.
    assert (error[:, NEAR:] < 0.5).float().mean() > 0.85
    assert error[9:15, 18:26].max() < 0.5
    unshifted = plane_sweep.psnr(two_planes.left, two_planes.right, ~trained)
    assert plane_sweep.psnr(right.values, two_planes.right, trained) > 25
    assert plane_sweep.psnr(right.values, two_planes.right, ~trained) > unshifted + 3


def test_steps_reduce_the_loss(two_planes, trained):
    _, losses = fitted(two_planes, trained, steps=10)
    assert losses[-1] < 0.9 * losses[0]


def test_held_out_pixels_have_no_influence(two_planes, trained):
    noise = torch.rand(two_planes.right.shape, generator=torch.Generator().manual_seed(9))
    changed = torch.where(trained[..., None], two_planes.right, noise)
    other = StereoPair(two_planes.left, changed, two_planes.disparity, two_planes.disparity_range)
    first, _ = fitted(two_planes, trained)
    second, _ = fitted(other, trained)
    assert torch.equal(first.raw_density, second.raw_density)
    assert torch.equal(first.colour, second.colour)
    everything, _ = fitted(other, torch.ones_like(trained))  # the test can fail: these pixels do matter when trained
    assert not torch.equal(first.colour, everything.colour)


def test_true_disparity_has_no_influence(two_planes, trained):
    unknown = torch.full_like(two_planes.disparity, float("nan"))
    other = StereoPair(two_planes.left, two_planes.right, unknown, two_planes.disparity_range)
    first, _ = fitted(two_planes, trained)
    second, _ = fitted(other, trained)
    assert torch.equal(first.raw_density, second.raw_density)
    assert torch.equal(first.colour, second.colour)


def test_a_fifth_of_the_blocks_is_held_out():
    held_out = plane_sweep.held_out_blocks(125, 185, seed=0)
    assert held_out.shape == (125, 185)
    assert 0.18 < held_out.float().mean() < 0.22
    assert torch.equal(held_out, plane_sweep.held_out_blocks(125, 185, seed=0))
    assert not torch.equal(held_out, plane_sweep.held_out_blocks(125, 185, seed=1))


def test_fit_writes_its_pictures_and_repeats_itself(tmp_path):
    steps = []
    first = plane_sweep.fit(steps=2, planes=6, output=tmp_path / "new" / "folder", progress=steps.append)
    second = plane_sweep.fit(steps=2, planes=6, output=None)
    assert [report["step"] for report in steps] == [1, 2]
    assert first["figures"] == second["figures"]
    assert first["loss"] == second["loss"]
    assert second["pictures"] == []
    assert first["pictures"]
    for picture in first["pictures"]:
        assert (tmp_path / "new" / "folder" / picture["file"]).stat().st_size > 0
        assert picture["title"]
        assert picture["caption"]
    assert json.loads((tmp_path / "new" / "folder" / "report.json").read_text()) == first


def test_interrupt_keeps_what_is_fitted():
    def interrupt(report):
        if report["step"] == 2:
            raise KeyboardInterrupt

    result = plane_sweep.fit(steps=50, planes=4, output=None, progress=interrupt)
    assert result["steps_done"] == 2
    assert result["figures"]["psnr_left"] > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps: expected an integer of at least 0, got -1"),
        ({"planes": 1}, "planes: expected an integer of at least 2, got 1"),
        ({"planes": 4.0}, "planes: expected an integer of at least 2, got 4.0"),
        ({"device": "tpu"}, "device: expected 'cpu', or 'cuda' where torch finds a GPU, got 'tpu'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        plane_sweep.fit(output=None, **arguments)
