"""Windows, chunks and ALiBi on the simulated device."""

from dataclasses import replace

import pytest
import torch

import flash8
from defaults import by_default
from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import check, compare, device, draw, int32, launch, packed
from forward_launch import Call
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

LOCAL = ForwardVariant("bf16", 64, 64, mask="local")
ALIBI_LOCAL = ForwardVariant("bf16", 64, 64, mask="local", alibi=True)
ALIBI = ForwardVariant("fp16", 128, 128, softcap=True, alibi=True)
SCALE = 64**-0.5

WINDOWS = [
    {"window": (0, 0)},
    {"window": (127, 0)},
    {"window": (-1, 5)},
    {"window": (64, -1)},
    {"window": (2**31 - 1, 2**31 - 1)},
    {"window": (130, 0), "causal": True},
]
CHUNKS = [
    {"attention_chunk": 1},
    {"attention_chunk": 13, "causal": True},
    {"attention_chunk": 127},
    {"attention_chunk": 128, "causal": True},
    {"attention_chunk": 129, "window": (40, 3)},
    {"attention_chunk": 2**31 - 1, "window": (-1, 0)},
]
SHAPES = [(131, 197), (193, 70), (1, 257)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", WINDOWS + CHUNKS, ids=str)
def test_bounds_of_a_row(mask, shape):
    q, k, v = draw(LOCAL, *shape, 1, 1, batch=1)
    check(LOCAL, Call(q, k, v, SCALE, **mask))


def test_chunks_of_packed_sequences():
    lengths_q, lengths_k = [70, 0, 33, 200], [90, 4, 33, 129]
    q, k, v = draw(LOCAL, sum(lengths_q), sum(lengths_k), 2, 1)
    indices = {"cu_seqlens_q": packed(lengths_q), "cu_seqlens_k": packed(lengths_k)}
    indices["seqused_k"] = int32([90, 4, 20, 128])
    call = Call(q, k, v, SCALE, indices=indices, max_seqlen_q=200, max_seqlen_k=129)
    check(LOCAL, replace(call, attention_chunk=31))


def slopes(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) * 0.3


@pytest.mark.parametrize("mask", [{"window": (70, 30)}, {"attention_chunk": 50}], ids=str)
@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("shape", [(131, 197), (193, 70)], ids=str)
def test_alibi_and_windows(shape, per_batch, mask):
    q, k, v = draw(ALIBI_LOCAL, *shape, 2, 1, batch=2)
    given = slopes(2, 2) if per_batch else slopes(2)
    check(ALIBI_LOCAL, Call(q, k, v, SCALE, alibi_slopes=given, **mask))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(130, 300), (257, 127), (1, 1)], ids=str)
def test_alibi_and_softcap(shape):
    q, k, v = draw(ALIBI, *shape, 3, 1, batch=1)
    check(ALIBI, Call(q, k, v, 128**-0.5, softcap=2.0, alibi_slopes=slopes(3)))


@pytest.mark.parametrize("variant", by_default([ALIBI, ALIBI_LOCAL], [ALIBI_LOCAL]))
def test_alibi_of_packed_sequences(variant):
    q, k, v = draw(variant, 100, 170, 2, 2)
    indices = {"cu_seqlens_q": packed([60, 40]), "cu_seqlens_k": packed([20, 150])}
    options = {"softcap": 5.0} if variant.softcap else {"window": (70, 30)}
    scale = variant.head_dim**-0.5
    call = Call(q, k, v, scale, indices=indices, max_seqlen_q=60, max_seqlen_k=150, **options)
    check(variant, replace(call, alibi_slopes=slopes(2, 2)))


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"attention_chunk": 50}, {"attention_chunk": 51}),
        ({"attention_chunk": 50}, {"attention_chunk": 0}),
        ({"window": (20, 10)}, {"window": (21, 10)}),
        ({"window": (20, 10)}, {"window": (20, 11)}),
        ({"alibi_slopes": slopes(2)}, {"alibi_slopes": slopes(2).flip(0)}),
        ({"alibi_slopes": slopes(2)}, {"alibi_slopes": slopes(2) * 1.05}),
    ],
    ids=str,
)
def test_the_bounds_catch(good, bad):
    variant = ALIBI_LOCAL if "alibi_slopes" in good else LOCAL
    q, k, v = draw(variant, 120, 200, 2, 1, batch=1)
    call = Call(q, k, v, SCALE)
    o, lse = launch(variant, replace(call, **bad))
    with pytest.raises(AssertionError):
        compare(replace(call, **good), o, lse)


@pytest.mark.parametrize("pack_gqa", by_default([False, None], [False]))
def test_the_public_function_has_chunks_and_alibi(pack_gqa, monkeypatch):
    q, k, v = draw(ALIBI_LOCAL, 90, 150, 2, 1, batch=2)
    given = slopes(2, 2)
    options = {"alibi_slopes": given, "attention_chunk": 40}
    with device().serving_cpu_tensors(monkeypatch, seed=4):
        o, lse = flash8.flash_attn_func(
            q, k, v, causal=True, pack_gqa=pack_gqa, return_attn_probs=True, **options
        )
    assert device().report()["kernel"] == "flash8_forward"
    compare(Call(q, k, v, SCALE, causal=True, **options), o, lse)
