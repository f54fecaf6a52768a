"""Gradients: gradcheck in float64, the oracle's autograd, FA3's rule in 16 bits."""

import pytest
import torch

import flash8
from cases import (
    Case,
    as_leaves,
    build,
    check_backward,
    factor,
    gradients,
    run_flash8,
    run_oracle,
    upstream,
)
from cpu_cases import GROUPS, LONG, OPTIONS, case
from flash8.call.options import Options
from tolerances import check_fa3

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
VARLEN = {
    "packed": Case((5, 0, 9, 33), (7, 4, 0, 40), layout="packed"),
    "packed causal": Case((5, 0, 9, 33), (7, 4, 0, 21), layout="packed", causal=True, tail=3),
    "packed seqused": Case(
        (5, 6, 9), (7, 4, 12), unused_q=(2, 6, 0), unused_k=(0, 1, 12), layout="packed", causal=True
    ),
    "dense seqused": Case((9, 9), (12, 12), unused_q=(0, 4), unused_k=(7, 0), causal=True),
    "paged": Case((5, 0, 9, 3), (7, 4, 0, 20), layout="paged", page_size=3, causal=True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, dtype):
    check_backward(build(case(45, 67, dtype=dtype, **OPTIONS[option])))


@pytest.mark.parametrize("option", OPTIONS)
def test_options_over_many_tiles(option):
    check_backward(build(case(*LONG, batch=1, **OPTIONS[option])))


@pytest.mark.parametrize("shape", [(1, 3000), (3000, 1), (700, 1030)])
def test_long_shapes(shape):
    for causal in (False, True):
        check_backward(build(case(*shape, batch=1, heads=1, causal=causal)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 131), (131, 1), (64, 128), (127, 65), (129, 130)])
def test_shapes(shape, dtype):
    check_backward(build(case(*shape, batch=1, dtype=dtype, causal=True)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("group", GROUPS)
def test_grouped_heads(group, dtype):
    heads, heads_kv = GROUPS[group]
    check_backward(build(case(45, 67, heads=heads, heads_kv=heads_kv, dtype=dtype, sink=True)))


@pytest.mark.parametrize("head_dims", [(1, 1), (7, 13), (24, 8), (96, 96)])
def test_head_dims(head_dims):
    for dtype in (torch.float64, torch.bfloat16):
        check_backward(
            build(case(20, 33, head_dim=head_dims[0], head_dim_v=head_dims[1], dtype=dtype))
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", VARLEN)
def test_varlen_and_paged(name, dtype):
    check_backward(build(VARLEN[name].with_(dtype=dtype, sink=True, heads=4, heads_kv=2)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_page_in_two_sequences_collects_both_gradients(dtype):
    problem = build(VARLEN["paged"].with_(dtype=dtype))
    problem.layout["page_table"][3, 0] = problem.layout["page_table"][0, 0]
    check_backward(problem)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("option", ["full", "causal", "window", "softcap"])
def test_fa3_rule_to_the_letter(option, dtype):
    shape = case(192, 256, heads=4, heads_kv=2, head_dim=64, head_dim_v=64, dtype=dtype)
    problem = build(shape.with_(**OPTIONS[option]))
    d_out, _ = upstream(problem)
    actual = gradients(as_leaves(problem), run_flash8, d_out, None)
    reference = gradients(as_leaves(problem, torch.float64), run_oracle, d_out.double(), None)
    emulation = gradients(as_leaves(problem), run_oracle, d_out, None, dtype=dtype)
    for name in ("q", "k", "v"):
        check_fa3(
            f"d{name}", actual[name], reference[name], emulation[name], factor=factor(problem.case)
        )


def test_lse_alone_has_a_gradient():
    problem = build(case(20, 31, causal=True, sink=True))
    d_out, d_lse = upstream(problem)
    actual = gradients(as_leaves(problem), run_flash8, torch.zeros_like(d_out), d_lse)
    reference = gradients(as_leaves(problem), run_oracle, torch.zeros_like(d_out), d_lse)
    for name in actual:
        torch.testing.assert_close(actual[name], reference[name], rtol=1e-9, atol=1e-11)
    assert actual["k"].abs().max() > 0 and (actual["v"] == 0).all()


def test_lse_gradient_when_the_loss_uses_nothing_else():
    q, k, v = (torch.randn(1, 6, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    flash8.flash_attn_func(q, k, v, return_attn_probs=True)[1].sum().backward()
    s = torch.einsum("bihd,bjhd->bhij", q, k) * 0.5
    expected = torch.autograd.grad(s.logsumexp(-1).sum(), [q, k])
    torch.testing.assert_close([q.grad, k.grad], list(expected))


GRADCHECK = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(2, 1)),
    "chunk": dict(attention_chunk=3),
    "softcap": dict(softcap=1.5),
    "alibi": dict(alibi="bh"),
    "sink": dict(sink=True, causal=True),
    "qv": dict(qv=True),
    "gqa": dict(heads=4, heads_kv=2),
    "dv": dict(head_dim=3, head_dim_v=5),
    "dropout": dict(dropout_p=0.3),
    "packed": dict(layout="packed", seqlens_q=(3, 0, 4), seqlens_k=(5, 2, 0), sink=True),
    "paged": dict(layout="paged", page_size=2, seqlens_q=(3, 0, 4), seqlens_k=(5, 2, 0)),
    "seqused": dict(unused_q=(1, 0), unused_k=(0, 2), causal=True),
    "everything": dict(causal=True, window_size=(3, 0), softcap=2.0, alibi="h", sink=True, qv=True),
}


@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck(name):
    small = dict(seqlens_q=(5, 5), seqlens_k=(6, 6), head_dim=3, head_dim_v=3)
    problem = as_leaves(build(Case(**{**small, **GRADCHECK[name]})))
    leaves = problem.leaves()

    def run(*tensors):
        for leaf, value in zip(leaves, tensors, strict=True):
            setattr(problem, leaf, value)
        out, lse = run_flash8(problem)
        return out, torch.nan_to_num(lse, neginf=0.0)

    assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=False)


@pytest.mark.parametrize("deterministic", [False, True])
def test_backward_repeats_bit_for_bit(deterministic):
    problem = as_leaves(build(case(70, 90, dtype=torch.bfloat16, heads=4, heads_kv=2)))
    d_out, d_lse = upstream(problem)
    first, second = (
        gradients(problem, run_flash8, d_out, d_lse, deterministic=deterministic) for _ in range(2)
    )
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_only_the_gradients_asked_for():
    for wanted in ("q", "k", "v", "s_aux"):
        problem = build(case(12, 17, sink=True))
        leaf = getattr(problem, wanted).requires_grad_()
        out, _ = run_flash8(problem)
        (grad,) = torch.autograd.grad(out.sum(), [leaf])
        reference, _ = run_oracle(problem)
        (expected,) = torch.autograd.grad(reference.sum(), [leaf])
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-11)


def test_non_contiguous_and_broadcast_upstream():
    problem = as_leaves(build(case(12, 17)))
    reference = as_leaves(build(case(12, 17)))
    run_flash8(problem)[0].sum().backward()
    run_oracle(reference)[0].sum().backward()
    torch.testing.assert_close(problem.k.grad, reference.k.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layout", ["five", "four", "kv"])
def test_packed_tensors_get_one_gradient(layout):
    problem = build(case(20, 20, heads=2, heads_kv=2, causal=True))
    d_out, _ = upstream(problem)
    reference = gradients(as_leaves(problem), run_oracle, d_out, None)
    parts = [problem.q, problem.k, problem.v]
    if layout == "five":
        qkv = torch.stack(parts, dim=2).requires_grad_()
        out = flash8.flash_attn_qkvpacked_func(qkv, causal=True)
        expected = torch.stack([reference[n] for n in "qkv"], dim=2)
    elif layout == "four":
        qkv = torch.cat(parts, dim=2).requires_grad_()
        out = flash8.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=2)
        expected = torch.cat([reference[n] for n in "qkv"], dim=2)
    else:
        qkv = torch.stack(parts[1:], dim=2).requires_grad_()
        out = flash8.flash_attn_kvpacked_func(problem.q, qkv, causal=True)
        expected = torch.stack([reference[n] for n in "kv"], dim=2)
    (grad,) = torch.autograd.grad(out, [qkv], [d_out])
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-11)


def test_second_derivative_is_refused_not_wrong():
    q = torch.randn(1, 4, 1, 4, dtype=torch.float64, requires_grad=True)
    out = flash8.flash_attn_func(q, q, q)
    (grad,) = torch.autograd.grad(out.sum(), [q], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.square().sum(), [q])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape,options",
    [
        ((1, 1), {}),
        ((39, 1), {}),
        ((128, 192), dict(window_size=(0, 0))),
        ((70, 70), dict(attention_chunk=1)),
    ],
)
def test_one_visible_key_has_no_score_gradient(shape, options, dtype):
    """P is 1 whatever S is: torch gives exact zeros, and FA3's rule then leaves no room."""
    problem = as_leaves(build(case(*shape, dtype=dtype, head_dim=128, head_dim_v=128, **options)))
    d_out, _ = upstream(problem)
    found = gradients(problem, run_flash8, d_out, None)
    assert (found["q"] == 0).all()
    assert (found["k"] == 0).all()


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parts_of_the_keys_sum_to_the_whole(dtype, sink):
    """A backward gets O and LSE of all keys and some of the keys, as in ring attention."""
    q, k, v, d_out = (torch.randn(2, 11, heads, 16).to(dtype) for heads in (4, 2, 2, 4))
    s_aux = torch.randn(4, dtype=dtype, requires_grad=True) if sink else None
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = flash8.flash_attn_func(q, k, v, s_aux=s_aux, return_attn_probs=True)
    want = torch.autograd.grad(out, leaves, d_out)
    found = []
    for keys in (slice(0, 4), slice(4, 11)):
        part = (q, k[:, keys], v[:, keys], None, s_aux, out, lse)
        dq, dk, dv, *_ = torch.ops.flash8.backward(
            d_out, None, *(x if x is None else x.detach() for x in part), *Options()
        )
        found.append((dq, dk, dv))
    dq, dk, dv = zip(*found, strict=True)
    near = 1e-10 if dtype == torch.float64 else 0.05
    for got, whole in zip((sum(dq), torch.cat(dk, 1), torch.cat(dv, 1)), want, strict=True):
        torch.testing.assert_close(got, whole, rtol=near, atol=near)
