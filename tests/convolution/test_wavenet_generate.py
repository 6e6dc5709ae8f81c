"""What WaveNet's sample loop promises, on every backend."""

import importlib
import math
from typing import Any

import pytest
import torch

from mpkernels import convolution, spec
from mpkernels.convolution import (
    GenerationInterrupted,
    PackedWaveNet,
    WaveNetWeights,
    dilated_conv1d,
    gated_residual_layer,
    mulaw_decode,
    mulaw_encode,
    pack_wavenet,
    wavenet_generate,
    wavenet_sample,
)
from mpkernels.convolution.wavenet_generate.spec import eager_cached, random_network, recomputed
from mpkernels.philox import philox
from mpkernels.testing.properties import OpProperties

API = importlib.import_module("mpkernels.convolution.wavenet_generate.api")


def network_of(dtype=torch.float32, seed=0, device="cpu", **shape) -> WaveNetWeights:
    network = random_network(dtype, torch.Generator().manual_seed(seed), **shape)

    def move(weights):
        moved = {name: x.to(device) for name, x in weights._asdict().items() if isinstance(x, torch.Tensor)}
        return weights._replace(**moved)

    return move(network)._replace(layers=[move(layer) for layer in network.layers])


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def logits_of_layers(packed: PackedWaveNet, samples, condition, offsets):
    """Logits (B, O) of the next sample, by the public ops of the layers on the CPU."""
    network, wide = packed.network, packed.offsets.dtype

    def matrix(x):
        return x.to(wide)

    def pointwise(x, weight, bias):
        return dilated_conv1d(x, weight[:, :, None], bias, backend="cpu")

    if network.input.dim() == 1:
        x = pointwise(samples[:, None].contiguous(), network.input[:, None], network.input_bias)
    else:
        x = packed.embedding[samples].transpose(1, 2)
    skips: Any = None
    one = torch.eye(x.shape[0], dtype=wide)
    for i, layer in enumerate(network.layers):
        found: Any = gated_residual_layer(
            x,
            matrix(layer.weight),
            layer.bias,
            residual_weight=matrix(layer.residual),
            residual_bias=layer.residual_bias,
            skip_weight=matrix(layer.skip),
            skip_bias=layer.skip_bias,
            condition=condition.contiguous(),
            condition_weight=matrix(layer.condition_weight),
            global_condition=one,
            global_weight=offsets[i].t().contiguous(),
            dilation=layer.dilation,
            residual_scale=network.residual_scale,
            backend="cpu",
        )
        x = found.residual
        skips = found.skip if skips is None else skips + found.skip
    hidden = pointwise(torch.relu(skips * network.skip_scale), matrix(network.hidden), network.hidden_bias)
    return pointwise(torch.relu(hidden), matrix(network.output), network.output_bias)[:, :, -1]


class WaveNetGenerateProperties(OpProperties):
    ops = ("wavenet_generate", "wavenet_sample")
    kinds = ("categorical", "logistic_mixture")

    def network(self, output="categorical", **shape) -> WaveNetWeights:
        mixture = {"mixture": True, "outputs": 12} if output == "logistic_mixture" else {}
        return network_of(device=self.device, **(mixture | shape))

    def same(self, first, second):
        """The same bits; of the reference, whose sums torch orders by the size of the problem, the same values."""
        if isinstance(first, tuple):
            for x, y in zip(first, second, strict=True):
                self.same(x, y)
        elif not isinstance(first, torch.Tensor):
            assert first == second
        elif self.backend == "reference":
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(first, second)

    def generate(self, network: WaveNetWeights | PackedWaveNet, steps: int, **arguments: Any) -> Any:
        arguments = {"backend": self.backend, "return_state": True, "return_logits": True} | arguments
        return wavenet_generate(network, steps, **arguments)

    @pytest.mark.parametrize("output", kinds)
    def test_cut_anywhere_it_is_the_same(self, output):
        network = self.network(output, dilations=(1, 3, 20), condition=2)
        condition = torch.randn(2, 2, 30, generator=torch.Generator().manual_seed(1)).to(self.device)
        given: dict[str, Any] = {"output": output, "seed": 11}
        whole = self.generate(network, 30, condition=condition, **given)
        parts, state, first = [], None, 0
        for count in (1, 12, 0, 17):
            piece = condition[:, :, first : first + count]
            parts.append(self.generate(network, count, batch=2, condition=piece, state=state, **given))
            state, first = parts[-1].state, first + count
        self.same(torch.cat([part.samples for part in parts], 1), whole.samples)
        self.same(torch.cat([part.logits for part in parts], 2), whole.logits)
        self.same(state, whole.state)

    @pytest.mark.parametrize("output", kinds)
    def test_a_prompt_of_its_own_samples_changes_nothing(self, output):
        network = self.network(output)
        whole = self.generate(network, 9, batch=2, output=output)
        again = self.generate(network, 4, prompt=whole.samples[:, :5], output=output)
        self.same(again.samples, whole.samples)
        self.same(again.logits, whole.logits)
        self.same(again.state, whole.state)

    @pytest.mark.parametrize("output", kinds)
    def test_a_sequence_alone_and_in_a_batch_are_bit_equal(self, output):
        network = self.network(output, taps=3, dilations=(1, 4))
        whole = self.generate(network, 8, batch=11, output=output)
        for b in (0, 4, 10):
            alone = self.generate(network, 8, first_sequence=b, output=output)
            self.same(alone.samples[0], whole.samples[b])
            self.same(alone.logits[0], whole.logits[b])

    @pytest.mark.parametrize("output", kinds)
    def test_equals_the_slow_loop(self, output):
        """Each sample is drawn from the logits of a run over everything before it, which starts from nothing."""
        network = self.network(output, dilations=(1, 2, 4, 8))
        whole = self.generate(network, 14, batch=2, seed=5, temperature=0.8, output=output)
        for t in range(14):
            arguments: dict[str, Any] = {"prompt": whole.samples[:, :t], "output": output}
            logits = self.generate(network, 1, batch=2, temperature=0, **arguments).logits[:, :, t]
            self.same(logits, whole.logits[:, :, t])
            drawn = wavenet_sample(logits, step=t, seed=5, temperature=0.8, output=output, backend=self.backend)
            self.same(drawn, whole.samples[:, t])

    def test_logits_are_those_of_a_convolution_over_all_that_came_before(self):
        network = self.network(dtype=torch.float64, dilations=(1, 2, 4))
        found = self.generate(network, 12, initial=3, seed=2)
        before = torch.cat([found.samples.new_full((1, 1), 3), found.samples], 1)
        for t in range(12):
            torch.testing.assert_close(recomputed(network, before[:, : t + 1]), found.logits[:, :, t])

    def test_bfloat16_stores_the_weights_alone(self):
        network = self.network(condition=2)
        condition = torch.ones(1, 2, 6, device=self.device)

        def rounded(x):
            return x.bfloat16().float()

        layers = [
            layer._replace(
                **{n: rounded(getattr(layer, n)) for n in ("weight", "residual", "skip", "condition_weight")}
            )
            for layer in network.layers
        ]
        same = network._replace(layers=layers, hidden=rounded(network.hidden), output=rounded(network.output))
        packed = self.generate(pack_wavenet(network, torch.bfloat16), 6, condition=condition)
        wanted = self.generate(same, 6, condition=condition)
        self.same(packed.samples, wanted.samples)
        if self.backend == "cpu":
            self.same(packed.logits, wanted.logits)
        else:  # (a thread of a GPU takes 8 of these weights at a time instead of 4, and sums have another order)
            torch.testing.assert_close(packed.logits, wanted.logits)

    def test_each_condition_reaches_the_positions_that_depend_on_it(self):
        network = self.network(condition=3)
        prompt = torch.zeros(1, 8, dtype=torch.int64, device=self.device)
        condition = torch.zeros(1, 3, 8, device=self.device)
        plain = self.generate(network, 0, prompt=prompt, condition=condition).logits
        condition[0, 1, 4] = 1.0
        changed = self.generate(network, 0, prompt=prompt, condition=condition).logits
        different = (plain != changed).any(1)[0].tolist()
        assert different == [False] * 4 + [True, False, True, False]  # layers after the first reach back by 2 and 4

    def test_global_offsets_are_biases(self):
        network = self.network()
        layers = [layer._replace(bias=torch.as_tensor(layer.bias) + 0.5) for layer in network.layers]
        wanted = self.generate(network._replace(layers=layers), 5).logits
        for offsets in (torch.full((3, 1, 16), 0.5), [torch.full((1, 16), 0.5)] * 3):
            moved = (
                offsets.to(self.device) if isinstance(offsets, torch.Tensor) else [x.to(self.device) for x in offsets]
            )
            self.same(self.generate(network, 5, global_offsets=moved).logits, wanted)

    def test_a_nan_behind_the_end_of_the_past_never_matters(self):
        """A ring of a state holds (K - 1) dilation inputs, of which one tap reads one: the others come later."""
        network = self.network(dilations=(1, 5))
        state = self.generate(network, 3, batch=1).state
        state.rings[0, 1 + (3 + 2) % 5] = float("nan")  # what the second layer reads two positions later
        logits = self.generate(network, 3, state=state).logits
        assert logits.isnan().any(1)[0].tolist() == [False, False, True]

    def test_seeds_and_sequences_draw_differently(self):
        network = self.network()
        found = self.generate(network, 40, batch=2, seed=1).samples
        other = self.generate(network, 40, batch=2, seed=2).samples
        assert not torch.equal(found[0], found[1])
        assert not torch.equal(found, other)
        tensor = torch.tensor(1, device=self.device)
        assert torch.equal(self.generate(network, 40, batch=2, seed=tensor).samples, found)

    def test_the_random_stream_is_the_documented_one(self):
        """Uniform logits over 2^k classes give the k highest bits of Philox's word."""
        position, sequence, key = 2**35 + 7, 4, 2**41 + 9
        words = [torch.tensor(x) for x in (7, sequence, 0, 8, key & 0xFFFFFFFF, key >> 32)]
        word = int(philox((words[0], words[1], words[2], words[3]), (words[4], words[5]))[0])
        logits = torch.zeros(1, 64, device=self.device)
        drawn = wavenet_sample(logits, step=position, seed=key, first_sequence=sequence, backend=self.backend)
        assert int(drawn) == word >> 26

    def test_classes_are_as_frequent_as_their_probability(self):
        rows = 20_000 if self.backend != "fibres" else 2_000
        logits = torch.tensor([1.0, -30.0, 0.0, 2.0, -1.0, 0.5, -float("inf")])
        for temperature in (1.0, 0.5):
            drawn = wavenet_sample(
                logits.to(self.device).expand(rows, 7), step=0, seed=8, temperature=temperature, backend=self.backend
            ).cpu()
            probability = torch.softmax(logits / temperature, 0)
            seen = torch.bincount(drawn, minlength=7)
            likely = probability > 1e-6
            assert int(seen[~likely].sum()) == 0
            expected = rows * probability[likely]
            assert float(((seen[likely] - expected) ** 2 / expected).sum()) < 25  # 4 degrees of freedom: p = 5e-5

    def test_logistics_have_their_mean_and_spread(self):
        rows = 20_000 if self.backend != "fibres" else 2_000
        logits = torch.tensor([0.0, -40.0, 0.2, -0.9, -3.0, 0.0]).to(self.device).expand(rows, 6)
        drawn = wavenet_sample(logits, step=3, output="logistic_mixture", backend=self.backend).double().cpu()
        scale = torch.tensor(-3.0).double().exp()
        assert abs(drawn.median() - 0.2) < 6 * 2 * scale / rows**0.5
        inside = ((drawn - 0.2).abs() < scale * torch.tensor(3.0).log()).double().mean()  # half of a logistic
        assert abs(inside - 0.5) < 3 / rows**0.5
        wide = wavenet_sample(logits + 3, step=3, output="logistic_mixture", backend=self.backend)
        assert float(wide.abs().max()) == 1.0

    def test_temperature_0_takes_the_first_largest(self):
        logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 5.0], [-1.0, -2.0, -3.0]], device=self.device)
        drawn = wavenet_sample(logits, step=1, temperature=0, backend=self.backend)
        assert drawn.tolist() == [1, 0, 0]

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_nan_gives_a_class_that_exists(self, temperature):
        logits = torch.full((3, 5), float("nan"), device=self.device)
        drawn = wavenet_sample(logits, step=1, temperature=temperature, backend=self.backend)
        assert bool(((drawn >= 0) & (drawn < 5)).all())

    def test_progress_is_told_and_interrupts(self, monkeypatch):
        monkeypatch.setattr(API, "_POSITIONS_A_CALL", 4)
        network = self.network()
        told = []
        whole = self.generate(
            network,
            10,
            prompt=torch.zeros(1, 1, dtype=torch.int64, device=self.device),
            progress=lambda done, total: told.append((done, total)),
        )
        assert told == [(4, 11), (8, 11), (11, 11)]

        def stop(done, total):
            if done == 8:
                raise KeyboardInterrupt

        with pytest.raises(GenerationInterrupted) as caught:
            self.generate(network, 10, prompt=whole.samples[:, :1], progress=stop)
        found = caught.value.output
        assert torch.equal(found.samples, whole.samples[:, :8])
        rest = self.generate(network, 3, state=found.state)
        assert torch.equal(rest.samples, whole.samples[:, 8:])


class TestReference(WaveNetGenerateProperties):
    backend = "reference"
    large = False

    def test_the_cached_loop_of_torch_agrees(self):
        """(which is what the kernels' speed is compared with)"""
        network = network_of(torch.float64, dilations=(1, 2, 4))
        samples, logits = eager_cached(network, 9, 2, temperature=0, return_logits=True)
        found = self.generate(network, 9, batch=2, temperature=0)
        assert torch.equal(samples, found.samples)
        torch.testing.assert_close(logits, found.logits)


class TestCpu(WaveNetGenerateProperties):
    backend = "cpu"

    @pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("output", WaveNetGenerateProperties.kinds)
    def test_equals_the_loop_of_layers(self, output, stored):
        """gated_residual_layer over everything before each sample, 1x1 convolutions, wavenet_sample: the same bits."""
        given = torch.float64 if stored == torch.float64 else torch.float32
        shape: dict[str, Any] = {"residual": 33, "gates": 40, "skip": 50, "hidden": 37, "dilations": (1, 2, 4, 8, 3)}
        packed = pack_wavenet(self.network(output, dtype=given, taps=3, condition=5, **shape), stored)
        condition = normal(2, 5, 12, dtype=given)
        offsets = normal(5, 2, 80, seed=1, dtype=given)
        arguments: dict[str, Any] = {"seed": 4, "output": output}
        found = self.generate(packed, 12, condition=condition, global_offsets=offsets, **arguments)
        samples = torch.full((2, 1), 10) if output == "categorical" else torch.zeros(2, 1, dtype=given)
        for t in range(12):
            logits = logits_of_layers(packed, samples, condition[:, :, : t + 1], offsets)
            assert torch.equal(logits, found.logits[:, :, t])
            drawn = wavenet_sample(logits, step=t, **arguments, backend="cpu")
            assert torch.equal(drawn, found.samples[:, t])
            samples = torch.cat([samples, drawn[:, None]], 1)

    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
    def test_one_two_and_three_threads_are_bit_equal(self, stored):
        packed = pack_wavenet(network_of(residual=33, gates=20, skip=40), stored)
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(self.generate(packed, 6, batch=11))
        finally:
            torch.set_num_threads(threads)
        for other in found[1:]:
            assert torch.equal(other.samples, found[0].samples)
            assert torch.equal(other.logits, found[0].logits)


class TestFibres(WaveNetGenerateProperties):
    """The CUDA kernels, a fibre per thread, on the CPU."""

    backend = "fibres"
    slow = True
    large = False

    @pytest.mark.parametrize("order", ["reverse", "random:3"])
    def test_order_of_threads(self, order, monkeypatch):
        network = self.network("logistic_mixture")
        wanted = self.generate(network, 3, output="logistic_mixture")
        monkeypatch.setenv("MPKERNELS_FIBRES_ORDER", order)
        found = self.generate(network, 3, output="logistic_mixture")
        assert torch.equal(found.samples, wanted.samples)
        assert torch.equal(found.logits, wanted.logits)


@pytest.mark.gpu
class TestCuda(WaveNetGenerateProperties):
    backend = "cuda"
    device = "cuda"


@pytest.mark.gpu
class TestReferenceOnGpu(WaveNetGenerateProperties):
    backend = "reference"
    device = "cuda"
    large = False


class TestMuLaw:
    def test_round_trip_of_every_class(self):
        for classes in (2, 3, 255, 256, 1024):
            index = torch.arange(classes)
            assert torch.equal(mulaw_encode(mulaw_decode(index, classes), classes), index)

    def test_error_is_half_a_class(self):
        x = torch.linspace(-1, 1, 2001, dtype=torch.float64)
        back = mulaw_decode(mulaw_encode(x), dtype=torch.float64)
        # half of a class, times the largest slope of the inverse of f, and what curves there
        assert float((back - x).abs().max()) < 256 * math.log(256) / 255 / 255 * 1.02
        assert float((back - x)[x.abs() < 0.01].abs().max()) < 0.0005

    def test_what_is_outside(self):
        assert mulaw_encode(torch.tensor([-9.0, 9.0, -torch.inf, torch.inf])).tolist() == [0, 255, 0, 255]
        assert mulaw_encode(torch.zeros(0, 3)).shape == (0, 3)

    def test_bad_input(self):
        with pytest.raises(TypeError, match=r"x.*floating.*int64"):
            mulaw_encode(torch.zeros(2, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"index.*integers.*float32"):
            mulaw_decode(torch.zeros(2))
        with pytest.raises(ValueError, match=r"classes.*at least 2.*1"):
            mulaw_encode(torch.zeros(2), 1)


def test_packed_weights_are_copies():
    network = network_of()
    packed = pack_wavenet(network)
    wanted: Any = wavenet_generate(packed, 5, temperature=0, return_logits=True).logits
    network.hidden.zero_()
    for layer in network.layers:
        layer.weight.zero_()
    found: Any = wavenet_generate(packed, 5, temperature=0, return_logits=True).logits
    assert torch.equal(found, wanted)
    with pytest.raises(TypeError, match=r"dtype.*bfloat16.*float16"):
        pack_wavenet(network, torch.float16)


def test_every_name_is_exported():
    assert all(hasattr(convolution, name) for name in convolution.__all__)
    assert {op.name for op in spec.all_specs()} >= {"wavenet_generate", "wavenet_sample"}
