"""What scripts written for gsplat 1.5.3 find by changing the import."""

import importlib
import inspect
import math
import sys

import plyfile
import pytest
import torch

import mpkernels.compat.gsplat as gsplat
from mpkernels import splatting
from mpkernels.compat.gsplat import (
    RollingShutterType,
    SelectiveAdam,
    distributed,
    export_splats,
    rasterization,
    utils,
)
from mpkernels.compat.gsplat.cuda import _wrapper
from mpkernels.compat.gsplat.strategy import ops
from mpkernels.splatting.ply import load_ply

# the arguments of gsplat 1.5.3, in order
SIGNATURES = {
    "rasterization": "means, quats, scales, opacities, colors, viewmats, Ks, width, height, near_plane=0.01, "
    "far_plane=10000000000.0, radius_clip=0.0, eps2d=0.3, sh_degree=None, packed=True, tile_size=16, backgrounds=None, "
    "render_mode='RGB', sparse_grad=False, absgrad=False, rasterize_mode='classic', channel_chunk=32, "
    "distributed=False, camera_model='pinhole', segmented=False, covars=None, with_ut=False, with_eval3d=False, "
    "radial_coeffs=None, tangential_coeffs=None, thin_prism_coeffs=None, ftheta_coeffs=None, "
    "rolling_shutter=<RollingShutterType.GLOBAL: 4>, viewmats_rs=None",
    "fully_fused_projection": "means, covars, quats, scales, viewmats, Ks, width, height, eps2d=0.3, near_plane=0.01, "
    "far_plane=10000000000.0, radius_clip=0.0, packed=False, sparse_grad=False, calc_compensations=False, "
    "camera_model='pinhole', opacities=None",
    "isect_tiles": "means2d, radii, depths, tile_size, tile_width, tile_height, sort=True, segmented=False, "
    "packed=False, n_images=None, image_ids=None, gaussian_ids=None",
    "isect_offset_encode": "isect_ids, n_images, tile_width, tile_height",
    "rasterize_to_pixels": "means2d, conics, colors, opacities, image_width, image_height, tile_size, isect_offsets, "
    "flatten_ids, backgrounds=None, masks=None, packed=False, absgrad=False",
    "spherical_harmonics": "degrees_to_use, dirs, coeffs, masks=None",
    "quat_scale_to_covar_preci": "quats, scales, compute_covar=True, compute_preci=True, triu=False",
    "proj": "means, covars, Ks, width, height, camera_model='pinhole'",
    "world_to_cam": "means, covars, viewmats",
    "accumulate": "means2d, conics, opacities, colors, gaussian_ids, pixel_ids, image_ids, image_width, image_height",
    "compute_relocation": "opacities, scales, ratios, binoms",
    "export_splats": "means, scales, quats, opacities, sh0, shN, format='ply', save_to=None",
    "cuda._wrapper.persp_proj": "means, covars, Ks, width, height",
    "cuda._wrapper.adam": "param, param_grad, exp_avg, exp_avg_sq, valid, lr, b1, b2, eps",
    "SelectiveAdam": "params, eps, betas",
    "SelectiveAdam.step": "self, visibility",
    "DefaultStrategy.initialize_state": "self, scene_scale=1.0",
    "DefaultStrategy.check_sanity": "self, params, optimizers",
    "DefaultStrategy.step_pre_backward": "self, params, optimizers, state, step, info",
    "DefaultStrategy.step_post_backward": "self, params, optimizers, state, step, info, packed=False",
    "MCMCStrategy.initialize_state": "self",
    "MCMCStrategy.step_post_backward": "self, params, optimizers, state, step, info, lr",
    "strategy.ops.duplicate": "params, optimizers, state, mask",
    "strategy.ops.split": "params, optimizers, state, mask, revised_opacity=False",
    "strategy.ops.remove": "params, optimizers, state, mask",
    "strategy.ops.reset_opa": "params, optimizers, state, value",
    "strategy.ops.relocate": "params, optimizers, state, mask, binoms, min_opacity=0.005",
    "strategy.ops.sample_add": "params, optimizers, state, n, binoms, min_opacity=0.005",
    "strategy.ops.inject_noise_to_position": "params, optimizers, state, scaler",
    "strategy.ops._update_param_with_optimizer": "param_fn, optimizer_fn, params, optimizers, names=None",
    "utils.save_ply": "splats, dir, colors=None",
    "utils.normalized_quat_to_rotmat": "quat",
    "utils.depth_to_points": "depths, camtoworlds, Ks, z_depth=True",
    "utils.depth_to_normal": "depths, camtoworlds, Ks, z_depth=True",
    "utils.get_projection_matrix": "znear, zfar, fovX, fovY, device='cuda'",
    "distributed.cli": "fn, args, verbose=False",
}

# where scripts import them from
PLACES = {
    "": "PngCompression DefaultStrategy MCMCStrategy Strategy rasterization rasterization_2dgs SelectiveAdam "
    "rasterization_inria_wrapper spherical_harmonics isect_offset_encode isect_tiles proj fully_fused_projection "
    "quat_scale_to_covar_preci rasterize_to_pixels world_to_cam accumulate rasterize_to_indices_in_range "
    "fully_fused_projection_2dgs rasterize_to_pixels_2dgs rasterize_to_indices_in_range_2dgs accumulate_2dgs "
    "rasterization_2dgs_inria_wrapper RollingShutterType fully_fused_projection_with_ut rasterize_to_pixels_eval3d "
    "export_splats __version__",
    ".rendering": "rasterization rasterization_2dgs rasterization_inria_wrapper rasterization_2dgs_inria_wrapper",
    ".strategy": "DefaultStrategy MCMCStrategy Strategy",
    ".strategy.base": "Strategy",
    ".strategy.default": "DefaultStrategy",
    ".strategy.mcmc": "MCMCStrategy",
    ".cuda._wrapper": "RollingShutterType UnscentedTransformParameters FThetaPolynomialType persp_proj adam "
    "FThetaCameraDistortionParameters world_to_cam spherical_harmonics quat_scale_to_covar_preci proj isect_tiles "
    "fully_fused_projection isect_offset_encode rasterize_to_pixels rasterize_to_pixels_eval3d "
    "rasterize_to_indices_in_range fully_fused_projection_with_ut fully_fused_projection_2dgs rasterize_to_pixels_2dgs",
    ".cuda._torch_impl": "accumulate",
    ".optimizers": "SelectiveAdam",
    ".optimizers.selective_adam": "SelectiveAdam",
    ".relocation": "compute_relocation",
    ".exporter": "export_splats",
    ".compression": "PngCompression",
    ".distributed": "cli",
    ".utils": "log_transform inverse_log_transform normalized_quat_to_rotmat",
    ".version": "__version__",
}


def find(path):
    found = gsplat
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(path):
    function = find(path)
    parameters = inspect.signature(function).parameters.values()
    parameters = [p for p in parameters if not (p.kind is p.KEYWORD_ONLY and p.name == "generator")]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    got = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    assert got == SIGNATURES[path]


@pytest.mark.parametrize("place", PLACES)
def test_names(place):
    module = importlib.import_module("mpkernels.compat.gsplat" + place)
    for name in PLACES[place].split():
        assert hasattr(module, name), name


def test_version():
    assert gsplat.__version__ == gsplat.gsplat_version == "1.5.3"
    assert set(PLACES[""].split()) <= set(gsplat.__all__)


@pytest.mark.parametrize(
    "name",
    [
        "PngCompression", "accumulate_2dgs", "fully_fused_projection_2dgs", "fully_fused_projection_with_ut",
        "rasterization_2dgs", "rasterization_2dgs_inria_wrapper", "rasterization_inria_wrapper",
        "rasterize_to_indices_in_range", "rasterize_to_indices_in_range_2dgs", "rasterize_to_pixels_2dgs",
        "rasterize_to_pixels_eval3d",
    ],
)  # fmt: skip
def test_what_is_not_supported_says_so(name):
    function = getattr(gsplat, name)
    assert function.__name__ == name
    with pytest.raises(NotImplementedError, match=rf"^{name}: .* is not supported"):
        function(1, two=2)


def readme(n=100):
    """The example in the documentation of gsplat's rasterization."""
    rng = torch.Generator().manual_seed(0)
    means = torch.randn((n, 3), generator=rng)
    quats = torch.randn((n, 4), generator=rng)
    scales = torch.rand((n, 3), generator=rng) * 0.1
    colors = torch.rand((n, 3), generator=rng)
    opacities = torch.rand((n,), generator=rng)
    viewmats = torch.eye(4)[None, :, :]
    Ks = torch.tensor([[300.0, 0.0, 150.0], [0.0, 300.0, 100.0], [0.0, 0.0, 1.0]])[None, :, :]
    return means, quats, scales, opacities, colors, viewmats, Ks, 300, 200


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the functions of mpkernels.splatting, which remember their arguments."""
    remembered = {}
    outputs = {
        "rasterization": ("colors", "alphas", {}),
        "project_gaussians": ("radii", "means2d", "depths", "conics", "compensations"),
        "rasterize": ("colors", "alphas"),
        "spherical_harmonics": "colors",
    }

    def stand_in(name, output):
        def function(*args, **kwargs):
            remembered[name] = (args, kwargs)
            return output

        monkeypatch.setattr(splatting, name, function, raising=False)

    for name, output in outputs.items():
        stand_in(name, output)
    monkeypatch.setattr(
        splatting,
        "quat_scale_to_covar",
        lambda quats, scales, *, inverse=False, triu=False: ("preci" if inverse else "covar", triu),
        raising=False,
    )
    remembered["replace"] = stand_in
    return remembered


class TestRasterization:
    def test_arguments(self, calls):
        example = readme()
        changed = {
            "near_plane": 0.1, "far_plane": 9.0, "radius_clip": 1.0, "eps2d": 0.2, "sh_degree": 2, "packed": False,
            "tile_size": 8, "backgrounds": torch.zeros(1, 3), "render_mode": "RGB+ED", "absgrad": True,
            "rasterize_mode": "antialiased", "camera_model": "ortho",
        }  # fmt: skip
        assert rasterization(*example, **changed, channel_chunk=8, segmented=True) == ("colors", "alphas", {})
        args, kwargs = calls["rasterization"]
        assert all(got is given for got, given in zip(args, example, strict=True))
        assert kwargs == {**changed, "covars": None}
        covars = torch.zeros(100, 3, 3)
        rasterization(*example, covars=covars)
        args, kwargs = calls["rasterization"]
        assert args[1:3] == (None, None)  # of quats, scales and covars gsplat takes the last
        assert kwargs["covars"] is covars
        assert kwargs["packed"] is True  # gsplat's default

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"sparse_grad": True}, "^sparse_grad: .*not supported"),
            ({"distributed": True}, "^distributed: .*several GPUs.*not supported"),
            ({"with_ut": True}, "^with_ut: .*unscented.*not supported"),
            ({"with_eval3d": True}, "^with_eval3d: .*not supported"),
            ({"radial_coeffs": torch.zeros(1, 4)}, "^radial_coeffs: .*distortion.*not supported"),
            ({"tangential_coeffs": torch.zeros(1, 2)}, "^tangential_coeffs: .*not supported"),
            ({"thin_prism_coeffs": torch.zeros(1, 4)}, "^thin_prism_coeffs: .*not supported"),
            ({"ftheta_coeffs": object()}, "^ftheta_coeffs: .*not supported"),
            ({"rolling_shutter": RollingShutterType.ROLLING_TOP_TO_BOTTOM}, "^rolling_shutter: .*not supported"),
            ({"viewmats_rs": torch.zeros(1, 4, 4)}, "^viewmats_rs: .*rolling shutter.*not supported"),
            ({"camera_model": "fisheye"}, "^camera_model: 'fisheye' is not supported.*'pinhole' and 'ortho'"),
            ({"camera_model": "ftheta"}, "^camera_model: 'ftheta' is not supported"),
        ],
    )
    def test_not_supported(self, calls, arguments, message):
        with pytest.raises(NotImplementedError, match=message):
            rasterization(*readme(), **arguments)
        assert "rasterization" not in calls

    def test_unknown_camera(self, calls):
        with pytest.raises(ValueError, match=r"camera_model: expected 'pinhole' or 'ortho', got 'panorama'"):
            rasterization(*readme(), camera_model="panorama")

    @pytest.mark.parametrize("packed", [True, False])
    def test_the_example_of_gsplat_runs(self, packed):
        colors, alphas, meta = rasterization(*readme(), packed=packed)
        assert colors.shape == (1, 200, 300, 3)
        assert alphas.shape == (1, 200, 300, 1)
        assert alphas.max() > 0.5
        names = {
            "batch_ids", "camera_ids", "gaussian_ids", "radii", "means2d", "depths", "conics", "opacities",
            "tile_width", "tile_height", "tiles_per_gauss", "isect_ids", "flatten_ids", "isect_offsets", "width",
            "height", "tile_size", "n_batches", "n_cameras",
        }  # fmt: skip
        assert names <= set(meta)

    @pytest.mark.parametrize("packed", [True, False])
    @pytest.mark.parametrize("absgrad", [True, False])
    def test_a_training_loop_of_gsplat_runs(self, packed, absgrad):
        means, quats, scales, opacities, colors, viewmats, Ks, width, height = readme(60)
        params = torch.nn.ParameterDict(
            {
                "means": means + torch.tensor([0.0, 0, 4]), "quats": quats, "scales": torch.log(scales + 0.01),
                "opacities": torch.logit(opacities.clamp(0.1, 0.9)), "colors": torch.logit(colors.clamp(0.1, 0.9)),
            }
        )  # fmt: skip
        optimizers = {name: torch.optim.Adam([param], lr=1e-2) for name, param in params.items()}
        strategy = gsplat.DefaultStrategy(refine_start_iter=0, refine_every=2, grow_grad2d=1e-9, absgrad=absgrad)
        strategy.check_sanity(params, optimizers)
        state = strategy.initialize_state()
        for step in range(4):
            image, _, info = rasterization(
                params["means"], params["quats"], torch.exp(params["scales"]), torch.sigmoid(params["opacities"]),
                torch.sigmoid(params["colors"]), viewmats, Ks / 8, width // 8, height // 8, packed=packed,
                absgrad=absgrad,
            )  # fmt: skip
            strategy.step_pre_backward(params, optimizers, state, step, info)
            ((image - 0.5) ** 2).mean().backward()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            strategy.step_post_backward(params, optimizers, state, step, info, packed=packed)
        assert len(params["means"]) > 60

    @pytest.mark.parametrize("packed", [True, False])
    def test_the_pieces_make_the_same_image(self, packed):
        means, quats, scales, opacities, colors, viewmats, Ks, width, height = readme()
        viewmats = torch.stack([viewmats[0], viewmats[0]])
        viewmats[1, 0, 3] = 0.5
        Ks = Ks.expand(2, 3, 3)
        expected, expected_alphas, _ = rasterization(
            means, quats, scales, opacities, colors, viewmats, Ks, width, height, packed=packed
        )
        outputs = gsplat.fully_fused_projection(
            means, None, quats, scales, viewmats, Ks, width, height, packed=packed, opacities=opacities
        )
        radii, means2d, depths, conics, compensations = outputs[-5:]
        assert compensations is None
        tile_width, tile_height = math.ceil(width / 16), math.ceil(height / 16)
        images = {}
        if packed:
            _, camera_ids, gaussian_ids = outputs[:3]
            images = {"packed": True, "n_images": 2, "image_ids": camera_ids, "gaussian_ids": gaussian_ids}
            colors, opacities = colors[gaussian_ids], opacities[gaussian_ids]
        else:
            colors, opacities = colors.expand(2, -1, -1), opacities.expand(2, -1)
        tiles, isect_ids, flatten_ids = gsplat.isect_tiles(
            means2d, radii, depths, 16, tile_width, tile_height, **images
        )
        assert tiles.sum() == len(isect_ids)
        offsets = gsplat.isect_offset_encode(isect_ids, 2, tile_width, tile_height)
        got, alphas = gsplat.rasterize_to_pixels(
            means2d, conics, colors, opacities, width, height, 16, offsets, flatten_ids, packed=packed
        )
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(alphas, expected_alphas)

        unsorted = gsplat.isect_tiles(means2d, radii, depths, 16, tile_width, tile_height, sort=False, **images)
        assert torch.equal(unsorted[2].sort().values, unsorted[2])
        assert torch.equal(unsorted[1].sort().values, isect_ids)

    def test_covariances_and_their_inverses(self):
        quats, scales = (x.double() for x in readme()[1:3])
        covars, precis = gsplat.quat_scale_to_covar_preci(quats, scales + 0.1)
        torch.testing.assert_close(covars @ precis, torch.eye(3).double().expand(100, 3, 3))
        triu, _ = gsplat.quat_scale_to_covar_preci(quats, scales + 0.1, compute_preci=False, triu=True)
        torch.testing.assert_close(triu, covars[:, [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]])

    def test_harmonics_of_degree_1(self):
        dirs, coeffs = readme()[0], torch.randn(100, 9, 3, generator=torch.Generator().manual_seed(0))
        got = gsplat.spherical_harmonics(1, dirs, coeffs, masks=torch.arange(100) > 2)
        x, y, z = torch.nn.functional.normalize(dirs, dim=-1)[..., None].unbind(1)
        expected = 0.28209479 * coeffs[:, 0] + 0.48860251 * (-y * coeffs[:, 1] + z * coeffs[:, 2] - x * coeffs[:, 3])
        torch.testing.assert_close(got[3:], expected[3:])
        assert not got[:3].any()


class TestPieces:
    def test_projection(self, calls):
        means, quats, scales, opacities, _, viewmats, Ks, width, height = readme()
        options = {"eps2d": 0.1, "near_plane": 1.0, "far_plane": 2.0, "radius_clip": 3.0, "camera_model": "ortho"}
        got = gsplat.fully_fused_projection(
            means, None, quats, scales, viewmats, Ks, width, height, **options, opacities=opacities, packed=True
        )
        assert got == ("radii", "means2d", "depths", "conics", None)
        args, kwargs = calls["project_gaussians"]
        assert all(a is b for a, b in zip(args, (means, quats, scales, viewmats, Ks, width, height), strict=True))
        assert kwargs == {**options, "covars": None, "opacities": opacities, "packed": True, "antialiased": False}
        covars = torch.zeros(100, 6)
        got = gsplat.fully_fused_projection(
            means, covars, quats, scales, viewmats, Ks, width, height, calc_compensations=True
        )
        assert got[-1] == "compensations"
        assert calls["project_gaussians"][0][1:3] == (None, None)
        assert calls["project_gaussians"][1]["covars"] is covars
        assert calls["project_gaussians"][1]["antialiased"] is True
        with pytest.raises(NotImplementedError, match=r"^sparse_grad"):
            gsplat.fully_fused_projection(means, covars, None, None, viewmats, Ks, 1, 1, packed=True, sparse_grad=True)
        with pytest.raises(NotImplementedError, match=r"^camera_model: 'fisheye'"):
            gsplat.fully_fused_projection(means, covars, None, None, viewmats, Ks, 1, 1, camera_model="fisheye")

    def test_covariances(self, calls):
        quats, scales = readme()[1:3]
        assert gsplat.quat_scale_to_covar_preci(quats, scales) == (("covar", False), ("preci", False))
        assert gsplat.quat_scale_to_covar_preci(quats, scales, triu=True, compute_preci=False) == (
            ("covar", True), None
        )  # fmt: skip
        assert gsplat.quat_scale_to_covar_preci(quats, scales, compute_covar=False) == (None, ("preci", False))

    def test_spherical_harmonics(self, calls):
        dirs, coeffs, masks = torch.zeros(5, 3), torch.zeros(5, 4, 3), torch.ones(5, dtype=torch.bool)
        assert gsplat.spherical_harmonics(1, dirs, coeffs, masks) == "colors"
        args, kwargs = calls["spherical_harmonics"]
        assert args == (1, dirs, coeffs)
        assert kwargs == {"masks": masks}

    def keys(self, images, tiles, depths, n_tiles):
        bits = torch.tensor(depths, dtype=torch.float32).view(torch.int32).long()
        return (torch.tensor(images) << (32 + n_tiles.bit_length())) | (torch.tensor(tiles) << 32) | bits

    def test_tiles(self, calls):
        keys = self.keys([0, 0, 0, 1], [0, 1, 1, 5], [2.0, 1.0, 2.0, 1.0], 6)
        calls["replace"]("intersect_tiles", ("tiles", keys, torch.tensor([1, 0, 1, 3], dtype=torch.int32), "offsets"))
        means2d, radii, depths = torch.zeros(2, 2, 2), torch.ones(2, 2, 2, dtype=torch.int32), torch.ones(2, 2)
        got = gsplat.isect_tiles(means2d, radii, depths, 16, 3, 2)
        args, kwargs = calls["intersect_tiles"]
        assert args[3:] == (48, 32)
        assert kwargs == {"tile_size": 16}
        assert got[0] == "tiles"
        assert torch.equal(got[1], keys)
        _, unsorted, ids = gsplat.isect_tiles(means2d, radii, depths, 16, 3, 2, sort=False)
        assert ids.tolist() == [0, 1, 1, 3]
        assert torch.equal(unsorted, keys[[1, 0, 2, 3]])
        packed = {"packed": True, "n_images": 2, "image_ids": torch.tensor([0, 0, 1, 1])}
        gsplat.isect_tiles(means2d[0], radii[0], depths[0], 16, 3, 2, **packed, gaussian_ids=torch.arange(4))
        assert calls["intersect_tiles"][1] == {
            "tile_size": 16, "n_images": 2, "image_ids": packed["image_ids"]
        }  # fmt: skip
        with pytest.raises(ValueError, match=r"image_ids, n_images.*packed=True"):
            gsplat.isect_tiles(means2d[0], radii[0], depths[0], 16, 3, 2, packed=True)

    def test_offsets(self):
        keys = self.keys([0, 0, 0, 2, 2], [0, 1, 1, 3, 5], [2.0, 1.0, 2.0, 1.0, 1.0], 6)
        offsets = gsplat.isect_offset_encode(keys, 3, 3, 2)
        assert offsets.tolist() == [[[0, 1, 3], [3, 3, 3]], [[3, 3, 3], [3, 3, 3]], [[3, 3, 3], [3, 4, 4]]]
        keys = self.keys([0, 1, 1], [3, 0, 2], [1.0, 1.0, 1.0], 4)
        assert gsplat.isect_offset_encode(keys, 2, 2, 2).tolist() == [[[0, 0], [0, 0]], [[1, 2], [2, 3]]]
        assert gsplat.isect_offset_encode(keys[:0], 1, 2, 2).tolist() == [[[0, 0], [0, 0]]]
        with pytest.raises(TypeError, match=r"isect_ids.*int64.*int32"):
            gsplat.isect_offset_encode(keys.int(), 3, 3, 2)

    def test_pixels(self, calls):
        tensors = [torch.zeros(2, 5, size) for size in (2, 3, 4)]
        opacities, offsets = torch.zeros(2, 5), torch.zeros(2, 3, 4, dtype=torch.int32)
        ids, backgrounds, masks = torch.zeros(0, dtype=torch.int32), torch.zeros(2, 4), offsets.bool()
        got = gsplat.rasterize_to_pixels(
            *tensors, opacities, 33, 48, 16, offsets, ids, backgrounds, masks, absgrad=True
        )  # fmt: skip
        assert got == ("colors", "alphas")
        args, kwargs = calls["rasterize"]
        assert [id(a) for a in args[:4]] == [id(a) for a in (*tensors, opacities)]
        assert args[4:6] == (33, 48)
        assert args[6].dtype == torch.int64
        assert args[7] is ids
        assert kwargs == {"tile_size": 16, "backgrounds": backgrounds, "masks": masks, "absgrad": True}
        with pytest.raises(ValueError, match=r"isect_offsets.*\(4, 4\) tiles of 16.*50 x 49.*\(3, 4\)"):
            gsplat.rasterize_to_pixels(*tensors, opacities, 50, 49, 16, offsets, ids)
        with pytest.raises(ValueError, match=r"means2d.*\(nnz, 2\).*\(2, 5, 2\)"):
            gsplat.rasterize_to_pixels(*tensors, opacities, 33, 48, 16, offsets, ids, packed=True)

    def test_world_to_cam(self):
        rng = torch.Generator().manual_seed(0)
        means = torch.randn(2, 5, 3, generator=rng, dtype=torch.float64)
        root = torch.randn(2, 5, 3, 3, generator=rng, dtype=torch.float64)
        rotation = torch.linalg.qr(torch.randn(2, 4, 3, 3, generator=rng, dtype=torch.float64)).Q
        viewmats = torch.eye(4, dtype=torch.float64).repeat(2, 4, 1, 1)
        viewmats[..., :3, :3], viewmats[..., :3, 3] = rotation, torch.randn(2, 4, 3, generator=rng).double()
        got_means, got_covars = gsplat.world_to_cam(means, root @ root.mT, viewmats)
        homogeneous = torch.nn.functional.pad(means, (0, 1), value=1)
        torch.testing.assert_close(got_means, torch.einsum("bcij,bnj->bcni", viewmats, homogeneous)[..., :3])
        moved = torch.einsum("bcij,bnjk->bcnik", rotation, root)
        torch.testing.assert_close(got_covars, moved @ moved.mT)
        with pytest.raises(ValueError, match=r"covars.*\(2, 5, 3, 3\).*\(2, 5, 6\)"):
            gsplat.world_to_cam(means, torch.zeros(2, 5, 6), viewmats)

    @pytest.mark.parametrize("camera_model", ["pinhole", "ortho"])
    def test_proj(self, camera_model):
        """Inside of the image, by the Jacobian that autograd finds."""
        rng = torch.Generator().manual_seed(0)
        means = torch.randn(2, 6, 3, generator=rng, dtype=torch.float64) * 0.2 + torch.tensor([0.0, 0, 4])
        root = torch.randn(2, 6, 3, 3, generator=rng, dtype=torch.float64)
        Ks = torch.tensor([[[30.0, 0, 20], [0, 35, 15], [0, 0, 1]], [[20.0, 0, 25], [0, 25, 10], [0, 0, 1]]]).double()
        means2d, covars2d = gsplat.proj(means, root @ root.mT, Ks, 40, 30, camera_model)
        for camera in range(2):
            for i in range(6):

                def project(x, k=Ks[camera]):
                    y = k @ x if camera_model == "pinhole" else k @ torch.cat([x[:2], x.new_ones(1)])
                    return y[:2] / y[2]

                jacobian = torch.autograd.functional.jacobian(project, means[camera, i]) @ root[camera, i]
                torch.testing.assert_close(means2d[camera, i], project(means[camera, i]))
                torch.testing.assert_close(covars2d[camera, i], jacobian @ jacobian.mT)

    def test_proj_cuts_the_jacobian_outside(self):
        """At 0.3 tan(half the view) beyond the image's edges, whose centre is not in the middle."""
        Ks = torch.tensor([[[10.0, 0, 4], [0, 20, 6], [0, 0, 1]]]).double()
        means = torch.tensor([[[9.0, 1, 2], [-9, 1, 2], [1, 9, 2], [1, -9, 2]]]).double()
        _, covars = gsplat.proj(means, torch.eye(3).double().expand(1, 4, 3, 3), Ks, 20, 10)
        tan_x, tan_y = 20 / 20, 10 / 40
        slopes = [(16 / 10 + 0.3 * tan_x, 0.5), (-4 / 10 - 0.3 * tan_x, 0.5), (0.5, 0.2 + 0.3 * tan_y)]
        slopes.append((0.5, -0.3 - 0.3 * tan_y))
        for i, (x, y) in enumerate(slopes):
            y = min(max(y, -0.3 - 0.3 * tan_y), 0.2 + 0.3 * tan_y)
            jacobian = torch.tensor([[5.0, 0, -5 * x], [0, 10, -10 * y]]).double()
            torch.testing.assert_close(covars[0, i], jacobian @ jacobian.mT)
        assert torch.equal(_wrapper.persp_proj(means, covars.new_ones(1, 4, 3, 3), Ks, 20, 10)[0], _)

    def test_accumulate(self):
        rng = torch.Generator().manual_seed(0)
        images, n, width, height = 2, 4, 3, 2
        means2d = torch.rand(images, n, 2, generator=rng, dtype=torch.float64) * 3
        means2d[1, 2] = 1.5  # the centre of pixel 4, where its opacity of 1 is cut
        conics = torch.tensor([0.5, 0.1, 0.7]).double() * torch.rand(images, n, 1, generator=rng).double()
        opacities = torch.tensor([[0.3, 0.9, 1.0, 1.0]]).double().expand(images, n).contiguous()
        colors = torch.rand(images, n, 5, generator=rng, dtype=torch.float64)
        pairs = [(i, p, g) for p in (0, 4, 5) for g in (2, 0, 3) for i in (1, 0) if (i, p) != (0, 4)]
        image_ids, pixel_ids, gaussian_ids = torch.tensor(pairs).T
        tensors = [x.requires_grad_() for x in (means2d, conics, opacities, colors)]
        got, alphas = gsplat.accumulate(*tensors, gaussian_ids, pixel_ids, image_ids, width, height)
        expected = [torch.zeros(5).double() for _ in range(images * height * width)]
        through = [torch.ones(()).double() for _ in expected]
        for i, p, g in pairs:
            x, y = p % width + 0.5 - means2d[i, g, 0], p // width + 0.5 - means2d[i, g, 1]
            a, b, c = conics[i, g]
            alpha = (opacities[i, g] * torch.exp(-(a * x * x + 2 * b * x * y + c * y * y) / 2)).clamp(max=0.999)
            at = i * height * width + p
            expected[at] = expected[at] + through[at] * alpha * colors[i, g]
            through[at] = through[at] * (1 - alpha)
        expected = torch.stack(expected).reshape(images, height, width, 5)
        through = torch.stack(through).reshape(images, height, width)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(alphas, 1 - through[..., None])
        weights = torch.rand(got.shape, generator=rng)
        for one, other in zip(
            torch.autograd.grad((got * weights).sum(), tensors),
            torch.autograd.grad((expected * weights).sum(), tensors),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


class TestSelectiveAdam:
    def test_steps(self):
        """Against the formula; rows that are not seen keep their state, and nothing is corrected for bias."""
        rng = torch.Generator().manual_seed(0)
        param = torch.randn(4, 2, 3, generator=rng).requires_grad_()
        optimizer = SelectiveAdam([{"params": [param], "lr": 0.1, "name": "sh0"}], eps=1e-8, betas=(0.9, 0.99))
        expected, first, second = param.detach().clone(), torch.zeros(4, 2, 3), torch.zeros(4, 2, 3)
        for seen in ([1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]):
            param.grad = torch.randn(4, 2, 3, generator=rng)
            for row in range(4):
                if seen[row]:
                    first[row] = 0.9 * first[row] + 0.1 * param.grad[row]
                    second[row] = 0.99 * second[row] + 0.01 * param.grad[row] ** 2
                    expected[row] -= 0.1 * first[row] / (second[row].sqrt() + 1e-8)
            optimizer.step(visibility=torch.tensor(seen, dtype=torch.float32))
            torch.testing.assert_close(param.detach(), expected)
        torch.testing.assert_close(optimizer.state[param]["exp_avg"], first)
        torch.testing.assert_close(optimizer.state[param]["exp_avg_sq"], second)

    def test_of_strategies(self):
        """Its state is edited with the Gaussians."""
        param = torch.nn.Parameter(torch.randn(3, 3))
        params = {"means": param}
        optimizers = {"means": SelectiveAdam([param], eps=1e-8, betas=(0.9, 0.99))}
        param.grad = torch.ones(3, 3)
        optimizers["means"].step(torch.ones(3, dtype=torch.bool))
        ops.duplicate(params, optimizers, {}, torch.tensor([True, False, False]))
        params["means"].grad = torch.ones(4, 3)
        optimizers["means"].step(torch.ones(4, dtype=torch.bool))
        assert optimizers["means"].state[params["means"]]["exp_avg"].shape == (4, 3)

    def test_errors(self):
        param, other = (torch.zeros(3, requires_grad=True) for _ in range(2))
        optimizer = SelectiveAdam([param], eps=1e-8, betas=(0.9, 0.99))
        optimizer.step(torch.ones(2))  # no gradient, no step
        param.grad = torch.ones(3)
        with pytest.raises(ValueError, match=r"visibility: expected 3 elements.*\(2,\)"):
            optimizer.step(torch.ones(2))
        with pytest.raises(ValueError, match=r"params: expected groups of one parameter each, got 2"):
            SelectiveAdam([param, other], eps=1e-8, betas=(0.9, 0.99)).step(torch.ones(3))

    def test_adam(self):
        param, first, second = torch.ones(2), torch.zeros(2), torch.zeros(2)
        _wrapper.adam(param, torch.ones(2), first, second, None, 0.5, 0.0, 0.0, 0.0)
        assert param.tolist() == [0.5, 0.5]
        with pytest.raises(ValueError, match=r"valid: expected shape \(2,\).*\(3,\)"):
            _wrapper.adam(param, torch.ones(2), first, second, torch.ones(3), 0.5, 0.0, 0.0, 0.0)


def splats(n=5, k=4):
    rng = torch.Generator().manual_seed(0)
    shapes = {
        "means": (n, 3), "scales": (n, 3), "quats": (n, 4), "opacities": (n,), "sh0": (n, 1, 3), "shN": (n, k - 1, 3)
    }  # fmt: skip
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


class TestFiles:
    def test_export(self, tmp_path):
        given = splats()
        data = export_splats(*given.values(), save_to=str(tmp_path / "a.ply"))
        assert (tmp_path / "a.ply").read_bytes() == data
        for name, value in load_ply(tmp_path / "a.ply").items():
            assert torch.equal(value, given[name])
        assert export_splats(**given) == data
        given["means"][1, 1] = math.nan
        with pytest.warns(UserWarning, match=r"1 of 5 Gaussians are left out") as record:
            export_splats(**given)
        assert record[0].filename == __file__
        for name in ("splat", "ply_compressed"):
            with pytest.raises(NotImplementedError, match=rf"^format: '{name}' is not supported.*'ply'"):
                export_splats(**given, format=name)
        with pytest.raises(ValueError, match=r"^format: expected 'ply', got 'glb'"):
            export_splats(**given, format="glb")

    def test_save_ply(self, tmp_path):
        given = splats()
        utils.save_ply(torch.nn.ParameterDict(given), tmp_path / "a.ply")
        assert torch.equal(load_ply(tmp_path / "a.ply")["shN"], given["shN"])
        colors = torch.rand(5, 3)
        utils.save_ply(given, tmp_path / "b.ply", colors)
        got = load_ply(tmp_path / "b.ply")
        torch.testing.assert_close(0.5 + got["sh0"][:, 0] * math.sqrt(1 / (4 * math.pi)), colors)
        assert got["shN"].shape == (5, 0, 3)
        assert "f_rest_0" not in plyfile.PlyData.read(str(tmp_path / "b.ply"))["vertex"]


class TestUtils:
    def test_rotations(self):
        quats = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        matrices = utils.normalized_quat_to_rotmat(torch.nn.functional.normalize(quats, dim=-1))
        torch.testing.assert_close(matrices @ matrices.mT, torch.eye(3).double().expand(6, 3, 3))
        w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
        torch.testing.assert_close(matrices[:, 0, 0], 1 - 2 * (y * y + z * z))
        torch.testing.assert_close(matrices[:, 1, 0], 2 * (x * y + w * z))
        torch.testing.assert_close(matrices[:, 1, 2], 2 * (y * z - w * x))

    def test_logarithms(self):
        x = torch.linspace(-9, 9, 19, dtype=torch.float64)
        torch.testing.assert_close(utils.inverse_log_transform(utils.log_transform(x)), x)
        assert utils.log_transform(torch.tensor(-1.0)).item() == pytest.approx(-math.log(2))

    @pytest.mark.parametrize("z_depth", [True, False])
    def test_points_and_normals_of_a_plane(self, z_depth):
        """A plane n x = d, seen by two cameras, from its depth."""
        rng = torch.Generator().manual_seed(0)
        normal = torch.nn.functional.normalize(torch.tensor([0.2, -0.3, -1.0]).double(), dim=0)
        Ks = torch.tensor([[9.0, 0, 4], [0, 8, 3], [0, 0, 1]]).double().expand(2, 3, 3)
        camtoworlds = torch.eye(4).double().repeat(2, 1, 1)
        camtoworlds[:, :3, 3] = torch.randn(2, 3, generator=rng).double() * 0.1
        camtoworlds[1, :3, :3] = utils.normalized_quat_to_rotmat(torch.tensor([0.995, 0.05, 0.05, 0.07]).double())
        x, y = torch.meshgrid((torch.arange(8) - 3.5) / 9, (torch.arange(6) - 2.5) / 8, indexing="xy")
        rays = torch.stack([x, y, torch.ones_like(x)], -1).double() @ camtoworlds[:, None, :3, :3].mT
        if not z_depth:
            rays = torch.nn.functional.normalize(rays, dim=-1)
        depths = (-4 - camtoworlds[:, :3, 3] @ normal)[:, None, None] / (rays @ normal)
        points = utils.depth_to_points(depths[..., None], camtoworlds, Ks, z_depth)
        torch.testing.assert_close(points @ normal, torch.full((2, 6, 8), -4.0).double())
        torch.testing.assert_close(points, camtoworlds[:, None, None, :3, 3] + depths[..., None] * rays)
        normals = utils.depth_to_normal(depths[..., None], camtoworlds, Ks, z_depth)
        torch.testing.assert_close(normals[:, 1:-1, 1:-1], normal.expand(2, 4, 6, 3))
        assert not normals[:, 0].any()
        assert not normals[:, :, -1].any()
        with pytest.raises(ValueError, match=r"depths.*\(..., H, W, 1\).*\(2, 6, 8\)"):
            utils.depth_to_points(depths, camtoworlds, Ks)

    def test_projection_matrix(self):
        matrix = utils.get_projection_matrix(0.5, 9.0, 1.0, 0.8, device="cpu")
        for x, y, z, expected in ((0, 0, 0.5, (0, 0, 0)), (math.tan(0.5) * 9, -math.tan(0.4) * 9, 9, (1, -1, 1))):
            point = matrix @ torch.tensor([x, y, z, 1.0])
            torch.testing.assert_close(point[:3] / point[3], torch.tensor(expected).float())


class TestDistributed:
    def test_one_process(self, monkeypatch):
        monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        seen = []
        assert distributed.cli(lambda *given: seen.append(given), {"a": 1}, verbose=True)
        assert seen == [(0, 0, 1, {"a": 1})]

    def test_several(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(NotImplementedError, match=r"several GPUs.*CUDA_VISIBLE_DEVICES"):
            distributed.cli(print, None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
        with pytest.raises(NotImplementedError, match=r"several GPUs"):
            distributed.cli(print, None)


def test_strategies_that_others_wrote():
    """They take gsplat's private helper."""
    params = {"means": torch.nn.Parameter(torch.zeros(3, 3)), "label": torch.zeros(3)}
    optimizers = {"means": torch.optim.Adam([params["means"]])}
    params["means"].grad = torch.ones(3, 3)
    optimizers["means"].step()
    step = optimizers["means"].state[params["means"]]["step"]
    ops._update_param_with_optimizer(
        lambda name, p: torch.nn.Parameter(p[:2], requires_grad=p.requires_grad),
        lambda key, value: value[:2] * 2,
        params,
        optimizers,
    )
    assert len(params["label"]) == len(params["means"]) == 2
    assert optimizers["means"].param_groups[0]["params"][0] is params["means"]
    state = optimizers["means"].state[params["means"]]
    assert state["step"] is step
    torch.testing.assert_close(state["exp_avg"], torch.full((2, 3), 0.2))
    with pytest.raises(ValueError, match=r"optimizers.*'means'.*requires_grad"):
        ops._update_param_with_optimizer(lambda name, p: p, lambda key, value: value, params, {}, ["means"])


def test_importing_needs_no_plyfile_and_no_gsplat():
    assert "gsplat" not in sys.modules
    assert gsplat.__name__ == "mpkernels.compat.gsplat"
