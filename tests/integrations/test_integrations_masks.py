"""The layouts that stand in for transformers' masks, against the dense masks themselves."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="transformers is not installed: flash8[transformers]")

from transformers import (
    DynamicCache,
    MistralConfig,
    StaticCache,
    masking_utils,
)

from flash8.integrations import transformers as flash8_transformers
from flash8.integrations.transformers.attention import attend
from flash8.integrations.transformers.layouts import Cached, Dense, Packed
from flash8.integrations.transformers.masks import make_mask
from transformers_masks import (
    BATCH,
    HEAD_DIM,
    HEADS_KV,
    MASKS,
    PADDING,
    SEQLEN,
    build,
    check,
    padding_mask,
    tensors,
)


@pytest.fixture(scope="module", autouse=True)
def name():
    return flash8_transformers.register()


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", MASKS)
def test_padded_batch(kind, padding, training, name):
    mask = padding_mask(padding)
    q, k, v = tensors(SEQLEN, SEQLEN)
    with torch.set_grad_enabled(training):
        if padding == "holes" and "window" in kind:
            with pytest.raises(ValueError, match="between valid tokens"):
                build(kind, name, SEQLEN, mask)
            return
        layout = build(kind, name, SEQLEN, mask)
        check(layout, build(kind, "eager", SEQLEN, mask), q, k, v, mask, "bi" not in kind)


@pytest.mark.parametrize(
    "kind", [kind for kind in MASKS if "bidirectional" not in kind and kind != "window_1"]
)
@pytest.mark.parametrize("lengths", [[(4, 7), (1, 10), (11,)], [(1,) * 11, (5, 1, 5), (2, 9)]])
def test_packed_by_position_ids(kind, lengths, name):
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    layout = build(kind, name, SEQLEN, position_ids=position_ids)
    assert isinstance(layout, Packed)
    if kind == "causal":
        assert layout.keys.cu_seqlens.diff().tolist() == [n for row in lengths for n in row]
    dense = build(kind, "eager", SEQLEN, position_ids=position_ids)
    check(layout, dense, *tensors(SEQLEN, SEQLEN))


def test_plain_masks_are_dense_and_never_none(name):
    """None would be a mask that hides nothing, to a model that computes attention itself."""
    position_ids = torch.arange(SEQLEN).expand(BATCH, -1)
    cache = filled_cache("dynamic", None, SEQLEN - 1)
    plain = [
        build("causal", name, SEQLEN),
        build("causal", name, SEQLEN, position_ids=position_ids),
        build("causal", name, SEQLEN, torch.ones(BATCH, SEQLEN)),
        build("causal", name, 1, cache=cache),
        make_mask(BATCH, SEQLEN, SEQLEN),
    ]
    for layout in plain:
        assert isinstance(layout, Dense)
        assert (layout.causal, layout.window) == (True, (-1, -1))
    assert build("window_4", name, SEQLEN).window == (3, 0)
    assert not build("bidirectional", name, SEQLEN).causal


def filled_cache(kind, window, length):
    config = MistralConfig(num_hidden_layers=1, sliding_window=window)
    cache = (
        DynamicCache(config=config)
        if kind == "dynamic"
        else StaticCache(config=config, max_cache_len=SEQLEN + 3)
    )
    if length:
        cache.update(*torch.randn(2, BATCH, HEADS_KV, length, HEAD_DIM, dtype=torch.float64), 0)
    return cache


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("q_length", [1, 3, SEQLEN])
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("window", [None, 4])
def test_over_a_cache(window, cache_kind, q_length, padding, name):
    kind = "causal" if window is None else "window_4"
    mask = padding_mask(padding)
    cache = filled_cache(cache_kind, window, SEQLEN - q_length)
    dense = build(kind, "eager", q_length, mask, cache)
    q, k, v = tensors(q_length, q_length)
    with torch.no_grad():
        if padding == "holes" and window is not None and q_length > 1:
            with pytest.raises(ValueError, match="between valid tokens"):
                build(kind, name, q_length, mask, cache)
            return
        layout = build(kind, name, q_length, mask, cache)
        k, v = cache.update(k, v, 0)
        check(layout, dense, q, k, v, mask[:, SEQLEN - q_length :])
    if padding in ("none", "left") and cache_kind == "static" and window is None:
        assert isinstance(layout, Cached)


def test_left_padding_in_training_is_packed_so_that_dropout_works(name):
    mask = padding_mask("left")
    assert isinstance(build("causal", name, SEQLEN, mask), Packed)
    with torch.no_grad():
        layout = build("causal", name, SEQLEN, mask)
    assert isinstance(layout, Cached)
    with pytest.raises(ValueError, match="attention dropout over a KV cache"):
        attend(SimpleNamespace(), *tensors(SEQLEN, SEQLEN), layout, dropout=0.1)


def test_cross_attention_keeps_every_query(name):
    mask = padding_mask("right")
    config = SimpleNamespace(_attn_implementation=name)
    dense_config = SimpleNamespace(_attn_implementation="eager")
    embeds, encoded = torch.empty(BATCH, SEQLEN, 0), torch.empty(BATCH, SEQLEN, 0)
    create = masking_utils.create_bidirectional_mask
    layout = create(config, embeds, mask, encoder_hidden_states=encoded)
    dense = create(dense_config, embeds, mask, encoder_hidden_states=encoded)
    check(layout, dense, *tensors(SEQLEN, SEQLEN), is_causal=False)


def test_masks_that_are_not_served_are_refused(name):
    def composed(batch, head, query, key):
        return key < 3

    with pytest.raises(ValueError, match="composed"):
        build("causal", name, SEQLEN, or_mask_function=composed)
    blocks = torch.full((BATCH, SEQLEN), -1)
    blocks[:, 2:5] = 0
    with pytest.raises(ValueError, match="neither causal, bidirectional"):
        build("causal", name, SEQLEN, block_sequence_ids=blocks)
    with pytest.raises(ValueError, match="over a KV cache"):
        build("chunk_4", name, 2, cache=filled_cache("dynamic", None, 6))


@pytest.mark.parametrize(
    "function",
    [
        lambda batch, head, query, key: (query >= key) & ((query - key) % 2 == 0),
        lambda batch, head, query, key: (query >= key) & ((query - key < 3) | (key < 2)),
        lambda batch, head, query, key: (query >= key) | (key < 4),
        lambda batch, head, query, key: (query - key).abs() < 3,
        lambda batch, head, query, key: key > query,
    ],
    ids=["stride", "window_and_first", "prefix", "band", "reversed"],
)
def test_unknown_mask_functions_are_refused(function):
    with pytest.raises(ValueError, match="neither causal, bidirectional"):
        make_mask(BATCH, SEQLEN, SEQLEN, mask_function=function)


def test_a_mask_longer_than_the_used_cache(name):
    mask = torch.cat([padding_mask("left"), torch.ones(BATCH, 3, dtype=torch.long)], dim=1)
    cache = filled_cache("static", None, SEQLEN - 2)
    with torch.no_grad():
        layout = build("causal", name, 2, mask, cache)
    assert layout.used.tolist() == [SEQLEN] * BATCH
    assert layout.leftpad.tolist() == [5, 1, 0]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("given", ["by the layer", "by the call"])
def test_layers_that_ask_for_no_mask(is_causal, given):
    """Vision towers and the like: the layer or the call says whether attention is causal."""
    q, k, v = tensors(SEQLEN, SEQLEN)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    layer = SimpleNamespace(is_causal=is_causal if given == "by the layer" else not is_causal)
    options = {} if given == "by the layer" else {"is_causal": is_causal}
    out, _ = attend(layer, q, k, v, None, **options)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_window_without_a_layout(is_causal):
    q, k, v = tensors(SEQLEN, SEQLEN)
    distance = torch.arange(SEQLEN)[:, None] - torch.arange(SEQLEN)
    visible = (distance < 3) & (distance >= 0) if is_causal else distance.abs() <= 3
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    out, _ = attend(SimpleNamespace(is_causal=is_causal), q, k, v, None, sliding_window=3)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-10, atol=1e-10)


def test_layouts_move_between_devices(name):
    layout = build("causal", name, SEQLEN, padding_mask("right"))
    moved = layout.to("meta")
    assert moved.keys.cu_seqlens.is_meta
    assert moved.queries.indices.is_meta
    assert moved.window == layout.window
    # Models cast masks; a layout has no values to cast.
    for cast in (layout.to(torch.float16), layout.to("cpu", torch.bool), layout.to(torch.zeros(1))):
        assert cast.keys.cu_seqlens.dtype == torch.int32
        assert cast.queries.indices.dtype == torch.int64
        assert torch.equal(cast.keys.cu_seqlens, layout.keys.cu_seqlens)
    assert layout.to(device="meta", dtype=torch.bool, non_blocking=True).keys.cu_seqlens.is_meta
