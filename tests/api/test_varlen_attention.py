"""Packed, seqused and paged layouts: forward against the oracle, and what stays untouched."""

import pytest
import torch

import flash8
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

LENGTHS = {
    "one": ((1,), (1,)),
    "mixed": ((5, 64, 1, 130), (7, 64, 129, 33)),
    "empty queries": ((0, 5, 0, 9, 0), (3, 5, 0, 20, 4)),
    "empty keys": ((4, 5, 6), (0, 5, 0)),
    "all keys empty": ((4, 5), (0, 0)),
    "all queries empty": ((0, 0), (4, 5)),
    "no sequence": ((), ()),
    "more queries than keys": ((50, 130), (3, 64)),
}
OPTIONS = {
    "full": {},
    "causal sink": dict(causal=True, sink=True),
    "window": dict(window_size=(9, 3)),
    "chunk alibi": dict(attention_chunk=10, alibi="bh"),
    "softcap qv": dict(softcap=2.0, qv=True),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["packed", "paged"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_forward(lengths, option, layout, dtype):
    seqlens_q, seqlens_k = LENGTHS[lengths]
    case = Case(
        seqlens_q, seqlens_k, layout=layout, heads=4, heads_kv=2, dtype=dtype, **OPTIONS[option]
    )
    check_forward(build(case))


@pytest.mark.parametrize("layout", ["packed", "paged"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_backward(lengths, layout):
    seqlens_q, seqlens_k = LENGTHS[lengths]
    check_backward(build(Case(seqlens_q, seqlens_k, layout=layout, sink=True, causal=True)))


@pytest.mark.parametrize("page_size", [1, 2, 3, 7, 16, 64, 300])
def test_any_page_size(page_size):
    case = Case((3, 40), (130, 64), layout="paged", page_size=page_size, causal=True, sink=True)
    check_forward(build(case))
    check_backward(build(case))


SEQUSED = {
    "packed": dict(layout="packed"),
    "packed tail": dict(layout="packed", tail=5),
    "paged": dict(layout="paged", page_size=5),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", SEQUSED)
def test_seqused(kind, causal):
    unused = dict(unused_q=(2, 0, 4), unused_k=(0, 5, 20))
    problem = build(
        Case((9, 70, 4), (33, 64, 20), causal=causal, sink=True, **unused, **SEQUSED[kind])
    )
    check_forward(problem)
    check_backward(problem)
    out, lse = run_flash8(problem)
    nobody = ~used_masks(problem)[0]
    assert (out[nobody] == 0).all() and torch.isneginf(lse[:, nobody]).all()


def test_seqused_on_dense_tensors():
    case = Case((40, 40, 40), (66, 66, 66), unused_q=(0, 7, 40), unused_k=(66, 3, 0), causal=True)
    check_forward(build(case))
    check_backward(build(case))
    only_k = case.with_(unused_q=None)
    check_forward(build(only_k))
    check_backward(build(only_k))


@pytest.mark.parametrize("dense_side", ["q", "k"])
def test_one_side_dense_the_other_packed(dense_side):
    dense = build(Case((20, 20), (30, 30), causal=True))
    q, k, v = dense.q, dense.k, dense.v
    cu = {"cu_seqlens_q": None, "cu_seqlens_k": None}
    if dense_side == "q":
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        cu["cu_seqlens_k"] = torch.tensor([0, 30, 60], dtype=torch.int32)
    else:
        q = q.flatten(0, 1)
        cu["cu_seqlens_q"] = torch.tensor([0, 20, 40], dtype=torch.int32)
    out, lse = flash8.flash_attn_varlen_func(
        q, k, v, **cu, max_seqlen_q=20, max_seqlen_k=30, causal=True, return_attn_probs=True
    )
    expected, expected_lse = run_flash8(dense)
    if dense_side == "k":
        expected = expected.flatten(0, 1)
        expected_lse = expected_lse.transpose(0, 1).flatten(1)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_packing_is_the_same_as_separate_calls():
    problem = build(
        Case((5, 64, 1, 30), (7, 64, 29, 33), layout="packed", dtype=torch.bfloat16, causal=True)
    )
    out, lse = run_flash8(problem)
    cu_q, cu_k = (problem.layout[f"cu_seqlens_{s}"].tolist() for s in "qk")
    for b in range(4):
        rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
        alone, alone_lse = flash8.flash_attn_func(
            problem.q[None, rows],
            problem.k[None, keys],
            problem.v[None, keys],
            causal=True,
            return_attn_probs=True,
        )
        assert torch.equal(out[rows], alone[0])
        assert torch.equal(lse[:, rows], alone_lse[0])


def test_every_row_is_written_even_over_poison():
    case = Case(
        (9, 70, 4), (33, 64, 20), unused_q=(2, 0, 4), unused_k=(0, 5, 20), layout="packed", tail=5
    )
    problem = build(case)
    out = torch.full_like(problem.q, float("nan"))
    plain, _ = run_flash8(problem)
    returned, _ = run_flash8(problem, out=out)
    assert torch.equal(out, plain) and returned.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("packing", ["qkv five", "qkv four", "kv"])
def test_packed_tensors(packing):
    lengths = (5, 0, 64)
    heads = 4 if packing == "qkv four" else 2
    case = Case(lengths, lengths, layout="packed", heads=heads, heads_kv=2, causal=True, sink=True)
    problem = build(case)
    cu = problem.layout["cu_seqlens_q"]
    parts = [problem.q, problem.k, problem.v]
    options = dict(causal=True, s_aux=problem.s_aux, return_attn_probs=True)
    if packing == "qkv five":
        qkv = torch.stack(parts, dim=1).requires_grad_()
        found = flash8.flash_attn_varlen_qkvpacked_func(qkv, cu, 64, **options)
    elif packing == "qkv four":
        qkv = torch.cat(parts, dim=1).requires_grad_()
        found = flash8.flash_attn_varlen_qkvpacked_func(qkv, cu, 64, num_heads_q=4, **options)
    else:
        qkv = torch.stack(parts[1:], dim=1).requires_grad_()
        found = flash8.flash_attn_varlen_kvpacked_func(problem.q, qkv, cu, cu, 64, 64, **options)
    check_forward(problem, result=found)
    d_out, _ = upstream(problem)
    (grad,) = torch.autograd.grad(found[0], [qkv], [d_out])
    separate = gradients(as_leaves(problem), run_flash8, d_out, None)
    join = torch.cat if packing == "qkv four" else torch.stack
    names = "kv" if packing == "kv" else "qkv"
    torch.testing.assert_close(grad, join([separate[n] for n in names], dim=1))


def test_causal_of_a_short_query_block_looks_at_the_end():
    """A decoding step: one query at the end of each sequence sees all of it."""
    problem = build(Case((1, 1, 1), (5, 64, 129), layout="packed"))
    full, _ = run_flash8(problem)
    causal, _ = run_flash8(build(problem.case.with_(causal=True)))
    assert torch.equal(full, causal)


def test_max_seqlen_is_an_upper_bound_only():
    problem = build(Case((5, 8), (7, 9), layout="packed"))
    cu_q, cu_k = problem.layout["cu_seqlens_q"], problem.layout["cu_seqlens_k"]
    tight, loose = (
        flash8.flash_attn_varlen_func(problem.q, problem.k, problem.v, cu_q, cu_k, a, b)
        for a, b in [(8, 9), (10**6, 2**31 - 1)]
    )
    assert torch.equal(tight, loose)
