"""Attention over keys that come in parts, in the shapes of ring-flash-attention's calls.

It fills the arguments in by the signature, and merges partial results.
"""

import inspect

import pytest
import torch

import flash8
from flash8.compat import install
from framework_cases import (
    CU_SEQLENS,
    DIM,
    HEADS_KV,
    SEQLEN,
    dense,
    imported,
    near,
    packed,
    whole,
)


@pytest.fixture(autouse=True)
def installed():
    with install():
        yield


def by_signature(function, **given):
    spec = inspect.getfullargspec(function)
    defaults = spec.defaults or ()
    filled = (None,) * (len(spec.args) - len(defaults)) + defaults
    return {**dict(zip(spec.args, filled, strict=True)), "softcap": 0.0, **given}


def merged(parts):
    """O and LSE over all keys, from those over some each."""
    lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
    weights = [(part - lse).exp().transpose(-1, -2).unsqueeze(-1) for _, part in parts]
    return sum(out * w for (out, _), w in zip(parts, weights, strict=True)), lse


def test_a_ring_of_keys_is_one_call():
    names = imported("ring-flash-attention")
    forward, backward = names["_flash_attn_forward"], names["_flash_attn_backward"]
    assert inspect.isfunction(forward) and inspect.isfunction(backward)
    q, k, v, dout = dense()
    half = SEQLEN // 2
    # The second process of two: its queries see all keys before, and its own causally.
    steps = [(slice(half, None), True), (slice(0, half), False)]
    q, dout = q[:, half:], dout[:, half:]
    shared = dict(dropout_p=0, softmax_scale=DIM**-0.5, alibi_slopes=None)
    shared |= dict(window_size_left=-1, window_size_right=-1)
    parts = []
    for keys, causal in steps:
        arguments = dict(q=q, k=k[:, keys], v=v[:, keys], causal=causal, return_softmax=False)
        out, lse, _, _ = forward(**by_signature(forward, **arguments, **shared))
        parts.append((out, lse))
    out, lse = merged(parts)
    want_out, want_lse, want_dq, *want = whole(flash8.flash_attn_func, q, k, v, dout, causal=True)
    near((out, lse), (want_out, want_lse))
    dq = torch.zeros_like(q)
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)  # as the ring has it: no row is dense
    for keys, causal in steps:
        written = [torch.full_like(x, float("nan")) for x in (q, k[:, keys], v[:, keys])]
        given = dict(dout=dout, q=q, k=k[:, keys], v=v[:, keys], out=out, softmax_lse=lse)
        given |= dict(zip(("dq", "dk", "dv"), written, strict=True))
        given |= dict(causal=causal, deterministic=False)
        backward(**by_signature(backward, **given, **shared))
        dq += written[0]
        near(tuple(written[1:]), tuple(x[:, keys] for x in want))
    near(dq, want_dq)


def test_all_gathered_keys_of_packed_sequences():
    """Some heads at a time, gradients into slices of a buffer."""
    names = imported("ring-flash-attention")
    forward, backward = (names[f"_flash_attn_varlen_{x}"] for x in ("forward", "backward"))
    q, k, v, dout = packed()
    lengths = (CU_SEQLENS, CU_SEQLENS, 16, 16)
    want = whole(
        lambda q, k, v, **options: flash8.flash_attn_varlen_func(q, k, v, *lengths, **options),
        *(q, k, v, dout),
        causal=True,
    )
    named = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    shared = dict(zip(named, lengths, strict=True))
    shared |= dict(dropout_p=0, softmax_scale=DIM**-0.5, causal=True, alibi_slopes=None)
    buffer = torch.full((2, 24, HEADS_KV, DIM), float("nan"))
    dq = torch.full_like(q, float("nan"))
    for head in range(HEADS_KV):
        rows, one = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        part = dict(q=q[:, rows], k=k[:, one], v=v[:, one])
        out, lse, _, _ = forward(**by_signature(forward, **part, **shared, return_softmax=False))
        near((out, lse), (want[0][:, rows], want[1][rows]))
        part |= dict(dout=dout[:, rows], out=out, softmax_lse=lse, deterministic=False)
        part |= dict(dq=dq[:, rows], dk=buffer[0][:, one], dv=buffer[1][:, one])
        window = dict(window_size_left=-1, window_size_right=-1)
        backward(**by_signature(backward, **part, **shared, **window))
    near((dq, *buffer), want[2:])
