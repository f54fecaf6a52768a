"""What the mask hides counts for nothing, whatever it holds: NaN, infinities, freed pages."""

from dataclasses import replace

import pytest
import torch

import flash8
from cases import Case, as_leaves, build, gradients, int32, run_flash8, upstream

FP8 = torch.float8_e4m3fn
BAD = (float("nan"), float("inf"), float("-inf"))
MASKS = {
    "causal": dict(causal=True),
    "window": dict(window_size=(3, 2)),
    "causal window": dict(causal=True, window_size=(4, -1)),
    "chunks": dict(attention_chunk=5),
    "causal chunks": dict(attention_chunk=4, causal=True),
}


def visible(case):
    """bool (seqlen_q, seqlen_k) of a case of one length."""
    sq, sk = case.seqlens_q[0], case.seqlens_k[0]
    p = torch.arange(sq)[:, None] + sk - sq
    j = torch.arange(sk)
    left, right = case.window_size
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if left >= 0:
        seen &= j >= p - left
    if case.causal or right >= 0:
        seen &= j <= p + (0 if case.causal else right)
    if case.attention_chunk:
        seen &= j // case.attention_chunk == p // case.attention_chunk
    return seen


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_forward_of_a_bad_key(mask, bad, dtype):
    """Rows that do not see it have the bits they have without it; the others show it."""
    case = Case((24,), (30,), heads=4, heads_kv=2, dtype=dtype, **MASKS[mask])
    problem, key = build(case), 13
    out, lse = run_flash8(problem)
    sees = visible(case)[:, key]
    assert sees.any() and not sees.all()
    k, v = problem.k.clone(), problem.v.clone()
    v[:, key] = bad
    changed, changed_lse = run_flash8(replace(problem, v=v))
    assert torch.equal(changed[:, ~sees], out[:, ~sees]) and torch.equal(changed_lse, lse)
    assert not changed[:, sees].isfinite().any()
    k[:, key] = bad
    changed, changed_lse = run_flash8(replace(problem, k=k, v=v))
    assert torch.equal(changed[:, ~sees], out[:, ~sees])
    assert torch.equal(changed_lse[..., ~sees], lse[..., ~sees])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "options", [dict(), dict(softcap=3.0, alibi="h", qv=True, sink=True)], ids=str
)
@pytest.mark.parametrize("name", ["k", "v", "q", "dout"])
def test_gradients_of_a_bad_row(mask, options, name):
    """A pair of query and key that the mask hides carries nothing, in either direction."""
    case = Case((24,), (30,), heads=4, heads_kv=2, **MASKS[mask], **options)
    problem, at = build(case), 13
    d_out, d_lse = upstream(problem)
    clean = gradients(as_leaves(problem), run_flash8, d_out, d_lse)
    seen = visible(case)
    if name == "dout":
        d_out = d_out.clone()
        d_out[:, at] = torch.nan
    else:
        x = getattr(problem, name).clone()
        x[:, at] = torch.nan
        problem = replace(problem, **{name: x})
    found = gradients(as_leaves(problem), run_flash8, d_out, d_lse)
    if name in ("k", "v"):
        rows = ~seen[:, at]  # queries that do not see it, and keys that no such query sees
        keys = ~(seen & seen[:, at, None]).any(0)
    else:
        rows = torch.arange(seen.shape[0]) != at
        keys = ~seen[at]
    assert rows.any() and (keys.any() or mask == "causal")
    for gradient, kept in (("dq", rows), ("dk", keys), ("dv", keys)):
        x, y = found[gradient[1:]], clean[gradient[1:]]
        torch.testing.assert_close(x[:, kept], y[:, kept])
    assert not found["q"][:, ~rows].isfinite().any()
    if "qv" in clean:
        torch.testing.assert_close(found["qv"][:, rows], clean["qv"][:, rows])


def cache_call(page_size=4, window=6, seqlen_q=2, lengths=(21, 13), dtype=torch.float32, new=0):
    """A paged call with a window, as arguments; pages in order of a permutation."""
    g = torch.Generator().manual_seed(5)
    table = torch.randperm(16, generator=g)[: 2 * 7].reshape(2, 7).to(torch.int32)
    arguments = dict(
        q=torch.randn(2, seqlen_q, 4, 16, generator=g).to(dtype),
        k_cache=torch.randn(16, page_size, 2, 16, generator=g).to(dtype),
        v_cache=torch.randn(16, page_size, 2, 16, generator=g).to(dtype),
        page_table=table,
        cache_seqlens=int32(lengths),
        causal=True,
        window_size=(window, 0),
        return_softmax_lse=True,
    )
    if new:
        arguments["k"], arguments["v"] = torch.randn(2, 2, new, 2, 16, generator=g).to(dtype)
    return arguments


def free_pages(arguments, how, new=0):
    """The call with what lies wholly left of the window freed, or full of NaN, and the rest of the
    places behind the used ones NaN."""
    changed = {name: x.clone() if hasattr(x, "clone") else x for name, x in arguments.items()}
    size, seqlen_q = changed["k_cache"].shape[1], changed["q"].shape[1]
    window, table = changed["window_size"][0], changed["page_table"]
    nan = float("nan")
    for b, used in enumerate(changed["cache_seqlens"].tolist()):
        first = max(0, used + new - seqlen_q - window)
        for page in range(table.shape[1]):
            number = int(table[b, page])
            begin = page * size
            for cache in (changed["k_cache"], changed["v_cache"]):
                for slot in range(size):
                    if not first <= begin + slot < used:
                        cache[number, slot] = torch.tensor(nan).to(cache.dtype)
            if begin + size <= first or begin >= used + new:
                if how == "freed":
                    table[b, page] = -1
                elif how == "beyond":
                    table[b, page] = 10**6
    return changed


@pytest.mark.parametrize("how", ["NaN", "freed", "beyond"])
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("new", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_over_a_paged_cache(how, num_splits, new, dtype):
    arguments = cache_call(dtype=dtype, new=new)
    changed = free_pages(arguments, how, new)
    expected = flash8.flash_attn_with_kvcache(**arguments, num_splits=num_splits)
    found = flash8.flash_attn_with_kvcache(**changed, num_splits=num_splits)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("how", ["NaN", "freed"])
def test_a_window_over_pages_of_fp8(how):
    """Its descales by page, too, are of no account where the page is hidden."""
    arguments = cache_call(page_size=16, lengths=(70, 37), window=20)
    arguments["k_cache"], arguments["v_cache"] = (
        arguments[name].to(FP8) for name in ("k_cache", "v_cache")
    )
    descales = torch.rand(2, 16, 2, 1) + 0.5
    changed = free_pages(arguments, how)
    seen = set()
    lengths = arguments["cache_seqlens"].tolist()
    for used, table in zip(lengths, arguments["page_table"], strict=True):
        seen |= {int(table[j // 16]) for j in range(used - 22, used)}
    hidden = [page for page in range(16) if page not in seen]
    bad = descales.clone()
    bad[:, hidden] = torch.nan
    expected = flash8.flash_attn_with_kvcache(
        **arguments, k_descale=descales[0], v_descale=descales[1]
    )
    found = flash8.flash_attn_with_kvcache(**changed, k_descale=bad[0], v_descale=bad[1])
    for x, y in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(x, y) and x.isfinite().all()


def test_pages_in_sight_are_still_checked():
    for number in (-1, 16):
        arguments = cache_call()
        arguments["page_table"][1, 12 // 4] = number
        with pytest.raises(ValueError, match=rf"page_table .*got {number} at \[1, 3\]"):
            flash8.flash_attn_with_kvcache(**arguments)


def test_gradients_through_pages_left_of_the_window():
    arguments = cache_call()
    results = []
    for call in (arguments, free_pages(arguments, "freed")):
        names = ("q", "k_cache", "v_cache")
        leaves = {name: call[name].clone().requires_grad_() for name in names}
        out, lse, *_ = flash8.flash_attn_with_kvcache(**{**call, **leaves})
        results.append(torch.autograd.grad(out.square().sum() + lse.sum(), list(leaves.values())))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y) and x.isfinite().all()


@pytest.mark.parametrize("mask", ["causal", "window"])
def test_fp8_keys_that_are_hidden(mask):
    q, k, v = (torch.randn(1, n, 2, 16).to(FP8) for n in (24, 30, 30))
    seen = visible(Case((24,), (30,), **MASKS[mask]))[:, 13]
    expected = flash8.flash_attn_func(q, k, v, **MASKS[mask])
    for x in (k, v):
        x.view(torch.uint8)[:, 13] = 0x7F
    found = flash8.flash_attn_func(q, k, v, **MASKS[mask])
    assert torch.equal(found[:, ~seen], expected[:, ~seen])
    assert found[:, seen].isnan().all()


@pytest.mark.parametrize("backward", ["16bit", "fp8_scores", "fp8_scores_dv", "fp8"])
def test_fp8_gradients_of_a_hidden_key(backward):
    """The last key is seen by the last query alone."""
    recipe = flash8.fp8.CurrentScaling(backward=backward)
    q, k, v = (torch.randn(1, 20, 2, 16) for _ in range(3))
    v[:, -1] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash8.fp8.fp8_attention(*leaves, recipe, causal=True)
    assert out[:, :-1].isfinite().all() and not out[:, -1].isfinite().any()
    dq, _, _ = torch.autograd.grad(out[:, :-1].square().sum(), leaves)
    assert dq[:, :-1].isfinite().all() and dq[:, :-1].abs().max() > 0.01


def test_tangents_of_a_hidden_key():
    q, k, v = (torch.randn(1, 20, 2, 16) for _ in range(3))
    tangents = tuple(torch.randn_like(x) for x in (q, k, v))

    def attend(q, k, v):
        return flash8.flash_attn_func(q, k, v, causal=True)

    expected = torch.func.jvp(attend, (q, k, v), tangents)[1]
    for x in (k, v, *tangents[1:]):
        x[:, -1] = torch.nan
    found = torch.func.jvp(attend, (q, k, v), tangents)[1]
    torch.testing.assert_close(found[:, :-1], expected[:, :-1])
    assert found[:, -1].isnan().all()
