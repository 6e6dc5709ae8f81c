"""The public functions of WaveNet's sample loop: they check their input and choose a backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpkernels import backends, checks
from mpkernels.convolution.wavenet_generate import reference, schema
from mpkernels.convolution.wavenet_generate.packing import PackedWaveNet, WaveNetWeights, pack_wavenet

OUTPUTS = ("categorical", "logistic_mixture")
# Positions of a call of the kernel, for up to 8 sequences: between calls, Python hears of Ctrl-C and progress is told.
_POSITIONS_A_CALL = 2048


class WaveNetState(NamedTuple):
    """What a run has to know of the samples before it."""

    rings: Tensor  # (B, rows, R): the last (K - 1) dilation inputs of every layer
    last: Tensor  # (B,): the last sample
    position: int  # how many samples there were


class WaveNetOutput(NamedTuple):
    """The result of ``wavenet_generate``."""

    samples: Tensor  # (B, T0 + steps), the prompt included
    logits: Tensor | None  # (B, O, T0 + steps), with return_logits
    state: WaveNetState | None  # with return_state


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C during ``wavenet_generate``; ``output`` has what was sampled before, and the state to go on from."""

    def __init__(self, output: WaveNetOutput):
        super().__init__(f"interrupted after {output.samples.shape[1]} samples")
        self.output = output


def wavenet_generate(
    network: WaveNetWeights | PackedWaveNet,
    steps: int,
    *,
    batch: int | None = None,
    prompt: Tensor | None = None,
    condition: Tensor | None = None,
    global_offsets: Tensor | Sequence[Tensor] | None = None,
    seed: int | Tensor = 0,
    temperature: float = 1.0,
    initial: float | None = None,
    state: WaveNetState | None = None,
    first_sequence: int = 0,
    return_state: bool = False,
    return_logits: bool = False,
    output: str = "categorical",
    progress: Callable[[int, int], object] | None = None,
    backend: str | None = None,
) -> WaveNetOutput:
    """Samples from a WaveNet, one position after the other, in one kernel that never computes the past again.

    Each position is the network of :mod:`mpkernels.convolution.wavenet_generate.schema` (van den Oord et al. 2016,
    "WaveNet", eq. 2 and figure 4; Paine et al. 2016, "Fast Wavenet", for the queues of past inputs), then a sample,
    which is the next input. Same bits for a run as a whole or cut anywhere, in any batch (see ``first_sequence``), on
    any number of threads; and on the CPU the bits of gated_residual_layer over all that came before.

    Args:
        network: weights, or what :func:`pack_wavenet` made of them (do that once if you call more than once).
        steps: how many samples to draw after the prompt; 0 or more.
        batch: B, the number of sequences; default: that of the prompt, the state or the condition, else 1.
        prompt: (B, T0), the first samples: integers in [0, classes), or for a mixture values in the dtype of the
            computation. The network sees them as if it had drawn them.
        condition: (B, A, T0 + steps), what the local condition is at each position, the prompt's included.
        global_offsets: (L, B or 1, 2 G), or a list of L tensors (B or 1, 2 G): added to the biases of the dilated
            convolutions (of a speaker, say).
        seed: an integer, or a () int64 tensor. One seed gives one result; sequences have their own random numbers.
        temperature: logits (and scales of logistics) are divided (multiplied) by it; 0 takes the most probable.
        initial: what counts as the sample before the first: a class, default classes // 2, which is mu-law's silence;
            or a value, default 0. Not with a state.
        state: of the call before: this one goes on where that one stopped. A state belongs to one dtype and network.
        first_sequence: the number of the first sequence in the random stream: a batch may be sampled in parts.
        return_state: whether to return what the next call needs.
        return_logits: whether to return the outputs of the network at every position, too.
        output: "categorical", or "logistic_mixture" (Salimans et al. 2017, "PixelCNN++"): outputs are O / 3 weights
            (as logits), means, and logarithms of scales; a sample is limited to [-1, 1].
        progress: called now and then as ``progress(positions done, positions in all)``.
        backend: "reference", "cpu" or "cuda"; None chooses (see :func:`mpkernels.use_backend`).

    Returns:
        samples (B, T0 + steps), int64 or, of a mixture, values; logits (B, O, T0 + steps) or None; state or None.
        Values, logits and the state are float32 (float64 for float64 weights).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, a number is out of range, or a weight needs a gradient: there is none.
        GenerationInterrupted: Ctrl-C; its ``output`` holds what there is.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.convolution import WaveNetLayer, WaveNetWeights, wavenet_generate
        >>> layers = [WaveNetLayer(torch.randn(16, 8, 2), torch.randn(8, 8), torch.randn(4, 8), 2**i) for i in range(3)]
        >>> network = WaveNetWeights(torch.randn(256, 8), layers, torch.randn(4, 4), torch.randn(256, 4))
        >>> whole = wavenet_generate(network, 20, seed=7)
        >>> start = wavenet_generate(network, 12, seed=7, return_state=True)
        >>> rest = wavenet_generate(network, 8, seed=7, state=start.state)
        >>> torch.equal(torch.cat([start.samples, rest.samples], 1), whole.samples)
        True
    """
    packed = network if isinstance(network, PackedWaveNet) else pack_wavenet(network)
    steps = _integer("steps", steps, 0)
    first_sequence = _integer("first_sequence", first_sequence, 0)
    temperature = _temperature(temperature)
    mixture = _is_mixture(packed.network, output)
    batch = _batch(batch, prompt, condition, state)
    wide, device = packed.offsets.dtype, packed.offsets.device
    kind = wide if mixture else torch.int64
    prompt = _prompt(prompt, packed, batch, kind)
    given = 0 if prompt is None else prompt.shape[1]
    length = given + steps
    condition = _condition(condition, packed, (batch, packed.sizes[6], length))
    offsets = _offsets(global_offsets, packed, batch)
    state = _state(state, packed, batch, kind, initial)
    seed = _seed(seed, device)
    chosen = backends.choose(schema.GENERATE, device.type, backend)

    at_once = _POSITIONS_A_CALL if batch <= 8 else max(_POSITIONS_A_CALL * 8 // batch, 64)
    samples, logits = [state.last.new_empty((batch, 0))], []
    done = 0
    try:
        while done < length or not logits:
            count = min(at_once, length - done)
            forced = None if prompt is None or done >= given else prompt[:, done : done + count].contiguous()
            now = None if condition is None else condition[:, :, done : done + count]
            drawn = count - (0 if forced is None else forced.shape[1])
            found = _run(
                chosen,
                packed,
                offsets,
                mixture,
                forced,
                now,
                state,
                seed,
                first_sequence,
                drawn,
                temperature,
                return_logits,
            )
            samples.append(found[0])
            logits.append(found[1])
            state = WaveNetState(
                found[2], found[0][:, -1].contiguous() if count else state.last, state.position + count
            )
            done += count
            if progress is not None:
                progress(done, length)
    except KeyboardInterrupt:
        parts = torch.cat(logits, 1).transpose(1, 2) if return_logits and logits else None
        raise GenerationInterrupted(WaveNetOutput(torch.cat(samples, 1), parts, state)) from None
    return WaveNetOutput(
        torch.cat(samples, 1),
        torch.cat(logits, 1).transpose(1, 2) if return_logits else None,
        state if return_state else None,
    )


def wavenet_sample(
    logits: Tensor,
    *,
    step: int,
    seed: int | Tensor = 0,
    temperature: float = 1.0,
    first_sequence: int = 0,
    output: str = "categorical",
    backend: str | None = None,
) -> Tensor:
    """Draws one sample for each row of logits: what :func:`wavenet_generate` does at position ``step``, bit for bit.

    Args:
        logits: (B, O), floating point (half types are computed in float32).
        step: the position, 0 or more: each has random numbers of its own.
        seed, temperature, first_sequence, output, backend: as in :func:`wavenet_generate`.

    Returns:
        (B,): classes, int64; or of a mixture of logistics values, float32 (float64 for float64).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape or a number is out of range, or a gradient is asked for.
        mpkernels.BackendError: the backend asked for cannot run here.

    Example:
        >>> import torch
        >>> from mpkernels.convolution import wavenet_sample
        >>> wavenet_sample(torch.tensor([[0.0, 9.0, 1.0]]), step=0, temperature=0)
        tensor([1])
    """
    checks.floating("logits", logits)
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits: expected shape (B, O), O at least 1, got {tuple(logits.shape)}")
    if output not in OUTPUTS:
        raise ValueError(f"output: expected one of {', '.join(map(repr, OUTPUTS))}, got {output!r}")
    if output == "logistic_mixture" and logits.shape[1] % 3:
        raise ValueError(f"logits: expected a multiple of 3 columns, got {tuple(logits.shape)}")
    if logits.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "logits: expected a tensor that needs no gradient, got one with requires_grad: a sample has none"
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    arguments = (
        wide.contiguous(),
        _seed(seed, logits.device),
        _integer("step", step, 0),
        _integer("first_sequence", first_sequence, 0),
        _temperature(temperature),
        output == "logistic_mixture",
    )
    chosen = backends.choose(schema.SAMPLE, logits.device.type, backend)
    return reference.sample(*arguments) if chosen == "reference" else backends.call(chosen, schema.SAMPLE)(*arguments)


def _run(
    chosen: str,
    packed: PackedWaveNet,
    offsets: Tensor,
    mixture: bool,
    forced: Tensor | None,
    condition: Tensor | None,  # (B, A, T)
    state: WaveNetState,
    seed: Tensor,
    first_sequence: int,
    steps: int,
    temperature: float,
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples (B, T), logits (B, T, O), rings."""
    scales = (float(packed.network.residual_scale), float(packed.network.skip_scale))
    if chosen != "reference":
        by_position = None if condition is None else condition.transpose(1, 2).contiguous()
        return backends.call(chosen, schema.GENERATE)(
            packed.weights,
            offsets,
            packed.biases,
            packed.embedding,
            packed.dilations,
            packed.sizes,
            *scales,
            mixture,
            forced,
            by_position,
            state.last,
            state.rings,
            seed,
            state.position,
            first_sequence,
            steps,
            temperature,
            keep_logits,
        )
    wide = packed.offsets.dtype
    layers, network = packed.network.layers, packed.network

    def rows(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return weight.to(wide), weight.new_zeros(weight.shape[0], dtype=wide) if bias is None else bias.to(wide)

    def projection(i: int) -> tuple[Tensor, Tensor]:
        layer = layers[i]
        weight, bias = rows(layer.skip, layer.skip_bias)
        if i == len(layers) - 1 or layer.residual is None:
            return weight, bias
        above = rows(layer.residual, layer.residual_bias)
        return torch.cat([above[0], weight]), torch.cat([above[1], bias])

    return reference.generate(
        packed.embedding,
        [layer.weight.to(wide) for layer in layers],
        offsets,
        [projection(i) for i in range(len(layers))],
        [None if layer.condition_weight is None else layer.condition_weight.to(wide) for layer in layers],
        [rows(network.hidden, network.hidden_bias), rows(network.output, network.output_bias)],
        packed.dilations,
        *scales,
        mixture,
        forced,
        condition,
        state.last,
        state.rings,
        seed,
        state.position,
        first_sequence,
        steps,
        temperature,
    )


def _integer(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if not least <= value < 2**62:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return value


def _temperature(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"temperature: expected a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"temperature: expected a finite number of at least 0, got {value}")
    return float(value)


def _is_mixture(network: WaveNetWeights, output: object) -> bool:
    if output not in OUTPUTS:
        raise ValueError(f"output: expected one of {', '.join(map(repr, OUTPUTS))}, got {output!r}")
    mixture = output == "logistic_mixture"
    if mixture != (network.input.dim() == 1):
        wanted = "(R,), a weight of the value before" if mixture else "(classes, R), an embedding"
        raise ValueError(f"output: {output!r} expects network.input {wanted}, got {tuple(network.input.shape)}")
    return mixture


def _batch(batch: int | None, prompt: object, condition: object, state: object) -> int:
    if batch is not None:
        return _integer("batch", batch, 0)
    if isinstance(state, WaveNetState) and isinstance(state.last, Tensor) and state.last.dim() == 1:
        return state.last.shape[0]
    for x in (prompt, condition):
        if isinstance(x, Tensor) and x.dim() > 0:
            return x.shape[0]
    return 1


def _device(name: str, x: Tensor, packed: PackedWaveNet) -> None:
    if x.device != packed.offsets.device:
        raise ValueError(f"{name}: expected the device of network, {packed.offsets.device}, got {x.device}")


def _wide(name: str, x: Tensor, packed: PackedWaveNet) -> Tensor:
    """Values in the dtype that is computed in; half types are taken too."""
    checks.floating(name, x)
    if x.dtype == torch.float64 and packed.offsets.dtype != torch.float64:
        raise TypeError(f"{name}: expected at most the precision of network, {packed.offsets.dtype}, got {x.dtype}")
    _device(name, x, packed)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: expected a tensor that needs no gradient: wavenet_generate has none")
    return x.to(packed.offsets.dtype)


def _prompt(prompt: Tensor | None, packed: PackedWaveNet, batch: int, kind: torch.dtype) -> Tensor | None:
    if prompt is None:
        return None
    checks.tensor("prompt", prompt)
    if prompt.dim() != 2 or prompt.shape[0] != batch:
        raise ValueError(f"prompt: expected shape ({batch}, T0), got {tuple(prompt.shape)}")
    if kind != torch.int64:
        return _wide("prompt", prompt, packed).contiguous()
    if prompt.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise TypeError(f"prompt: expected classes, integers, got {prompt.dtype}")
    _device("prompt", prompt, packed)
    classes = packed.embedding.shape[0]
    if prompt.numel() > 0 and not 0 <= int(prompt.min()) <= int(prompt.max()) < classes:
        raise ValueError(
            f"prompt: expected classes in [0, {classes}), those of network.input, got {int(prompt.min())} to "
            f"{int(prompt.max())}"
        )
    return prompt.to(torch.int64).contiguous()


def _condition(condition: Tensor | None, packed: PackedWaveNet, shape: tuple[int, int, int]) -> Tensor | None:
    if (condition is None) != (shape[1] == 0):
        wanted = "None, as network has no condition weights" if shape[1] == 0 else f"a tensor of shape {shape}"
        raise ValueError(f"condition: expected {wanted}, got {'None' if condition is None else 'a tensor'}")
    if condition is None:
        return None
    condition = _wide("condition", condition, packed)
    checks.shape("condition", condition, shape, "(B, A, T0 + steps)")
    return condition


def _offsets(added: Tensor | Sequence[Tensor] | None, packed: PackedWaveNet, batch: int) -> Tensor:
    if added is None:
        return packed.offsets
    if not isinstance(added, Tensor):
        for x in added:
            checks.tensor("global_offsets", x)
        if len({x.shape for x in added}) != 1:
            raise ValueError("global_offsets: expected tensors of one shape, one for each layer")
        added = torch.stack(list(added))
    added = _wide("global_offsets", added, packed)
    layers, _, gates = packed.offsets.shape
    if added.dim() != 3 or added.shape[0] != layers or added.shape[1] not in (1, batch) or added.shape[2] != gates:
        raise ValueError(f"global_offsets: expected shape ({layers}, {batch} or 1, {gates}), got {tuple(added.shape)}")
    return packed.offsets + added


def _state(
    state: WaveNetState | None, packed: PackedWaveNet, batch: int, kind: torch.dtype, initial: float | None
) -> WaveNetState:
    wide, device = packed.offsets.dtype, packed.offsets.device
    rows, channels = packed.rows, packed.sizes[1]
    classes = packed.embedding.shape[0]
    if state is None:
        if initial is None:
            initial = classes // 2 if kind == torch.int64 else 0.0
        if isinstance(initial, bool) or not isinstance(initial, (int, float)):
            raise TypeError(f"initial: expected a number, got {type(initial).__name__}")
        if kind == torch.int64 and not (isinstance(initial, int) and 0 <= initial < classes):
            raise ValueError(f"initial: expected a class in [0, {classes}), got {initial}")
        rings = torch.zeros((batch, rows, channels), dtype=wide, device=device)
        return WaveNetState(rings, torch.full((batch,), initial, dtype=kind, device=device), 0)
    if not isinstance(state, WaveNetState):
        raise TypeError(f"state: expected the WaveNetState of an earlier call, got {type(state).__name__}")
    if initial is not None:
        raise ValueError("initial: expected None with a state, which knows the sample before")
    checks.tensor("state.rings", state.rings)
    checks.tensor("state.last", state.last)
    _device("state.rings", state.rings, packed)
    _device("state.last", state.last, packed)
    if state.rings.dtype != wide:
        raise TypeError(f"state.rings: expected {wide}, got {state.rings.dtype}")
    if state.last.dtype != kind:
        raise TypeError(f"state.last: expected {kind}, got {state.last.dtype}")
    checks.shape("state.rings", state.rings, (batch, rows, channels), "(B, (K - 1) sum of the dilations, R)")
    checks.shape("state.last", state.last, (batch,), "B")
    if kind == torch.int64 and batch > 0 and not 0 <= int(state.last.min()) <= int(state.last.max()) < classes:
        raise ValueError(f"state.last: expected classes in [0, {classes})")
    position = _integer("state.position", state.position, 0)
    return WaveNetState(state.rings.contiguous(), state.last.contiguous(), position)


def _seed(seed: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise TypeError(f"seed: expected an integer or a () int64 tensor, got {seed.dtype} {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed: expected the device of the other tensors, {device}, got {seed.device}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an integer or a () int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed}")
    return torch.tensor(seed, dtype=torch.int64, device=device)
