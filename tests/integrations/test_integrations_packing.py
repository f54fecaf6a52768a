"""Packed sequences that a layer is told of, and the description that stands in a mask's place."""

import copy
import os
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="transformers is not installed: flash8[transformers]")

from transformers import AutoModelForCausalLM, Llama4TextConfig, LlamaConfig, masking_utils

from flash8.integrations import transformers as flash8_transformers
from flash8.integrations.transformers import packing
from flash8.integrations.transformers.attention import REFUSED, attend
from flash8.integrations.transformers.layouts import Cached, Dense, Packed
from flash8.integrations.transformers.masks import make_mask
from flash8.integrations.transformers.opaque import MaskUsedAsTensorError
from transformers_zoo import SIZES

DOCUMENTS = (7, 3, 9)
SEQLEN = sum(DOCUMENTS)
CU_SEQLENS = torch.tensor([0, 7, 10, 19], dtype=torch.int32)
BOUNDARIES = dict(
    cu_seq_lens_q=CU_SEQLENS, cu_seq_lens_k=CU_SEQLENS, max_length_q=9, max_length_k=9
)
POSITIONS = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]


@pytest.fixture(scope="module", autouse=True)
def name():
    return flash8_transformers.register()


def tensors(batch=1, seqlen=SEQLEN, seqlen_k=SEQLEN):
    return (torch.randn(batch, 2, n, 8, dtype=torch.float64) for n in (seqlen, seqlen_k, seqlen_k))


def alone(q, k, v, documents, **options):
    """Each document by itself, queries and keys at the same places."""
    module = SimpleNamespace(is_causal=True)
    pieces = zip(*(x.split(documents, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([attend(module, *piece, None, **options)[0] for piece in pieces], dim=1)


def check_alone(layout, **kwargs):
    q, k, v = tensors()
    out, _ = attend(SimpleNamespace(), q, k, v, layout, **kwargs)
    expected = alone(q, k, v, DOCUMENTS)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_position_ids_that_a_layer_is_handed():
    check_alone(make_mask(1, SEQLEN, SEQLEN), position_ids=POSITIONS)
    check_alone(None, position_ids=POSITIONS, is_causal=True)
    check_alone(make_mask(1, SEQLEN, SEQLEN), position_ids=POSITIONS + 2)  # as RoBERTa counts


def test_positions_are_looked_at_once_per_forward(monkeypatch):
    looks = []
    real = packing._restarts
    monkeypatch.setattr(packing, "_restarts", lambda *args: looks.append(1) or real(*args))
    layout = make_mask(1, SEQLEN, SEQLEN)
    for _layer in range(3):
        check_alone(layout, position_ids=POSITIONS)
    assert len(looks) == 1
    attend(SimpleNamespace(), *tensors(), layout, position_ids=POSITIONS.clone())
    assert len(looks) == 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_rows_that_are_padded_too(side, training):
    """transformers looks for packing in unpadded batches only; the layers look at all."""
    padding, documents = 4, (6, 9)
    tokens = slice(padding, None) if side == "left" else slice(-padding)
    mask = torch.zeros(2, SEQLEN, dtype=torch.long)
    mask[:, tokens] = 1
    position_ids = torch.ones(2, SEQLEN, dtype=torch.long)
    position_ids[:, tokens] = torch.cat([torch.arange(length) for length in documents])
    q, k, v = tensors(2)
    with torch.set_grad_enabled(training):
        layout = make_mask(2, SEQLEN, SEQLEN, attention_mask=mask)
        assert isinstance(layout, Packed if training or side == "right" else Cached)
        out, _ = attend(SimpleNamespace(), q, k, v, layout, position_ids=position_ids)
    expected = alone(*(x[:, :, tokens] for x in (q, k, v)), documents)
    torch.testing.assert_close(out[:, tokens], expected, rtol=1e-10, atol=1e-10)


def test_ordinary_positions_change_nothing():
    layout = make_mask(1, SEQLEN, SEQLEN)
    q, k, v = tensors()
    expected, _ = attend(SimpleNamespace(), q, k, v, layout)
    ordinary = [
        torch.arange(SEQLEN)[None],
        torch.arange(SEQLEN)[None] + 40,
        torch.arange(SEQLEN)[None] * 2,  # gaps are no new sequence
        POSITIONS.expand(3, 1, SEQLEN),  # three coordinates per token
        POSITIONS.float(),
    ]
    for position_ids in ordinary:
        out, _ = attend(SimpleNamespace(), q, k, v, layout, position_ids=position_ids)
        assert torch.equal(out, expected)


def test_packing_over_a_cache_is_refused():
    q, k, v = tensors(1, 4, SEQLEN)
    layout = make_mask(1, 4, SEQLEN, q_offset=SEQLEN - 4)
    assert isinstance(layout, Dense)
    for position_ids in (torch.tensor([[15, 16, 0, 1]]), torch.tensor([[0, 0, 0, 0]])):
        with pytest.raises(ValueError, match="not supported over a KV cache"):
            attend(SimpleNamespace(), q, k, v, layout, position_ids=position_ids)


def test_half_of_the_boundaries_is_refused_and_lengths_are_found():
    layout = make_mask(1, SEQLEN, SEQLEN)
    check_alone(layout, **BOUNDARIES)
    check_alone(layout, **{name: BOUNDARIES[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k")})
    with pytest.raises(ValueError, match="must be given together"):
        attend(SimpleNamespace(), *tensors(), layout, cu_seq_lens_q=CU_SEQLENS)


@pytest.mark.parametrize("with_positions", [True, False])
def test_chunks_are_kept_inside_given_boundaries(with_positions, name):
    """Llama 4: chunks count from the begin of each document."""
    config = SimpleNamespace(_attn_implementation=name, attention_chunk_size=4)
    embeds = torch.empty(1, SEQLEN, 0)
    position_ids = POSITIONS if with_positions else None
    layout = masking_utils.create_chunked_causal_mask(
        config, embeds, None, None, position_ids=position_ids
    )
    chunks = (4, 3, 3, 4, 4, 1)
    q, k, v = tensors()
    expected = alone(q, k, v, chunks)
    out, _ = attend(SimpleNamespace(), q, k, v, layout, **BOUNDARIES)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    out, _ = attend(SimpleNamespace(), q, k, v, layout, position_ids=POSITIONS)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_short_packed_rows_of_a_chunked_model(name):
    """Rows that fit a chunk hold packed sequences all the same."""
    config = SimpleNamespace(_attn_implementation=name, attention_chunk_size=64)
    layout = masking_utils.create_chunked_causal_mask(
        config, torch.empty(1, SEQLEN, 0), None, None, position_ids=POSITIONS
    )
    check_alone(layout)


def test_llama4_with_boundaries_equals_each_document_alone(name):
    config = Llama4TextConfig(
        **{key: value for key, value in SIZES.items() if hasattr(Llama4TextConfig, key)}
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name).eval()
    tokens = torch.randint(3, 60, (1, SEQLEN))
    with torch.no_grad():
        packed = model(input_ids=tokens, position_ids=POSITIONS, **BOUNDARIES, use_cache=False)
        single = [
            model(input_ids=document, use_cache=False).logits[0]
            for document in tokens.split(DOCUMENTS, dim=1)
        ]
    torch.testing.assert_close(packed.logits[0], torch.cat(single), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("argument", REFUSED)
def test_arguments_that_change_the_result_are_refused(argument):
    given = {argument: torch.zeros(1)}
    with pytest.raises(ValueError, match=f"{argument} is not supported; use attn_implementation"):
        attend(SimpleNamespace(), *tensors(), None, **given)


USES = {
    "added": lambda mask: torch.zeros(2, 2) + mask,
    "added to": lambda mask: mask + torch.zeros(2, 2),
    "multiplied": lambda mask: 1.0 - mask,
    "compared": lambda mask: mask == 0,
    "indexed": lambda mask: mask[:, :, :, :4],
    "inverted": lambda mask: ~mask,
    "in torch.where": lambda mask: torch.where(mask, 1.0, 0.0),
    "in masked_fill": lambda mask: torch.zeros(2).masked_fill(mask, 1.0),
    "in a list": lambda mask: torch.cat([torch.zeros(2), mask]),
    "in SDPA": lambda mask: torch.nn.functional.scaled_dot_product_attention(
        *torch.zeros(3, 1, 1, 2, 8), attn_mask=mask
    ),
    "asked for its type": lambda mask: mask.dtype,
    "asked for its shape": lambda mask: mask.shape[-1],
    "reshaped": lambda mask: mask.view(1, 1, 2, 2),
    "as truth": lambda mask: 1 if mask else 0,
    "counted": lambda mask: len(mask),
    "iterated": lambda mask: list(mask),
}


@pytest.mark.parametrize("use", USES)
def test_a_description_is_no_tensor(use):
    config = SimpleNamespace(model_type="bloom")
    mask = make_mask(1, 4, 4, config=config)
    with pytest.raises(MaskUsedAsTensorError, match=r"type 'bloom' computes attention by itself"):
        USES[use](mask)


def test_a_description_passes_through_model_code():
    mask = make_mask(1, 4, 4)
    assert mask is not None
    assert mask.ndim == 4
    assert mask.contiguous() is mask.clone() is mask.detach() is mask
    assert not hasattr(mask, "shape")
    assert getattr(mask, "dtype", None) is None
    assert mask != "eager"
    assert {mask: 1}[mask] == 1
    assert mask in [None, mask]
    assert copy.deepcopy(mask).window == mask.to("cpu").window == mask.window
    x = torch.ones(2, requires_grad=True)
    for reentrant in (True, False):
        out = checkpoint(lambda x, mask: x * mask.window[0], x, mask, use_reentrant=reentrant)
        out.sum().backward()


def test_reentrant_gradient_checkpointing(name):
    config = LlamaConfig(**{key: SIZES[key] for key in SIZES if hasattr(LlamaConfig, key)})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name).train()
    tokens = torch.randint(3, 60, (1, SEQLEN))
    inputs = dict(input_ids=tokens, position_ids=POSITIONS, labels=tokens, use_cache=False)
    losses = []
    for enable in (False, True):
        if enable:
            model.activation_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append((loss.item(), model.lm_head.weight.grad.clone()))
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])


def test_a_prefill_without_a_mask_is_one_graph(name):
    config = LlamaConfig(**{key: SIZES[key] for key in SIZES if hasattr(LlamaConfig, key)})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name).eval()
    tokens = torch.randint(3, 60, (2, SEQLEN))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(input_ids=tokens).logits, expected)


def test_compiled_forwards_are_one_graph_and_refuse_unseen_packing(name):
    """A model that hands position_ids to its layers only; in a graph they cannot be looked at."""
    module = torch.nn.Module()

    def layer(q, k, v, position_ids):
        layout = make_mask(1, SEQLEN, SEQLEN)
        return attend(module, q, k, v, layout, position_ids=position_ids)[0]

    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    q, k, v = tensors()
    ordinary = torch.arange(SEQLEN)[None]
    assert torch.equal(compiled(q, k, v, ordinary), layer(q, k, v, ordinary))
    with pytest.raises(RuntimeError, match="position_ids restart: inside"):
        compiled(q, k, v, POSITIONS)
