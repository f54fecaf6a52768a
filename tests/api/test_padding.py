"""Poison: NaN in everything that is stored but not used must never be seen again."""

import math

import pytest
import torch

from cases import (
    Case,
    as_leaves,
    build,
    check_backward,
    check_forward,
    gradients,
    run_flash8,
    upstream,
    used_masks,
)
from kvcache_cases import HEAD_DIM, HEAD_DIM_V, HEADS, HEADS_KV, call, problem

CASES = {
    "dense seqused": Case((9, 9, 9), (70, 70, 70), unused_q=(0, 4, 9), unused_k=(7, 0, 70)),
    "packed seqused": Case(
        (5, 66, 9), (7, 140, 12), unused_q=(2, 6, 0), unused_k=(0, 30, 12), layout="packed"
    ),
    "packed tail": Case((5, 0, 9), (7, 4, 0), layout="packed", tail=70),
    "paged": Case((5, 0, 9, 3), (7, 4, 0, 140), layout="paged", page_size=16),
    "paged seqused": Case(
        (5, 6), (7, 40), unused_q=(1, 0), unused_k=(7, 1), layout="paged", page_size=3
    ),
}
OPTIONS = {
    "full": {},
    "causal sink": dict(causal=True, sink=True),
    "window qv": dict(window_size=(5, 3), qv=True),
    "splits": dict(num_splits=3),
    "dropout": dict(dropout_p=0.2),
}
DTYPES = [torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", CASES)
def test_forward(name, option, dtype):
    poisoned = build(CASES[name].with_(poison=True, dtype=dtype, **OPTIONS[option]))
    assert poisoned.k.isnan().any() or poisoned.q.isnan().any()
    check_forward(poisoned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", [x for x in OPTIONS if x != "splits"])
@pytest.mark.parametrize("name", CASES)
def test_backward(name, option, dtype):
    check_backward(build(CASES[name].with_(poison=True, dtype=dtype, **OPTIONS[option])))


@pytest.mark.parametrize("name", CASES)
def test_unused_rows_get_exactly_zero_gradient(name):
    poisoned = as_leaves(build(CASES[name].with_(poison=True, qv=True)))
    d_out, d_lse = upstream(poisoned)
    found = gradients(poisoned, run_flash8, d_out, d_lse)
    q_used, k_used = used_masks(poisoned)
    for leaf, used in (("q", q_used), ("qv", q_used), ("k", k_used), ("v", k_used)):
        assert (found[leaf][~used] == 0).all(), leaf


@pytest.mark.parametrize("name", CASES)
def test_poison_in_the_upstream_of_unused_rows(name):
    """A loss may leave NaN where nobody looks: it must not reach a gradient."""
    problem_ = as_leaves(build(CASES[name].with_(poison=True)))
    d_out, d_lse = upstream(problem_)
    clean = gradients(problem_, run_flash8, d_out, d_lse)
    q_used, _ = used_masks(problem_)
    d_out[~q_used] = math.nan
    if problem_.case.layout == "dense":
        d_lse[(~q_used)[:, None, :].expand_as(d_lse)] = math.nan
    else:
        d_lse[:, ~q_used] = math.nan
    poisoned = gradients(problem_, run_flash8, d_out, d_lse)
    assert all(torch.equal(clean[n], poisoned[n]) for n in clean)


@pytest.mark.parametrize("name", CASES)
def test_out_is_written_everywhere(name):
    p = build(CASES[name].with_(poison=True))
    out = torch.full((*p.q.shape[:-1], p.v.shape[-1]), math.nan, dtype=p.q.dtype)
    run_flash8(p, out=out)
    assert torch.isfinite(out).all()
    assert (out[~used_masks(p)[0]] == 0).all()


def poison_cache(k_cache, v_cache, step, new):
    """NaN in every slot that the call neither reads nor writes."""
    used = torch.zeros(k_cache.shape[:2], dtype=torch.bool)
    for b, length in enumerate(step.cache_seqlens.tolist()):
        row = int(step.cache_batch_idx[b]) if step.cache_batch_idx is not None else b
        first = int(step.cache_leftpad[b]) if step.cache_leftpad is not None else 0
        for t in range(first, length):
            if step.page_table is None:
                used[row, t] = True
            else:
                size = k_cache.shape[1]
                used[int(step.page_table[row, t // size]), t % size] = True
    k_cache[~used], v_cache[~used] = math.nan, math.nan
    return used


@pytest.mark.parametrize("new", [0, 2])
@pytest.mark.parametrize("page_size", [None, 3, 16])
@pytest.mark.parametrize("batch_idx", [False, True])
def test_cache(page_size, batch_idx, new):
    q, k_cache, v_cache, step = problem(
        page_size=page_size, batch_idx=batch_idx, leftpad=True, new=new
    )
    k_clean, v_clean = k_cache.clone(), v_cache.clone()
    poison_cache(k_cache, v_cache, step, new)
    found, lse, *_ = call(q, k_cache, v_cache, step, causal=True)
    expected, expected_lse, *_ = call(q, k_clean, v_clean, step, causal=True)
    assert torch.equal(found, expected) and torch.equal(lse, expected_lse)
    assert found.shape == (3, 3, HEADS, HEAD_DIM_V)


def test_an_unused_page_table_entry_may_be_anything():
    q, k_cache, v_cache, step = problem(page_size=4, new=1)
    expected, *_ = call(q, k_cache.clone(), v_cache.clone(), step)
    for b, length in enumerate(step.cache_seqlens.tolist()):
        step.page_table[b, -(-(length + 1) // 4) :] = -12345
    found, *_ = call(q, k_cache, v_cache, step)
    assert torch.equal(found, expected)
    assert k_cache.shape[-2:] == (HEADS_KV, HEAD_DIM)
