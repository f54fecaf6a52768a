"""Tiny random models of transformers: flash8 against transformers' own attention."""

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="transformers is not installed: flash8[transformers]")

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DataCollatorWithFlattening,
    DynamicCache,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    StaticCache,
)
from transformers.cache_utils import QuantizedLayer

import flash8.fp8
from flash8.integrations import transformers as flash8_transformers
from flash8.integrations.transformers.attention import attend
from flash8.integrations.transformers.layouts import Cached
from transformers_sizes import SIZES, VOCABULARY

SEQLEN = 12
WINDOW = 5
# The goal of the project is 1e-4; what fp32 gives is two orders of magnitude better.
LOGITS = dict(rtol=1e-5, atol=1e-5)
GRADIENTS = dict(rtol=1e-4, atol=1e-6)

HYBRID = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
YARN = dict(
    rope_type="yarn",
    rope_theta=1e4,
    factor=2.0,
    original_max_position_embeddings=32,
    beta_fast=32.0,
    beta_slow=1.0,
)
#: name: (configuration, the implementation of transformers that computes the same)
MODELS = {
    "llama": (LlamaConfig(**SIZES), "sdpa"),
    "qwen3": (Qwen3Config(**SIZES), "sdpa"),
    "mistral": (MistralConfig(**SIZES, sliding_window=WINDOW), "sdpa"),
    "gemma2": (
        Gemma2Config(**SIZES, **HYBRID, attn_logit_softcapping=3.0, query_pre_attn_scalar=24),
        "eager",
    ),
    "gpt_oss": (
        GptOssConfig(
            **SIZES, **HYBRID, num_local_experts=2, num_experts_per_tok=1, rope_parameters=YARN
        ),
        "eager",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def name():
    return flash8_transformers.register()


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """The model twice, with the same random weights: transformers' attention, and ours."""
    config, reference = MODELS[request.param]
    return make_pair(config, reference)


def new_model(config, implementation):
    """A model with a configuration of its own, for that is where the implementation is kept."""
    auto = AutoModelForMaskedLM if isinstance(config, BertConfig) else AutoModelForCausalLM
    return auto.from_config(copy.deepcopy(config), attn_implementation=implementation).eval()


def make_pair(config, reference):
    torch.manual_seed(0)
    theirs = new_model(config, reference)
    with torch.no_grad():
        for parameter in theirs.parameters():  # away from initial zeros and ones: sinks, norms
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = new_model(config, flash8_transformers.register())
    ours.load_state_dict(theirs.state_dict())
    assert theirs.config._attn_implementation == reference != ours.config._attn_implementation
    return theirs, ours


def tokens(batch=3, seqlen=SEQLEN):
    return torch.randint(2, VOCABULARY, (batch, seqlen))


def padding_mask(side, batch=3, seqlen=SEQLEN):
    mask = torch.ones(batch, seqlen, dtype=torch.long)
    for row, padding in enumerate((7, 1)):
        mask[row, slice(padding) if side == "left" else slice(-padding, None)] = 0
    return mask


def logits_and_gradients(model, valid, **inputs):
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    logits[valid].square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits[valid].detach(), gradients


def check_same(pair, valid, **inputs):
    theirs, ours = (logits_and_gradients(model, valid, **inputs) for model in pair)
    torch.testing.assert_close(ours[0], theirs[0], **LOGITS)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(
            ours[1][name], gradient, **GRADIENTS, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_and_gradients_of_padded_batches(pair, side):
    mask = None if side == "none" else padding_mask(side)
    valid = torch.ones(3, SEQLEN, dtype=torch.bool) if mask is None else mask.bool()
    check_same(pair, valid, input_ids=tokens(), attention_mask=mask)


def test_logits_and_gradients_of_packed_sequences(pair):
    """Against transformers' attention on each sequence alone: where the mask is made without
    position_ids (GPT-OSS), its own packed run lets sequences see each other."""
    theirs, ours = pair
    lengths = [[4, 8], [1, 10, 1], [12]]
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    valid = torch.ones(3, SEQLEN, dtype=torch.bool)
    input_ids = tokens()
    logits, gradients = logits_and_gradients(
        ours, valid, input_ids=input_ids, position_ids=position_ids
    )
    theirs.zero_grad()
    alone = [
        theirs(input_ids=sequence[None], use_cache=False).logits[0]
        for row, parts in zip(input_ids, lengths, strict=True)
        for sequence in row.split(parts)
    ]
    alone = torch.cat(alone)
    alone.square().mean().backward()
    torch.testing.assert_close(logits, alone.detach(), **LOGITS)
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, **GRADIENTS)


def test_packing_equals_running_each_sequence_alone(pair):
    _, model = pair
    sequences = [tokens(1, length)[0] for length in (5, 1, 9)]
    collator = DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_position_ids=True, return_tensors="pt"
    )
    batch = collator([{"input_ids": sequence.tolist()} for sequence in sequences])
    batch.pop("labels")
    given = [name for name in ("cu_seq_lens_q", "max_length_k") if name in batch]
    assert given == ["cu_seq_lens_q", "max_length_k"]
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0]
        alone = [
            model(input_ids=sequence[None], use_cache=False).logits[0] for sequence in sequences
        ]
    torch.testing.assert_close(packed, torch.cat(alone), **LOGITS)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_same_tokens(pair, cache, side):
    mask = torch.ones(3, SEQLEN, dtype=torch.long) if side == "none" else padding_mask(side)
    options = dict(
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        cache_implementation=None if cache == "dynamic" else cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    prompt = tokens()
    theirs, ours = (model.generate(prompt, **options) for model in pair)
    assert ours.sequences.shape == (3, SEQLEN + 8)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), **LOGITS)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_steps_over_a_cache_equal_one_pass(pair, cache):
    """Prefill in two pieces and decode, past the window: the logits of one pass without a cache."""
    _, ours = pair
    input_ids, mask = tokens(), padding_mask("left")
    with torch.no_grad():
        position_ids = positions(mask)
        past = (
            DynamicCache(config=ours.config)
            if cache == "dynamic"
            else StaticCache(config=ours.config, max_cache_len=SEQLEN + 2)
        )
        begin, pieces = 0, []
        for length in (7, 3, 1, 1):
            piece = slice(begin, begin + length)
            step = ours(
                input_ids=input_ids[:, piece],
                attention_mask=mask[:, : begin + length],
                position_ids=position_ids[:, piece],
                past_key_values=past,
            )
            pieces.append(step.logits)
            begin += length
        whole = ours(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).logits
    valid = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, dim=1)[valid], whole[valid], **LOGITS)


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def test_decoding_over_a_static_cache_compiles_without_a_graph_break(name):
    _, model = make_pair(*MODELS["llama"])
    input_ids, mask = tokens(seqlen=SEQLEN + 1), padding_mask("left", seqlen=SEQLEN + 1)
    with torch.no_grad():
        whole = model(input_ids=input_ids, attention_mask=mask, position_ids=positions(mask))
        past = StaticCache(config=model.config, max_cache_len=SEQLEN + 4)
        prompt = dict(attention_mask=mask[:, :-1], position_ids=positions(mask)[:, :-1])
        model(input_ids=input_ids[:, :-1], **prompt, past_key_values=past)
        step = model.prepare_inputs_for_generation(
            input_ids[:, -1:],
            attention_mask=mask,
            position_ids=positions(mask)[:, -1:],
            past_key_values=past,
            is_first_iteration=False,
        )
        assert isinstance(step["attention_mask"], Cached)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        logits = compiled(**step).logits
    torch.testing.assert_close(logits[:, -1], whole.logits[:, -1], **LOGITS)


def test_decoding_after_right_padding(name):
    """Padding that has become a hole between prompt and new tokens."""
    theirs, ours = make_pair(*MODELS["llama"])
    prompt, new = tokens(), tokens(seqlen=2)
    mask = torch.cat([padding_mask("right"), torch.ones(3, 2, dtype=torch.long)], dim=1)
    results = []
    with torch.no_grad():
        for model in (theirs, ours):
            past = model(input_ids=prompt, attention_mask=mask[:, :SEQLEN]).past_key_values
            step = model(input_ids=new, attention_mask=mask, past_key_values=past)
            results.append(step.logits)
    torch.testing.assert_close(results[1], results[0], **LOGITS)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_bidirectional_encoder(name, side):
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    theirs = new_model(config, "sdpa")
    ours = new_model(config, name)
    ours.load_state_dict(theirs.state_dict())
    mask = None if side == "none" else padding_mask(side)
    valid = torch.ones(3, SEQLEN, dtype=torch.bool) if mask is None else mask.bool()
    check_same((theirs, ours), valid, input_ids=tokens(), attention_mask=mask)


def test_no_layer_receives_a_quadratic_mask_or_repeated_heads(name, monkeypatch):
    """What reaches the flash8 functions: 1 KV head per group, and nothing of seqlen x seqlen."""
    from flash8.integrations.transformers import attention

    calls = []

    def spy(q, k, *args, **options):
        sizes = [x.numel() for x in (*args, *options.values()) if isinstance(x, torch.Tensor)]
        calls.append((q.shape[-2], k.shape[-2], max(sizes)))
        return real(q, k, *args, **options)

    real = attention.flash_attn_varlen_func
    monkeypatch.setattr(attention, "flash_attn_varlen_func", spy)
    _, ours = make_pair(*MODELS["mistral"])
    seqlen = 48
    position_ids = torch.arange(seqlen // 2).repeat(2)[None]
    ours(input_ids=tokens(1, seqlen), position_ids=position_ids, use_cache=False)
    assert len(calls) == 2
    for heads, heads_kv, largest in calls:
        assert (heads, heads_kv) == (4, 2)
        assert largest == seqlen * heads_kv * 8 < seqlen * seqlen


def test_dropout_training_step_is_reproducible(name):
    config = LlamaConfig(**SIZES, attention_dropout=0.5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name).train()
    input_ids, mask = tokens(), padding_mask("left")
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(input_ids=input_ids, attention_mask=mask, labels=input_ids).loss.item())
    assert losses[0] == losses[1] != losses[2]


def test_gradient_checkpointing_and_autocast(name):
    theirs, ours = make_pair(*MODELS["qwen3"])
    inputs = dict(input_ids=tokens(), attention_mask=padding_mask("left"), labels=tokens())
    losses = {}
    for model, checkpointing in ((theirs, False), (ours, False), (ours, True)):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        losses[model is ours, checkpointing] = loss.item()
    assert losses[True, True] == losses[True, False]
    assert losses[True, False] == pytest.approx(losses[False, False], rel=1e-2)


RECIPES = {
    "head": {"scaling": "current", "granularity": "head", "smooth_k": True},
    "block": {"scaling": "block", "hadamard": True},
}


@pytest.fixture(params=RECIPES)
def fp8_pair(request):
    """A Llama with 16-bit attention (on this CPU: fp32), and one with FP8 attention."""
    exact, fp8 = make_pair(*MODELS["llama"])
    fp8.config.f8_recipe = RECIPES[request.param]
    return exact, fp8


def test_fp8_through_the_configuration(fp8_pair):
    mask = padding_mask("left")
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    (exact, exact_grads), (fp8, fp8_grads) = (
        logits_and_gradients(model, mask.bool(), **inputs) for model in fp8_pair
    )
    error = (fp8 - exact).norm() / exact.norm()
    assert 1e-3 < error < 0.1  # e4m3 keeps four bits
    assert exact_grads.keys() == fp8_grads.keys()
    flat = [torch.cat([x.flatten() for x in grads.values()]) for grads in (exact_grads, fp8_grads)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.99


def test_fp8_is_that_of_fp8_attention():
    q, k, v = torch.randn(2, 4, 9, 16), *torch.randn(2, 2, 2, 9, 16)
    layer = SimpleNamespace(config=SimpleNamespace(f8_recipe=RECIPES["head"]), is_causal=True)
    out, _ = attend(layer, q, k, v, None, scaling=0.3, softcap=0.0)
    recipe = flash8.fp8.CurrentScaling(granularity="head", smooth_k=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = flash8.fp8.fp8_attention(q, k, v, recipe, softmax_scale=0.3, causal=True)
    assert torch.equal(out, expected)


def test_fp8_in_inference_is_that_of_training(fp8_pair):
    _, model = fp8_pair
    mask = padding_mask("left")
    inputs = dict(input_ids=tokens(), attention_mask=mask, use_cache=False)
    training = model(**inputs).logits.detach()
    with torch.no_grad():
        inference = model(**inputs).logits
    assert torch.equal(training, inference)
    generated = model.generate(**inputs | dict(use_cache=True), max_new_tokens=3, do_sample=False)
    assert generated.shape == (3, SEQLEN + 3)


def test_fp8_recipes_are_saved_and_checked(fp8_pair):
    _, model = fp8_pair
    config = type(model.config).from_dict(model.config.to_dict())
    assert config.f8_recipe == model.config.f8_recipe
    for wrong in ({"scaling": "delayed"}, "current", {"scaling": "block", "granularity": "head"}):
        model.config.f8_recipe = wrong
        with pytest.raises(ValueError, match=r"config\.f8_recipe"):
            model(input_ids=tokens())


def test_set_attn_implementation_switches_a_loaded_model(name):
    theirs, _ = make_pair(*MODELS["llama"])
    inputs = dict(input_ids=tokens(), attention_mask=padding_mask("left"))
    before = theirs(**inputs).logits.detach()
    theirs.set_attn_implementation(name)
    assert theirs.config._attn_implementation == name
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(theirs(**inputs).logits.detach()[valid], before[valid], **LOGITS)


def test_what_cannot_be_served_is_refused(name):
    _, model = make_pair(*MODELS["llama"])
    input_ids = tokens()
    custom = torch.ones(3, 1, SEQLEN, SEQLEN, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"attention_mask tensors .*\(3, 1, 12, 12\)"):
        model(input_ids=input_ids, attention_mask=custom)
    with pytest.raises(ValueError, match="output_attentions"):
        model(input_ids=input_ids, output_attentions=True)
    boundaries = torch.tensor([0, SEQLEN], dtype=torch.int32)
    with pytest.raises(ValueError, match="cannot be combined with a padding mask"):
        model(
            input_ids=input_ids[:1],
            attention_mask=padding_mask("left")[:1],
            cu_seq_lens_q=boundaries,
            cu_seq_lens_k=boundaries,
            max_length_q=SEQLEN,
            max_length_k=SEQLEN,
        )


def quantizer():
    """A layer of a quantized cache that needs no package: 8 bits, one scale for a token's head."""

    class Layer(QuantizedLayer):
        def _quantize(self, tensor, axis):
            scale = tensor.abs().amax(-1, keepdim=True) / 127
            return (tensor / scale).round().to(torch.int8), scale

        def _dequantize(self, quantized):
            values, scale = quantized
            return values * scale

    return Layer


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_quantized_caches(family, name):
    """What transformers dequantizes is a dynamic cache to attention."""
    layer = quantizer()
    prompt, logits = tokens(), []
    for model in make_pair(*MODELS[family]):
        past = DynamicCache()
        past.layers = [layer(residual_length=4) for _ in range(model.config.num_hidden_layers)]
        result = model.generate(
            prompt,
            attention_mask=padding_mask("left"),
            past_key_values=past,
            max_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert past.layers[0]._quantized_keys[0].dtype == torch.int8
        logits.append(torch.stack(result.logits))
    torch.testing.assert_close(*logits, **LOGITS)


HINT = """
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig
import flash8.integrations.transformers
assert not any("f8" in key for key in AttentionInterface().valid_keys())
for name in ("flash8", "f8_attention"):
    try:
        AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1), attn_implementation=name)
    except ValueError as error:
        assert "transformers.register() returns: 'f8_attention'" in str(error), error
    else:
        raise AssertionError(name)
"""


def test_a_name_that_is_not_registered_gets_a_hint(name):
    """And importing registers nothing."""
    done = subprocess.run([sys.executable, "-c", HINT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match=r"'flash8' is not registered; .*: 'f8_attention'"):
        new_model(MODELS["llama"][0], "flash8")


def test_old_transformers_are_refused(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"5\.23 or newer, found 4\.57\.1"):
        flash8_transformers.register()
