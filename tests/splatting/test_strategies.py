"""Densification: the edits move parameters, optimizers and statistics together; the strategies decide as documented."""

import itertools
import math

import pytest
import torch

from mpkernels.splatting.strategies import DefaultStrategy, MCMCStrategy, compute_relocation, edits
from mpkernels.splatting.strategies.relocation import binomials

SHAPES = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": (), "sh0": (1, 3), "shN": (3, 3)}
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "capturable state": lambda p: torch.optim.NAdam(p, lr=0.01),
    "one state tensor": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "no state": lambda p: torch.optim.SGD(p, lr=0.01),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussians(n, kind=torch.nn.ParameterDict, seed=0, **given):
    """Random parameters, with scales around e^-3 and opacities around a half."""
    rng = generator(seed)
    params = {name: torch.randn((n, *shape), generator=rng) for name, shape in SHAPES.items()}
    params["scales"] = params["scales"] * 0.3 - 3
    params |= {name: torch.as_tensor(value) for name, value in given.items()}
    return kind({name: torch.nn.Parameter(value) for name, value in params.items()})


def trained(params, optimizer="adam", steps=2):
    """Optimizers that have made steps, so that their state holds a different number for each row."""
    optimizers = {name: OPTIMIZERS[optimizer]([param]) for name, param in params.items()}
    for _ in range(steps):
        for name, param in params.items():
            param.grad = torch.arange(1.0, len(param) + 1).reshape(-1, *[1] * (param.dim() - 1)).expand_as(param)
            optimizers[name].step()
            param.grad = None
    return optimizers


def values(params):
    return {name: param.detach().clone() for name, param in params.items()}


def rows_of_state(optimizers, params, name):
    state = optimizers[name].state[params[name]]
    return {key: value.clone() for key, value in state.items() if key != "step" and value.dim() > 0}


def assert_consistent(params, optimizers, state=None):
    """Each optimizer holds its parameter, with state of as many rows, and can make a step."""
    sizes = {len(param) for param in params.values()}
    sizes |= {len(value) for value in (state or {}).values() if isinstance(value, torch.Tensor)}
    assert len(sizes) == 1
    for name, param in params.items():
        assert isinstance(param, torch.nn.Parameter)
        assert param.is_leaf
        (group,) = optimizers[name].param_groups
        assert group["params"][0] is param
        assert set(optimizers[name].state) <= {param}
        for key, value in optimizers[name].state[param].items():
            if key not in ("step", "mu_product") and isinstance(value, torch.Tensor):
                assert value.shape == param.shape
        before = param.detach().clone()
        param.grad = torch.ones_like(param)
        optimizers[name].step()
        param.grad = None
        assert len(param) == 0 or not torch.equal(before, param)


def assert_rows(params, old, rows, but=()):
    for name in old:
        if name not in but:
            torch.testing.assert_close(params[name].detach(), old[name][rows], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [dict, torch.nn.ParameterDict])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
class TestEdits:
    mask = torch.tensor([False, True, False, True, True])

    def test_duplicate(self, kind, optimizer):
        params = gaussians(5, kind)
        optimizers = trained(params, optimizer)
        old = values(params)
        moments = {name: rows_of_state(optimizers, params, name) for name in params}
        steps = {name: optimizers[name].state[params[name]].get("step") for name in params}
        state = {"grad2d": torch.arange(5.0), "scene_scale": 2.0, "none": None}
        edits.duplicate(params, optimizers, state, self.mask)
        rows = [0, 1, 2, 3, 4, 1, 3, 4]
        assert_rows(params, old, rows)
        assert state == {"grad2d": state["grad2d"], "scene_scale": 2.0, "none": None}
        assert state["grad2d"].tolist() == rows
        for name in params:
            assert optimizers[name].state[params[name]].get("step") is steps[name]
            for key, value in rows_of_state(optimizers, params, name).items():
                assert torch.equal(value[:5], moments[name][key])
                assert not value[5:].any()
        assert_consistent(params, optimizers, state)

    def test_remove(self, kind, optimizer):
        params = gaussians(5, kind)
        optimizers = trained(params, optimizer)
        old = values(params)
        moments = {name: rows_of_state(optimizers, params, name) for name in params}
        state = {"count": torch.arange(5.0)}
        edits.remove(params, optimizers, state, self.mask)
        assert_rows(params, old, [0, 2])
        assert state["count"].tolist() == [0, 2]
        for name in params:
            for key, value in rows_of_state(optimizers, params, name).items():
                assert torch.equal(value, moments[name][key][[0, 2]])
        assert_consistent(params, optimizers, state)

    def test_split(self, kind, optimizer):
        params = gaussians(5, kind)
        optimizers = trained(params, optimizer)
        old = values(params)
        moments = {name: rows_of_state(optimizers, params, name) for name in params}
        state = {"count": torch.arange(5.0)}
        edits.split(params, optimizers, state, self.mask, generator=generator())
        rows = [0, 2, 1, 3, 4, 1, 3, 4]
        assert_rows(params, old, rows, but=("means", "scales"))
        assert torch.equal(params["means"][:2], old["means"][[0, 2]])
        assert torch.equal(params["scales"][:2], old["scales"][[0, 2]])
        torch.testing.assert_close(params["scales"][2:].exp(), old["scales"][rows[2:]].exp() / 1.6)
        assert state["count"].tolist() == rows
        for name in params:
            for key, value in rows_of_state(optimizers, params, name).items():
                assert torch.equal(value[:2], moments[name][key][[0, 2]])
                assert not value[2:].any()
        assert_consistent(params, optimizers, state)

    def test_reset_opacities(self, kind, optimizer):
        params = gaussians(4, kind, opacities=[-9.0, -1.0, 0.0, 7.0])
        optimizers = trained(params, optimizer, steps=1)
        old = values(params)
        moments = rows_of_state(optimizers, params, "means")
        edits.reset_opacities(params, optimizers, {}, 0.01)
        opacities = torch.sigmoid(params["opacities"].detach())
        torch.testing.assert_close(opacities, torch.sigmoid(old["opacities"]).clamp(max=0.01))
        assert_rows(params, old, slice(None), but=("opacities",))
        assert not any(value.any() for value in rows_of_state(optimizers, params, "opacities").values())
        for key, value in rows_of_state(optimizers, params, "means").items():
            assert torch.equal(value, moments[key])
        assert_consistent(params, optimizers)

    def test_relocate(self, kind, optimizer):
        params = gaussians(5, kind, opacities=[-30.0, 0.5, -30.0, 2.0, -30.0])
        optimizers = trained(params, optimizer, steps=1)
        with torch.no_grad():
            params["opacities"].copy_(torch.tensor([-30.0, 0.5, -30.0, 2.0, -30.0]))
        old = values(params)
        moments = {name: rows_of_state(optimizers, params, name) for name in params}
        state = {"seen": torch.arange(1.0, 6)}
        dead = torch.tensor([True, False, True, False, True])
        assert edits.relocate(params, optimizers, state, dead, binomials(), generator=generator(3)) == 3
        onto = [next(i for i in (1, 3) if torch.equal(params["means"][row], old["means"][i])) for row in (0, 2, 4)]
        rows = [onto[0], 1, onto[1], 3, onto[2]]
        assert len({1, 3} & set(onto)) == 2  # this seed takes both
        assert_rows(params, old, rows, but=("scales", "opacities"))
        opacity, scale = compute_relocation(
            torch.sigmoid(old["opacities"])[rows],
            old["scales"].exp()[rows],
            torch.tensor([rows.count(row) for row in rows]),
            binomials(),
        )
        torch.testing.assert_close(torch.sigmoid(params["opacities"].detach()), opacity)
        torch.testing.assert_close(params["scales"].detach().exp(), scale)
        assert not state["seen"].any()
        for name in params:
            assert not any(value.any() for value in rows_of_state(optimizers, params, name).values())
            assert all(value.any() for value in moments[name].values())
        assert_consistent(params, optimizers, state)

    def test_sample_add(self, kind, optimizer):
        params = gaussians(3, kind, opacities=[-200.0, 0.5, -200.0])
        optimizers = trained(params, optimizer, steps=1)
        with torch.no_grad():
            params["opacities"].copy_(torch.tensor([-200.0, 0.5, -200.0]))
        old = values(params)
        moments = {name: rows_of_state(optimizers, params, name) for name in params}
        state = {"seen": torch.arange(1.0, 4)}
        assert edits.sample_add(params, optimizers, state, 2, binomials(), generator=generator()) == 2
        assert_rows(params, old, [0, 1, 2, 1, 1], but=("scales", "opacities"))
        opacity = 1 - (1 - torch.sigmoid(torch.tensor(0.5))) ** (1 / 3)
        torch.testing.assert_close(torch.sigmoid(params["opacities"].detach())[[1, 3, 4]], opacity.expand(3))
        assert torch.equal(params["scales"][[0, 2]], old["scales"][[0, 2]])
        assert torch.equal(params["scales"][[1, 1]], params["scales"][3:])
        assert state["seen"].tolist() == [1, 2, 3, 0, 0]
        for name in params:
            for key, value in rows_of_state(optimizers, params, name).items():
                assert torch.equal(value[:3], moments[name][key])
                assert not value[3:].any()
        assert_consistent(params, optimizers, state)


def test_optimizers_without_steps_and_frozen_parameters():
    params = gaussians(4)
    params["label"] = torch.nn.Parameter(torch.arange(4.0), requires_grad=False)
    optimizers = {name: torch.optim.Adam([param]) for name, param in params.items() if name != "label"}
    edits.duplicate(params, optimizers, {}, torch.tensor([True, False, False, False]))
    assert params["label"].tolist() == [0, 1, 2, 3, 0]
    assert not params["label"].requires_grad
    assert all(not optimizer.state for optimizer in optimizers.values())
    del optimizers["quats"]
    with pytest.raises(ValueError, match=r"optimizers.*'quats'.*requires_grad"):
        edits.remove(params, optimizers, {}, torch.zeros(5, dtype=torch.bool))


def test_step_counts_steps_even_where_there_are_as_many_rows():
    params = gaussians(1)
    optimizers = trained(params)
    for name, param in params.items():
        optimizers[name].state[param]["step"] = torch.tensor([2.0])
    edits.duplicate(params, optimizers, {}, torch.tensor([True]))
    assert all(optimizers[name].state[param]["step"].tolist() == [2.0] for name, param in params.items())


def covariance(quats, scales):
    """R S S^T R^T, from the matrix of a quaternion."""
    w, x, y, z = torch.nn.functional.normalize(quats.double(), dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    rotation = torch.stack([torch.stack(row, -1) for row in rows], -2)
    return rotation @ torch.diag_embed(scales.double() ** 2) @ rotation.mT


def test_halves_are_drawn_from_the_gaussian():
    n = 20_000
    one = gaussians(1, seed=4, scales=[[-1.0, 0.0, 0.7]])
    params = {
        name: torch.nn.Parameter(param.detach().repeat(n, *[1] * (param.dim() - 1))) for name, param in one.items()
    }
    optimizers = {name: torch.optim.SGD([param]) for name, param in params.items()}
    edits.split(params, optimizers, {}, torch.ones(n, dtype=torch.bool), generator=generator(7))
    offsets = (params["means"].detach() - one["means"].detach()).double()
    expected = covariance(one["quats"].detach(), one["scales"].detach().exp())[0]
    torch.testing.assert_close(offsets.T @ offsets / (2 * n), expected, rtol=0.05, atol=0.03)
    assert offsets.mean(0).abs().max() < 0.05
    assert not torch.allclose(offsets[:n], offsets[n:])


def test_noise_follows_covariance_and_opacity():
    n = 20_000
    one = gaussians(1, seed=5, scales=[[-1.0, 0.0, 0.3]], opacities=[math.log(0.01 / 0.99)])
    params = {
        name: torch.nn.Parameter(param.detach().repeat(n, *[1] * (param.dim() - 1))) for name, param in one.items()
    }
    means = params["means"]
    edits.add_noise(params, {}, {}, 2.0, generator=generator(8))
    assert params["means"] is means
    offsets = (means.detach() - one["means"].detach()).double()
    factor = 2.0 / (1 + math.exp(100 * (0.01 - 0.005)))
    matrix = covariance(one["quats"].detach(), one["scales"].detach().exp())[0] * factor
    torch.testing.assert_close(offsets.T @ offsets / n, matrix @ matrix.T, rtol=0.05, atol=0.02)


def test_revised_opacity_keeps_what_both_halves_hide():
    logits = torch.tensor([-40.0, -3.0, 0.0, 4.0, 30.0])
    params = gaussians(5, opacities=logits)
    optimizers = {name: torch.optim.SGD([param]) for name, param in params.items()}
    edits.split(params, optimizers, {}, torch.ones(5, dtype=torch.bool), revised_opacity=True)
    halves = params["opacities"].detach().double()
    expected = torch.nn.functional.logsigmoid(-logits.double()).repeat(2) / 2
    torch.testing.assert_close(torch.nn.functional.logsigmoid(-halves), expected, rtol=1e-5, atol=0)


class TestRelocation:
    @pytest.mark.parametrize("n", [1, 2, 3, 10, 51])
    @pytest.mark.parametrize("opacity", [1e-3, 0.3, 0.75, 0.999, 1 - 2**-24])
    def test_equation_9(self, n, opacity):
        got_opacity, got_scale = compute_relocation(
            torch.tensor([opacity]), torch.tensor([[0.5, 1.0, 2.0]]), torch.tensor([n]), binomials()
        )
        opacity = torch.tensor(opacity).item()
        new = 1 - (1 - opacity) ** (1 / n)
        terms = [
            math.comb(i - 1, k) * (-1) ** k / math.sqrt(k + 1) * new ** (k + 1)
            for i, k in itertools.product(range(1, n + 1), range(n))
            if k < i
        ]
        factor = opacity / math.fsum(terms)
        assert got_opacity.item() == pytest.approx(new, rel=1e-6)
        assert got_scale[0].tolist() == pytest.approx([0.5 * factor, factor, 2 * factor], rel=3e-7)

    def test_the_integral_along_a_ray_is_kept(self):
        """n Gaussians at one place, composited across a line through the mean, hide as much as the one before."""
        x = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
        for n, opacity in itertools.product((2, 5), (0.2, 0.9)):
            new, scale = compute_relocation(
                torch.tensor([opacity], dtype=torch.float64),
                torch.ones(1, 3, dtype=torch.float64),
                torch.tensor([n]),
                binomials(),
            )
            one = opacity * torch.exp(-x * x / 2)
            each = new * torch.exp(-x * x / (2 * scale[0, 0] ** 2))
            assert torch.trapezoid(1 - (1 - each) ** n, x).item() == pytest.approx(torch.trapezoid(one, x).item())

    def test_edges(self):
        ratios = torch.tensor([0, 1, 60, 3, 51])
        opacities = torch.tensor([0.5, 0.5, 0.5, 0.0, 1.0])
        new, scales = compute_relocation(opacities, torch.ones(5, 3), ratios, binomials())
        assert ratios.tolist() == [0, 1, 60, 3, 51]  # gsplat cuts them in place
        assert new[:2].tolist() == [0.5, 0.5]
        torch.testing.assert_close(new[2], 1 - torch.tensor(0.5) ** (1 / 51))
        torch.testing.assert_close(scales[[0, 1, 3]], torch.ones(3, 3))
        assert torch.isfinite(scales).all()
        assert new[4].item() == pytest.approx(1 - torch.finfo(torch.float64).eps ** (1 / 51))
        none, _ = compute_relocation(opacities[:0], torch.ones(0, 3), ratios[:0], binomials())
        assert none.shape == (0,)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"opacities": torch.ones(2, 1)}, ValueError, r"opacities.*\(N,\).*\(2, 1\)"),
            ({"scales": torch.ones(2)}, ValueError, r"scales.*\(2, 3\)"),
            ({"scales": torch.ones(2, 3).double()}, TypeError, "scales.*float32.*float64"),
            ({"ratios": torch.ones(3)}, ValueError, r"ratios.*\(2,\).*\(3,\)"),
            ({"binoms": torch.ones(3)}, ValueError, r"binoms.*n_max.*\(3,\)"),
        ],
    )
    def test_bad_input(self, changes, error, message):
        arguments = {
            "opacities": torch.ones(2), "scales": torch.ones(2, 3), "ratios": torch.ones(2), "binoms": binomials()
        }  # fmt: skip
        with pytest.raises(error, match=message):
            compute_relocation(**arguments | changes)


class TestSample:
    def test_in_proportion_and_never_of_weight_zero(self):
        weights = torch.tensor([0.0, 0.1, 0.0, 0.3, math.nan, 0.6, 0.0])
        drawn = edits.sample(weights, 50_000, generator())
        frequency = torch.bincount(drawn, minlength=7) / 50_000
        torch.testing.assert_close(frequency, weights.nan_to_num(0), rtol=0, atol=0.01)
        assert not frequency[[0, 2, 4, 6]].any()

    def test_same_bits_with_the_same_seed(self):
        weights = torch.rand(1000, generator=generator())
        assert torch.equal(edits.sample(weights, 100, generator(5)), edits.sample(weights, 100, generator(5)))
        torch.manual_seed(3)
        first = edits.sample(weights, 100)
        torch.manual_seed(3)
        assert torch.equal(first, edits.sample(weights, 100))

    def test_the_first_weight_is_not_drawn_if_it_is_0(self):
        assert edits.sample(torch.tensor([0.0, 2**-31, 0.0]), 5).tolist() == [1] * 5  # one unit, so the draw is 0

    def test_nothing_to_draw_from(self):
        assert edits.sample(torch.zeros(3), 2) is None
        assert edits.sample(torch.zeros(0), 2) is None


def rendered(n, cameras=2, packed=False, seed=0, hidden=()):
    """What rasterization says about itself, with gradients, as if there had been a backward."""
    rng = generator(seed)
    radii = torch.randint(1, 20, (cameras, n, 2), generator=rng, dtype=torch.int32)
    for camera, gaussian in hidden:
        radii[camera, gaussian] = 0
    means2d = torch.randn(cameras, n, 2, generator=rng)
    gradient = torch.randn(cameras, n, 2, generator=rng) * 1e-5
    ids = None
    if packed:
        seen = (radii > 0).all(-1)
        ids = seen.nonzero()[:, 1]
        radii, means2d, gradient = radii[seen], means2d[seen], gradient[seen]
    means2d = means2d.requires_grad_() * 1  # no leaf, as after a projection
    info = {
        "means2d": means2d, "radii": radii, "gaussian_ids": ids, "width": 64, "height": 48, "n_cameras": cameras
    }  # fmt: skip
    return info, gradient


def step(strategy, params, optimizers, state, number, info, gradient, **options):
    strategy.step_pre_backward(params, optimizers, state, number, info)
    (info["means2d"] * gradient).sum().backward()
    strategy.step_post_backward(params, optimizers, state, number, info, **options)


class TestDefaultStrategy:
    hidden = ((0, 1), (0, 3), (1, 3))

    def test_defaults_are_those_of_gsplat(self):
        expected = {
            "prune_opa": 0.005, "grow_grad2d": 0.0002, "grow_scale3d": 0.01, "grow_scale2d": 0.05, "prune_scale3d": 0.1,
            "prune_scale2d": 0.15, "refine_scale2d_stop_iter": 0, "refine_start_iter": 500, "refine_stop_iter": 15_000,
            "reset_every": 3000, "refine_every": 100, "pause_refine_after_reset": 0, "absgrad": False,
            "revised_opacity": False, "verbose": False, "key_for_gradient": "means2d",
        }  # fmt: skip
        strategy = DefaultStrategy(*expected.values())
        assert vars(strategy) == vars(DefaultStrategy())
        assert list(vars(strategy).items())[: len(expected)] == list(expected.items())

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("absgrad", [False, True])
    def test_statistics(self, packed, absgrad):
        params = gaussians(5)
        optimizers = trained(params)
        strategy = DefaultStrategy(refine_scale2d_stop_iter=10, absgrad=absgrad)
        state = strategy.initialize_state(2.0)
        assert state == {"grad2d": None, "count": None, "radii": None, "scene_scale": 2.0}
        total, count, largest = torch.zeros(5), torch.zeros(5), torch.zeros(5)
        for number in range(2):
            info, gradient = rendered(5, packed=packed, hidden=self.hidden, seed=number)
            dense, dense_gradient = rendered(5, hidden=self.hidden, seed=number)
            info["means2d"].absgrad = 3 * gradient
            step(strategy, params, optimizers, state, number, info, gradient, packed=packed)
            for camera, row in itertools.product(range(2), range(5)):
                if (camera, row) not in self.hidden:
                    dx, dy = (dense_gradient * (3 if absgrad else 1))[camera, row]
                    total[row] += math.hypot(dx * 32 * 2, dy * 24 * 2)
                    count[row] += 1
                    largest[row] = max(largest[row], dense["radii"][camera, row].max() / 64)
        torch.testing.assert_close(state["grad2d"], total)
        assert torch.equal(state["count"], count)
        assert count.tolist() == [4, 2, 4, 0, 4]
        torch.testing.assert_close(state["radii"], largest)

    @pytest.mark.parametrize("packed", [False, True])
    def test_a_gradient_of_what_is_not_seen_counts_nowhere(self, packed):
        params = gaussians(5)
        info, gradient = rendered(5, hidden=self.hidden)
        gradient[0, 1] = math.nan
        info["radii"][1, 0] = torch.tensor([4, 0])
        if packed:
            info |= {name: info[name].flatten(0, 1) for name in ("means2d", "radii")}
            info["gaussian_ids"] = torch.arange(5).repeat(2)
            gradient = gradient.flatten(0, 1)
        strategy = DefaultStrategy()
        state = strategy.initialize_state()
        step(strategy, params, trained(params), state, 0, info, gradient)
        assert torch.isfinite(state["grad2d"]).all()
        assert state["count"].tolist() == [1, 1, 2, 0, 2]

    def test_packed_is_recognised(self):
        params = gaussians(5)
        info, gradient = rendered(5, packed=True, hidden=self.hidden)
        state = DefaultStrategy().initialize_state()
        step(DefaultStrategy(), params, trained(params), state, 0, info, gradient)
        assert state["count"].tolist() == [2, 1, 2, 0, 2]

    def refined(self, strategy, number, opacities=None, scales=None, high=(), radii=None):
        """Six Gaussians after a step of refinement, in which the gradients of ``high`` are."""
        params = gaussians(6, opacities=[0.0] * 6 if opacities is None else opacities)
        with torch.no_grad():
            params["scales"][:] = math.log(0.001)
            for row, scale in (scales or {}).items():
                params["scales"][row, 1] = math.log(scale)
        params["sh0"].data[:] = torch.arange(6.0)[:, None, None]
        optimizers = trained(params, steps=0)
        state = strategy.initialize_state(scene_scale=2.0)
        info, gradient = rendered(6)
        gradient[:] = 0
        for row in high:
            gradient[:, row, 1] = 0.00021 / (24 * 2)
        if radii:
            info["radii"][:] = 1
            for row, radius in radii.items():
                info["radii"][0, row, 0] = radius
        step(strategy, params, optimizers, state, number, info, gradient)
        assert_consistent(params, optimizers, state)
        return params["sh0"][:, 0, 0].round().int().tolist(), params, state

    def test_small_ones_are_duplicated_and_large_ones_split(self):
        rows, params, state = self.refined(DefaultStrategy(), 600, scales={2: 0.021, 3: 0.019, 5: 0.5}, high=(2, 3))
        assert rows == [0, 1, 3, 4, 5, 3, 2, 2]
        assert not state["grad2d"].any()
        assert not state["count"].any()
        torch.testing.assert_close(
            params["scales"].detach()[-2:, 1].exp(), torch.full((2,), 0.021 / 1.6), rtol=0.02, atol=0
        )

    def test_gradients_below_the_threshold_change_nothing(self):
        rows, *_ = self.refined(DefaultStrategy(grow_grad2d=0.00022), 600, scales={2: 0.021}, high=(2, 3))
        assert rows == list(range(6))

    @pytest.mark.parametrize("number", [500, 601, 15_000, 50])
    def test_steps_without_refinement(self, number):
        rows, *_ = self.refined(DefaultStrategy(), number, opacities=[-9.0] * 6, high=(1,))
        assert rows == list(range(6))

    def test_pause_after_reset(self):
        strategy = DefaultStrategy(pause_refine_after_reset=201)
        assert self.refined(strategy, 3200, high=(1,))[0] == list(range(6))
        assert self.refined(strategy, 3300, high=(1,))[0] == [0, 1, 2, 3, 4, 5, 1]
        strategy.pause_refine_after_reset = 200
        assert self.refined(strategy, 3200, high=(1,))[0] == [0, 1, 2, 3, 4, 5, 1]

    def test_revised_opacity(self):
        for revised, opacity in ((False, 0.5), (True, 1 - math.sqrt(0.5))):
            _, params, _ = self.refined(DefaultStrategy(revised_opacity=revised), 600, scales={2: 0.021}, high=(2,))
            got = torch.sigmoid(params["opacities"].detach())[-2:]
            torch.testing.assert_close(got, torch.full((2,), opacity), rtol=0, atol=0.02)  # after a step of Adam

    def test_transparent_ones_go(self):
        logit = math.log(0.005 / 0.995)
        opacities = [logit - 0.01, logit + 0.01, 3.0, -20.0, math.nan, 0.0]
        assert self.refined(DefaultStrategy(), 600, opacities=opacities)[0] == [1, 2, 5]
        assert self.refined(DefaultStrategy(), 600, opacities=[-20.0] * 6)[0] == []

    def test_huge_ones_go_after_the_first_reset(self):
        scales = {1: 0.19, 4: 0.21}
        assert self.refined(DefaultStrategy(), 3000, scales=scales)[0] == [0, 1, 2, 3, 4, 5]
        assert self.refined(DefaultStrategy(), 3100, scales=scales)[0] == [0, 1, 2, 3, 5]

    def test_radii(self):
        strategy = DefaultStrategy(refine_scale2d_stop_iter=4000)
        radii = {1: 3, 2: 4, 5: 10}  # of 64 pixels: 0.047, 0.0625, 0.156
        assert self.refined(strategy, 600, radii=radii)[0] == [0, 1, 3, 4, 2, 5, 2, 5]
        assert self.refined(strategy, 3100, radii=radii)[0] == [0, 1, 3, 4, 2, 2]
        assert self.refined(strategy, 4000, radii=radii)[0] == [0, 1, 2, 3, 4, 5]

    def test_opacities_are_reset(self):
        for number, reset in ((3000, True), (6000, True), (0, False), (2900, False), (15_000, False)):
            _, params, _ = self.refined(DefaultStrategy(), number)
            assert (params["opacities"].max() < -3) == reset, number
        _, params, _ = self.refined(DefaultStrategy(reset_opacities=False), 3000)
        assert params["opacities"].max() > -1

    def test_same_bits_with_the_same_seed(self):
        runs = [
            self.refined(DefaultStrategy(generator=generator(seed)), 600, scales={2: 0.5}, high=(2,))[1]
            for seed in (0, 0, 1)
        ]
        assert torch.equal(runs[0]["means"], runs[1]["means"])
        assert not torch.equal(runs[0]["means"], runs[2]["means"])

    def test_verbose(self, capsys):
        self.refined(DefaultStrategy(verbose=True), 600, scales={2: 0.021}, high=(2, 3), opacities=[-9.0] + [0.0] * 5)
        assert capsys.readouterr().out == (
            "Step 600: 1 duplicated, 1 split: 8 Gaussians\nStep 600: 1 removed: 7 Gaussians\n"
        )

    def test_errors_say_what_is_missing(self):
        params = gaussians(5)
        optimizers = trained(params)
        strategy = DefaultStrategy()
        info, gradient = rendered(5)
        arguments = params, optimizers, strategy.initialize_state(), 0
        with pytest.raises(ValueError, match=r"means2d.*no \.grad.*step_pre_backward before loss\.backward"):
            strategy.step_post_backward(*arguments, info)
        with pytest.raises(ValueError, match=r"absgrad=True.*rasterize with absgrad=True"):
            DefaultStrategy(absgrad=True).step_post_backward(*arguments, info)
        with pytest.raises(ValueError, match=r"'means2d'.*third output"):
            strategy.step_pre_backward(*arguments, {})
        with pytest.raises(ValueError, match=r"'means2d'.*requires_grad"):
            strategy.step_pre_backward(*arguments, {"means2d": torch.zeros(2, 5, 2)})
        strategy.step_pre_backward(*arguments, info)
        (info["means2d"] * gradient).sum().backward()
        for name in ("width", "height", "n_cameras", "radii"):
            with pytest.raises(ValueError, match=f"'{name}'"):
                strategy.step_post_backward(*arguments, {key: info[key] for key in info if key != name})
        with pytest.raises(ValueError, match=r"gaussian_ids.*packed"):
            strategy.step_post_backward(*arguments, info, packed=True)
        with pytest.raises(ValueError, match=r"means2d.*6 Gaussians.*\(2, 5, 2\)"):
            strategy.step_post_backward(gaussians(6), *arguments[1:], info)
        state = {**strategy.initialize_state(), "grad2d": torch.zeros(7)}
        with pytest.raises(ValueError, match=r"state\['grad2d'\].*5 rows.*7.*initialize_state"):
            strategy.step_post_backward(params, optimizers, state, 0, info)


class TestMCMCStrategy:
    def test_defaults_are_those_of_gsplat(self):
        expected = {
            "cap_max": 1_000_000, "noise_lr": 5e5, "refine_start_iter": 500, "refine_stop_iter": 25_000,
            "refine_every": 100, "min_opacity": 0.005, "verbose": False,
        }  # fmt: skip
        assert vars(MCMCStrategy(*expected.values())) == vars(MCMCStrategy())
        assert list(vars(MCMCStrategy()).items())[: len(expected)] == list(expected.items())

    def refined(self, number, n=51, lr=0.0, seed=0, opacities=(-9.0, math.nan), **options):
        params = gaussians(n, seed=1)
        with torch.no_grad():
            params["opacities"][: len(opacities)] = torch.tensor(opacities)
        optimizers = trained(params, steps=0)
        strategy = MCMCStrategy(generator=generator(seed), **options)
        strategy.check_sanity(params, optimizers)
        state = strategy.initialize_state() | {"mine": torch.ones(n)}
        old = values(params)
        strategy.step_post_backward(params, optimizers, state, number, {}, lr=lr)
        assert state["binoms"].shape == (51, 51)  # as many rows as there are Gaussians, and none is edited
        new = values(params)
        assert_consistent(params, optimizers, {"mine": state["mine"]})
        return old, new, state

    def test_dead_ones_move_and_more_are_added(self):
        old, params, state = self.refined(600)
        assert len(params["means"]) == 53  # 1.05 * 51, rounded down
        assert all(torch.isfinite(value).all() for value in params.values())
        for row in (0, 1, 51, 52):  # each is now on top of one that was alive
            assert (old["sh0"] == params["sh0"][row]).all(-1).all(-1).nonzero().item() > 1
        assert state["mine"][:2].tolist() == [0, 0]
        assert state["mine"][51:].tolist() == [0, 0]

    def test_opacities_stay_between_the_least_and_1(self):
        old, params, _ = self.refined(600, min_opacity=0.3)
        opacities = torch.sigmoid(params["opacities"])
        assert (torch.sigmoid(old["opacities"]) < 0.3).sum() > 5
        assert opacities.min() >= 0.3 - 1e-6
        assert opacities.max() < 0.95
        _, params, _ = self.refined(600, n=2, opacities=(200.0, -9.0))
        assert torch.isfinite(params["opacities"]).all()
        _, params, _ = self.refined(600, n=100, opacities=(-4.9,) + (-200.0,) * 99)  # 0.0074, shared by many
        assert torch.sigmoid(params["opacities"]).min() == pytest.approx(0.005)

    @pytest.mark.parametrize("number", [500, 601, 25_000, 0])
    def test_steps_without_refinement(self, number):
        _, params, state = self.refined(number, opacities=(-9.0,))
        assert len(params["means"]) == 51
        assert state["mine"].all()

    def test_cap(self):
        assert len(self.refined(600, cap_max=52)[1]["means"]) == 52
        assert len(self.refined(600, cap_max=40)[1]["means"]) == 51

    def test_nothing_left_to_move_onto(self):
        _, params, _ = self.refined(600, n=3, opacities=(-200.0,) * 3)
        assert len(params["means"]) == 3

    def test_noise_in_each_step(self):
        for number in (0, 30_000):
            old, params, _ = self.refined(number, lr=1e-3, opacities=(-9.0,))
            assert (params["means"] - old["means"])[0].norm() > 0.1
        old, params, _ = self.refined(0, lr=0.0)
        assert torch.equal(params["means"], old["means"])

    def test_same_bits_with_the_same_seed(self):
        runs = [self.refined(600, lr=1e-3, seed=seed)[1] for seed in (0, 0, 1)]
        assert torch.equal(runs[0]["means"], runs[1]["means"])
        assert not torch.equal(runs[0]["means"], runs[2]["means"])

    def test_opacities_of_one_column(self):
        params = gaussians(40, opacities=torch.linspace(-9, 3, 40)[:, None])
        optimizers = trained(params, steps=0)
        strategy = MCMCStrategy(generator=generator())
        strategy.step_post_backward(params, optimizers, strategy.initialize_state(), 600, {}, lr=1e-3)
        assert params["opacities"].shape == (42, 1)

    def test_errors_say_what_is_missing(self):
        params = gaussians(3)
        with pytest.raises(ValueError, match=r"binoms.*initialize_state"):
            MCMCStrategy().step_post_backward(params, trained(params), {}, 0, {}, lr=0.1)
        del params["quats"]
        with pytest.raises(ValueError, match=r"params.*missing quats"):
            MCMCStrategy().step_post_backward(params, {}, {}, 0, {}, lr=0.1)

    def test_verbose(self, capsys):
        self.refined(600, verbose=True)
        assert capsys.readouterr().out == "Step 600: 2 moved, 2 added: 53 Gaussians\n"


@pytest.mark.parametrize("strategy", [DefaultStrategy(), MCMCStrategy()])
class TestSanity:
    def test_good(self, strategy):
        params = gaussians(3)
        strategy.check_sanity(params, trained(params))

    def test_bad(self, strategy):
        params = gaussians(3)
        optimizers = trained(params)
        with pytest.raises(ValueError, match=r"params.*missing means, quats"):
            strategy.check_sanity({k: v for k, v in params.items() if k not in ("means", "quats")}, optimizers)
        with pytest.raises(ValueError, match=r"optimizers.*missing \['quats'\]"):
            strategy.check_sanity(params, {k: v for k, v in optimizers.items() if k != "quats"})
        with pytest.raises(ValueError, match=r"optimizers.*without such a parameter \['exposure'\]"):
            strategy.check_sanity(params, optimizers | {"exposure": optimizers["quats"]})
        other = {**params, "sh0": torch.nn.Parameter(torch.zeros(4, 1, 3))}
        with pytest.raises(ValueError, match=r"params\['sh0'\].*3 rows.*\(4, 1, 3\)"):
            strategy.check_sanity(other, optimizers)
        groups = torch.optim.Adam([{"params": [params["quats"]]}, {"params": [torch.zeros(1)]}])
        with pytest.raises(ValueError, match=r"optimizers\['quats'\].*one parameter group.*2"):
            strategy.check_sanity(params, optimizers | {"quats": groups})
        with pytest.raises(ValueError, match=r"optimizers\['quats'\].*params\['quats'\] alone"):
            strategy.check_sanity(params, optimizers | {"quats": optimizers["means"]})
