"""ScaledTensors and every shape of descale in the attention functions, against float64.

The reference is attention of the dequantized inputs, so a descale, mean or rotation in the wrong
place shows: the bounds are those of an FP8 forward, and the mutations at the end fail them.
"""

from dataclasses import replace

import pytest
import torch

import flash8
import oracle
from cases import cumulative, int32
from flash8 import fp8
from tolerances import FP8_REL_L2, FP8_ROW_REL_L2, check_fp8_lse, rel_l2, row_rel_l2

LENGTHS_Q, LENGTHS_K = (150, 0, 300, 1), (280, 60, 300, 130)


def draw(seqlen_q=300, seqlen_k=400, heads=4, heads_kv=2, d=64, dv=32, batch=2):
    """q, k, v whose size changes from token to token and head to head, K and V with a bias."""
    q = torch.randn(batch, seqlen_q, heads, d) * torch.rand(heads, 1).add(0.5)
    k = torch.randn(batch, seqlen_k, heads_kv, d) * torch.rand(batch, seqlen_k, 1, 1).mul(2).add(
        0.2
    )
    v = torch.randn(batch, seqlen_k, heads_kv, dv) * torch.rand(batch, seqlen_k, 1, 1).mul(5).add(
        0.2
    )
    k[..., 3] += 6.0
    v[..., 5] += 4.0
    return q, k, v


def check(out, lse, reference, reference_lse):
    FP8_REL_L2.check("O", rel_l2(out, reference))
    FP8_ROW_REL_L2.check("row of O", row_rel_l2(out, reference))
    check_fp8_lse("LSE", lse, reference_lse)


SMOOTH = dict(smooth_k=True), dict(smooth_v=True)
PLAIN = {}, {}
MIXES = {
    "tensor": (("tensor",) * 3, {}, PLAIN),
    "head": (("head",) * 3, {}, PLAIN),
    "block": (("block",) * 3, {}, PLAIN),
    "mixed": (("block", "head", "tensor"), {}, PLAIN),
    "mixed blocks": (("head", "tensor", "block"), {}, PLAIN),
    "rotated": (("block",) * 3, dict(hadamard=11), PLAIN),
    "smooth": (("head",) * 3, {}, SMOOTH),
    "channels": (("block", "block", "channel"), {}, SMOOTH),
    "channels, v_colmajor": (("head", "head", "channel"), {}, ({}, dict(v_colmajor=True))),
    "all": (("block",) * 3, dict(hadamard=True), SMOOTH),
}


def scaled(q, k, v, mix, for_q=None, for_kv=None):
    granularity, both, (for_k, for_v) = MIXES[mix]
    return (
        fp8.quantize(q, granularity[0], **both, **(for_q or {})),
        fp8.quantize(k, granularity[1], **both, **for_k, **(for_kv or {})),
        fp8.quantize(v, granularity[2], **for_v, **(for_kv or {})),
    )


OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "window, sink": dict(window_size=(150, 20), s_aux=torch.tensor([2.0, -1.0, 0.0, 5.0])),
    "splits": dict(num_splits=3),
    "alibi": dict(alibi_slopes=torch.tensor([0.02, 0.01, 0.0, 0.004]), causal=True),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("option", OPTIONS)
def test_dense(mix, option):
    options = dict(OPTIONS[option])
    tensors = scaled(*draw(), mix)
    out, lse = flash8.flash_attn_func(*tensors, return_attn_probs=True, **options)
    options.pop("num_splits", None)
    assert out.dtype == torch.bfloat16
    check(out, lse, *oracle.attention(*map(fp8.dequantize, tensors), **options))


@pytest.mark.parametrize("mix", MIXES)
def test_packed(mix):
    cu_q, cu_k = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    q, k, v = (x[0] for x in draw(sum(LENGTHS_Q), sum(LENGTHS_K), batch=1))
    tensors = scaled(q, k, v, mix, dict(cu_seqlens=cu_q), dict(cu_seqlens=cu_k))
    index = dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    out, lse = flash8.flash_attn_varlen_func(
        *tensors, max_seqlen_q=300, max_seqlen_k=300, causal=True, return_attn_probs=True, **index
    )
    check(out, lse, *oracle.attention(*map(fp8.dequantize, tensors), causal=True, **index))


def pages_of(x, lengths, page_size, table):
    """(total, heads, d) rows laid into pages by a page table; the rest is zero."""
    pages = x.new_zeros(int(table.max()) + 1, page_size, *x.shape[1:])
    start = 0
    for b, length in enumerate(lengths):
        for t in range(length):
            pages[int(table[b, t // page_size]), t % page_size] = x[start + t]
        start += length
    return pages


@pytest.mark.parametrize("page_size", [16, 80, 128, 256])
@pytest.mark.parametrize("wide_q", [False, True])
def test_pages_with_descales_of_their_own(page_size, wide_q):
    lengths = (280, 60, 300)
    q, k, v = (x[0] for x in draw(150, sum(lengths), batch=1))
    count = -(-max(lengths) // page_size)
    table = torch.randperm(3 * count).view(3, count).to(torch.int32)
    k_pages, v_pages = (pages_of(x, lengths, page_size, table) for x in (k, v))
    mean = k.mean(dim=0)
    cu = int32((0, 50, 100, 150))
    scaled_k = fp8.quantize(k_pages, "page", smooth_k=mean)
    scaled_v = fp8.quantize(v_pages, "page")
    query = q.bfloat16() if wide_q else fp8.quantize(q, "block", cu_seqlens=cu)
    index = dict(cu_seqlens_q=cu, page_table=table, seqused_k=int32(lengths))
    out, lse = flash8.flash_attn_varlen_func(
        query,
        scaled_k,
        scaled_v,
        cu_seqlens_k=None,
        max_seqlen_q=50,
        max_seqlen_k=300,
        causal=True,
        return_attn_probs=True,
        **index,
    )
    wide = query.double() if wide_q else fp8.dequantize(query)
    reference = oracle.attention(
        wide, fp8.dequantize(scaled_k), fp8.dequantize(scaled_v), causal=True, **index
    )
    check(out, lse, *reference)


def test_dense_blocks_behind_left_padding_and_batch_index():
    """Tiles follow the blocks of the cache, not the first used key."""
    q, k, v = draw(20, 400, batch=3)
    tensors = scaled(q, k, v, "all")
    # One mean for all rows of the cache: those of a call are not those of its cache.
    k8 = fp8.quantize(k, "block", hadamard=True, smooth_k=k.mean(dim=(0, 1)))
    v8 = fp8.quantize(v, "block")
    rows, padding, lengths = int32((2, 0)), int32((37, 250)), int32((390, 391))
    out, lse, *_ = flash8.flash_attn_with_kvcache(
        replace(tensors[0], data=tensors[0].data[:2], descale=tensors[0].descale[:2]),
        k8,
        v8,
        cache_seqlens=lengths,
        cache_batch_idx=rows,
        cache_leftpad=padding,
        return_softmax_lse=True,
    )
    reference = oracle.attention(
        *(fp8.dequantize(tensors[0])[:2], fp8.dequantize(k8), fp8.dequantize(v8)),
        seqused_k=lengths,
        leftpad_k=padding,
        batch_idx=rows,
    )
    check(out, lse, *reference)


def test_raw_descales_of_q_per_query_head():
    q, k, v = draw()
    tensors = scaled(q, k, v, "head")
    assert tensors[0].descale.shape == (2, 4) and tensors[1].descale.shape == (2, 2)
    raw = flash8.flash_attn_func(
        *(x.data for x in tensors),
        q_descale=tensors[0].descale,
        k_descale=tensors[1].descale,
        v_descale=tensors[2].descale,
    )
    assert torch.equal(raw, flash8.flash_attn_func(*tensors))
    grouped = flash8.flash_attn_func(*(x.data for x in tensors), q_descale=torch.full((2, 2), 0.01))
    each = flash8.flash_attn_func(*(x.data for x in tensors), q_descale=torch.full((2, 4), 0.01))
    assert torch.equal(grouped, each)


def test_wide_q_over_quantized_keys():
    q, k, v = draw()
    for mix in ("head", "block", "smooth"):
        _, k8, v8 = scaled(q, k, v, mix)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            out, lse = flash8.flash_attn_func(q.to(dtype), k8, v8, return_attn_probs=True)
            assert out.dtype == dtype
            reference, reference_lse = oracle.attention(
                q.to(dtype), fp8.dequantize(k8), fp8.dequantize(v8)
            )
            assert rel_l2(out, reference) < (1e-5 if dtype == torch.float32 else 0.004)
            check_fp8_lse("LSE", lse, reference_lse)


def test_zero_means_change_nothing():
    tensors = scaled(*draw(), "head")
    zero = [replace(x, mean=torch.zeros(2, x.shape[-1])) for x in tensors[1:]]
    plain = flash8.flash_attn_func(*tensors, return_attn_probs=True)
    same = flash8.flash_attn_func(tensors[0], *zero, return_attn_probs=True)
    assert all(map(torch.equal, plain, same))


def test_rows_that_see_nothing_or_only_the_sink():
    """V's mean belongs to visible keys, K's to LSE of scores: neither touches an empty row."""
    q, k, v = draw(60, 40)
    tensors = scaled(q, k, v, "smooth")
    sink = torch.tensor([1.0, -1.0, 0.0, 3.0])
    out, lse = flash8.flash_attn_func(*tensors, causal=True, s_aux=sink, return_attn_probs=True)
    assert (out[:, :20] == 0).all()
    torch.testing.assert_close(lse[..., :20], sink[None, :, None].expand(2, 4, 20))
    out, lse = flash8.flash_attn_func(*tensors, causal=True, return_attn_probs=True)
    assert (out[:, :20] == 0).all() and torch.isneginf(lse[..., :20]).all()


# ------------------------------------------------------------------------------- mutations


def swapped(x):
    return replace(x, descale=x.descale.flip(-1))


MUTATIONS = {
    "K descales swapped": lambda q, k, v: (q, swapped(k), v),
    "V descales swapped": lambda q, k, v: (q, k, swapped(v)),
    "Q descales swapped": lambda q, k, v: (swapped(q), k, v),
    "no K mean": lambda q, k, v: (q, replace(k, mean=None), v),
    "no V mean": lambda q, k, v: (q, k, replace(v, mean=None)),
    "another rotation": lambda q, k, v: (
        replace(fp8.quantize(fp8.dequantize(q), "block", hadamard=1), rotation=k.rotation),
        k,
        v,
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_fail_the_bounds(mutation):
    tensors = scaled(*draw(), "all")
    reference = oracle.attention(*map(fp8.dequantize, tensors))
    out = flash8.flash_attn_func(*MUTATIONS[mutation](*tensors), return_attn_probs=True)
    with pytest.raises(AssertionError, match="above"):
        check(*out, *reference)


# ------------------------------------------------------------------------------- bad input


def raw(granularity="head", **shape):
    return [fp8.quantize(x, granularity) for x in draw(10, 300, batch=2, **shape)]


def refuse(match, *tensors, error=ValueError, call=flash8.flash_attn_func, **options):
    with pytest.raises(error, match=match):
        call(*tensors, **options)


def test_a_descale_per_key_token_is_refused_with_the_reason():
    q, k, v = raw()
    for shape in ((2, 300, 2), (2, 2, 300), (2, 300)):
        refuse(
            r"k_descale must be a scalar.*multiply per score",
            *(x.data for x in (q, k, v)),
            k_descale=torch.ones(shape),
        )


def test_bad_descales_and_means():
    q, k, v = raw()
    data = [x.data for x in (q, k, v)]
    refuse(r"v_descale must be.*\(2, 2, 3\).*got \(2, 2, 4\)", *data, v_descale=torch.ones(2, 2, 4))
    refuse(r"q_descale must be.*got \(2, 3\)", *data, q_descale=torch.ones(2, 3))
    refuse("k_descale must have dtype", *data, k_descale=torch.ones(()).double(), error=TypeError)
    refuse(r"k_mean must have shape.*\(2, 64\).*got \(64,\)", *data, k_mean=torch.ones(64))
    refuse("k_mean needs torch.float8_e4m3fn", *draw(), k_mean=torch.ones(2, 64))
    refuse("k_mean.*softcap = 5.0.*capped", *data, k_mean=torch.ones(2, 64), softcap=5.0)
    refuse(
        r"v_channel_descale must have shape.*\(2, 32\).*got \(32,\)",
        *data,
        v_channel_descale=torch.ones(32),
    )
    channels = fp8.quantize(fp8.dequantize(v), "channel")
    refuse("v_channel_descale must be None", q, k, channels, v_channel_descale=torch.ones(2, 32))
    refuse(
        "k must not have a descale per channel", q, fp8.quantize(fp8.dequantize(k), "channel"), v
    )
    refuse("v_channel_descale needs torch.float8", *draw(), v_channel_descale=torch.ones(2, 32))
    refuse("v_mean.*dropout_p = 0.1.*sum to 1", *data, v_mean=torch.ones(2, 32), dropout_p=0.1)
    refuse("q_descale needs.*bfloat16 q", q.data.bfloat16(), k, v, q_descale=torch.ones(()))
    refuse("k_descale must be None where k is a ScaledTensor", q, k, v, k_descale=torch.ones(()))
    refuse("v must have dtype torch.float8", q, k, v.data.bfloat16(), error=TypeError)
    refuse("k must have dtype torch.float8", q, k.data.bfloat16(), v, error=TypeError)


@pytest.mark.parametrize(
    "choice", [dict(granularity="head"), dict(v_colmajor=True), dict(smooth_v=True)], ids=str
)
def test_boundaries_must_be_those_of_the_quantization(choice):
    q, k, v = (x[0] for x in draw(300, 300, batch=1))
    mine, other = int32((0, 100, 300)), int32((0, 200, 300))
    q8, k8 = fp8.quantize(q, cu_seqlens=mine), fp8.quantize(k, cu_seqlens=mine)
    v8 = fp8.quantize(v, cu_seqlens=mine, **choice)
    flash8.flash_attn_varlen_func(q8, k8, v8, mine.clone(), mine.clone(), 200, 200)
    with pytest.raises(ValueError, match=r"cu_seqlens_k must be what v was.*100.*got \[0, 200"):
        flash8.flash_attn_varlen_func(q8, k8, v8, mine, other, 200, 200)
    plain = fp8.quantize(v, cu_seqlens=mine)  # one descale, whatever the sequences are
    flash8.flash_attn_varlen_func(q8, k8, plain, other, other, 200, 200)


def test_rotations_must_agree():
    q, k, v = draw()
    plain, rotated = fp8.quantize(k), fp8.quantize(k, hadamard=1)
    v8 = fp8.quantize(v)
    refuse("q and k must be rotated alike.*None.*seed=1", q.bfloat16(), rotated, v8)
    refuse("q and k must be rotated alike", fp8.quantize(q, hadamard=2), rotated, v8)
    refuse("q and k must be rotated alike", fp8.quantize(q, hadamard=2), plain, v8)
    refuse("v must not be rotated", fp8.quantize(q), plain, fp8.quantize(v, hadamard=True))
    refuse("q must not have had a mean", fp8.quantize(q, smooth_k=True), plain, v8)


def test_descales_by_token_are_for_caches():
    q, k, v = (torch.randn(1, 40, 1, 16).to(torch.float8_e4m3fn) for _ in range(3))
    refuse("A descale per token of k is for KV caches", q, k, v, k_descale=torch.ones(1, 40, 1))


def test_gradients_of_raw_fp8_name_fp8_attention():
    q, k, v = raw()
    sink = torch.zeros(4, requires_grad=True)
    wide = draw(10, 300)[0].requires_grad_()
    for out in (flash8.flash_attn_func(q, k, v, s_aux=sink), flash8.flash_attn_func(wide, k, v)):
        with pytest.raises(ValueError, match=r"no backward: call flash8\.fp8_attention"):
            out.sum().backward()
