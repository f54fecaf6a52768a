"""Packed sequences that torch's ops serve one by one, with what is around them done once."""

from dataclasses import replace

import pytest
import torch

import flash8
from cases import Case, as_leaves, build, check_backward, check_forward, run_flash8, upstream
from flash8.backends.cpu import packed

LENGTHS = (9, 30, 2, 65, 9)
BASE = Case(LENGTHS, LENGTHS, heads=4, heads_kv=2, layout="packed", causal=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Calls that are for units: of other rows than cu_seqlens says, masks, values, or nothing to save.
NO_RUNS = {
    "equal lengths": dict(seqlens_q=(9,) * 3, seqlens_k=(9,) * 3),
    "an empty sequence": dict(seqlens_q=(9, 0, 5), seqlens_k=(9, 0, 5)),
    "one token": dict(seqlens_q=(9, 1), seqlens_k=(9, 1)),
    "more keys": dict(seqlens_q=(9, 5), seqlens_k=(9, 6)),
    "a window": dict(window_size=(20, 0)),
    "a chunk": dict(attention_chunk=32),
    "sinks": dict(sink=True),
    "softcap": dict(softcap=3.0),
    "wider v": dict(head_dim_v=24),
    "used lengths": dict(unused_k=(0, 3, 0, 1, 0)),
    "fp64": dict(dtype=torch.float64),
}


class Watched(list):
    """What became of the runs, forward and backward."""

    def __init__(self, monkeypatch):
        for name in ("forward_run", "backward_run"):
            monkeypatch.setattr(packed, name, self._wrapped(name, getattr(packed, name)))

    def _wrapped(self, name, run):
        def call(*given):
            self.append((name, run(*given)))
            return self[-1][1]

        return call


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


def results(problem, d_out):
    """O, LSE and the gradients by O."""
    leaves = as_leaves(problem)
    out, lse = run_flash8(leaves)
    out.backward(d_out)
    return [out.detach(), lse.detach(), *(x.grad for x in leaves.leaves().values())]


@pytest.mark.parametrize("causal", [True, False])
def test_a_few_tokens(causal, watched):
    """So few rows are looked at one by one."""
    lengths = {"seqlens_q": (3, 5), "seqlens_k": (3, 5)}
    problem = build(BASE.with_(dtype=torch.float32, causal=causal, **lengths))
    check_forward(problem)
    check_backward(problem, with_lse=False)
    assert {*watched} == {("forward_run", True), ("backward_run", True)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_bits_are_those_of_units(causal, dtype, watched, monkeypatch):
    problem = build(replace(BASE, causal=causal, dtype=dtype))
    d_out, _ = upstream(problem)
    found = results(problem, d_out)
    assert watched == [("forward_run", True), ("backward_run", True)]
    check_forward(problem)
    check_backward(problem, with_lse=False)
    monkeypatch.setattr(packed, "run_of", lambda *given: None)
    for got, expected in zip(found, results(problem, d_out), strict=True):
        torch.testing.assert_close(got, expected, atol=0.0, rtol=0.0)


@pytest.mark.parametrize("name", NO_RUNS)
def test_other_calls(name, watched):
    problem = build(replace(BASE, **NO_RUNS[name]))
    check_forward(problem)
    check_backward(problem)
    assert watched == []


def test_rows_beyond_the_sequences(watched):
    """They are zeros, and -inf in LSE."""
    q, k, v = (torch.randn(20, 2, 8) for _ in range(3))
    cu_seqlens = torch.tensor([0, 7, 18], dtype=torch.int32)
    o, lse = packed_call(q, k, v, cu_seqlens)
    assert watched == []
    assert (o[18:] == 0.0).all() and (lse[:, 18:] == float("-inf")).all()


def test_lengths_that_are_wrong(watched):
    q, k, v = (torch.randn(20, 2, 8) for _ in range(3))
    for offsets in ([0, 12, 8, 20], [2, 8, 20], [0, 8, 30], [0, 19, 20]):
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
        with pytest.raises(ValueError, match=r"cu_seqlens|max_seqlen"):
            packed_call(q, k, v, cu_seqlens, longest=18)
    assert watched == []


def packed_call(q, k, v, cu_seqlens, longest=20):
    lengths = (cu_seqlens, cu_seqlens, longest, longest)
    return flash8.flash_attn_varlen_func(q, k, v, *lengths, causal=True, return_attn_probs=True)


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_what_is_hidden_may_hold_anything(name, watched):
    """NaN in the last row of a sequence reaches that row, and the gradients of what it sees; the
    run finds it, and the units keep it out of the others."""
    problem = build(replace(BASE, dtype=torch.float32))
    last = sum(LENGTHS[:2]) - 1
    d_out, _ = upstream(problem)
    clean = results(problem, d_out)
    watched.clear()
    if name == "dout":
        d_out = d_out.clone()
        d_out[last] = torch.nan
    else:
        x = getattr(problem, name).clone()
        x[last] = torch.nan
        problem = replace(problem, **{name: x})
    found = results(problem, d_out)
    others = torch.ones(sum(LENGTHS), dtype=torch.bool)
    others[last] = False
    for got, expected in ((found[0], clean[0]), (found[2], clean[2])):  # O, dQ
        torch.testing.assert_close(got[others], expected[others], atol=1e-5, rtol=1e-5)
    assert found[2][last].isnan().any()
    assert ("backward_run", False) in watched


def test_scores_that_are_nowhere_finite(watched):
    """A row whose scores are all -inf has no LSE that the ops could tell from 0."""
    problem = build(replace(BASE, dtype=torch.float32))
    q, k = problem.q.clone(), problem.k.clone()
    q[9], k[9] = 1e30, -1e30  # the first row of the second sequence sees one key
    problem = replace(problem, q=q, k=k)
    out, lse = run_flash8(problem)
    assert watched == [("forward_run", False)]
    assert (lse[:, 9] == float("-inf")).all() and (out[9] == 0.0).all()
