"""Cases, workloads and cost of WaveNet's sample loop, and the loops that it is compared with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpkernels.convolution.wavenet_generate import api, schema
from mpkernels.convolution.wavenet_generate.packing import PackedWaveNet, WaveNetLayer, WaveNetWeights, pack_wavenet
from mpkernels.spec import Arguments, BadInput, Case, Cost, OpSpec, Workload

_DTYPES = {
    "reference": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "fibres": (torch.float32, torch.float64, torch.bfloat16),
}
MEDIUM: dict[str, Any] = {  # nv-wavenet's
    "dilations": tuple(2**i for i in range(10)) * 2,
    "residual": 64,
    "gates": 64,
    "skip": 128,
    "hidden": 256,
    "outputs": 256,
}


def random_network(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    dilations: tuple[int, ...] = (1, 2, 4),
    taps: int = 2,
    residual: int = 8,
    gates: int = 8,
    skip: int = 12,
    hidden: int = 9,
    outputs: int = 20,
    condition: int = 0,
    mixture: bool = False,
    biases: bool = True,
) -> WaveNetWeights:
    """A network of normal weights, on the CPU, whose activations stay near 1."""

    def normal(*shape: int) -> Tensor:
        size = math.prod(shape[1:]) if len(shape) > 1 else 16
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(size)).to(dtype)

    def bias(size: int) -> Tensor | None:
        return normal(size) if biases else None

    layers = [
        WaveNetLayer(
            normal(2 * gates, residual, taps),
            normal(residual, gates),
            normal(skip, gates),
            dilation,
            bias(2 * gates),
            bias(residual),
            bias(skip),
            normal(2 * gates, condition) if condition else None,
        )
        for dilation in dilations
    ]
    return WaveNetWeights(
        normal(residual) if mixture else normal(outputs, residual) * 2,
        layers,
        normal(hidden, skip),
        normal(outputs, hidden) * 2,
        bias(residual),
        bias(hidden),
        bias(outputs),
        residual_scale=0.75,
        skip_scale=0.5,
    )


def _flat(network: WaveNetWeights) -> Arguments:
    """The tensors of a network one by one, as tools convert and compare them; `_whole` undoes it."""
    arguments: Arguments = {f"network_{name}": getattr(network, name) for name in network._fields if name != "layers"}
    for i, layer in enumerate(network.layers):
        arguments |= {f"layer_{i}_{name}": getattr(layer, name) for name in layer._fields}
    return arguments


def _whole(arguments: Arguments) -> tuple[WaveNetWeights, Arguments]:
    """The network, and all other arguments."""
    layers = []
    while f"layer_{len(layers)}_weight" in arguments:
        layers.append(WaveNetLayer(*(arguments[f"layer_{len(layers)}_{name}"] for name in WaveNetLayer._fields)))
    names = (name for name in WaveNetWeights._fields if name != "layers")
    network = WaveNetWeights(layers=layers, **{name: arguments[f"network_{name}"] for name in names})
    return network, {name: x for name, x in arguments.items() if not name.startswith(("network_", "layer_"))}


def _case(
    steps: int,
    batch: int = 2,
    *,
    given: int = 0,
    offsets: int = 0,
    position: int | None = None,
    settings: Arguments | None = None,
    **shape,
):
    """A random network; ``given`` positions of a prompt; ``offsets`` sequences of global ones; a state at position."""

    def make(dtype, device, generator):
        network = random_network(dtype, generator, **shape)
        mixture = network.input.dim() == 1
        arguments = _flat(network) | {"steps": steps, "batch": batch, "return_logits": True, "seed": 3}

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

        def samples(*size: int) -> Tensor:
            if mixture:
                return normal(*size).clamp(-1, 1)
            return torch.randint(0, network.input.shape[0], size, generator=generator)

        if given:
            arguments["prompt"] = samples(batch, given)
        if network.layers[0].condition_weight is not None:
            arguments["condition"] = normal(batch, network.layers[0].condition_weight.shape[1], given + steps)
        gates, residual, taps = network.layers[0].weight.shape
        if offsets:
            arguments["global_offsets"] = normal(len(network.layers), offsets, gates)
        if position is not None:
            rows = (taps - 1) * sum(layer.dilation for layer in network.layers)
            arguments |= {"rings": normal(batch, rows, residual), "last": samples(batch), "position": position}
        arguments |= {"output": "logistic_mixture"} if mixture else {}
        arguments |= settings or {}
        return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}

    return make


_GREEDY = {"temperature": 0.0}
_CASES = (
    Case("categorical, most probable", _case(7, settings=_GREEDY), second_order=True),
    Case("conditioned, with a prompt", _case(3, given=4, condition=5, settings=_GREEDY), second_order=True),
    Case("categorical", _case(8, 3)),
    Case("three taps", _case(9, taps=3, dilations=(3, 1, 5, 2))),
    Case("one tap", _case(4, taps=1, dilations=(1, 7))),
    Case("odd sizes", _case(6, 1, residual=33, gates=17, skip=5, hidden=70, outputs=37, settings={"temperature": 1.3})),
    Case("wider than a panel", _case(2, 5, residual=70, gates=75, skip=140, hidden=33, outputs=257)),
    Case("mixture", _case(6, 3, outputs=30, mixture=True, settings={"temperature": 0.7})),
    Case("mixture, most probable", _case(3, given=3, outputs=6, mixture=True, settings=_GREEDY), second_order=True),
    Case("global offsets", _case(4, 3, offsets=3, condition=2)),
    Case("offsets of all, from a position far behind", _case(5, 2, offsets=1, position=2**33 + 5)),
    Case("prompt alone, without biases", _case(0, 2, given=5, biases=False)),
    Case("no positions", _case(0)),
    Case("no sequences", _case(3, 0)),
    Case("many", _case(40, 9, given=3, dilations=(1, 2, 4, 8, 16, 32), condition=3), large=True),
)


def _bad(network: Arguments | None = None, layer: Arguments | None = None, **changes):
    """A good call of 2 sequences and 3 steps after a prompt of 2, with changes of the network or of a layer of it."""

    def make(dtype, device, generator):
        found = random_network(torch.float32, generator, condition=2)
        layers = list(found.layers)
        layers[1] = layers[1]._replace(**(layer or {}))
        found = found._replace(**({"layers": layers} | (network or {})))
        arguments: Arguments = {
            "network": found,
            "steps": 3,
            "prompt": torch.zeros(2, 2, dtype=torch.int64),
            "condition": torch.zeros(2, 2, 5),
        }
        return arguments | changes

    return make


def _state(**changes) -> api.WaveNetState:
    state = api.WaveNetState(torch.zeros(2, 7, 8), torch.zeros(2, dtype=torch.int64), 4)
    return state._replace(**changes)


_BAD = (
    BadInput("steps of a string", _bad(steps="3"), TypeError, "steps.*integer.*str"),
    BadInput("steps below 0", _bad(steps=-1), ValueError, "steps.*at least 0.*-1"),
    BadInput("dilation 0", _bad(layer={"dilation": 0}), ValueError, r"layers\[1\].dilation.*at least 1.*0"),
    BadInput("no layers", _bad({"layers": []}), ValueError, "layers.*at least one"),
    BadInput("other taps", _bad(layer={"weight": torch.zeros(16, 8, 3)}), ValueError, r"layers\[1\].weight.*2\).*3\)"),
    BadInput("no residual", _bad(layer={"residual": None}), TypeError, r"layers\[1\].residual.*Tensor.*NoneType"),
    BadInput("odd gates", _bad(layer={"skip": torch.zeros(12, 7)}), ValueError, r"layers\[1\].skip.*\(12, 8\)"),
    BadInput("other dtype", _bad({"hidden": torch.zeros(9, 12).double()}), TypeError, "hidden.*float32.*float64"),
    BadInput("classes", _bad({"output": torch.zeros(19, 9), "output_bias": None}), ValueError, "output.*20.*19"),
    BadInput("gradients", _bad({"hidden": torch.zeros(9, 12).requires_grad_()}), ValueError, "hidden.*no_grad"),
    BadInput("mixture of an embedding", _bad(output="logistic_mixture"), ValueError, r"output.*\(R,\).*\(20, 8\)"),
    BadInput("unknown output", _bad(output="gaussian"), ValueError, "output.*'categorical'.*'gaussian'"),
    BadInput("prompt past the classes", _bad(prompt=torch.tensor([[0, 20]] * 2)), ValueError, r"prompt.*\[0, 20\).*20"),
    BadInput("prompt of floats", _bad(prompt=torch.zeros(2, 2)), TypeError, "prompt.*integers.*float32"),
    BadInput("prompt of another batch", _bad(batch=3), ValueError, r"prompt.*\(3, T0\)"),
    BadInput("short condition", _bad(condition=torch.zeros(2, 2, 4)), ValueError, r"condition.*\(2, 2, 5\).*4\)"),
    BadInput("no condition", _bad(condition=None), ValueError, "condition.*a tensor.*None"),
    BadInput("offsets", _bad(global_offsets=torch.zeros(3, 4, 16)), ValueError, r"global_offsets.*\(3, 2 or 1, 16\)"),
    BadInput(
        "state of another size", _bad(state=_state(rings=torch.zeros(2, 6, 8))), ValueError, r"rings.*\(2, 7, 8\)"
    ),
    BadInput("state of doubles", _bad(state=_state(rings=torch.zeros(2, 7, 8).double())), TypeError, "rings.*float32"),
    BadInput("state past the classes", _bad(state=_state(last=torch.tensor([0, 20]))), ValueError, r"last.*\[0, 20\)"),
    BadInput("state and initial", _bad(state=_state(), initial=3), ValueError, "initial.*None"),
    BadInput("initial past the classes", _bad(initial=20), ValueError, r"initial.*\[0, 20\).*20"),
    BadInput("temperature below 0", _bad(temperature=-1.0), ValueError, "temperature.*at least 0"),
    BadInput("temperature is not a number", _bad(temperature=math.nan), ValueError, "temperature.*finite"),
    BadInput("seed of floats", _bad(seed=0.5), TypeError, "seed.*integer.*float"),
    BadInput("unknown backend", _bad(backend="cudnn"), ValueError, "backend.*'reference'.*'cudnn'"),
)


def _function(network: Any = None, **arguments) -> tuple[Tensor, ...]:
    if network is None:
        network, arguments = _whole(arguments)
    if "rings" in arguments:
        state = (arguments.pop(name) for name in ("rings", "last", "position"))
        rings, last, position = state
        rings = rings if rings.dtype == torch.float64 else rings.float()
        last = last if last.dtype == torch.int64 else last.to(rings.dtype)
        arguments["state"] = api.WaveNetState(rings, last, position)
    found = api.wavenet_generate(network, **arguments)
    return (found.samples,) if found.logits is None else (found.samples, found.logits)


def eager_cached(
    network: Any = None,
    steps: int = 0,
    batch: int = 1,
    prompt: Tensor | None = None,
    condition: Tensor | None = None,
    temperature: float = 1.0,
    return_logits: bool = False,
    output: str = "categorical",
    seed: int = 0,
    **flat,
) -> tuple[Tensor, ...]:
    """The loop as users of torch write it: a queue of past inputs a layer, and torch's own random numbers."""
    if network is None:
        network, _ = _whole(flat)
    if isinstance(network, PackedWaveNet):
        network = network.network
    mixture, device = network.input.dim() == 1, network.input.device
    generator = torch.Generator(device).manual_seed(seed)
    taps = network.layers[0].weight.shape[2]
    queues = [
        [network.input.new_zeros((batch, network.input.shape[-1]))] * ((taps - 1) * layer.dilation)
        for layer in network.layers
    ]
    weights = [layer.weight.permute(0, 2, 1).flatten(1) for layer in network.layers]  # (2 G, K R)
    given = 0 if prompt is None else prompt.shape[1]
    if mixture:
        value = network.input.new_zeros(batch)
    else:
        value = torch.full((batch,), network.input.shape[0] // 2, device=device)
    samples, logits = [], []
    for t in range(given + steps):
        x = value[:, None] * network.input if mixture else network.input[value]
        if network.input_bias is not None:
            x = x + network.input_bias
        skips = 0
        for i, layer in enumerate(network.layers):
            queue = queues[i]
            taken = torch.cat([queue[k * layer.dilation] for k in range(taps - 1)] + [x], 1)
            z = functional.linear(taken, weights[i], layer.bias)
            if layer.condition_weight is not None and condition is not None:
                z = z + functional.linear(condition[:, :, t], layer.condition_weight)
            filters, gates = z.chunk(2, 1)
            h = torch.tanh(filters) * torch.sigmoid(gates)
            skips = skips + functional.linear(h, layer.skip, layer.skip_bias)
            if queue:
                queue.append(x)
                del queue[0]
            if layer.residual is not None:
                x = network.residual_scale * (x + functional.linear(h, layer.residual, layer.residual_bias))
        hidden = torch.relu(
            functional.linear(torch.relu(skips * network.skip_scale), network.hidden, network.hidden_bias)
        )
        out = functional.linear(hidden, network.output, network.output_bias)
        value = prompt[:, t] if prompt is not None and t < given else _drawn(out, temperature, mixture, generator)
        samples.append(value)
        logits.append(out)
    return (torch.stack(samples, 1), torch.stack(logits, 2)) if return_logits else (torch.stack(samples, 1),)


def _drawn(logits: Tensor, temperature: float, mixture: bool, generator: torch.Generator) -> Tensor:
    weight = logits.chunk(3, 1)[0] if mixture else logits
    if temperature == 0:
        component = weight.argmax(1)
    else:
        component = torch.multinomial(torch.softmax(weight / temperature, 1), 1, generator=generator)[:, 0]
    if not mixture:
        return component
    mean, log_scale = (x.gather(1, component[:, None])[:, 0] for x in logits.chunk(3, 1)[1:])
    if temperature > 0:
        u = torch.rand(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        mean = mean + temperature * log_scale.exp() * torch.logit(u)
    return mean.clamp(-1, 1)


def recomputed(network: WaveNetWeights, samples: Tensor) -> Tensor:
    """Logits (B, O) of the sample after ``samples`` (B, T), by torch's convolutions over the receptive field.

    What a loop without a cache does for every sample; T is at least the receptive field, or all samples so far.
    """
    x = network.input[samples].transpose(1, 2)
    if network.input_bias is not None:
        x = x + network.input_bias[:, None]
    skips = network.input.new_zeros(())
    for layer in network.layers:
        left = (layer.weight.shape[2] - 1) * layer.dilation
        z = functional.conv1d(functional.pad(x, (left, 0)), layer.weight, layer.bias, dilation=layer.dilation)
        filters, gates = z.chunk(2, 1)
        h = torch.tanh(filters) * torch.sigmoid(gates)
        skips = skips + functional.conv1d(h[:, :, -1:], layer.skip[..., None], layer.skip_bias)
        if layer.residual is not None:
            residual = functional.conv1d(h, layer.residual[..., None], layer.residual_bias)
            x = network.residual_scale * (x + residual)
    hidden = functional.conv1d(torch.relu(skips * network.skip_scale), network.hidden[..., None], network.hidden_bias)
    return functional.conv1d(torch.relu(hidden), network.output[..., None], network.output_bias)[:, :, 0]


def _cost(arguments: Arguments, backward: bool) -> Cost:
    """Bytes: the weights once for each position, as what comes before decides it. A multiply-add is 2 operations."""
    network = arguments.get("network")
    packed = network if isinstance(network, PackedWaveNet) else pack_wavenet(network or _whole(arguments)[0])
    positions = arguments["steps"] + (arguments["prompt"].shape[1] if "prompt" in arguments else 0)
    count = packed.weights.numel()
    return Cost(2 * count * positions * arguments.get("batch", 1), count * packed.weights.element_size() * positions)


def _workload(name: str, steps: int, batch: int = 1, stored: torch.dtype | None = None, **settings) -> Workload:
    def make(dtype, device, generator):
        network = random_network(dtype, generator, **MEDIUM)
        layers = [layer._replace(**_on(device, layer)) for layer in network.layers]
        network = network._replace(**(_on(device, network) | {"layers": layers}))
        return {"network": pack_wavenet(network, stored), "steps": steps, "batch": batch}

    return Workload(name, make, steps * batch, backward=False, **settings)


def _on(device: torch.device, weights: WaveNetWeights | WaveNetLayer) -> Arguments:
    return {name: x.to(device) for name, x in weights._asdict().items() if isinstance(x, Tensor)}


def _logits(*shape: int, **settings):
    def make(dtype, device, generator):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return {"logits": (2 * x).to(device, dtype), "step": 5} | settings

    return make


def _bad_logits(**changes):
    return lambda dtype, device, generator: _logits(4, 6)(dtype, device, generator) | changes


def _greedy(logits: Tensor, step: int, temperature: float, output: str = "categorical") -> tuple[Tensor]:
    return (_drawn(logits, temperature, output != "categorical", torch.Generator()),)


_MIXTURE = {"output": "logistic_mixture"}

SPECS = (
    OpSpec(
        name="wavenet_generate",
        family="convolution",
        op=schema.GENERATE,
        function=_function,
        formula="sample_t ~ WaveNet(sample_0 ... sample_t-1)",
        differentiable=(),
        outputs=("samples", "logits"),
        cases=_CASES,
        bad_inputs=_BAD,
        workloads=(
            _workload("R64 S128 A256, 20 layers, float32", 500),
            _workload("R64 S128 A256, 20 layers, weights in bfloat16", 500, stored=torch.bfloat16, eager=False),
            _workload("R64 S128 A256, 20 layers, 8 sequences", 100, 8),
        ),
        eager=eager_cached,
        cost=_cost,
        second_order=False,
        batched=False,
        dtypes=_DTYPES,
    ),
    OpSpec(
        name="wavenet_sample",
        family="convolution",
        op=schema.SAMPLE,
        function=lambda **arguments: (api.wavenet_sample(**arguments),),
        formula="min c: sum_{i <= c} e^logit_i > u sum_i e^logit_i",
        differentiable=(),
        outputs=("samples",),
        cases=(
            Case("most probable", _logits(5, 20, temperature=0.0), second_order=True),
            Case("mixture, most probable", _logits(5, 9, temperature=0.0, **_MIXTURE), second_order=True),
            Case("categorical", _logits(70, 33, seed=9)),
            Case("mixture", _logits(9, 30, seed=2**40 + 1, temperature=0.5, first_sequence=3, **_MIXTURE)),
            Case("one class", _logits(3, 1)),
            Case("no rows", _logits(0, 7)),
        ),
        bad_inputs=(
            BadInput("no tensor", _bad_logits(logits=[1.0]), TypeError, "logits.*Tensor.*list"),
            BadInput("three dimensions", _bad_logits(logits=torch.zeros(1, 2, 3)), ValueError, r"logits.*\(B, O\)"),
            BadInput("no classes", _bad_logits(logits=torch.zeros(2, 0)), ValueError, r"logits.*\(2, 0\)"),
            BadInput("mixture of 4", _bad_logits(logits=torch.zeros(2, 4), **_MIXTURE), ValueError, "logits.*3"),
            BadInput("negative step", _bad_logits(step=-1), ValueError, "step.*at least 0.*-1"),
            BadInput("seed", _bad_logits(seed=torch.zeros(1)), TypeError, "seed.*int64.*float32"),
            BadInput("gradients", _bad_logits(logits=torch.zeros(2, 4).requires_grad_()), ValueError, "logits.*grad"),
        ),
        workloads=(Workload("64 rows of 256", _logits(64, 256), 64, backward=False, eager=False),),
        eager=_greedy,
        cost=lambda arguments, backward: Cost(
            8 * arguments["logits"].numel(), arguments["logits"].numel() * arguments["logits"].element_size()
        ),
        second_order=False,
        batched=False,
        dtypes=_DTYPES | {"fibres": (torch.float32, torch.float64)},
    ),
)
