"""Appending to an e4m3 cache on the simulated device against the portable append, bit by bit."""

import pytest
import torch
from torch import Tensor

import flash8
from cases import cumulative, int32
from flash8.backends.hopper import append_quantized as appender
from flash8.backends.hopper import decode
from flash8.call.request import Appended
from flash8.tensors.float8 import E4M3
from flash8.tensors.rotary import Rope
from quantizer_cases import draw, tables, tensors_of
from quantizer_device import device, kernels
from simulated_device import missing_compiler

pytestmark = [
    pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler())),
    pytest.mark.filterwarnings("ignore:flash8 has no compiled kernel"),
]

HEADS, HEADS_KV, D = 4, 2, 64
BATCH = 3
ROWS = 20


def new_rows(packed: bool = False) -> tuple[Tensor, ...]:
    q = draw(BATCH, ROWS, HEADS, D, seed=1)
    k, v = (draw(BATCH, ROWS, HEADS_KV, D, seed=s, scale=3.0) for s in (2, 3))
    if packed:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    return q, k, v


def caches(slots: int, tokens: int) -> list[Tensor]:
    return [draw(slots, tokens, HEADS_KV, D, seed=s).to(E4M3) for s in (4, 5)]


def both_ways(monkeypatch, q, k, v, cache, *, seed=0, **options) -> None:
    """O and the caches after an append on kernels are those of the portable append."""
    want = [x.clone() for x in cache]
    have = [x.clone() for x in cache]
    expected = flash8.flash_attn_with_kvcache(q, *want, k, v, causal=True, **options)
    monkeypatch.setattr(decode, "refusal", lambda *_: "only the append is wanted")
    with kernels(monkeypatch, q, k, v, *have, *tensors_of(options), seed=seed):
        found = flash8.flash_attn_with_kvcache(q, *have, k, v, causal=True, **options)
    assert device().report()["kernel"] == "flash8_quantize_append"
    for a, b, before in zip(have, want, cache, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        assert not torch.equal(a.view(torch.uint8), before.view(torch.uint8))
    assert torch.equal(found, expected)


DESCALES = {
    "none": {},
    "scalar": {"k_descale": torch.tensor(0.02), "v_descale": torch.tensor(0.03)},
    "head": {
        "k_descale": torch.rand(BATCH, HEADS_KV) * 0.05 + 0.01,
        "v_descale": torch.rand(BATCH, HEADS_KV) * 0.05 + 0.01,
    },
}


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("descales", DESCALES)
def test_a_dense_cache(monkeypatch, descales, packed, interleaved):
    q, k, v = new_rows(packed)
    cos, sin = tables(32)
    options = dict(DESCALES[descales])
    if packed:
        options["cu_seqlens_k_new"] = cumulative((ROWS, 0, 2 * ROWS))
    if descales != "none":
        options["k_mean"] = draw(BATCH, HEADS_KV, D, dtype=torch.float32, seed=8)
    both_ways(
        monkeypatch,
        q,
        k,
        v,
        caches(BATCH, 200),
        cache_seqlens=int32((0, 120, 77)),
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_interleaved=interleaved,
        **options,
    )


def test_rows_of_a_larger_cache_with_block_descales(monkeypatch):
    """New rows cross from one block into the next; sequence b's are in row kv_batch_idx[b]."""
    q, k, v = new_rows()
    descale = torch.rand(5, HEADS_KV, 2) * 0.05 + 0.01
    both_ways(
        monkeypatch,
        q,
        k,
        v,
        caches(5, 200),
        cache_seqlens=int32((110, 128, 0)),
        cache_batch_idx=int32((4, 0, 2)),
        k_descale=descale,
        v_descale=descale.flip(0).contiguous(),
    )


@pytest.mark.parametrize("page_size", [16, 64])
def test_pages(monkeypatch, page_size):
    q, k, v = new_rows()
    columns = 192 // page_size
    order = torch.randperm(4 * columns, generator=torch.Generator().manual_seed(1))
    table = order[: 3 * columns].view(3, columns).int()
    descale = torch.rand(4 * columns, HEADS_KV, 1) * 0.05 + 0.01
    for seed in (0, 1, 2):
        both_ways(
            monkeypatch,
            q,
            k,
            v,
            caches(4 * columns, page_size),
            cache_seqlens=int32((page_size - 3, 0, 150)),
            page_table=table,
            k_descale=descale,
            v_descale=descale,
            k_mean=draw(HEADS_KV, D, dtype=torch.float32, seed=8),
            seed=seed,
        )


def test_rows_without_a_place_are_dropped(monkeypatch):
    """What the public function refuses must not write elsewhere where its check cannot look."""
    (cache, _), (_, k, _) = caches(4, 16), new_rows()
    before = cache.clone()
    table = int32(((0, -1), (9, 1), (2, 3)))
    starts = int32((30, 16, -4))  # behind the table; in page 1; no length at all
    with kernels(monkeypatch, cache, k, table, starts):
        appender.append(Appended(cache, k, starts, page_table=table))
    changed = (cache.float() != before.float()).flatten(2).any(-1)
    assert changed[1].all()
    assert not changed[[0, 2, 3]].any()
    same, behind = cache.clone(), int32((16, 20, 99))
    with kernels(monkeypatch, cache, k, behind):
        appender.append(Appended(cache, k, behind))
    assert torch.equal(cache.view(torch.uint8), same.view(torch.uint8))


MUTATIONS = {
    "another head's descale": lambda a: {"descale": a.descale.flip(1).contiguous()},
    "no mean": lambda a: {"mean": None},
    "no position": lambda a: {"rope": None},
    "one token further": lambda a: {"starts": a.starts + 1},
    "pages exchanged": lambda a: {"page_table": a.page_table.flip(0).contiguous()},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_is_caught(monkeypatch, mutation):
    (cache, _), (_, k, _) = caches(8, 64), new_rows()
    right = Appended(
        cache,
        k,
        int32((60, 0, 70)),
        page_table=int32(((0, 1), (2, 3), (4, 5))),
        descale=torch.rand(8, HEADS_KV, 1) * 0.05 + 0.01,
        mean=draw(HEADS_KV, D, dtype=torch.float32, seed=8),
        rope=Rope(*tables(64), int32((60, 0, 70))),
    )
    wrong = right._replace(cache=cache.clone(), **MUTATIONS[mutation](right))
    with device().serving_cpu_tensors(monkeypatch):
        appender.append(right)
        appender.append(wrong)
    assert not torch.equal(right.cache.view(torch.uint8), wrong.cache.view(torch.uint8))


SPARE = torch.zeros(8 * 16 * HEADS_KV * D * 2, dtype=torch.uint8).view(E4M3)
CACHE = SPARE[: SPARE.numel() // 2].view(8, 16, HEADS_KV, D)
NEW_K = new_rows()[1]
REFUSED = {
    "a 16-bit cache": (CACHE.bfloat16(), NEW_K, "the cache is torch.bfloat16"),
    "strides": (SPARE[: 8 * 15 * 2 * 72].view(8, 15, 2, 72)[..., :D], NEW_K, "strides"),
    "address": (SPARE[1 : 1 + CACHE.numel()].view(CACHE.shape), NEW_K, "address"),
    "head_dim": (CACHE[..., :40], NEW_K[..., :40], "head_dim is 40"),
    "fp64": (CACHE, NEW_K.double(), "no quantizer kernel for torch.float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    cache, k, message = REFUSED[case]
    assert message in appender.refusal(Appended(cache, k, int32((0, 0, 0))))


def test_the_op_has_a_fake(monkeypatch):
    arguments = (*caches(3, 64), *new_rows()[1:], int32((0, 1, 2)), *(None,) * 10, True)
    op = torch.ops.flash8.append_quantized.default
    with device().serving_cpu_tensors(monkeypatch):
        torch.library.opcheck(op, arguments, test_utils="test_faketensor")
