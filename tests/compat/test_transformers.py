"""Models of Hugging Face transformers with attn_implementation="mpkernels", beside their own eager attention."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from mpkernels import masks
from mpkernels.compat import transformers as compat

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
DECODER = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS = {
    "Llama": DECODER,
    "Mistral": {**DECODER, "sliding_window": 4},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 64},
    "Gemma2": {**DECODER, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0},
    "Bert": {**SMALL, "intermediate_size": 48},
}


@pytest.fixture(scope="module")
def hub():
    import transformers

    compat.register()
    compat.register()  # twice is no error
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are so small that threads only wait for each other
    yield transformers
    torch.set_num_threads(threads)


def make(hub, name, implementation):
    config = getattr(hub, f"{name}Config")(
        **MODELS[name], attn_implementation=implementation, pad_token_id=0, bos_token_id=1, eos_token_id=None
    )
    torch.manual_seed(0)
    model = getattr(hub, name + {"Bert": "ForMaskedLM", "GPT2": "LMHeadModel"}.get(name, "ForCausalLM"))(config).eval()
    with torch.no_grad():  # far enough from the initial weights that attention is not almost uniform
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def results(hub, name, implementation, mask, **inputs):
    model = make(hub, name, implementation)
    tokens = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = model(tokens, attention_mask=mask, **inputs).logits
    kept = logits if mask is None else logits[mask.bool()]
    weights = torch.randn(kept.shape, generator=torch.Generator().manual_seed(2))
    (kept.log_softmax(-1) * weights).sum().backward()
    return kept.detach(), {key: x.grad for key, x in model.named_parameters() if x.grad is not None}


PADDING = {
    "none": None,
    "left": torch.tensor([[1] * 9, [0] * 3 + [1] * 6]),
    "right": torch.tensor([[1] * 7 + [0] * 2, [1] * 9]),
    "holes": torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1], [1] * 9]),
}


@pytest.mark.parametrize(
    ("name", "padding"),
    [
        *(("Llama", padding) for padding in PADDING),
        *(("Bert", padding) for padding in ("none", "right")),
        *((name, "left") for name in ("Mistral", "GPT2", "Gemma2")),
    ],
)
def test_logits_and_gradients(hub, name, padding):
    check_equal(
        results(hub, name, "eager", PADDING[padding]),
        results(hub, name, "mpkernels", PADDING[padding]),
    )


def check_equal(wanted, found):
    torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-4)
    assert found[1].keys() == wanted[1].keys()
    for key, grad in wanted[1].items():
        torch.testing.assert_close(found[1][key], grad, atol=1e-4 * float(grad.abs().max() + 1), rtol=1e-4, msg=key)


def test_packed_sequences(hub):
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0, 1]])
    found = [results(hub, "Llama", how, None, position_ids=position) for how in ("eager", "mpkernels")]
    check_equal(*found)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_generate(hub, name, cache):
    tokens = torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    found = []
    for how in ("eager", "mpkernels"):
        model = make(hub, name, how)
        options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        if cache == "static":
            options |= {"cache_implementation": "static", "disable_compile": True}
        got = model.generate(tokens, attention_mask=mask, **options)
        found.append((got.sequences, torch.stack(got.logits)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-4, rtol=1e-4)


def functions(hub):
    made = hub.masking_utils
    packed = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 1, 1, 1]])
    return {
        "causal": made.causal_mask_function,
        "bidirectional": made.bidirectional_mask_function,
        "window": made.sliding_window_causal_mask_function(3),
        "window on both sides": made.sliding_window_bidirectional_mask_function(2),
        "chunks": made.chunked_causal_mask_function(3, torch.tensor([0, 2])),
        "documents": made.and_masks(made.packed_sequence_mask_function(packed), made.causal_mask_function),
        "blocks": made.or_masks(made.causal_mask_function, made.blockwise_overlay(packed)),
        "no interval": lambda batch, head, q, kv: (kv % 2 == 0) & (q >= 0),
    }


NAMES = ["causal", "bidirectional", "window", "window on both sides", "chunks", "documents", "blocks", "no interval"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
def test_mask(hub, monkeypatch, name, padding):
    monkeypatch.setattr(compat, "_MASK_ELEMENTS", 40)  # strips of some rows
    seen = None if padding == "none" else PADDING[padding][:, :8].bool()
    sizes = {"batch_size": 2, "q_length": 8, "kv_length": 8}
    sizes_later = {"batch_size": 2, "q_length": 3, "kv_length": 5, "q_offset": 4, "kv_offset": 2}
    for where in (sizes, sizes_later):
        options = {**where, "mask_function": functions(hub)[name], "attention_mask": seen}
        made = compat.attention_mask(**options, allow_is_causal_skip=True)
        wanted = hub.masking_utils.sdpa_mask(**options, allow_is_causal_skip=False)
        scores = (2, 1, where["q_length"], where["kv_length"])
        if made.dtype == torch.int32:
            assert made.shape[1:] == (1, where["q_length"], 2)
            made = masks.to_dense(masks.intervals(made[..., 0], made[..., 1]), scores)
        else:
            assert padding == "holes" or name in ("no interval", "blocks")
        assert torch.equal(made.expand(scores), wanted.expand(scores))


def test_models_that_change_their_mask_get_bools(hub):
    made = compat.attention_mask(batch_size=2, q_length=4, kv_length=4, allow_is_causal_skip=False)
    assert torch.equal(made, torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 1, 4, 4))


def test_window_is_recognised(hub):
    assert compat._window_of(hub.masking_utils.sliding_window_causal_mask_function(7), hub.masking_utils) == 7
    other = hub.masking_utils.and_masks(functions(hub)["window"], hub.masking_utils.causal_mask_function)
    assert compat._window_of(other, hub.masking_utils) is None


def heads(rows=4, keys=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, rows, 8), (2, 2, keys, 8), (2, 2, keys, 8))
    return [torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes]


def formula(query, key, value, visible=None, bias=0.0, sink=None, softcap=None):
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    scores = query @ key.mT / math.sqrt(8)
    scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)) + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    if sink is not None:
        scores = torch.cat([scores, sink[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)


AHEAD = torch.arange(6) - (torch.arange(4)[:, None] + 2)
KEPT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
LAYER = SimpleNamespace(is_causal=True)


@pytest.mark.parametrize(
    ("options", "explicit"),
    [
        ({}, {"visible": AHEAD <= 0}),
        ({"is_causal": False}, {}),
        ({"sliding_window": 2}, {"visible": (AHEAD <= 0) & (AHEAD > -2)}),
        ({"is_causal": False, "sliding_window": 2}, {"visible": AHEAD.abs() < 2}),
        ({"attention_mask": KEPT}, {"visible": (AHEAD <= 0) & KEPT.bool()[:, None, None]}),
        ({"attention_mask": AHEAD[None, None] <= 1}, {"visible": AHEAD <= 1}),
        ({"attention_mask": 0.5 * AHEAD[None, None].double()}, {"bias": 0.5 * AHEAD}),
        ({"softcap": 1.5, "is_causal": False}, {"softcap": 1.5}),
    ],
)
def test_arguments(options, explicit):
    inputs = heads()
    out, weights = compat.attention_forward(LAYER, *inputs, **{"attention_mask": None, **options})
    assert weights is None
    assert out.is_contiguous()
    wanted = formula(*inputs, **explicit)
    torch.testing.assert_close(out, wanted)
    grad = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5))
    found = [torch.autograd.grad((x * grad).sum(), inputs) for x in (out, wanted)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("rows", [1, 4])
def test_sinks_and_position_bias(rows):
    inputs = heads(rows)
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 4, rows, 6, dtype=torch.float64, requires_grad=True)
    options = {"attention_mask": None, "is_causal": False, "s_aux": sink, "position_bias": bias}
    wanted = formula(*inputs, bias=bias, sink=sink)
    out, _ = compat.attention_forward(LAYER, *inputs, **options)
    torch.testing.assert_close(out, wanted)
    found = [torch.autograd.grad(x.square().sum(), [*inputs, sink, bias]) for x in (out, wanted)]
    torch.testing.assert_close(*found)
    with torch.no_grad():  # one query without gradients goes to another op
        torch.testing.assert_close(compat.attention_forward(LAYER, *inputs, **options)[0], wanted)


def test_errors(hub, monkeypatch):
    for name in ("sdpa", "eager", ""):
        with pytest.raises(ValueError, match=r"^name: "):
            compat.register(name)
    with pytest.raises(TypeError, match=r"^name: "):
        compat.register(3)
    with pytest.raises(ValueError, match=r"^attention_mask: expected the intervals"):
        compat.attention_forward(LAYER, *heads(), torch.zeros(2, 1, 4, 8, dtype=torch.int32))
    with pytest.raises(NotImplementedError, match=r"^cache: "):
        compat.attention_forward(LAYER, *heads(), None, cache=object())
    with pytest.warns(UserWarning, match=r"^output_attentions: "):
        compat.attention_forward(LAYER, *heads(), None, output_attentions=True)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.40"))
    with pytest.raises(ImportError, match=r"4\.53 or later.*4\.40"):
        compat.register()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        compat.register()
