"""Rows of no sequence, and rows that see neither key nor sink: what their gradients of O and LSE
hold reaches nothing."""

import pytest
import torch

import flash8
from cases import cumulative
from flash8 import fp8
from flash8.fp8.recipes import BACKWARDS

ROWS, UNUSED, MASKED = 48, slice(44, 48), slice(0, 10)
SINKS = torch.tensor([0.5, float("-inf")])  # with the second head's, masked rows see nothing
WAYS = ["plain", *BACKWARDS]


def attend(way, q, k, v, sinks=None):
    """44 queries, of which the first ten see none of the 34 keys."""
    ends, key_ends = cumulative([44]), cumulative([34])
    options = dict(causal=True, s_aux=sinks, return_attn_probs=True)
    call = (ends, key_ends, 44, 34)
    if way == "plain":
        return flash8.flash_attn_varlen_func(q, k, v, *call, **options)
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    recipe = fp8.CurrentScaling(backward=way, smooth_k=True)
    return fp8.fp8_attention(q, k, v, recipe, **dict(zip(names, call, strict=True)), **options)


def gradients(way, spoil, sinks=SINKS):
    """Of q, k, v and the sinks. `spoil` gets q, dO and dLSE, rows first."""
    generator = torch.Generator().manual_seed(3)
    q, k, v, dout = (
        torch.randn(ROWS, heads, 64, generator=generator).bfloat16() for heads in (2, 1, 1, 2)
    )
    dlse = torch.randn(2, ROWS, generator=generator)
    spoil(q, dout, dlse.T)
    leaves = [x.requires_grad_() for x in (q, k, v, *(() if sinks is None else (sinks.clone(),)))]
    out, lse = attend(way, *leaves)
    assert torch.isneginf(lse[:, UNUSED]).all() and torch.isneginf(lse[1, MASKED]).all()
    return torch.autograd.grad((out, lse), leaves, (dout, dlse))


def same(found, right):
    return all(torch.equal(x, y) for x, y in zip(found, right, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("way", WAYS)
def test_their_gradients_reach_nothing(way, value):
    def spoil(value):
        def fill(q, dout, dlse):
            dout[UNUSED], dlse[UNUSED] = value, value
            dout[MASKED, 1], dlse[MASKED, 1] = value, value

        return fill

    right = gradients(way, spoil(0.0))
    assert all(x.isfinite().all() for x in right) and right[3][0] != 0 and right[3][1] == 0
    assert same(gradients(way, spoil(value)), right)


def test_kernels_know_them_whatever_their_queries_hold(monkeypatch):
    """By an LSE of -inf, from which K's mean takes its share."""
    seen, backward = [], torch.ops.flash8.backward

    def recording(*args):
        seen.append(args[8])
        return backward(*args)

    monkeypatch.setattr(torch.ops.flash8, "backward", recording)

    def spoil(q, dout, dlse):
        q[UNUSED], q[MASKED, 1] = float("nan"), float("nan")

    found = gradients("16bit", spoil, sinks=None)
    (lse,) = seen
    assert torch.isneginf(lse[:, UNUSED]).all() and torch.isneginf(lse[1, MASKED]).all()
    assert all(x.isfinite().all() for x in found)
