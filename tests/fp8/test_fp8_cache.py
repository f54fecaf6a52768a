"""An e4m3 KV cache: queries of 16 bits, append that quantizes, a mean frozen at prefill."""

import pytest
import torch

import flash8
import oracle
from cases import cumulative, int32
from flash8 import fp8
from flash8.tensors.float8 import E4M3, saturating_cast
from tolerances import FP8_CACHE_DEQUANTISED, FP8_CACHE_TOTAL, check_fp8_lse, rel_l2

HEADS, HEADS_KV, D, DV = 4, 2, 64, 64


def draw(rows, seqlen, bias=0.0, dtype=torch.bfloat16):
    q = torch.randn(2, rows, HEADS, D).to(dtype)
    k = torch.randn(2, seqlen, HEADS_KV, D)
    k[..., 40] += bias  # outside of what rotary embedding turns
    return q, k.to(dtype), torch.randn(2, seqlen, HEADS_KV, DV).to(dtype)


def rope_tables(length=600):
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(16) / 16)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("granularity", ["tensor", "head", "block"])
@pytest.mark.parametrize("bias", [0.0, 8.0])
def test_bounds_of_a_16_bit_query_over_an_e4m3_cache(granularity, bias):
    q, k, v = draw(4, 500, bias)
    k8 = fp8.quantize(k, granularity, smooth_k=bias > 0)
    v8 = fp8.quantize(v, granularity)
    out, lse, *_ = flash8.flash_attn_with_kvcache(q, k8, v8, causal=True, return_softmax_lse=True)
    seen, seen_lse = oracle.attention(q, fp8.dequantize(k8), fp8.dequantize(v8), causal=True)
    FP8_CACHE_DEQUANTISED.check("O", rel_l2(out, seen))
    check_fp8_lse("LSE", lse, seen_lse)
    FP8_CACHE_TOTAL.check("O", rel_l2(out, oracle.attention(q, k, v, causal=True)[0]))


def test_mutations_of_the_cache_bounds():
    q, k, v = draw(4, 500)
    k8, v8 = fp8.quantize(k, "head"), fp8.quantize(v, "head")
    seen = oracle.attention(q, fp8.dequantize(k8), fp8.dequantize(v8))[0]
    wrong = {
        "descales swapped": dict(k_descale=v8.descale, v_descale=k8.descale * 1.02),
        "no descale of K": dict(v_descale=v8.descale),
    }
    for descales in wrong.values():
        out = flash8.flash_attn_with_kvcache(q, k8.data, v8.data, **descales)
        with pytest.raises(AssertionError, match="above"):
            FP8_CACHE_DEQUANTISED.check("O", rel_l2(out, seen))
    out = flash8.flash_attn_with_kvcache(q, k8, v8, causal=True)
    with pytest.raises(AssertionError, match="above"):
        FP8_CACHE_DEQUANTISED.check("O", rel_l2(out, seen))
    coarse = fp8.dequantize(fp8.quantize(k, dtype=torch.float8_e5m2)).bfloat16()
    out = flash8.flash_attn_with_kvcache(q, coarse, v)
    with pytest.raises(AssertionError, match="above"):
        FP8_CACHE_TOTAL.check("O", rel_l2(out, oracle.attention(q, k, v)[0]))


# -------------------------------------------------------------------------------------- append


def expected_rows(k, rope, start, mean, descale):
    """Rotated, without the mean, scaled and rounded once: (rows, heads_kv, D) of one sequence."""
    cos, sin = rope
    turned = oracle.rotate(k.double(), cos, sin, start + torch.arange(k.shape[0]), True).float()
    return saturating_cast((turned - mean) / descale[..., None])


@pytest.mark.parametrize("shape", ["scalar", "head"])
@pytest.mark.parametrize("packed", [False, True])
def test_append_rotates_shifts_and_quantizes_once(shape, packed):
    q, k, v = draw(6, 5, bias=8.0)
    k_descale = torch.tensor(0.0625) if shape == "scalar" else torch.tensor([[0.0625, 0.125]] * 2)
    v_descale = torch.tensor(0.03125)
    mean = torch.randn(2, HEADS_KV, D)
    caches = [torch.zeros(2, 90, HEADS_KV, D).to(E4M3) for _ in range(2)]
    lengths, rope = int32((40, 70)), rope_tables()
    new, index = (k, v), {}
    if packed:
        index = dict(cu_seqlens_k_new=cumulative((5, 5)))
        new = (k.flatten(0, 1), v.flatten(0, 1))
    flash8.flash_attn_with_kvcache(
        q,
        *caches,
        *new,
        rotary_cos=rope[0],
        rotary_sin=rope[1],
        cache_seqlens=lengths,
        causal=True,
        k_descale=k_descale,
        v_descale=v_descale,
        k_mean=mean,
        **index,
    )
    for b, start in enumerate(lengths.tolist()):
        scale = k_descale if shape == "scalar" else k_descale[b]
        rows = caches[0][b, start : start + 5]
        expected = expected_rows(k[b], rope, start, mean[b], scale.expand(HEADS_KV))
        # The oracle rotates in float64: a value on a boundary may round the other way.
        different = rows.float() != expected.float()
        assert different.float().mean() < 0.01
        assert (rows.float() - expected.float()).abs().max() <= 0.13 * expected.float().abs().max()
        values = saturating_cast(v[b].float() / v_descale)
        assert torch.equal(caches[1][b, start : start + 5].float(), values.float())
        assert (caches[0][b, start + 5 :].float() == 0).all()


@pytest.mark.parametrize("page_size", [16, 128])
def test_append_into_pages_reads_the_descale_of_each_page(page_size):
    """New rows cross from one page into the next, whose descale is eight times as large."""
    q, k, v = draw(20, 20)
    count = 256 // page_size
    table = torch.randperm(2 * count).view(2, count).to(torch.int32)
    caches = [torch.zeros(2 * count, page_size, HEADS_KV, D).to(E4M3) for _ in range(2)]
    descale = torch.full((2 * count, HEADS_KV, 1), 2.0**-6)
    second = table[:, 128 // page_size]
    descale[second.long()] *= 8
    flash8.flash_attn_with_kvcache(
        q,
        *caches,
        k,
        v,
        cache_seqlens=118,
        page_table=table,
        k_descale=descale,
        v_descale=descale,
    )
    for b in range(2):
        for cache, new in ((caches[0], k), (caches[1], v)):
            for t in range(20):
                page, slot = int(table[b, (118 + t) // page_size]), (118 + t) % page_size
                expected = saturating_cast(new[b, t].float() / descale[page])
                assert torch.equal(cache[page, slot].float(), expected.float())


@pytest.mark.parametrize("q_dtype", [torch.bfloat16, E4M3])
def test_prefill_then_decode_with_a_frozen_mean(q_dtype):
    """The mean and the scales of the prefill serve every later token."""
    q, k, v = draw(400, 400, bias=8.0)
    rope = rope_tables()
    prefill = 300
    k8 = fp8.quantize(k[:, :prefill], "head", smooth_k=True, rope=rope)
    v8 = fp8.quantize(v[:, :prefill], "head")
    caches = [torch.zeros(2, 512, HEADS_KV, D).to(E4M3) for _ in range(2)]
    caches[0][:, :prefill], caches[1][:, :prefill] = k8.data, v8.data
    descales = dict(k_descale=k8.descale, v_descale=v8.descale)
    outs, lses = [], []
    for t in range(prefill, 400, 4):
        query = q[:, t : t + 4]
        step = dict(rotary_cos=rope[0], rotary_sin=rope[1], causal=True, return_softmax_lse=True)
        if q_dtype == E4M3:
            scaled = fp8.quantize(query, "head")
            query, step["q_descale"] = scaled.data, scaled.descale
        out, lse, *_ = flash8.flash_attn_with_kvcache(
            query,
            *caches,
            k[:, t : t + 4],
            v[:, t : t + 4],
            cache_seqlens=t,
            k_mean=k8.mean,
            **descales,
            **step,
        )
        outs.append(out)
        lses.append(lse)
    positions = torch.arange(400)
    turned = [
        torch.stack([oracle.rotate(x[b], *rope, positions, True) for b in range(2)]) for x in (q, k)
    ]
    expected, expected_lse = oracle.attention(turned[0][:, prefill:], turned[1], v, causal=True)
    # With e4m3 queries, rotated in e4m3, every operand has its rounding.
    limit = 0.05 if q_dtype == torch.bfloat16 else 0.09
    assert rel_l2(torch.cat(outs, 1), expected) < limit
    lse_limit = 0.1 if q_dtype == torch.bfloat16 else 0.4
    assert (torch.cat(lses, -1) - expected_lse).abs().max() < lse_limit


def test_an_e4m3_append_is_written_as_it_is():
    q, k, v = draw(2, 3)
    caches = [torch.zeros(2, 16, HEADS_KV, D).to(E4M3) for _ in range(2)]
    new = [saturating_cast(x.float()) for x in (k, v)]
    options = dict(cache_seqlens=4, k_descale=torch.tensor(0.5), v_descale=torch.tensor(2.0))
    flash8.flash_attn_with_kvcache(q, *caches, *new, **options)
    for cache, x in zip(caches, new, strict=True):
        assert torch.equal(cache[:, 4:7].float(), x.float())


def test_nan_and_infinity_are_appended_as_the_quantizer_has_them():
    q, k, v = draw(1, 1)
    k[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -1e30])
    caches = [torch.zeros(2, 16, HEADS_KV, D).to(E4M3) for _ in range(2)]
    flash8.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=4)
    row = caches[0][0, 4, 0].float()
    assert row[0].isnan() and row[1] == 448.0 and row[2] == -448.0


# ----------------------------------------------------------------------------------- bad input


def test_bad_input_leaves_the_cache_unchanged():
    q, k, v = draw(2, 3)
    caches = [torch.zeros(2, 16, HEADS_KV, D).to(E4M3) for _ in range(2)]
    rotated = fp8.quantize(torch.randn(2, 16, HEADS_KV, D), hadamard=True)
    plain = fp8.quantize(torch.randn(2, 16, HEADS_KV, D))
    scaled_q = fp8.quantize(q, hadamard=True)
    cases = [
        ((q, *caches, k, saturating_cast(v.float())), {}, TypeError, "v must have k's dtype"),
        (
            (q, *caches, k, v),
            dict(cache_seqlens=15),
            ValueError,
            "room for 3 new rows|cache_seqlens",
        ),
        ((q, *caches, k, v), dict(k_descale=torch.ones(2, 4)), ValueError, "k_descale"),
        ((q, *caches, k, v), dict(k_mean=torch.ones(2, 3)), ValueError, "k_mean"),
        ((q, *caches, k, v), dict(q_descale=torch.ones(())), ValueError, "q_descale needs"),
        ((scaled_q, rotated, plain, k, v), {}, ValueError, "k_cache is rotated.*e4m3fn"),
        ((q, caches[0], caches[1].bfloat16(), k, v), {}, TypeError, "v_cache|v must have dtype"),
    ]
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=message):
            flash8.flash_attn_with_kvcache(*arguments, **{"cache_seqlens": 4, **options})
    assert all((cache.float() == 0).all() for cache in caches)
