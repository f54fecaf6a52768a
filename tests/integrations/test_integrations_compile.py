"""Models under torch.compile: one graph, as under transformers' attention, of equal values."""

import copy
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="transformers is not installed: flash8[transformers]")

from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DataCollatorWithFlattening,
    Gemma2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    masking_utils,
)

from flash8.integrations import transformers as flash8_transformers
from flash8.integrations.transformers import packing
from flash8.integrations.transformers.attention import attend
from flash8.integrations.transformers.layouts import UNBOUNDED, Dense
from transformers_masks import MASKS, PADDING, SEQLEN, build, check, padding_mask, tensors
from transformers_sizes import SIZES as MODEL_SIZES
from transformers_sizes import VOCABULARY

SIZES = dict(MODEL_SIZES, num_hidden_layers=1)
HYBRID = dict(
    num_hidden_layers=2, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
)
#: name: (configuration, the implementation of transformers that computes the same)
CONFIGS = {
    "llama": (LlamaConfig(**SIZES), "sdpa"),
    "mistral": (MistralConfig(**SIZES, sliding_window=5), "sdpa"),
    "gemma2": (Gemma2Config(**SIZES | HYBRID, attn_logit_softcapping=3.0), "eager"),
    "llama4_text": (
        Llama4TextConfig(
            **SIZES,
            attention_chunk_size=5,
            intermediate_size_mlp=48,
            num_local_experts=2,
            layer_types=["chunked_attention"],
        ),
        "eager",
    ),
    "bert": (
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
        ),
        "sdpa",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def name():
    return flash8_transformers.register()


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def new_model(family, implementation):
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    config = copy.deepcopy(CONFIGS[family][0])
    return auto.from_config(config, attn_implementation=implementation).eval()


def graphs():
    """A backend that counts graphs."""
    return CompileCounterWithBackend("eager")


def results(model, run, valid, **inputs):
    """Logits of valid tokens, and gradients."""
    logits = run(**inputs).logits[valid]
    logits.square().mean().backward()
    return logits.detach(), [x.grad for x in model.parameters() if x.grad is not None]


def compiled(model, counter):
    cache = {} if "Bert" in type(model).__name__ else {"use_cache": False}
    run = torch.compile(model, backend=counter, fullgraph=True)
    return lambda **inputs: run(**inputs, **cache)


def slow_but(first, families):
    return [f if f == first else pytest.param(f, marks=pytest.mark.slow) for f in families]


@pytest.mark.parametrize("family", slow_but("llama", CONFIGS))
def test_training_is_one_graph(family, name):
    """Without a mask and with one, which may pad on either side: whose values are no part of it."""
    theirs, ours = new_model(family, CONFIGS[family][1]), new_model(family, name)
    counter = CompileCounterWithBackend("aot_eager")  # which traces the backward, too
    run = compiled(ours, counter)
    ids = torch.randint(2, VOCABULARY, (3, SEQLEN))
    for padding in (None, "none", "left", "right"):
        mask = None if padding is None else padding_mask(padding)
        valid = torch.ones(3, SEQLEN, dtype=torch.bool) if mask is None else mask.bool()
        expected = results(theirs, theirs, valid, input_ids=ids, attention_mask=mask)
        given = results(ours, run, valid, input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-6)
        for model in (theirs, ours):
            model.zero_grad()
    assert counter.frame_count == 2  # without a mask, and with one


@torch.no_grad()
def test_lengths_of_packed_batches_are_no_part_of_the_graph(name):
    """One graph for the first batch, one for lengths in general, and no more."""
    model = new_model("llama", name)
    counter = graphs()
    run = compiled(model, counter)
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    counts = []
    for lengths in ((5, 7), (9, 4, 6), (3, 3, 8, 11, 2), (17, 2)):
        documents = [torch.randint(2, VOCABULARY, (n,)) for n in lengths]
        batch = collate([{"input_ids": document.tolist()} for document in documents])
        batch.pop("labels")
        logits = run(**batch).logits[0]
        alone = [model(input_ids=d[None], use_cache=False).logits[0] for d in documents]
        torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-6)
        counts.append(counter.frame_count)
    assert counts[1:] == [2] * 3


def test_boundaries_without_lengths_in_a_graph(monkeypatch):
    """max_length_q and max_length_k cannot be found there; a row is at least as long."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x, boundaries = torch.zeros(1, SEQLEN, 2, 8), torch.tensor([0, 9, SEQLEN])
    given = dict(cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries)
    layout = packing.resolve(Dense(True, UNBOUNDED), x, x, given)
    assert layout.queries.max_seqlen >= 9
    assert layout.keys.max_seqlen >= 9


@pytest.mark.parametrize("family", slow_but("llama", ["llama", "llama4_text"]))
@torch.no_grad()
def test_packing_by_position_ids_alone_is_refused_in_a_graph(family, name):
    """They would have to be looked at; transformers makes a mask of seqlen x seqlen of them."""
    model = new_model(family, name)
    run = compiled(model, graphs())
    ids = torch.randint(2, VOCABULARY, (1, SEQLEN))
    positions = torch.arange(SEQLEN)[None]
    logits = run(input_ids=ids, position_ids=positions).logits
    torch.testing.assert_close(
        logits, model(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-6
    )
    with pytest.raises(RuntimeError, match=r"position_ids restart: inside torch\.compile"):
        run(input_ids=ids, position_ids=positions % 6)


@pytest.mark.parametrize("kind", MASKS)
def test_masks_in_a_graph_are_the_dense_ones(kind, name):
    """Of one graph for all kinds of padding."""
    counter = graphs()

    def layer(q, k, v, mask):
        return attend(torch.nn.Module(), q, k, v, build(kind, name, SEQLEN, mask))[0]

    layer = torch.compile(layer, backend=counter, fullgraph=True)
    for padding in PADDING:
        mask = padding_mask(padding)
        q, k, v = tensors(SEQLEN, SEQLEN)
        if padding == "holes" and ("window" in kind or "chunk" in kind):
            with pytest.raises(RuntimeError, match="between valid tokens"):
                layer(q, k, v, mask)
            continue
        dense = build(kind, "eager", SEQLEN, mask)
        check(layer(q, k, v, mask), dense, q, k, v, mask, "bi" not in kind)
    assert counter.frame_count == 1


def test_steps_over_a_cache_with_a_mask(name):
    """Prompts padded on the right leave holes, which a graph serves as well."""
    theirs, ours = new_model("llama", "eager"), new_model("llama", name)
    prompt, new = torch.randint(2, VOCABULARY, (3, SEQLEN + 2)).split([SEQLEN, 2], dim=1)
    counter = graphs()
    run = torch.compile(ours, backend=counter, fullgraph=True)
    for padding in ("left", "right"):
        mask = padding_mask(padding)
        longer = torch.cat([mask, torch.ones(3, 2, dtype=torch.long)], dim=1)
        steps = []
        for model in (theirs, ours):
            with torch.no_grad():
                past = model(input_ids=prompt, attention_mask=mask).past_key_values
                step = run if model is ours else model
                steps.append(step(input_ids=new, attention_mask=longer, past_key_values=past))
        torch.testing.assert_close(steps[1].logits, steps[0].logits, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


def test_blocks_of_tokens_are_refused_in_a_graph(name):
    """As images in Gemma 3 are: no layout draws them."""
    config = copy.deepcopy(CONFIGS["llama"][0])
    config._attn_implementation = name

    def layer(q, k, v, blocks):
        embeds = q.new_zeros(1, SEQLEN, 4)
        layout = masking_utils.create_causal_mask(
            config, embeds, None, None, block_sequence_ids=blocks
        )
        return attend(torch.nn.Module(), q, k, v, layout)[0]

    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    q, k, v = (x[:1] for x in tensors(SEQLEN, SEQLEN))
    blocks = torch.full((1, SEQLEN), -1)
    run(q, k, v, blocks)
    blocks[0, 3:6] = 0
    with pytest.raises(RuntimeError, match="neither causal, bidirectional, a window nor a packing"):
        run(q, k, v, blocks)
