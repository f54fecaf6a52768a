"""Calls with a KV cache, and their comparison with the float64 oracle."""

import torch

import flash8
from cases import LOW, cumulative, int32
from oracle import CacheStep
from tolerances import check_close, check_lse

HEADS, HEADS_KV, HEAD_DIM, HEAD_DIM_V, SLOTS = 4, 2, 32, 24, 48

LENGTHS = (0, 7, 30)


def problem(
    dtype=torch.float64,
    seqlen_q=3,
    new=0,
    page_size=None,
    batch_idx=False,
    leftpad=False,
    rotary_dim=0,
    interleaved=True,
    varlen_q=None,
    varlen_new=None,
    lengths=LENGTHS,
    slots=SLOTS,
):
    """q, k_cache, v_cache and the CacheStep of one call."""
    batch, rows = len(lengths), len(lengths) + (2 if batch_idx else 0)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    step = CacheStep(int32(lengths), rotary_interleaved=interleaved)
    if page_size is None:
        storage = (rows, slots)
    else:
        per_row = -(-slots // page_size)
        order = torch.randperm(rows * per_row + 3)[: rows * per_row]
        step.page_table = order.reshape(rows, per_row).to(torch.int32)
        storage = (rows * per_row + 3, page_size)
    k_cache, v_cache = randn(*storage, HEADS_KV, HEAD_DIM), randn(*storage, HEADS_KV, HEAD_DIM_V)
    if batch_idx:
        step.cache_batch_idx = torch.randperm(rows)[:batch].to(torch.int32)
    if leftpad:
        step.cache_leftpad = int32(max(0, n // 3) for n in lengths)
    if rotary_dim:
        angle = torch.rand(slots + 8, rotary_dim // 2) * 6.28
        step.rotary_cos, step.rotary_sin = angle.cos().to(dtype), angle.sin().to(dtype)
    if varlen_q:
        step.cu_seqlens_q = cumulative(varlen_q)
        q = randn(sum(varlen_q), HEADS, HEAD_DIM)
    else:
        q = randn(batch, seqlen_q, HEADS, HEAD_DIM)
    if varlen_new:
        step.cu_seqlens_k_new = cumulative(varlen_new)
        step.k = randn(sum(varlen_new), HEADS_KV, HEAD_DIM)
        step.v = randn(sum(varlen_new), HEADS_KV, HEAD_DIM_V)
    elif new:
        step.k, step.v = (
            randn(batch, new, HEADS_KV, HEAD_DIM),
            randn(batch, new, HEADS_KV, HEAD_DIM_V),
        )
    return q, k_cache, v_cache, step


def call(q, k_cache, v_cache, step, **options):
    if step.cu_seqlens_q is not None:
        lengths = step.cu_seqlens_q.diff()
        options.setdefault("max_seqlen_q", int(lengths.max()))
    return flash8.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        step.k,
        step.v,
        rotary_cos=step.rotary_cos,
        rotary_sin=step.rotary_sin,
        cache_seqlens=step.cache_seqlens,
        cache_batch_idx=step.cache_batch_idx,
        cache_leftpad=step.cache_leftpad,
        page_table=step.page_table,
        cu_seqlens_q=step.cu_seqlens_q,
        cu_seqlens_k_new=step.cu_seqlens_k_new,
        rotary_seqlens=step.rotary_seqlens,
        rotary_interleaved=step.rotary_interleaved,
        return_softmax_lse=True,
        **options,
    )


# The cache is written with one rounding of the rotated float64 value; ours rotates in fp32 first.
CACHE_ULPS = 1.0


def check(q, k_cache, v_cache, step, **options):
    masking = {k: options[k] for k in options if k not in ("num_splits", "scheduler_metadata")}
    reference = step.attention(q, k_cache, v_cache, **masking)
    emulation = None
    if q.dtype in LOW:
        emulation = step.attention(q, k_cache, v_cache, dtype=q.dtype, **masking)[0]
    k_after, v_after = k_cache.clone(), v_cache.clone()
    out, lse, *_ = call(q, k_after, v_after, step, **options)
    check_close("O", out, reference[0], emulation, factor=2.0)
    # q is rounded to 16 bits after its rotation: an ulp of q moves S by up to |q||k| eps.
    if step.rotary_cos is None or q.dtype not in LOW:
        check_lse("LSE", lse, reference[1], q.dtype)
    assert torch.equal(v_after, reference[3]), "v_cache differs from plain copies of v"
    if step.rotary_cos is None:
        assert torch.equal(k_after, reference[2]), "k_cache differs from plain copies of k"
    else:
        error = (k_after.double() - reference[2].double()).abs().max()
        assert error <= CACHE_ULPS * torch.finfo(q.dtype).eps * reference[2].abs().max().item()
    return out, lse
