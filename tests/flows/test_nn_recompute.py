"""Chains that rebuild their activations: the gradients of stored ones, less memory, and what they refuse."""

import copy

import pytest
import torch

from mpkernels.flows import nn
from mpkernels.flows.nn import recompute


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Network(torch.nn.Module):
    """A smooth network of images, that counts its runs; a context is a pair (tensor, {"scale": tensor})."""

    def __init__(self, inputs, outputs, hidden=8, dropout=0.0):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(inputs, hidden, 1), torch.nn.Tanh(), torch.nn.Dropout(dropout),
            torch.nn.Conv2d(hidden, hidden, 1), torch.nn.Tanh(), torch.nn.Conv2d(hidden, outputs, 1),
        )  # fmt: skip
        self.runs = []

    def forward(self, x, context=None):
        self.runs.append(torch.is_grad_enabled())
        if context is not None:
            first, rest = context
            x = x + first * rest["scale"][:, None, None, None]
        return self.layers(x)


def mixed(memory, every=None, dropout=0.0):
    """A chain with a step of every kind, some of them nested."""
    torch.manual_seed(0)
    inside = nn.Sequential(
        nn.GlowStep(4, Network(2, 4, dropout=dropout)),
        nn.Inverse(nn.Sequential(nn.AdditiveCoupling(Network(4, 4), mask="checkerboard"), nn.Reverse())),
    )
    chain = nn.Sequential(
        nn.ActNorm(4),
        nn.AffineCoupling(Network(4, 8, dropout=dropout), mask="checkerboard", parity=1),
        inside,
        nn.Squeeze(),
        nn.SplineCoupling(Network(8, 8 * 8), bins=3),
        nn.Inverse(nn.GlowStep(16, Network(8, 16, dropout=dropout))),
        nn.Unsqueeze(),
        nn.InvertibleConv1x1(4, plu=False),
        nn.AffineCoupling(Network(2, 4), parity=1, scale="exp"),
        memory=memory,
        checkpoint_every=every,
    ).double()
    chain(seeded(3, 4, 4, 4, dtype=torch.float64))
    return chain


def of_context(requires_grad):
    first = seeded(3, 1, 4, 4, seed=7, dtype=torch.float64).requires_grad_(requires_grad)
    return first, {"scale": seeded(3, seed=8, dtype=torch.float64).requires_grad_(requires_grad), "name": "a string"}


def gradients(chain, x, context=None, inverse=False, seed=0):
    """Results, and the gradients of inputs, context and parameters."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    chain.zero_grad(set_to_none=True)
    y, log_abs_det = chain.inverse(x, context) if inverse else chain(x, context)
    ((y * seeded(*y.shape, seed=1)).sum() + (log_abs_det * seeded(len(y), seed=2)).sum()).backward()
    found = [x.grad, *(p.grad for p in chain.parameters())]
    if context is not None:
        for tensor in (context[0], context[1]["scale"]):
            found.append(tensor.grad)
            tensor.grad = None
    return (y.detach(), log_abs_det.detach()), [None if g is None else g.clone() for g in found]


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("every", [None, 1, 3, 100])
def test_gradients_are_those_of_stored_activations(every, inverse):
    x, context = seeded(3, 4, 4, 4, seed=3, dtype=torch.float64), None
    expected = gradients(mixed("store"), x, context, inverse)
    chain = mixed("recompute", every)
    for _ in range(2):  # the first pass measures, the second one uses what was found
        results, found = gradients(chain, x, context, inverse)
        torch.testing.assert_close(results, expected[0], rtol=0, atol=1e-12)
        for got, wanted in zip(found, expected[1], strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


def test_a_context_that_is_a_nest_gets_its_gradients():
    x = seeded(3, 2, 4, 4, seed=3, dtype=torch.float64)

    def chain(memory):
        torch.manual_seed(0)
        return nn.Sequential(
            *[nn.GlowStep(2, Network(1, 2)) for _ in range(3)], memory=memory, checkpoint_every=2
        ).double()

    for needed in (True, False):
        expected, found = (gradients(chain(memory), x, of_context(needed)) for memory in ("store", "recompute"))
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-12)
        assert (found[1][-1] is None) is not needed
        for got, wanted in zip(found[1], expected[1], strict=True):
            assert (got is None) == (wanted is None)
            if got is not None:
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


def test_multiscale():
    x = seeded(2, 3, 8, 8, seed=3, dtype=torch.float64)

    def flow(memory):
        torch.manual_seed(0)
        levels = [[nn.Squeeze(), *[nn.GlowStep(c, Network(c // 2, c)) for _ in range(2)]] for c in (12, 24)]
        return nn.MultiScale(levels, memory=memory).double()

    expected = gradients(flow("store"), x)
    chain = flow("recompute")
    for _ in range(2):
        results, found = gradients(chain, x)
        torch.testing.assert_close(results, expected[0], rtol=0, atol=1e-12)
        for got, wanted in zip(found, expected[1], strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


def glow(levels, steps, memory, hidden, size, every=None):
    torch.manual_seed(0)
    made, channels = [], 3
    for _ in range(levels):
        channels *= 4
        made.append(
            [nn.Squeeze(), *[nn.GlowStep(channels, Network(channels // 2, channels, hidden)) for _ in range(steps)]]
        )
        channels //= 2
    flow = nn.MultiScale(made, memory=memory, checkpoint_every=every)
    flow(seeded(4, 3, size, size))  # sets ActNorm
    return flow


@pytest.mark.parametrize("every", [None, 1000], ids=["measured", "from the outputs alone"])
def test_32_glow_steps_in_float32(every):
    x = seeded(4, 3, 4, 4, seed=3)
    _, expected = gradients(glow(1, 32, "store", 16, 4), x)
    chain = glow(1, 32, "recompute", 16, 4, every)
    largest = max(g.abs().max() for g in expected)
    for _ in range(2):
        _, found = gradients(chain, x)
        assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) <= 1e-4 * largest
    assert len(chain.levels[0].drift()) == (33 if every is None else 0)


def peak(run):
    """The most bytes allocated at a time, beyond those at the start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_memory_is_at_most_a_quarter():
    # 3 levels of 8 steps: 0.15; of 32 steps: 0.11
    x = seeded(16, 3, 8, 8)

    def run(flow):
        y, log_abs_det = flow(x)
        (y.square().sum() - log_abs_det.sum()).backward()

    flows = {memory: glow(3, 8, memory, 32, 8) for memory in ("store", "recompute")}
    for flow in flows.values():
        run(flow)  # gradients exist already, and drift is measured
    peaks = {memory: peak(lambda flow=flow: run(flow)) for memory, flow in flows.items()}
    assert 0 < peaks["recompute"] <= peaks["store"] / 4, peaks


def test_a_network_runs_twice():
    chain = nn.Sequential(*[nn.GlowStep(4, Network(2, 4)) for _ in range(3)], memory="recompute")
    networks = [step.network for step in chain.transforms]
    for measured in (True, False, False):
        for network in networks:
            network.runs.clear()
        gradients(chain, seeded(2, 4, 3, 3))
        for network in networks:  # without gradients, with them, and where the drift is measured once more without
            assert network.runs == [False, True, False][: 3 if measured else 2]
    passes = chain._forward_plan.passes
    with torch.no_grad():
        chain(seeded(2, 4, 3, 3))
    chain.requires_grad_(False)(seeded(2, 4, 3, 3))
    assert all(len(network.runs) == 4 for network in networks)
    assert chain._forward_plan.passes == passes  # those without gradients do not count


def test_dropout_is_the_same_in_backward():
    x = seeded(3, 4, 4, 4, seed=3, dtype=torch.float64)
    for every in (1, 4, None):
        expected = gradients(mixed("store", dropout=0.3), x)
        chain = mixed("recompute", every, dropout=0.3)
        for _ in range(2):
            results, found = gradients(chain, x)
            torch.testing.assert_close(results, expected[0], rtol=0, atol=1e-12)
            for got, wanted in zip(found, expected[1], strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


def test_backward_leaves_the_random_numbers_alone():
    chain = mixed("recompute", 4, dropout=0.3)
    y, log_abs_det = chain(seeded(3, 4, 4, 4, dtype=torch.float64))
    before = torch.get_rng_state()
    (y.sum() + log_abs_det.sum()).backward()
    assert torch.equal(torch.get_rng_state(), before)


class Flat(nn.Transform):
    """Loses its input: most of it is rounded away."""

    def forward(self, inputs, context=None):
        return inputs * 1e-6 + 1, inputs.new_zeros(len(inputs))

    def inverse(self, inputs, context=None):
        return (inputs - 1) * 1e6, inputs.new_zeros(len(inputs))


def test_backward_does_not_set_actnorm():
    for layer in (nn.ActNorm(4), nn.GlowStep(4, Network(2, 4))):
        gradients(nn.Sequential(nn.Inverse(layer), memory="recompute"), 3 + seeded(5, 4, 2, 2))
        assert not any(bool(x) for name, x in layer.state_dict().items() if name.endswith("initialized"))


def test_what_drifts_is_kept():
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Reverse(), Flat(), nn.ActNorm(4), nn.Reverse(), memory="recompute").eval()
    x = seeded(5, 4)
    expected = gradients(nn.Sequential(*chain.transforms).eval(), x)
    for _ in range(3):
        _, found = gradients(chain, x)
        assert chain._forward_plan.kept == (False, True, False, False)
        for got, wanted in zip(found, expected[1], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert chain.drift()[1] > 1e-3 > chain.drift()[2]


def test_splines_keep_their_input():
    make = [lambda: nn.SplineCoupling(Network(2, 2 * 8), bins=3), lambda: nn.Inverse(mixed("store")[4]), nn.Reverse]
    chain = nn.Sequential(make[0](), make[2](), make[0](), memory="recompute", checkpoint_every=100)
    assert chain._forward_plan.next_pass([recompute.Step(t, False) for t in chain.transforms]) == (
        (True, False, True),
        False,
    )
    measured = nn.Sequential(make[0](), make[2](), memory="recompute")
    gradients(measured, seeded(2, 4, 2, 2))
    assert measured._forward_plan.kept == (True, False)


def test_drift_is_measured_now_and_then():
    chain = nn.Sequential(nn.ActNorm(4), memory="recompute")
    measured = [chain._forward_plan.next_pass([recompute.Step(chain[0], False)])[1]]
    chain._forward_plan.learn((False,), (0.0,))
    measured += [chain._forward_plan.next_pass([recompute.Step(chain[0], False)])[1] for _ in range(200)]
    assert [i for i, m in enumerate(measured) if m] == [0, 100, 200]


def test_parameters_gather_gradients_as_ever():
    shared = nn.AffineCoupling(Network(2, 4))
    frozen = nn.ActNorm(4).requires_grad_(False)
    chain = nn.Sequential(shared, nn.Reverse(), frozen, shared, memory="recompute")
    stored = nn.Sequential(*chain.transforms)
    x = seeded(2, 4, 3, 3)
    stored(x)
    _, expected = gradients(stored, x)
    seen = []
    weight = shared.network.layers[0].weight
    handle = weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    _, found = gradients(chain, x)
    handle.remove()
    for got, wanted in zip(found, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen, [weight.grad])
    chain(x)[0].sum().backward()  # a second backward adds
    assert not torch.allclose(weight.grad, seen[0])
    assert frozen.bias.grad is None


def test_half_types_are_kept_in_float32():
    chain = nn.Sequential(nn.AffineCoupling(Network(2, 4)), memory="recompute")
    x = seeded(2, 4, 3, 3).bfloat16().requires_grad_()
    y, log_abs_det = chain(x)
    assert (y.dtype, log_abs_det.dtype) == (torch.float32, torch.float32)
    (y.sum() + log_abs_det.sum()).backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_autocast_is_that_of_forward():
    torch.manual_seed(0)
    stored = nn.Sequential(*[nn.AffineCoupling(Network(2, 4), parity=i % 2) for i in range(3)])
    chain = nn.Sequential(*copy.deepcopy(stored).transforms, memory="recompute", checkpoint_every=2)
    found, dtypes = [], set()

    def record(layer, inputs, outputs):
        dtypes.add(outputs.dtype)

    for flow in (stored, chain):
        for layer in [m for m in flow.modules() if isinstance(m, torch.nn.Conv2d)]:
            layer.register_forward_hook(record)
        x = seeded(2, 4, 3, 3).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, log_abs_det = flow(x)
        (y.square().sum() + log_abs_det.sum()).backward()
        found.append([y.detach(), x.grad, *(p.grad for p in flow.parameters())])
    for got, wanted in zip(found[1], found[0], strict=True):
        assert (got - wanted).abs().max() <= 0.02 * wanted.abs().max()
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=0)
    assert dtypes == {torch.bfloat16}


def test_refused():
    x = seeded(2, 4, 3, 3).requires_grad_()
    chain = nn.Sequential(nn.AffineCoupling(Network(2, 4)), memory="recompute")
    with pytest.raises(RuntimeError, match=r"memory: .*create_graph.*'store'.*'recompute'"):
        torch.autograd.grad(chain(x)[0].sum(), x, create_graph=True)
    normalized = nn.AffineCoupling(torch.nn.Sequential(torch.nn.BatchNorm2d(2), Network(2, 4)))
    with pytest.raises(ValueError, match=r"memory: .*BatchNorm2d in training"):
        nn.Sequential(normalized, memory="recompute")(x)
    nn.Sequential(normalized, memory="recompute").eval()(x)[0].sum().backward()
    y = chain(x)[0].sum()
    with torch.no_grad():
        chain[0].network.layers[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with pytest.raises(ValueError, match=r"memory: .*'recompute'.*'discard'"):
        nn.Sequential(memory="discard")
    with pytest.raises(ValueError, match=r"checkpoint_every: .*0"):
        nn.Sequential(checkpoint_every=0)
    with pytest.raises(TypeError, match=r"transforms\[1\]: .*Linear"):
        nn.Sequential(nn.Reverse(), torch.nn.Linear(2, 2))


def test_without_steps_and_without_samples():
    chain = nn.Sequential(memory="recompute")
    x = seeded(2, 4).requires_grad_()
    y, log_abs_det = chain(x)
    (y.sum() + log_abs_det.sum()).backward()
    torch.testing.assert_close(x.grad, torch.ones(2, 4))
    chain = nn.Sequential(nn.AffineCoupling(Network(2, 4)), nn.Reverse(), memory="recompute")
    for _ in range(2):
        y, log_abs_det = chain(torch.zeros(0, 4, 3, 3, requires_grad=True))
        (y.sum() + log_abs_det.sum()).backward()
    assert chain[0].network.layers[0].weight.grad.abs().sum() == 0


def test_transforms_of_torch_func_store():
    chain = nn.Sequential(nn.AffineCoupling(Network(2, 4)), memory="recompute")
    x = seeded(2, 4, 3, 3)
    got = torch.func.grad(lambda x: chain(x)[0].square().sum())(x)
    leaf = x.clone().requires_grad_()
    chain(leaf)[0].square().sum().backward()
    torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=1e-4)
