"""An e4m3 KV cache whose tokens, or small pages, have descales of their own."""

import math

import pytest
import torch

import flash8
import oracle
from cases import int32
from flash8.tensors.float8 import E4M3
from tolerances import FP8_CACHE_DEQUANTISED, check_fp8_lse, rel_l2

HEADS, HEADS_KV, D = 4, 2, 64
LENGTHS = (70, 0, 33)


def draw(page_size=None, rows=3, dtype=torch.bfloat16):
    """q, caches of 90 places a sequence, the arguments of a call, those of the oracle."""
    q = torch.randn(3, rows, HEADS, D).to(dtype)
    given = {"cache_seqlens": int32(LENGTHS)}
    where = {"seqused_k": int32(LENGTHS)}
    shape = (3, 90)
    if page_size is not None:
        columns = -(-90 // page_size)
        shape = (3 * columns + 2, page_size)
        table = torch.randperm(shape[0])[: 3 * columns].view(3, columns).int()
        given["page_table"] = where["page_table"] = table
    k, v = ((8 * torch.randn(*shape, HEADS_KV, D)).to(E4M3) for _ in "kv")
    return q, k, v, given, where


def descales(k, granularity):
    shape = k.shape[:3] if granularity == "token" else (k.shape[0], HEADS_KV, 1)
    return {f"{x}_descale": torch.exp2(4 * torch.rand(shape) - 5) for x in "kv"}


def dequantized(x, descale):
    of_tokens = descale if descale.shape == x.shape[:3] else descale.transpose(1, 2)
    return x.double() * of_tokens[..., None]


CALLS = [(None, "token"), (24, "token"), (3, "token"), (1, "token"), (3, "page"), (17, "page")]


@pytest.mark.parametrize("page_size, granularity", CALLS)
def test_against_the_dequantized_cache(page_size, granularity):
    q, k, v, given, where = draw(page_size)
    scales = descales(k, granularity)
    out, lse, *_ = flash8.flash_attn_with_kvcache(
        q, k, v, causal=True, return_softmax_lse=True, **given, **scales
    )
    real = [dequantized(x, scales[f"{name}_descale"]) for name, x in (("k", k), ("v", v))]
    exact, exact_lse = oracle.attention(q, *real, causal=True, **where)
    FP8_CACHE_DEQUANTISED.check("O", rel_l2(out, exact))
    check_fp8_lse("LSE", lse, exact_lse)
    swapped = {"k_descale": scales["v_descale"], "v_descale": scales["k_descale"]}
    wrong = flash8.flash_attn_with_kvcache(q, k, v, causal=True, **given, **swapped)
    with pytest.raises(AssertionError, match="above"):
        FP8_CACHE_DEQUANTISED.check("O", rel_l2(wrong, exact))


@pytest.mark.parametrize("page_size", [None, 16])
def test_e4m3_queries(page_size):
    q, k, v, given, where = draw(page_size)
    scales, q8, q_descale = descales(k, "token"), q.to(E4M3), torch.tensor(0.75)
    out = flash8.flash_attn_with_kvcache(q8, k, v, q_descale=q_descale, **given, **scales)
    assert out.dtype == torch.bfloat16
    real = [dequantized(x, scales[f"{name}_descale"]) for name, x in (("k", k), ("v", v))]
    exact, _ = oracle.attention(0.75 * q8.double(), *real, **where)
    FP8_CACHE_DEQUANTISED.check("O", rel_l2(out, exact))


@pytest.mark.parametrize("page_size", [None, 16])
def test_descales_that_no_query_sees_may_be_anything(page_size):
    """Left of the window, past the end, of freed pages."""
    q, k, v, given, _ = draw(page_size)
    scales = descales(k, "token")
    given |= {"window_size": (20, 0)}
    want = flash8.flash_attn_with_kvcache(q, k, v, **given, **scales)
    seen = torch.zeros(k.shape[:2], dtype=torch.bool)
    for b, length in enumerate(LENGTHS):
        keys = torch.arange(max(0, length - 23), length)
        rows = b if page_size is None else given["page_table"][b].long()[keys // page_size]
        seen[rows, keys if page_size is None else keys % page_size] = True
    for value in (math.nan, -1.0):
        hostile = {n: torch.where(seen[..., None], x, value) for n, x in scales.items()}
        found = flash8.flash_attn_with_kvcache(q, k, v, **given, **hostile)
        assert torch.equal(found, want)
    bad = scales["v_descale"].clone()
    bad[seen] = -1.0
    with pytest.raises(ValueError, match="v_descale must be positive and finite"):
        flash8.flash_attn_with_kvcache(q, k, v, **given, **{**scales, "v_descale": bad})


def test_new_rows_come_quantized():
    q, k, v, given, _ = draw()
    scales, new = descales(k, "token"), torch.randn(3, 2, HEADS_KV, D)
    with pytest.raises(ValueError, match=r"k must be .*e4m3fn where k_descale has a value for"):
        flash8.flash_attn_with_kvcache(q, k, v, new, new, **given, **scales)
    rows = [new.to(E4M3), (2 * new).to(E4M3)]
    caches = [k.clone(), v.clone()]
    out = flash8.flash_attn_with_kvcache(q, *caches, *rows, **given, **scales)
    for cache, old, row in zip(caches, (k, v), rows, strict=True):
        want = old.clone()
        for b, length in enumerate(LENGTHS):
            want[b, length : length + 2] = row[b]
        assert torch.equal(cache.view(torch.uint8), want.view(torch.uint8))
    given["cache_seqlens"] = given["cache_seqlens"] + 2
    assert torch.equal(out, flash8.flash_attn_with_kvcache(q, *caches, **given, **scales))


def test_wrong_shapes():
    q, k, v, given, _ = draw()
    with pytest.raises(ValueError, match=r"k_descale must be a scalar .* or \(3, 90, 2\); got"):
        flash8.flash_attn_with_kvcache(q, k, v, **given, k_descale=torch.ones(3, 89, 2))
