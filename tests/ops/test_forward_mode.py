"""Forward-mode derivatives: torch.func.jvp, jacfwd and linearize, and dual tensors."""

from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.autograd import gradcheck
from torch.func import jacfwd, jacrev, jvp, linearize, vjp

import flash8
from cases import LEAVES, Case, build, int32, run_flash8, run_oracle
from transform_cases import FACE, small, summed

CASES = {
    "dense": Case((5, 5), (7, 7), head_dim=8, head_dim_v=4),
    "causal, grouped, sink": Case((5, 5), (7, 7), heads=4, heads_kv=2, causal=True, sink=True),
    "more queries than keys": Case((7,), (3,), causal=True, sink=True),
    "everything": Case(
        (5, 5), (7, 7), window_size=(3, 1), softcap=2.0, alibi="bh", sink=True, qv=True
    ),
    "chunks": Case((9,), (11,), attention_chunk=4),
    "dropout": Case((5,), (7,), dropout_p=0.3, qv=True),
    "packed": Case((5, 0, 4), (7, 2, 0), layout="packed", tail=2, causal=True),
    "unused": Case((5, 5), (7, 7), unused_q=(1, 0), unused_k=(2, 3), poison=True),
    "paged": Case((3, 2), (7, 5), layout="paged", page_size=4, causal=True),
    "splits": Case((2,), (600,), num_splits=2, head_dim=4, head_dim_v=4, heads=1),
    "several tiles": Case((20,), (600,), window_size=(300, 5), head_dim=4, head_dim_v=4, heads=1),
}


def call_of(case):
    """(function of the leaves, leaves)."""
    problem = build(case)
    names = [name for name in LEAVES if getattr(problem, name) is not None]

    def function(*tensors):
        out, lse = run_flash8(replace(problem, **dict(zip(names, tensors, strict=True))))
        return out, torch.where(lse.isinf(), 0.0, lse)

    return function, [getattr(problem, name) for name in names]


def draw_like(tensors, seed=3):
    g = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in tensors
    )


@pytest.mark.parametrize("name", CASES)
def test_tangents_are_those_of_finite_differences(name):
    function, leaves = call_of(replace(CASES[name], poison=False))
    tangents = draw_like(leaves)
    _, found = jvp(function, tuple(leaves), tangents)
    step = 1e-5
    ends = [
        function(*(x + sign * step * t for x, t in zip(leaves, tangents, strict=True)))
        for sign in (1, -1)
    ]
    for tangent, high, low in zip(found, *ends, strict=True):
        torch.testing.assert_close(tangent, (high - low) / (2 * step), rtol=1e-6, atol=1e-8)
        assert tangent.abs().max() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_tangents_and_gradients_are_adjoint(name):
    function, leaves = call_of(CASES[name])
    tangents = draw_like(leaves)
    _, found = jvp(function, tuple(leaves), tangents)
    outputs, pull_back = vjp(function, *leaves)
    weights = draw_like(outputs, seed=4)
    gradients = pull_back(weights)
    forward = sum((w * t).sum() for w, t in zip(weights, found, strict=True))
    backward = sum((g * t).nansum() for g, t in zip(gradients, tangents, strict=True))
    torch.testing.assert_close(forward, backward)


@pytest.mark.parametrize("position", range(5), ids=LEAVES)
def test_one_tangent_at_a_time(position):
    function, leaves = call_of(CASES["everything"])
    (tangent,) = draw_like(leaves[position : position + 1])

    def of_one(x):
        return function(*leaves[:position], x, *leaves[position + 1 :])

    _, (out, lse) = jvp(of_one, (leaves[position],), (tangent,))
    (high, _), (low, _) = (of_one(leaves[position] + s * tangent) for s in (1e-5, -1e-5))
    torch.testing.assert_close(out, (high - low) / 2e-5, rtol=1e-6, atol=1e-8)
    assert out.abs().max() > 0.01
    if LEAVES[position] != "s_aux":
        assert lse.abs().max() > 0.01 or position == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision(dtype):
    """As exact as the output's type, also where all scores of a row share a tangent."""
    case = Case((40, 40), (300, 300), heads=4, heads_kv=2, causal=True, dtype=dtype)
    problem = build(case)
    leaves = (problem.q, problem.k, problem.v)
    tangents = draw_like(leaves)
    tangents[0].add_(8 * leaves[1].mean(dim=1, keepdim=True).repeat_interleave(2, 2))

    def ours(q, k, v):
        return flash8.flash_attn_func(q, k, v, causal=True)

    def reference(q, k, v):
        return run_oracle(replace(problem, q=q, k=k, v=v))[0]

    _, found = jvp(ours, leaves, tangents)
    wide = [tuple(x.double() for x in tensors) for tensors in (leaves, tangents)]
    _, expected = jvp(reference, *wide)
    assert found.dtype == dtype
    error = (found.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)


def test_gradcheck_of_every_mode():
    """Forward, reverse, and both of a batch of vectors."""
    function, leaves = call_of(Case((3,), (4,), causal=True, sink=True, head_dim=4, head_dim_v=4))
    leaves = [x.requires_grad_() for x in leaves]
    gradcheck(
        function,
        leaves,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )


def test_jacobians():
    q, k, v = small()
    by_rows = jacrev(flash8.flash_attn_func, (0, 1, 2))(q, k, v)
    by_columns = jacfwd(flash8.flash_attn_func, (0, 1, 2))(q, k, v)
    torch.testing.assert_close(by_rows, by_columns)
    assert all(x.abs().max() > 0.01 for x in by_rows)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_linearize():
    q, k, v = small()

    def function(q):
        return flash8.flash_attn_func(q, k, v).sin()

    tangent = torch.randn_like(q)
    torch.testing.assert_close(
        linearize(function, q)[1](tangent), jvp(function, (q,), (tangent,))[1]
    )


def test_dual_tensors():
    q, k, v = small()
    tangent = torch.randn_like(k)
    expected = jvp(lambda k: flash8.flash_attn_func(q, k, v), (k,), (tangent,))[1]
    for requires_grad in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(k.clone().requires_grad_(requires_grad), tangent)
            out = flash8.flash_attn_func(q, dual, v)
            found = forward_ad.unpack_dual(out).tangent
        torch.testing.assert_close(found, expected)
        plain = flash8.flash_attn_func(q, k, v)
        assert torch.equal(forward_ad.unpack_dual(out).primal, plain)


@pytest.mark.parametrize("name", FACE)
def test_every_public_function(name):
    """Of all inputs at once: against finite differences, and its own gradients."""
    function, inputs = summed(FACE[name]), small()
    tangents = draw_like(inputs)
    out, found = jvp(function, tuple(inputs), tangents)
    assert torch.equal(out, function(*inputs)) and found.abs().max() > 0.1
    high, low = (
        function(*(x + step * t for x, t in zip(inputs, tangents, strict=True)))
        for step in (1e-5, -1e-5)
    )
    torch.testing.assert_close(found, (high - low) / 2e-5, rtol=1e-6, atol=1e-8)
    weights = torch.randn_like(out)
    gradients = vjp(function, *inputs)[1](weights)
    adjoint = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    torch.testing.assert_close((weights * found).sum(), adjoint)


def test_combine_of_a_split_that_saw_nothing():
    out, lse = torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2)
    lse[1] = -torch.inf
    lse[:, 2] = -torch.inf
    out[1] = torch.nan
    tangents = torch.randn_like(out), torch.randn_like(lse)
    _, (found, row) = jvp(flash8.flash_attn_combine, (out, lse), tangents)
    kept = [x[::2].clone() for x in (out, lse, *tangents)]
    _, (expected, expected_row) = jvp(flash8.flash_attn_combine, tuple(kept[:2]), tuple(kept[2:]))
    torch.testing.assert_close((found, row), (expected, expected_row))
    assert (found[2] == 0).all() and (row[2] == 0).all()


@pytest.mark.parametrize("recipe", ["", "hadamard", "smooth", "block"])
@pytest.mark.parametrize("packed", [False, True])
def test_fp8_attention(recipe, packed):
    """Tangents pass straight through the rounding: those of the dequantized operands."""
    fp8 = flash8.fp8
    chosen = {
        "": fp8.CurrentScaling(),
        "hadamard": fp8.CurrentScaling(hadamard=True),
        "smooth": fp8.CurrentScaling(smooth_k=True, smooth_v=True),
        "block": fp8.BlockScaling(),
    }[recipe]
    inputs = [torch.randn(2, 40, heads, 32) for heads in (4, 2, 2)]
    extra, ends = {}, None
    if packed:
        inputs, ends = [x.flatten(0, 1) for x in inputs], int32([0, 30, 80])
        extra = dict(cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=50, max_seqlen_k=50)
    sink = torch.randn(4)
    tangents = draw_like([*inputs, sink])

    def ours(q, k, v, sink):
        return fp8.fp8_attention(
            q, k, v, chosen, causal=True, s_aux=sink, return_attn_probs=True, **extra
        )

    _, found = jvp(ours, (*inputs, sink), tangents)
    seen = [
        fp8.dequantize(chosen.quantize(name, x, ends))
        for name, x in zip("qkv", inputs, strict=True)
    ]

    def wide(q, k, v, sink):
        if not packed:
            return flash8.flash_attn_func(q, k, v, causal=True, s_aux=sink, return_attn_probs=True)
        return flash8.flash_attn_varlen_func(
            q, k, v, ends, ends, 50, 50, causal=True, s_aux=sink, return_attn_probs=True
        )

    _, expected = jvp(wide, (*seen, sink), tangents)
    for x, y in zip(found, expected, strict=True):
        assert (x - y).norm() < 2e-4 * y.norm()


def test_raw_float8_has_no_tangents():
    q, k, v = (torch.randn(1, 4, 2, 16) for _ in range(3))
    k8, v8 = (x.to(torch.float8_e4m3fn) for x in (k, v))
    with pytest.raises(ValueError, match=r"call flash8\.fp8_attention"):
        jvp(lambda q: flash8.flash_attn_func(q, k8, v8), (q,), (q,))
    scaled = jvp(lambda q: flash8.fp8.quantize(q).descale, (q,), (q,))[1]
    assert (scaled == 0).all()  # as documented: the quantizer is not differentiable


@pytest.mark.parametrize("field", ["alibi_slopes"])
def test_a_tangent_of_what_is_not_differentiable_is_refused(field):
    q, k, v = small()
    with pytest.raises(RuntimeError, match=f"{field} is not differentiable"):
        jvp(
            lambda x: flash8.flash_attn_func(q, k, v, **{field: x}),
            (torch.ones(2),),
            (torch.ones(2),),
        )


def test_what_is_written_in_place_is_refused_before_it_is_written():
    q, k, v = (torch.randn(1, 2, 2, 8) for _ in range(3))
    out, caches = torch.zeros_like(q), [torch.zeros(1, 8, 2, 8) for _ in range(2)]
    calls = [
        lambda q: flash8.flash_attn_func(q, k, v, out=out),
        lambda q: flash8.flash_attn_combine(q[None], q[None, ..., 0], out=out),
        lambda k: flash8.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=2),
        lambda q: flash8.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=2),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="tangent"):
            jvp(call, (q,), (q,))
        with pytest.raises(ValueError, match="tangent"), forward_ad.dual_level():
            call(forward_ad.make_dual(q, torch.ones_like(q)))
        assert not out.any() and not any(cache.any() for cache in caches)
    for call in calls[:3]:
        with pytest.raises(
            (ValueError, RuntimeError), match=r"tangent|derivative|in place|inplace"
        ):
            jvp(torch.vmap(call), (q[None],), (q[None],))
        with pytest.raises(
            (ValueError, RuntimeError), match=r"tangent|derivative|in place|inplace"
        ):
            torch.vmap(lambda x, call=call: jvp(call, (x,), (x,)))(q[None])
        assert not out.any() and not any(cache.any() for cache in caches)
    forward_out, append = torch.ops.flash8.forward_out, torch.ops.flash8.append_kv
    starts = int32([2])
    with pytest.raises(RuntimeError, match="no derivative"):
        jvp(lambda k: append(*caches, k, v, starts, None, None, None), (k,), (k,))
    options = flash8.call.options.Options(num_splits=1)
    with pytest.raises(RuntimeError, match="no derivative"):
        jvp(lambda q: forward_out(q, k, v, None, None, out, *options), (q,), (q,))
    assert not out.any() and not any(cache.any() for cache in caches)
