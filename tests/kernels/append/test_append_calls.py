"""flash_attn_with_kvcache with new keys, whose append is a kernel on the simulated device."""

import contextlib

import pytest
import torch

import flash8
from append_cases import bits
from cases import cumulative, int32
from flash8 import _native
from flash8.backends.hopper import decode
from flash8.tensors.float8 import E4M3
from quantizer_cases import draw, tables, tensors_of
from quantizer_device import device, kernels
from simulated_device import missing_compiler

pytestmark = [
    pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler())),
    pytest.mark.filterwarnings("ignore:flash8 has no compiled kernel"),
]

HEADS, HEADS_KV, D = 4, 2, 64
BATCH, ROWS = 3, 20


def inputs(dtype=torch.bfloat16, *, packed=False, slots=5, tokens=200, cache=None):
    """q, both caches, k, v."""
    q = draw(BATCH, ROWS, HEADS, D, seed=1).to(dtype)
    k, v = (draw(BATCH, ROWS, HEADS_KV, D, seed=s, scale=3.0).to(dtype) for s in (2, 3))
    if packed:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    held = [draw(slots, tokens, HEADS_KV, D, seed=s).to(cache or dtype) for s in (4, 5)]
    return q, *held, k, v


def both_ways(monkeypatch, given, *, launches=("append",), **options):
    """O and the caches after an append on kernels are those of the portable append."""
    q, k_cache, v_cache, k, v = given
    want, have = ([x.clone() for x in (k_cache, v_cache)] for _ in range(2))
    call = {"causal": True, **options}
    expected = flash8.flash_attn_with_kvcache(q, *want, k, v, **call)
    launched = []
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(monkeypatch.context())
        patch.setattr(decode, "refusal", lambda *_: "only the append is wanted")
        stack.enter_context(kernels(patch, q, k, v, *have, *tensors_of(options)))
        launch = _native.launch_append
        patch.setattr(
            _native, "launch_append", lambda *args: (launched.append("append"), launch(*args))
        )
        found = flash8.flash_attn_with_kvcache(q, *have, k, v, **call)
    assert device().report()["kernel"] == "flash8_append"
    assert launched == list(launches)
    for a, b, before in zip(have, want, (k_cache, v_cache), strict=True):
        assert torch.equal(bits(a), bits(b)) and not torch.equal(bits(a), bits(before))
    assert torch.equal(found, expected)


def rotary(dim=32, dtype=torch.float32):
    cos, sin = (x.to(dtype) for x in tables(dim))
    return {"rotary_cos": cos, "rotary_sin": sin}


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float16, E4M3], ids=str)
def test_a_dense_cache(monkeypatch, cache, packed, interleaved):
    dtype = torch.bfloat16 if cache == E4M3 else cache
    options = {**rotary(dtype=dtype), "rotary_interleaved": interleaved}
    if packed:
        options["cu_seqlens_k_new"] = cumulative((ROWS, 0, 2 * ROWS))
    if cache == E4M3:
        options["k_descale"] = torch.rand(BATCH, HEADS_KV) * 0.05 + 0.01
        options["k_mean"] = draw(BATCH, HEADS_KV, D, dtype=torch.float32, seed=8)
    given = inputs(dtype, packed=packed, slots=BATCH, cache=cache)
    both_ways(monkeypatch, given, cache_seqlens=int32((0, 120, 77)), **options)


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_pages(monkeypatch, page_size):
    columns = -(-192 // page_size)
    order = torch.randperm(5 * columns, generator=torch.Generator().manual_seed(1))
    both_ways(
        monkeypatch,
        inputs(slots=5 * columns, tokens=page_size),
        cache_seqlens=int32((page_size, 0, 150)),
        page_table=order.view(5, columns).int(),
        cache_batch_idx=int32((4, 0, 2)),
        cache_leftpad=int32((0, 0, 70)),
        **rotary(64),
    )


def test_positions_of_their_own(monkeypatch):
    options = {"rotary_seqlens": int32((3, 90, 0)), "causal": False}
    starts = int32((0, 120, 77))
    both_ways(monkeypatch, inputs(slots=3), cache_seqlens=starts, **options, **rotary())


def test_packed_queries(monkeypatch):
    given = inputs(slots=3)
    q = given[0].flatten(0, 1)[:33]
    options = {"cu_seqlens_q": cumulative((13, 0, 20)), "max_seqlen_q": 20, **rotary()}
    both_ways(monkeypatch, (q, *given[1:]), cache_seqlens=int32((0, 120, 77)), **options)


@pytest.mark.parametrize("cache", [torch.bfloat16, E4M3], ids=str)
@pytest.mark.parametrize("turned", [True, False])
def test_norms(monkeypatch, cache, turned):
    weights = [draw(D, seed=s).bfloat16() for s in (6, 7)]
    options = {"q_norm_weight": weights[0], "k_norm_weight": weights[1], "norm_eps": 0.1}
    options |= rotary() if turned else {}
    starts = int32((0, 120, 77))
    both_ways(monkeypatch, inputs(slots=3, cache=cache), cache_seqlens=starts, **options)


def test_rows_that_are_e4m3_already(monkeypatch):
    given = inputs(slots=3, cache=E4M3)
    given = (*given[:3], *(x.to(E4M3) for x in given[3:]))
    both_ways(monkeypatch, given, cache_seqlens=int32((0, 120, 77)))


def test_types_that_differ_have_launches_of_their_own(monkeypatch):
    q, *given = inputs(slots=3, cache=E4M3)
    starts = int32((0, 120, 77))
    twice = ("append", "append")
    both_ways(monkeypatch, (q.half(), *given), launches=twice, cache_seqlens=starts, **rotary())


def test_the_op_has_a_fake(monkeypatch):
    q, k_cache, v_cache, k, v = inputs(slots=3)
    cos, sin = tables(32)
    starts = int32((0, 1, 2))
    op = torch.ops.flash8.append.default
    with device().serving_cpu_tensors(monkeypatch):
        for rest in (
            (q, k, v, starts, *(None,) * 7, cos, sin, starts, True, None, True, None, None, 0.0),
            (None, k, v, starts, *(None,) * 10, True, None, True, None, None, 0.0),
        ):
            torch.library.opcheck(op, (k_cache, v_cache, *rest), test_utils="test_faketensor")
