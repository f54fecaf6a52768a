"""int64 indices, rows without work, and what a plan keeps of both."""

import pytest
import torch

import flash8
from cases import Case, build, int32, run_flash8
from flash8.fp8 import quantize
from flash8.tensors.arguments import to_int32
from plan_cache_cases import ENDS, addresses, draw

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]

LAYOUTS = {
    "packed": Case((5, 0, 9), (7, 4, 0), layout="packed", causal=True),
    "unused": Case((9, 9), (13, 13), unused_q=(3, 0), unused_k=(5, 2)),
    "paged": Case((5, 2), (7, 4), layout="paged", page_size=4),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_int64_indices(name):
    problem = build(LAYOUTS[name])
    expected = run_flash8(problem)
    problem.layout = {name: x.long() for name, x in problem.layout.items()}
    for x, y in zip(run_flash8(problem), expected, strict=True):
        assert torch.equal(x, y)


def cached(dtype, paged):
    g = torch.Generator().manual_seed(1)
    index = lambda *values: torch.tensor(values, dtype=dtype)  # noqa: E731
    k_cache, v_cache = torch.randn(2, 4, 12, 2, 32, generator=g)
    k, v = torch.randn(2, 5, 2, 32, generator=g)
    extra = dict(cache_batch_idx=index(3, 0), cache_leftpad=index(1, 0))
    if paged:
        k_cache, v_cache = (x.reshape(12, 4, 2, 32) for x in (k_cache, v_cache))
        extra["page_table"] = torch.arange(12, dtype=dtype).reshape(4, 3).flip(0)
    result = flash8.flash_attn_with_kvcache(
        torch.randn(5, 4, 32, generator=g),
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos=torch.randn(24, 8, generator=g),
        rotary_sin=torch.randn(24, 8, generator=g),
        cache_seqlens=index(5, 3),
        cu_seqlens_q=index(0, 2, 5),
        cu_seqlens_k_new=index(0, 2, 5),
        max_seqlen_q=3,
        rotary_seqlens=index(7, 2),
        causal=True,
        **extra,
    )
    return result, k_cache, v_cache


@pytest.mark.parametrize("paged", [False, True])
def test_int64_indices_of_a_cache(paged):
    for x, y in zip(cached(torch.int64, paged), cached(torch.int32, paged), strict=True):
        assert torch.equal(x, y)


def test_int64_indices_of_fp8():
    x, ends = torch.randn(9, 2, 16), torch.tensor([0, 4, 9])
    wide, narrow = (
        quantize(x, "block", cu_seqlens=e, seqused=e.diff() - 1) for e in (ends, ends.int())
    )
    assert torch.equal(wide.data.float(), narrow.data.float())
    assert torch.equal(wide.descale, narrow.descale)
    outs = [
        flash8.fp8.fp8_attention(
            x, x, x, cu_seqlens_q=e, cu_seqlens_k=e, max_seqlen_q=5, max_seqlen_k=5
        )
        for e in (ends, ends.int())
    ]
    assert torch.equal(*outs)
    flash8.flash_attn_varlen_func(wide, wide, narrow, ends.int(), ends, 5, 5)


def test_values_beyond_int32_do_not_wrap():
    far = torch.tensor([2**32 + 3, 3, -(2**32) - 1, 2**31, -(2**31) - 1])
    assert to_int32(far).tolist() == [2**31 - 1, 3, -(2**31), 2**31 - 1, -(2**31)]
    assert to_int32(far).dtype == torch.int32
    narrow = int32([1])
    assert to_int32(narrow) is narrow and to_int32(None) is None


def test_a_kernel_gets_int32_and_a_second_call_is_a_hit(on_fake_driver, misses, fake):
    """An int64 index is never read as int32, and costs no second way through the checks."""
    q, k, v = (x.flatten(0, 1) for x in draw())
    fields = ("sequences.cu_seqlens_q", "sequences.cu_seqlens_k")
    for turn in range(3):
        ends = ENDS.long()
        flash8.flash_attn_varlen_func(q, k, v, ends, ends, 67, 67, causal=True)
        assert len(misses) == 1, turn
        given = addresses(fake.parameter(turn), *fields)
        assert 0 not in given and ends.data_ptr() not in given
    flash8.flash_attn_varlen_func(q, k, v, ENDS, ENDS, 67, 67, causal=True)
    assert len(misses) == 1  # an int32 call has its key


def rows_without_work(paged, new, sink=None):
    g = torch.Generator().manual_seed(2)
    k_cache, v_cache = torch.randn(2, 3, 12, 2, 32, generator=g)
    extra = {}
    if paged:
        k_cache, v_cache = (x.reshape(9, 4, 2, 32) for x in (k_cache, v_cache))
        extra["page_table"] = torch.arange(9, dtype=torch.int32).reshape(3, 3)
    q = torch.randn(3, 2, 4, 32, generator=g)
    k, v = torch.randn(2, 3, 2, 2, 32, generator=g) if new else (None, None)
    rotary = torch.randn(2, 24, 8, generator=g) if new else (None, None)

    def call(rows, lengths):
        caches = k_cache.clone(), v_cache.clone()
        pick = [r for r, row in enumerate(rows)]
        out, lse, *_ = flash8.flash_attn_with_kvcache(
            q[pick],
            *caches,
            *(None if x is None else x[pick] for x in (k, v)),
            rotary_cos=rotary[0],
            rotary_sin=rotary[1],
            cache_seqlens=int32(lengths),
            cache_batch_idx=int32(rows),
            causal=True,
            s_aux=sink,
            return_softmax_lse=True,
            **extra,
        )
        return out, lse, *caches

    return call


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("sink", [None, torch.ones(4)], ids=["", "sink"])
def test_a_row_of_minus_one_has_no_work(paged, new, sink):
    """O = 0, LSE = -inf, the cache as it was; its length is not looked at."""
    call = rows_without_work(paged, new, sink)
    out, lse, *caches = call([2, -1, -1], [5, 10**6, -7])
    expected, expected_lse, *others = call([2], [5])
    assert torch.equal(out[:1], expected) and torch.equal(lse[:1], expected_lse)
    assert (out[1:] == 0).all() and (lse[1:] == -torch.inf).all()
    for x, y in zip(caches, others, strict=True):
        assert torch.equal(x, y)


def test_a_row_without_work_has_no_gradients():
    q = torch.randn(2, 2, 4, 32, requires_grad=True)
    caches = [torch.randn(3, 12, 2, 32, requires_grad=True) for _ in range(2)]
    sink = torch.randn(4, requires_grad=True)
    options = dict(return_softmax_lse=True, s_aux=sink)
    out, lse, *_ = flash8.flash_attn_with_kvcache(
        q, *caches, cache_batch_idx=int32([-1, 1]), **options
    )
    loss = out.square().sum() + lse[1].sum()
    found = torch.autograd.grad(loss, [q, *caches, sink])
    out, lse, *_ = flash8.flash_attn_with_kvcache(
        q[1:], *caches, cache_batch_idx=int32([1]), **options
    )
    expected = torch.autograd.grad(out.square().sum() + lse.sum(), [q, *caches, sink])
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)
    assert (found[0][0] == 0).all()
