"""flash_attn_with_kvcache: append, rotary, pages, batch_idx, leftpad, splits, metadata."""

from dataclasses import replace

import pytest
import torch

import flash8
from cases import int32
from kvcache_cases import (
    HEAD_DIM,
    HEAD_DIM_V,
    HEADS,
    HEADS_KV,
    LENGTHS,
    SLOTS,
    call,
    check,
    problem,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_decode_without_append(dtype, causal):
    check(*problem(dtype), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("new", [1, 3, 5])
def test_append(dtype, causal, new):
    check(*problem(dtype, new=new), causal=causal)


@pytest.mark.parametrize("page_size", [1, 3, 4, 16, 128])
@pytest.mark.parametrize("batch_idx", [False, True])
@pytest.mark.parametrize("leftpad", [False, True])
@pytest.mark.parametrize("new", [0, 3])
def test_pages_batch_idx_leftpad(page_size, batch_idx, leftpad, new):
    args = problem(page_size=page_size, batch_idx=batch_idx, leftpad=leftpad, new=new)
    check(*args, causal=True)


@pytest.mark.parametrize("batch_idx", [False, True])
@pytest.mark.parametrize("leftpad", [False, True])
def test_dense_cache_batch_idx_leftpad(batch_idx, leftpad):
    check(*problem(batch_idx=batch_idx, leftpad=leftpad, new=2), causal=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 32])
@pytest.mark.parametrize(
    "mask", [{}, dict(causal=True), dict(window_size=(9, 2)), dict(causal=True, attention_chunk=8)]
)
def test_rotary(dtype, interleaved, rotary_dim, mask):
    args = problem(dtype, new=3, rotary_dim=rotary_dim, interleaved=interleaved)
    check(*args, **mask)


@pytest.mark.parametrize("leftpad", [False, True])
@pytest.mark.parametrize("page_size", [None, 4])
def test_rotary_seqlens_shift_the_angles(leftpad, page_size):
    q, k_cache, v_cache, step = problem(new=3, rotary_dim=16, leftpad=leftpad, page_size=page_size)
    shifted = replace(step, rotary_seqlens=int32([5, 1, 20]))
    first, _ = check(q, k_cache, v_cache, shifted, causal=True)
    second, _ = check(q, k_cache, v_cache, step, causal=True)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("rotary_dim", [0, 16])
@pytest.mark.parametrize("page_size", [None, 4])
def test_varlen_queries_and_new_keys(rotary_dim, page_size):
    args = problem(
        varlen_q=(2, 1, 5), varlen_new=(4, 0, 5), rotary_dim=rotary_dim, page_size=page_size
    )
    check(*args, causal=True)


def test_varlen_queries_over_a_dense_append():
    check(*problem(varlen_q=(2, 0, 5), new=2), causal=True)


@pytest.mark.parametrize("num_splits", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_splits(num_splits, dtype):
    check(*problem(dtype, new=1, leftpad=True), causal=True, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("page_size", [None, 64])
def test_a_long_cache(num_splits, page_size):
    args = problem(new=2, page_size=page_size, leftpad=True, lengths=(1, 1498, 700), slots=1500)
    check(*args, causal=True, num_splits=num_splits)


def test_partials_of_a_split_call_combine_to_the_result():
    q, k_cache, v_cache, step = problem(torch.float32)
    out, lse, out_partial, lse_partial = call(q, k_cache, v_cache, step, num_splits=3)
    assert out_partial.shape == (3, 3, HEADS, 3, HEAD_DIM_V) and lse_partial.shape == (
        3,
        3,
        HEADS,
        3,
    )
    merged, merged_lse = flash8.flash_attn_combine(
        out_partial.transpose(2, 3), lse_partial.transpose(2, 3)
    )
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse.transpose(1, 2), lse)


@pytest.mark.parametrize(
    "options",
    [
        dict(window_size=(5, 0)),
        dict(attention_chunk=7),
        dict(softcap=2.0),
        dict(softmax_scale=0.3, causal=True),
        dict(alibi_slopes=torch.linspace(0.01, 0.2, HEADS)),
        dict(s_aux=torch.linspace(-1, 1, HEADS)),
    ],
)
def test_options(options):
    check(*problem(new=2), **options)


def test_qv():
    q, k_cache, v_cache, step = problem(new=2)
    qv = torch.randn(*q.shape[:-1], HEAD_DIM_V, dtype=q.dtype)
    check(q, k_cache, v_cache, step, qv=qv, causal=True)


def test_one_int_for_all_cache_seqlens():
    q, k_cache, v_cache, step = problem(lengths=(9, 9, 9))
    expected, *_ = call(q, k_cache, v_cache, step)
    assert torch.equal(
        flash8.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=9), expected
    )


def test_without_cache_seqlens_the_whole_cache_is_used():
    q, k_cache, v_cache, step = problem(lengths=(SLOTS,) * 3)
    expected, *_ = call(q, k_cache, v_cache, step)
    assert torch.equal(flash8.flash_attn_with_kvcache(q, k_cache, v_cache), expected)


def test_returns_out_alone_by_default_and_honours_out():
    q, k_cache, v_cache, step = problem()
    expected, *_ = call(q, k_cache, v_cache, step)
    plain = flash8.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=step.cache_seqlens)
    assert isinstance(plain, torch.Tensor) and torch.equal(plain, expected)
    out = torch.full_like(plain, float("nan"))
    flash8.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=step.cache_seqlens, out=out)
    assert torch.equal(out, expected)


def test_scheduler_metadata_is_accepted_and_reusable():
    q, k_cache, v_cache, step = problem(new=1)
    metadata = flash8.get_scheduler_metadata(
        3,
        3,
        SLOTS,
        HEADS,
        HEADS_KV,
        HEAD_DIM,
        step.cache_seqlens,
        q.dtype,
        headdim_v=HEAD_DIM_V,
        max_seqlen_k_new=1,
        causal=True,
        num_splits=2,
    )
    assert metadata.dtype == torch.int32
    for _ in range(2):
        check(q, k_cache, v_cache, step, causal=True, num_splits=2, scheduler_metadata=metadata)
    given = {"cache_seqlens": step.cache_seqlens, "scheduler_metadata": metadata, "causal": True}
    with pytest.raises(ValueError, match="split_keys cannot be combined with num_splits = 2"):
        flash8.flash_attn_with_kvcache(q, k_cache, v_cache, **given, split_keys=64)


def test_decoding_token_by_token_equals_one_causal_call():
    length = 21
    q, k, v = (
        torch.randn(2, length, h, HEAD_DIM, dtype=torch.float64)
        for h in (HEADS, HEADS_KV, HEADS_KV)
    )
    k_cache, v_cache = torch.full((2, 2, 32, HEADS_KV, HEAD_DIM), float("nan")).double()
    steps = [
        flash8.flash_attn_with_kvcache(
            q[:, t : t + 1],
            k_cache,
            v_cache,
            k[:, t : t + 1],
            v[:, t : t + 1],
            cache_seqlens=t,
            causal=True,
        )
        for t in range(length)
    ]
    expected = flash8.flash_attn_func(q, k, v, causal=True)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-11, atol=1e-11)


def test_append_touches_only_its_own_slots():
    q, k_cache, v_cache, step = problem(new=2, page_size=4, batch_idx=True)
    k_after, v_after = k_cache.clone(), v_cache.clone()
    call(q, k_after, v_after, step)
    written = torch.zeros(k_cache.shape[:2], dtype=torch.bool)
    for b, start in enumerate(LENGTHS):
        for t in (start, start + 1):
            page = int(step.page_table[int(step.cache_batch_idx[b]), t // 4])
            written[page, t % 4] = True
    assert torch.equal(k_after[~written], k_cache[~written])
    assert torch.equal(v_after[~written], v_cache[~written])
    assert (k_after[written] != k_cache[written]).any(-1).all()


def test_strided_caches_are_updated_in_place():
    q, k_cache, v_cache, step = problem(new=2)
    big = torch.zeros(3, HEADS_KV, SLOTS, HEAD_DIM + 8, dtype=q.dtype)
    view = big.transpose(1, 2)[..., :HEAD_DIM]
    view.copy_(k_cache)
    v_view = v_cache.clone()
    out, *_ = call(q, view, v_view, step, causal=True)
    expected, _, k_after, _ = step.attention(q, k_cache, v_cache, causal=True)
    torch.testing.assert_close(out, expected)
    assert torch.equal(view, k_after) and (big[..., HEAD_DIM:] == 0).all()


@pytest.mark.parametrize("page_size", [None, 4])
def test_without_append_the_call_is_differentiable(page_size):
    q, k_cache, v_cache, step = problem(page_size=page_size, batch_idx=True, leftpad=True)
    step.cache_batch_idx[1] = step.cache_batch_idx[0]  # one cache row serves two sequences
    grads = []
    for run in (call, lambda *args, **kw: step.attention(*args[:3], **kw)):
        leaves = [x.clone().requires_grad_() for x in (q, k_cache, v_cache)]
        out, lse, *_ = run(*leaves, step, causal=True)
        loss = out.sin().sum() + torch.nan_to_num(lse, neginf=0.0).sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for found, reference in zip(*grads, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(), (2, 1), (4, 1, 1)], ids=["tensor", "head", "page"])
def test_qv_over_an_e4m3_cache(shape):
    """qv . v takes v's descale, q . k that of k."""
    generator = torch.Generator().manual_seed(8)
    q, qv = (torch.randn(2, 3, 4, d, generator=generator) for d in (16, 32))
    cache = [
        torch.randn(4, 16, 1, d, generator=generator).to(torch.float8_e4m3fn) for d in (16, 32)
    ]
    table, lengths = int32([[3, 0], [1, 2]]), int32([13, 16])
    descales = [torch.rand(shape, generator=generator) + i for i in (0.5, 1.5)]
    given = {"page_table": table, "cache_seqlens": lengths, "qv": qv, "causal": True}
    scaled = dict(zip(("k_descale", "v_descale"), descales, strict=True))
    found = flash8.flash_attn_with_kvcache(q, *cache, **given, **scaled)
    wide = []
    for x, descale in zip(cache, descales, strict=True):
        if descale.dim() == 2:  # by sequence
            rows = torch.empty(4)
            rows[table.long()] = descale
            descale = rows.view(4, 1, 1)
        wide.append(x.float() * (descale[..., None] if descale.dim() == 3 else descale))
    want = flash8.flash_attn_with_kvcache(q, *wide, **given)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
