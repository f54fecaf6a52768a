"""torch's compiled attention serves the calls it can, and what it serves is right."""

import functools
from dataclasses import replace
from types import SimpleNamespace

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
)
from flash8.backends.cpu import compiled
from flash8.call.options import Options
from flash8.ops import unseen

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: One of each side of what the ops split at: vectors of 8, blocks of 32, 64 and 256 queries and of
#: 512 keys.
LENGTHS = [(2, 2), (31, 33), (33, 2), (1, 70), (65, 511), (193, 193), (200, 513), (769, 770)]


class Watched(list):
    """The calls of the two ops, by name and whether causal."""

    def __init__(self, monkeypatch):
        found = compiled.ops()
        assert found is not None

        def forward(*given, **more):
            self.append(("forward", given[0].shape[0], given[4]))
            return found.forward(*given, **more)

        def backward(*given, **more):
            self.append(("backward", given[1].shape[0], given[7]))
            return found.backward(*given, **more)

        monkeypatch.setattr(compiled, "ops", lambda: compiled.Ops(forward, backward))


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


def run(problem):
    """A forward and a backward, of O alone."""
    d_out, _ = upstream(problem)
    gradients(as_leaves(problem), run_flash8, d_out, None)


BASE = Case((70,) * 3, (70,) * 3, heads=4, heads_kv=2, dtype=torch.bfloat16)
PACKED = replace(BASE, layout="packed", seqlens_q=(9, 30, 9, 9), seqlens_k=(9, 30, 9, 9))
SERVED = {
    "full": (BASE, [(3, False)]),
    "causal": (replace(BASE, causal=True), [(3, True)]),
    "causal, more keys": (
        replace(BASE, causal=True, seqlens_k=(90,) * 3),
        [(3, True), (3, False)],
    ),
    "many heads": (replace(BASE, heads=32, heads_kv=32), [(3, False)]),
    "cross": (replace(BASE, seqlens_k=(90,) * 3), [(3, False)]),
    "one query": (replace(BASE, seqlens_q=(1,) * 3, causal=True), [(3, False)]),
    "a window that hides nothing": (replace(BASE, window_size=(69, 69)), [(3, False)]),
    "a causal window": (replace(BASE, causal=True, window_size=(69, 0)), [(3, True)]),
    "a chunk": (replace(BASE, causal=True, attention_chunk=70), [(3, True)]),
    "sinks": (replace(BASE, sink=True), [(3, False)]),
    "wider q": (replace(BASE, head_dim=24), [(3, False)]),
    "wider v": (replace(BASE, head_dim_v=24), [(3, False)]),
    "packed, one by one": (replace(PACKED, causal=True), 4 * [(1, True)]),
    "packed, by lengths": (
        replace(PACKED, causal=True, seqlens_k=(9, 31, 9, 9)),
        [(3, True), (1, True), (1, False)],
    ),
    "equal lengths": (replace(PACKED, seqlens_q=(9,) * 4, seqlens_k=(9,) * 4), [(4, False)]),
    "used lengths": (replace(BASE, unused_k=(0, 7, 0)), [(2, False), (1, False)]),
    "pages": (replace(PACKED, layout="paged", causal=True), [(3, True), (1, True)]),
}
NOT_SERVED = {
    "fp64": dict(dtype=torch.float64),
    "window": dict(window_size=(5, -1)),
    "causal, without keys": dict(causal=True, seqlens_k=(69,) * 3),
    "chunks": dict(attention_chunk=16),
    "softcap": dict(softcap=3.0),
    "ALiBi": dict(alibi="h"),
    "dropout": dict(dropout_p=0.2),
    "qv": dict(qv=True),
    "splits": dict(num_splits=2),
    "one key": dict(seqlens_k=(1,) * 3),
    "no key": dict(seqlens_k=(0,) * 3),
}


@pytest.mark.parametrize("name", SERVED)
def test_served(name, watched):
    """Units of equal lengths are one call of each op, but for those of `packed`."""
    case, calls = SERVED[name]
    problem = build(case)
    run(problem)
    assert sorted(watched) == sorted(
        (op, *call) for op in ("forward", "backward") for call in calls
    )
    check_forward(problem)
    check_backward(problem)


@pytest.mark.parametrize("name", NOT_SERVED)
def test_not_served(name, watched):
    problem = build(replace(BASE, **NOT_SERVED[name]))
    if problem.case.num_splits == 1:
        run(problem)
    assert watched == []
    check_forward(problem)


@pytest.mark.parametrize(
    "options", [dict(split_keys=64), dict(tree_mask=torch.ones(3, 70, dtype=torch.int32))], ids=str
)
def test_calls_over_a_cache_that_are_not_served(options):
    """Whose bits do not depend on the number of splits, and whose mask is a tree of drafts."""
    problem = build(BASE)
    tensors = (problem.q, problem.k, problem.v, None)
    assert compiled.can_do(*tensors, Options())
    assert not compiled.can_do(*tensors, Options(**options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [dict(), dict(sink=True)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_edges(lengths, options, dtype):
    """Of the ops' blocks, with the gradient of LSE: O alone, and O and LSE."""
    case = Case(*((n,) for n in lengths), head_dim=24, head_dim_v=24)
    problem = build(case.with_(dtype=dtype, **options))
    check_forward(problem)
    check_backward(problem)
    check_backward(problem, with_lse=False)
    for keys in (lengths[0], lengths[0] + lengths[1]):
        causal = build(problem.case.with_(seqlens_k=(keys,), causal=True))
        check_forward(causal)
        check_backward(causal)


def test_rows_that_are_not_contiguous(watched):
    """Of q, k, v and dO: every second channel, keys of one row, dO that is expanded."""
    problem = build(replace(BASE, dtype=torch.float32, causal=True))
    wide = {
        n: torch.stack([x, x * 0 + 7.0], dim=-1).flatten(-2) for n, x in problem.leaves().items()
    }
    problem = replace(problem, **{n: x[..., ::2] for n, x in wide.items()})
    check_forward(problem)
    problem = replace(problem, k=problem.k[:, :1].expand_as(problem.k))
    check_forward(problem)
    leaves = as_leaves(problem)
    out, _ = run_flash8(leaves)
    out.sum().backward()
    exact = as_leaves(problem, torch.float64)
    run_flash8(exact)[0].sum().backward()
    assert torch.allclose(leaves.k.grad.double(), exact.k.grad, atol=1e-5)
    assert torch.allclose(leaves.v.grad.double(), exact.v.grad, atol=1e-5)
    assert {name for name, *_ in watched} == {"forward", "backward"}


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_what_is_hidden_may_hold_anything(name, layout, watched):
    """A causal mask hides the last key from all queries but the last. The products would carry its
    NaN to all; then tiles serve the call."""
    lengths = (40,) * 3
    case = Case(lengths, lengths, causal=True, dtype=torch.float32, layout=layout)
    problem = build(case)
    last = torch.tensor([39, 79, 119]) if layout == "packed" else 39
    at = (last,) if layout == "packed" else (slice(None), last)
    d_out, _ = upstream(problem)
    clean = gradients(as_leaves(problem), run_flash8, d_out, None)
    out, _ = run_flash8(problem)
    if name == "dout":
        d_out = d_out.clone()
        d_out[at] = torch.nan
    else:
        x = getattr(problem, name).clone()
        x[at] = torch.nan
        problem = replace(problem, **{name: x})
    others = torch.ones(problem.q.shape[:-2], dtype=torch.bool)
    others[at] = False
    found, found_lse = run_flash8(problem)
    assert torch.allclose(found[others], out[others], atol=1e-5)
    assert found_lse.isnan().sum() == (found_lse.numel() // 40 if name in "qk" else 0)
    bad = gradients(as_leaves(problem), run_flash8, d_out, None)
    assert torch.allclose(bad["q"][others], clean["q"][others], atol=1e-5)
    assert bad["q"][at].isnan().any()
    assert watched.count(("forward", 3, True)) > 1 and ("backward", 3, True) in watched


def test_a_mask_from_the_top_left_is_found(monkeypatch):
    """What the ops call causal, where the mask is not square."""
    problem = build(replace(BASE, causal=True, seqlens_k=(75,) * 3))
    check_forward(problem)
    check_backward(problem)
    whole = compiled.common_keys
    monkeypatch.setattr(unseen, "_known", {})  # which keeps what it was
    monkeypatch.setattr(
        compiled, "common_keys", lambda *given: 0 if whole(*given) is not None else None
    )
    with pytest.raises(AssertionError):
        check_forward(problem)
    with pytest.raises(AssertionError):
        check_backward(problem)


FAULTS = {
    "another scale": lambda o: compiled.Ops(
        lambda *x, scale: o.forward(*x), lambda *x, scale: o.backward(*x)
    ),
    "a causal mask that is none": lambda o: compiled.Ops(
        lambda *x, scale: o.forward(*x[:4], False, scale=scale), o.backward
    ),
    "LSE to the base of 2": lambda o: compiled.Ops(
        lambda *x, scale: (lambda out, lse: (out, lse * 1.442695))(*o.forward(*x, scale=scale)),
        o.backward,
    ),
    "no scale of gradients": lambda o: compiled.Ops(
        o.forward,
        lambda *x, scale: tuple(g / scale for g in o.backward(*x, scale=scale)),
    ),
    "an argument less": lambda o: compiled.Ops(lambda q, k, v: o.forward(q, k, v), o.backward),
    "no backward": lambda o: compiled.Ops(o.forward, None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_ops_that_are_others_serve_nothing(name, monkeypatch):
    """Tiles do, as where torch has no such ops."""
    found = compiled.ops()
    other = FAULTS[name](found)
    calls = []

    def wrapped(op):
        def call(*given, **more):
            calls.append(op)
            return op(*given, **more)

        return call

    names = SimpleNamespace(
        _scaled_dot_product_flash_attention_for_cpu=SimpleNamespace(default=wrapped(other.forward)),
        _scaled_dot_product_flash_attention_for_cpu_backward=SimpleNamespace(
            default=wrapped(other.backward)
        ),
    )
    probe(monkeypatch, names)
    assert compiled.ops() is None and calls
    calls.clear()
    check_backward(build(replace(BASE, causal=True)))
    assert not calls


def test_a_torch_without_the_ops(monkeypatch):
    probe(monkeypatch, SimpleNamespace())
    assert compiled.ops() is None
    check_backward(build(replace(BASE, causal=True)))


def probe(monkeypatch, names):
    """The ops are looked for again, in `names`."""
    monkeypatch.setattr(compiled, "torch", SimpleNamespace(**vars(torch)))
    monkeypatch.delattr(compiled.torch, "_scaled_dot_product_flash_attention_for_cpu")
    monkeypatch.setattr(compiled.torch, "ops", SimpleNamespace(aten=names, mkldnn=torch.ops.mkldnn))
    monkeypatch.setattr(compiled, "ops", functools.cache(compiled.ops.__wrapped__))
    monkeypatch.setattr(unseen, "_known", {})  # of calls that these ops would serve


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(70, 70), (300, 600)], ids=str)
def test_products_of_16_bits(dtype, lengths, monkeypatch):
    """As on CPUs that have them; others convert, here too."""
    monkeypatch.setattr(compiled, "has_products", lambda _: True)
    monkeypatch.setattr(unseen, "_known", {})  # whose plans say who has them
    case = Case(*((n,) for n in lengths), heads=4, heads_kv=2, head_dim=64, head_dim_v=64)
    causal = lengths[0] == lengths[1]
    check_forward(build(case.with_(dtype=dtype, causal=causal)))
    check_backward(build(case.with_(dtype=dtype, causal=causal)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["dense", "packed", "paged"])
@pytest.mark.parametrize("lengths", [(1, 1024), (1, 1537), (16, 1100)], ids=str)
def test_a_few_queries_convert_keys_in_parts(lengths, layout, dtype, watched):
    """Every part is as right as the whole; more queries, or keys of fp32, are one part."""
    compiled.has_products.cache_clear()
    if compiled.has_products(dtype):
        pytest.skip("this CPU has products of 16 bits")
    case = Case(*((n,) * 2 for n in lengths), heads=4, heads_kv=2, dtype=dtype, layout=layout)
    parts = -(-lengths[1] // 512)
    check_forward(build(case))
    assert len(watched) == parts
    watched.clear()
    check_forward(build(case.with_(dtype=torch.float32)))
    check_forward(build(case.with_(seqlens_q=(17,) * 2)))
    assert len(watched) == 2


@pytest.mark.parametrize("at", [3, 700, 1023])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_parts_with_a_key_that_is_none(at, value):
    """NaN reaches O; a score of -inf, in one part or in all of a part, has no weight."""
    q = torch.ones(1, 1, 1, 16, dtype=torch.bfloat16)
    k, v = (torch.randn(1, 1024, 1, 16).bfloat16() for _ in "kv")
    k[:, at] = value
    clean = flash8.flash_attn_func(q.double(), k.double(), v.double(), return_attn_probs=True)
    o, lse = flash8.flash_attn_func(q, k, v, return_attn_probs=True)
    torch.testing.assert_close(o.double(), clean[0], atol=4e-3, rtol=4e-3, equal_nan=True)
    torch.testing.assert_close(
        lse.double(), clean[1].double(), atol=1e-4, rtol=1e-4, equal_nan=True
    )
    k[:, 512:] = torch.finfo(torch.bfloat16).min  # q . k is -inf in fp32
    if value == -1e30:
        o, _ = flash8.flash_attn_func(q, k, v, return_attn_probs=True)
        first, _ = flash8.flash_attn_func(q, k[:, :512], v[:, :512], return_attn_probs=True)
        torch.testing.assert_close(o, first, atol=4e-3, rtol=4e-3)


def test_memory_is_linear():
    """Tiles of the ops and fp32 copies of the operands; scores would take 64 times as much."""
    seqlen, heads, dim = 2048, 2, 32
    q = torch.randn(1, seqlen, heads, dim, dtype=torch.bfloat16, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        flash8.flash_attn_func(q, q, q, causal=True).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 8 * q.numel() * 4 == heads * seqlen * seqlen * 4 / 8


@pytest.mark.parametrize("sink", [None, 0.0])
@pytest.mark.parametrize("keys", [2, 5, 7, 8, 9, 40])
def test_a_query_of_nan_gives_nan(keys, sink):
    """torch's op takes a row of few NaN scores for one that is masked."""
    q = torch.randn(1, 5, 2, 16)
    q[:, 3] = torch.nan
    k, v = (torch.randn(1, keys, 2, 16) for _ in "kv")
    s_aux = None if sink is None else torch.full((2,), sink)
    for causal in (False, keys >= 5):
        o, lse = flash8.flash_attn_func(q, k, v, causal=causal, s_aux=s_aux, return_attn_probs=True)
        assert o[:, 3].isnan().all() and lse[..., 3].isnan().all()
        assert not o[:, :3].isnan().any() and not o[:, 4:].isnan().any()


def test_a_part_without_a_finite_score_has_no_weight():
    q, v = torch.full((1, 3, 2, 8), 1e20), torch.randn(1, 6, 2, 8)
    k = torch.cat([torch.full((1, 3, 2, 8), -1e20), torch.zeros(1, 3, 2, 8)], 1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o, lse = flash8.flash_attn_func(*leaves, causal=True, return_attn_probs=True)
    torch.testing.assert_close(lse[0, 0], torch.tensor([1.0, 2.0, 3.0]).log())
    for i in range(3):  # a mean of the last keys that it sees
        torch.testing.assert_close(o[0, i], v[0, 3 : 4 + i].mean(0))
    o.sum().backward()
    torch.testing.assert_close(leaves[2].grad[0, 3:, 0, 0], torch.tensor([11.0, 5.0, 2.0]) / 6)


@pytest.mark.parametrize("size", [10.0, 1e2, 1e3])
def test_gradients_of_large_logits(size):
    """torch's ops round the scores of a backward otherwise than those of its forward."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, do = (torch.randn(1, 40, 2, 32, generator=generator) for _ in range(4))
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (q * size, k * size, v)]
        out = flash8.flash_attn_func(*leaves)
        results.append(torch.autograd.grad(out, leaves, do.to(dtype))[2])
    assert (results[0] - results[1]).norm() <= 2e-4 * results[1].norm()


def test_heads_that_overlap():
    x = torch.randn(1, 20, 24)
    q = x.unfold(-1, 16, 1)[:, :, :8]
    assert q.stride() == (480, 24, 1, 1)
    k, v = (torch.randn(1, 20, 8, 16) for _ in "kv")
    for rows in (q, q[:, :1]):
        out = flash8.flash_attn_func(rows, k, v)
        torch.testing.assert_close(out, flash8.flash_attn_func(rows.contiguous(), k, v))
