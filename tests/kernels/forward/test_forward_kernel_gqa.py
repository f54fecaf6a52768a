"""Query heads that share a KV head, folded into the rows of one tile."""

from dataclasses import replace

import pytest
import torch

import flash8
from flash8.backends.hopper import heuristics
from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import check, compare, device, draw, int32, kernel, launch, packed
from forward_launch import Call, Schedule
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CAUSAL = ForwardVariant("bf16", 128, 128, mask="causal", pack_gqa=True)
LOCAL = ForwardVariant("fp16", 64, 64, mask="local", alibi=True, pack_gqa=True)
SCALE = 128**-0.5


@pytest.mark.parametrize("shape", [(1, 200), (3, 129), (31, 31), (33, 1), (130, 127)], ids=str)
@pytest.mark.parametrize("heads", [(4, 1), (16, 2), (3, 3), (128, 1)], ids=str)
def test_causal(shape, heads):
    q, k, v = draw(CAUSAL, *shape, *heads, batch=1)
    seeds = (0, 1) if heads[0] > 16 else (0, 1, 2)
    check(CAUSAL, Call(q, k, v, SCALE, causal=True), Schedule(heads_per_section=2), seeds=seeds)


@pytest.mark.parametrize("heads", [(3, 1), (12, 2), (64, 1)], ids=str)
@pytest.mark.parametrize("mask", [{"window": (20, 5)}, {"attention_chunk": 40}], ids=str)
def test_local_with_slopes_and_sinks(heads, mask):
    q, k, v = draw(LOCAL, 71, 150, *heads, batch=1)
    slopes = torch.rand((1, heads[0]), generator=torch.Generator().manual_seed(3)) * 0.2
    sinks = torch.linspace(-2, 5, heads[0])
    call = Call(q, k, v, 0.125, alibi_slopes=slopes, s_aux=sinks, **mask)
    check(LOCAL, call, seeds=(0, 3))


@pytest.mark.parametrize("num_ctas", [1, 3])
def test_packed_sequences(num_ctas):
    lengths_q, lengths_k = [1, 0, 70, 33, 1, 1], [9, 4, 129, 1, 0, 260]
    q, k, v = draw(CAUSAL, sum(lengths_q) + 5, sum(lengths_k), 8, 2)
    indices = {
        "cu_seqlens_q": packed(lengths_q),
        "cu_seqlens_k": packed(lengths_k),
        "seqused_q": int32([1, 0, 69, 0, 1, 1]),
        "seqused_k": int32([9, 3, 120, 1, 0, 257]),
    }
    call = Call(q, k, v, SCALE, causal=True, indices=indices, max_seqlen_q=70, max_seqlen_k=260)
    check(CAUSAL, call, Schedule(num_ctas=num_ctas, heads_per_section=2))


def test_heads_of_another_layout():
    """(heads, rows) swapped in memory: strides, not shapes, tell where a head's rows are."""
    q, k, v = draw(CAUSAL, 40, 70, 4, 2, batch=2)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    check(CAUSAL, Call(turned, k, v, SCALE, causal=True))


@pytest.mark.parametrize("mutation", ["heads", "sinks"])
def test_the_bounds_catch(mutation):
    q, k, v = draw(CAUSAL, 20, 100, 4, 1, batch=1)
    good = Call(q, k, v, SCALE, causal=True, s_aux=torch.tensor([0.0, 2.0, 4.0, 6.0]))
    bad = {"heads": {"q": q.flip(2)}, "sinks": {"s_aux": good.s_aux.flip(0)}}[mutation]
    o, lse = launch(CAUSAL, replace(good, **bad))
    with pytest.raises(AssertionError):
        compare(good, o, lse)


@pytest.mark.parametrize(
    ("seqlen_q", "ratio", "head_dim", "wanted", "packs"),
    [
        (1, 8, 128, None, True),
        (1, 1, 128, True, False),
        (1, 8, 128, False, False),
        (1, 6, 128, True, False),
        (1, 6, 64, None, True),
        (128, 8, 128, None, False),
        (128, 8, 128, True, True),
        (130, 8, 128, None, True),
        (8192, 8, 128, None, False),
        (None, 8, 128, None, True),
    ],
)
def test_when_heads_are_packed(seqlen_q, ratio, head_dim, wanted, packs):
    assert heuristics.packs_query_heads(seqlen_q, ratio, head_dim, wanted) == packs


@pytest.mark.parametrize("variant", [CAUSAL, LOCAL], ids=lambda v: v.name)
def test_the_host_knows_the_rows_of_a_tile(variant):
    assert kernel(variant).info.block_m == heuristics.tile_rows(variant.head_dim)


def test_the_public_function_packs_heads(monkeypatch):
    q, k, v = draw(CAUSAL, 2, 150, 8, 2, batch=3)
    with device().serving_cpu_tensors(monkeypatch, seed=3):
        o, lse = flash8.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert device().report()["kernel"] == "flash8_forward"
    compare(Call(q, k, v, SCALE, causal=True), o, lse)
