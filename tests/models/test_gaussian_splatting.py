"""Gaussian splatting: the stereo pair, training on a scene, one picture; on scenes of a few pixels."""

import dataclasses
import json
import math
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mpkernels import splatting
from python_models import gaussian_splatting, scenes
from python_models import gaussian_splatting_basics as basics
from python_models import gaussian_splatting_stereo as stereo
from python_models import gaussian_splatting_training as training
from python_models.gaussian_splatting_training import Budget, Settings, Trainer
from python_models.plane_sweep import StereoPair, load_motorcycle

SIZE = 24
CPU = torch.device("cpu")


def orbit(angle, distance=4.0):
    """Camera to world, OpenCV axes, looking at the origin."""
    position = np.array([distance * math.sin(angle), 0.5, -distance * math.cos(angle)])
    forward = -position / np.linalg.norm(position)
    right = np.cross([0, 1, 0], forward)
    right /= np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[:3] = np.stack([right, np.cross(forward, right), forward, position], axis=1)
    return matrix


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten pictures of a few coloured Gaussians, as a transforms.json."""
    path = tmp_path_factory.mktemp("scene")
    (path / "images").mkdir()
    generator = torch.Generator().manual_seed(5)
    points = torch.rand(30, 3, generator=generator) * 2 - 1
    true = basics.initial_gaussians(
        points, torch.rand(30, 3, generator=generator), sh_degree=0, largest=0.2, opacity=0.9
    )
    frames = []
    K = torch.tensor([[30.0, 0, SIZE / 2], [0, 30, SIZE / 2], [0, 0, 1]])
    for number, angle in enumerate(np.linspace(-1, 1, 10)):
        pose = orbit(angle)
        viewmat = torch.from_numpy(np.linalg.inv(pose)).float()
        with torch.no_grad():
            picture = basics.render(true, viewmat, K, SIZE, SIZE, sh_degree=0)[0]
        basics.save_picture(path / f"images/{number}.png", picture)
        matrix = (pose @ np.diag([1.0, -1, -1, 1])).tolist()
        frames.append({"file_path": f"images/{number}.png", "transform_matrix": matrix})
    camera = {"fl_x": 30, "fl_y": 30, "cx": SIZE / 2, "cy": SIZE / 2, "w": SIZE, "h": SIZE, "aabb_scale": 1}
    (path / "transforms.json").write_text(json.dumps(camera | {"frames": frames}))
    return path


FEW = Settings(points=200, max_gaussians=300, sh_degree=1)


def contents(trainer):
    """Everything that the next step depends on, as tensors and numbers."""
    found = {f"gaussians {name}": value for name, value in trainer.gaussians.items()}
    for name, optimizer in trainer.optimizers.items():
        for key, value in optimizer.state[trainer.gaussians[name]].items():
            found[f"{name} {key}"] = value
    found |= {f"state {name}": value for name, value in trainer.state.items() if isinstance(value, torch.Tensor)}
    return found | {"generator": trainer.generator.get_state(), "noise": trainer.noise.get_state()}


@pytest.fixture(scope="module")
def quick():
    """Refines every five steps: the strategies' own steps are too far apart for a test."""
    changed = {"refine_every": 5, "refine_start_iter": 4}
    before = {kind: kind.__init__ for kind in (splatting.DefaultStrategy, splatting.MCMCStrategy)}

    def quick_init(kind):
        def init(self, *arguments, **settings):
            before[kind](self, *arguments, **(changed | settings))

        return init

    for kind in before:
        kind.__init__ = quick_init(kind)
    yield
    for kind, init in before.items():
        kind.__init__ = init


@pytest.mark.parametrize("strategy", training.STRATEGIES)
def test_a_resumed_run_is_bit_equal(folder, tmp_path, quick, strategy):
    scene, settings, budget = scenes.load_scene(folder), dataclasses.replace(FEW, strategy=strategy), Budget(60)
    whole = Trainer(scene, settings, budget, CPU)
    losses = [whole.train_step() for _ in range(24)]
    first = Trainer(scene, settings, budget, CPU)
    again = [first.train_step() for _ in range(12)]
    first.save(tmp_path / "checkpoint.pt")
    second = Trainer.load(tmp_path / "checkpoint.pt", scene, settings, budget, CPU)
    assert (second.step, second.order) == (12, first.order)
    again += [second.train_step() for _ in range(12)]
    assert losses == again
    expected, found = contents(whole), contents(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert len(whole.gaussians["means"]) != 200  # the strategy has been at work
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint.pt"]


def test_training_shows_what_was_held_out(folder, tmp_path, quick):
    reports = []
    settings = Settings(points=300, max_gaussians=500, sh_degree=0)
    result = training.train(folder, output=tmp_path, steps=150, settings=settings, progress=reports.append)
    start = Trainer(scenes.load_scene(folder), settings, Budget(150), CPU).evaluate()
    assert result["figures"]["psnr_held_out"] > start["psnr_held_out"] + 3
    assert result["figures"]["ssim_held_out"] > start["ssim_held_out"]
    assert result["figures"]["gaussians"] <= 500
    assert [report["step"] for report in reports] == list(range(1, 151))
    assert reports[-1]["spent"] == 1
    assert reports[-1]["psnr_held_out"] > start["psnr_held_out"]
    assert [entry["step"] for entry in result["history"]] == list(range(15, 150, 15))
    assert json.loads((tmp_path / "result.json").read_text()) == result
    for picture in result["pictures"]:
        assert Image.open(tmp_path / picture["file"]).size == (3 * SIZE, SIZE)
    assert len(result["pictures"]) == 2  # views 0 and 8 of ten
    found = splatting.load_ply(tmp_path / "scene.ply")
    assert len(found["means"]) == result["figures"]["gaussians"]
    assert found["shN"].shape[1] == 0
    assert not result["interrupted"]


def test_a_step_of_the_loss_goes_down(folder):
    trainer = Trainer(scenes.load_scene(folder), FEW, Budget(1000), CPU)
    losses = [trainer.train_step() for _ in range(40)]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])


def test_rates_fall_and_degrees_rise_with_the_budget(folder, monkeypatch):
    monkeypatch.setattr(training, "SH_DEGREE_EVERY", 2)
    trainer = Trainer(scenes.load_scene(folder), FEW, Budget(4), CPU)
    rates, degrees = [], []
    for _ in range(4):
        degrees.append(trainer.sh_degree)
        trainer.train_step()
        rates.append(trainer.optimizers["means"].param_groups[0]["lr"])
    first = 1.6e-4 * trainer.scene.scale
    assert rates == pytest.approx([first * 0.01 ** (i / 4) for i in range(4)])
    assert degrees == [0, 0, 1, 1]
    assert trainer.spent == 1


def test_photographs_are_small_at_first(folder, monkeypatch):
    monkeypatch.setattr(training, "COARSE_LEAST", 1)
    trainer = Trainer(scenes.load_scene(folder), FEW, Budget(4), CPU)
    sizes = []
    monkeypatch.setattr(
        training, "photometric_loss", lambda p, t, *rest: (sizes.append((p.shape, t.shape)), p.mean())[1]
    )
    for _ in range(4):
        trainer.train_step()
    assert sizes == [((SIZE // 2, SIZE // 2, 3),) * 2] + [((SIZE, SIZE, 3),) * 2] * 3


def test_a_small_view_is_the_large_one_averaged(folder):
    trainer = Trainer(scenes.load_scene(folder), FEW, Budget(4), CPU)
    mask = torch.ones(SIZE, SIZE, dtype=torch.bool)
    mask[3, 5] = False
    trainer.scene.masks[1] = mask
    large, small = (trainer.render(1, factor)[0] for factor in (1, 2))
    averaged = large.reshape(SIZE // 2, 2, SIZE // 2, 2, 3).mean(dim=(1, 3))
    assert (small - averaged).abs().mean() < 0.4 * (small - averaged.flip(1)).abs().mean()
    target, seen = trainer._target(1, 2)
    full = trainer._target(1)[0]
    assert torch.allclose(target[4, 7], full[8:10, 14:16].mean(dim=(0, 1)))
    assert (~seen).nonzero().tolist() == [[1, 2]]


def test_every_training_view_comes_before_one_comes_again(folder):
    trainer = Trainer(scenes.load_scene(folder), FEW, Budget(4), CPU)
    first, second = ([trainer._next_view() for _ in trainer.scene.train] for _ in range(2))
    assert sorted(first) == sorted(second) == trainer.scene.train
    assert first != second


def test_minutes_end_training(folder, tmp_path):
    result = training.train(folder, output=tmp_path, minutes=0.01, settings=FEW)
    assert result["steps_done"] > 0
    assert 0.6 <= result["timings"]["train_seconds"] < 5


def test_held_out_views_have_no_influence(folder, tmp_path):
    scene = scenes.load_scene(folder)
    changed = dataclasses.replace(
        scene, images=[255 - x if i in scene.held_out else x for i, x in enumerate(scene.images)]
    )
    runs = [Trainer(each, FEW, Budget(20), CPU) for each in (scene, changed)]
    losses = [[run.train_step() for _ in range(10)] for run in runs]
    assert losses[0] == losses[1]
    assert runs[0].evaluate() != runs[1].evaluate()


def test_masked_pixels_have_no_influence(folder):
    scene = scenes.load_scene(folder)
    mask = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(1)) > 0.2
    figures = []
    for value in (0, 255):
        images = [torch.where(mask[..., None], image, value).byte() for image in scene.images]
        masked = dataclasses.replace(scene, images=images, masks=[mask] * len(scene), points=torch.zeros(1, 3) + 0.1)
        masked = dataclasses.replace(masked, point_colours=torch.full((1, 3), 0.5))
        trainer = Trainer(masked, FEW, Budget(20), CPU)
        target, seen = trainer._target(1)
        picture = torch.rand(SIZE, SIZE, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
        basics.photometric_loss(picture, target, seen).backward()
        assert (picture.grad[~mask] == 0).all()
        assert (picture.grad[mask] != 0).any()
        figures.append(basics.psnr(picture.detach(), target, seen))
    assert figures[0] == figures[1]


def test_loss_is_four_fifths_of_l1_and_a_fifth_of_ssim():
    picture, target = torch.rand(2, 20, 22, 3, generator=torch.Generator().manual_seed(0))
    similarity = splatting.ssim(picture.permute(2, 0, 1)[None], target.permute(2, 0, 1)[None])
    expected = 0.8 * (picture - target).abs().mean() + 0.2 * (1 - similarity)
    assert torch.allclose(basics.photometric_loss(picture, target, None), expected)
    assert basics.ssim(target, target) == pytest.approx(1)
    assert basics.psnr(target + 0.1 * (0.5 - target).sign(), target) == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize(("cap", "grown"), [(3, []), (4, []), (5, [2]), (6, [1, 2]), (7, [0, 1, 2]), (99, [0, 1, 2])])
def test_the_cap_lets_the_highest_gradients_grow(cap, grown):
    made = basics.initial_gaussians(torch.rand(4, 3), torch.rand(4, 3), sh_degree=0, largest=1e-3)
    optimizers = {name: torch.optim.Adam([value]) for name, value in made.items()}
    strategy = training.CappedStrategy(grow_grad2d=0.5)
    strategy.cap = cap
    state = strategy.initialize_state()
    state |= {"grad2d": torch.tensor([1.0, 8.0, 6.0, 0.0]), "count": torch.tensor([1.0, 2.0, 1.0, 0.0])}  # 1, 4, 6, 0
    before = made["means"].detach().clone()
    strategy._grow(made, optimizers, state, 1000)
    assert sorted(made["means"][4:].tolist()) == sorted(before[grown].tolist())  # small ones are duplicated
    assert strategy.grow_grad2d == 0.5


def test_gaussians_start_as_large_as_their_neighbours_are_away():
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 2], [50, 0, 0]])
    made = basics.initial_gaussians(points, torch.rand(5, 3), sh_degree=2, largest=10.0)
    assert made["scales"].exp()[0].tolist() == pytest.approx([math.sqrt(3)] * 3)
    assert made["scales"].exp()[4].tolist() == pytest.approx([10] * 3)
    assert made["shN"].shape == (5, 8, 3)
    assert torch.sigmoid(made["opacities"]).tolist() == pytest.approx([0.1] * 5)
    assert len(basics.initial_gaussians(points[:1], torch.rand(1, 3), sh_degree=0, largest=1.0)["means"]) == 1


def test_points_of_the_scene_are_taken_up_to_the_cap(folder):
    scene = dataclasses.replace(scenes.load_scene(folder), points=torch.rand(400, 3), point_colours=torch.rand(400, 3))
    trainer = Trainer(scene, FEW, Budget(1), CPU)
    assert len(trainer.gaussians["means"]) == 300
    known = {tuple(row) for row in scene.points.tolist()}
    assert all(tuple(row) in known for row in trainer.gaussians["means"].tolist())


def test_ctrl_c_saves_and_reports(folder, tmp_path):
    def interrupt(report):
        if report["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    result = training.train(folder, output=tmp_path, steps=10, settings=FEW, progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert (result["steps_done"], result["interrupted"]) == (3, True)
    assert (tmp_path / "scene.ply").exists()
    resumed = training.train(folder, output=tmp_path, steps=10, settings=FEW, resume=True)
    assert (resumed["steps_done"], resumed["interrupted"]) == (10, False)
    whole = training.train(folder, output=tmp_path / "whole", steps=10, settings=FEW)
    assert whole["figures"] == resumed["figures"]
    assert (tmp_path / "scene.ply").read_bytes() == (tmp_path / "whole/scene.ply").read_bytes()


def test_an_interrupt_out_of_the_progress_report_ends_training(folder, tmp_path):
    def interrupt(report):
        raise KeyboardInterrupt

    assert training.train(folder, output=tmp_path, steps=10, settings=FEW, progress=interrupt)["steps_done"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": dataclasses.replace(FEW, seed=4)}, "seed: expected 0 as in .*checkpoint.pt, got 4"),
        ({"data": "other"}, "data: expected the views of .*checkpoint.pt"),
    ],
)
def test_resuming_something_else_is_refused(folder, tmp_path, change, message):
    training.train(folder, output=tmp_path, steps=1, settings=FEW)
    data = folder
    if "data" in change:
        data = tmp_path / "other"
        described = json.loads((folder / "transforms.json").read_text())
        described["frames"] = described["frames"][:5]
        data.mkdir()
        (data / "transforms.json").write_text(json.dumps(described))
        (data / "images").symlink_to(folder / "images")
    with pytest.raises(ValueError, match=message):
        training.train(data, output=tmp_path, steps=2, settings=change.get("settings", FEW), resume=True)


def test_resuming_nothing_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="resume: expected a checkpoint, there is none"):
        training.train(folder, output=tmp_path, steps=2, settings=FEW, resume=True)


def test_a_loss_that_is_not_finite_stops_training(folder):
    trainer = Trainer(scenes.load_scene(folder), FEW, Budget(10), CPU)
    trainer._target = lambda view, factor: (torch.full((SIZE, SIZE, 3), math.nan), None)
    with pytest.raises(FloatingPointError, match="the loss of step 0 is nan"):
        trainer.train_step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Settings(strategy="best"), "strategy: expected one of 'default', 'mcmc', got 'best'"),
        (lambda: Settings(sh_degree=4), "sh_degree: expected an integer from 0 to 3, got 4"),
        (lambda: Settings(points=0), "points: expected an integer from 1 to .*, got 0"),
        (lambda: Settings(max_gaussians=1.5), "max_gaussians: expected an integer from 1 to .*, got 1.5"),
        (lambda: Budget(), "steps: expected either steps or minutes, got None and None"),
        (lambda: Budget(3, 4.0), "steps: expected either steps or minutes, got 3 and 4.0"),
        (lambda: Budget(steps=-1), "steps: expected an integer of at least 0, got -1"),
        (lambda: Budget(minutes=0.0), "minutes: expected a positive number, got 0.0"),
        (lambda: gaussian_splatting.fit(steps=-1, output=None), "steps: expected an integer of at least 0, got -1"),
        (lambda: gaussian_splatting.fit(scale=0, output=None), "scale: expected an integer of at least 1, got 0"),
        (lambda: training.train("x", output="y", steps=1, device="tpu"), "device: expected 'cpu', or 'cuda' .*'tpu'"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_cameras_of_the_pair_agree_with_its_disparity():
    cameras = stereo.StereoCameras.at(2)
    disparity = torch.tensor([4.0, 20.0])
    points = cameras.back_project(torch.tensor([30.5, 200.5]), torch.tensor([7.5, 90.5]), disparity)
    left, depth = scenes.project(points, cameras.viewmats[0], cameras.Ks[0])
    right, _ = scenes.project(points, cameras.viewmats[1], cameras.Ks[1])
    assert torch.allclose(left, torch.tensor([[30.5, 7.5], [200.5, 90.5]]), atol=1e-3)
    assert torch.allclose(right, left - torch.tensor([[4.0, 0], [20.0, 0]]), atol=1e-3)
    # of the full picture: disparity 8 and 40
    assert depth.tolist() == pytest.approx([0.193001 * 994.978 / (d + 31.086) for d in (8, 40)], rel=1e-4)


def test_forward_warp_keeps_the_nearest_and_leaves_holes():
    disparity = torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0, math.nan]])
    left = torch.arange(8.0)[None, :, None].expand(1, 8, 3) + 1
    picture, found = stereo.forward_warp(left, disparity)
    assert picture[0, :, 0].tolist() == [1, 4, 5, 0, 0, 6, 7, 0]
    assert found[0].tolist() == [0, 2, 2, -1, -1, 0, 0, -1]
    warped, holes = stereo.warp_baseline(left, disparity)
    assert warped[0, :, 0].tolist() == [1, 4, 5, 5, 6, 6, 7, 7]
    assert holes[0].tolist() == [False] * 3 + [True] * 2 + [False] * 2 + [True]


def test_gaps_are_filled_from_behind():
    disparity = torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0, 0.0]]).repeat(3, 1)
    left = torch.zeros(3, 8, 3)
    left[:, 3:5] = 1  # a white bar in front of black
    rows, columns, behind, colours = stereo._guess_unseen(left, disparity)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [(r, c) for r in range(3) for c in (3, 4)]
    assert behind.tolist() == [0] * 6
    assert (colours < 0.5).all()


def test_unknown_disparity_takes_the_nearest():
    disparity = torch.tensor([[1.0, math.nan, math.nan, 5.0]])
    assert stereo.fill_disparity(disparity).tolist() == [[1, 1, 5, 5]]
    with pytest.raises(ValueError, match="disparity: expected some that are known, got none"):
        stereo.fill_disparity(torch.full((2, 2), math.nan))


@pytest.fixture(scope="module")
def small_pair():
    return stereo.at_scale(load_motorcycle(), 8)


@pytest.fixture
def tiny_motorcycle(monkeypatch, small_pair):
    """The pair at 92x62, whatever scale is asked for."""
    cameras = stereo.StereoCameras.at(8)
    monkeypatch.setattr(gaussian_splatting, "load_motorcycle", lambda: small_pair)
    monkeypatch.setattr(stereo.StereoCameras, "at", classmethod(lambda cls, scale: cameras))


def test_the_pair_beats_warping(tiny_motorcycle, tmp_path):
    reports = []
    result = gaussian_splatting.fit(steps=8, output=tmp_path / "new" / "folder", progress=reports.append)
    assert [report["step"] for report in reports] == list(range(1, 9))
    assert result["figures"]["psnr_right"] > result["baseline_warped_by_disparity"]["psnr_right"]
    assert result["figures"]["psnr_left"] > result["figures_before_fitting"]["psnr_right"]
    assert result["loss"]["last"] < result["loss"]["first"]
    assert 0 < result["share_unseen_by_left"] < 0.3
    assert json.loads((tmp_path / "new/folder/report.json").read_text()) == result
    for picture in result["pictures"]:
        assert (tmp_path / "new/folder" / picture["file"]).stat().st_size > 0
    again = gaussian_splatting.fit(steps=8, output=None)
    assert again["figures"] == result["figures"]
    assert again["pictures"] == []


def test_the_right_photograph_has_no_influence(tiny_motorcycle, monkeypatch, small_pair):
    before = gaussian_splatting.fit(steps=3, output=None)
    other = StereoPair(small_pair.left, 1 - small_pair.right, small_pair.disparity, small_pair.disparity_range)
    monkeypatch.setattr(gaussian_splatting, "load_motorcycle", lambda: other)
    after = gaussian_splatting.fit(steps=3, output=None)
    assert before["loss"] == after["loss"]
    assert before["figures"]["psnr_left"] == after["figures"]["psnr_left"]
    assert before["figures"]["psnr_right"] != after["figures"]["psnr_right"]


def test_interrupt_keeps_what_is_fitted(tiny_motorcycle):
    def interrupt(report):
        if report["step"] == 2:
            raise KeyboardInterrupt

    assert gaussian_splatting.fit(steps=50, output=None, progress=interrupt)["steps_done"] == 2


def test_one_picture(tmp_path):
    y, x = torch.meshgrid(torch.linspace(0, 1, 20), torch.linspace(0, 1, 30), indexing="ij")
    image = torch.stack([x, y, (3 * x + y).sin().abs()], dim=-1)
    reports = []
    start, _ = gaussian_splatting.fit_image(image, gaussians=60, steps=0)
    picture, params = gaussian_splatting.fit_image(image, gaussians=60, steps=60, progress=reports.append)
    assert picture.shape == image.shape
    assert basics.psnr(picture, image) > basics.psnr(start, image) + 5
    assert basics.psnr(picture, image) > 20
    assert len(params["means"]) == 60
    assert reports[-1]["step"] == 60
    again, _ = gaussian_splatting.fit_image(image, gaussians=60, steps=60)
    assert torch.equal(picture, again)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gaussian_splatting", *map(str, arguments)])
    gaussian_splatting.main()


def test_command_line_of_one_picture(monkeypatch, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    command(monkeypatch, "--image", tmp_path / "a.png", "--gaussians", 20, "--steps", 3, "--output", tmp_path / "o")
    assert "psnr" in capsys.readouterr().out
    assert json.loads((tmp_path / "o/result.json").read_text())["settings"]["gaussians"] == 20
    assert Image.open(tmp_path / "o/image.png").size == (32, 12)


def test_command_line_of_a_scene(monkeypatch, tmp_path, capsys, folder):
    scene = ("--data", folder, "--output", tmp_path, "--points", 50, "--sh-degree", 0)
    command(monkeypatch, *scene, "--steps", 3)
    command(monkeypatch, *scene, "--steps", 5, "--resume")
    assert "psnr_held_out" in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["steps_done"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "3"], "--minutes: expected --data with it"),
        (["--gaussians", "3"], "--gaussians: expected --image with it"),
        (["--image", "--scale", "2"], "--scale: expected neither --data nor --image with it"),
        (["--image", "--data", "x"], "--image: expected one of --data and --image, got both"),
        (["--image", "nowhere.png"], "image: expected a file, got 'nowhere.png'"),
        (["--data", "nowhere"], "data: expected a folder, got 'nowhere'"),
        (["--data", "nowhere", "--sh-degree", "9"], "sh_degree: expected an integer from 0 to 3, got 9"),
    ],
)
def test_bad_usage_is_named(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
