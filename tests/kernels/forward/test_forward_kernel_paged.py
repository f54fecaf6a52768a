"""The forward kernel over paged caches: the bits of a dense cache, and float64 attention.

What no query sees is NaN, in pages of no order, and the table has no page for it (paged_cases.py).
"""

from dataclasses import replace

import pytest
import torch

from defaults import by_default
from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import compare, int32, kernel, launch, packed
from forward_launch import Schedule
from fp8_forward_cases import changed_kernel
from paged_cases import (
    MASKS,
    MOST,
    call_with_freed_pages,
    check_bits,
    dense_call,
    padded_call,
    paged,
)
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CAUSAL = ForwardVariant("bf16", 128, 128, mask="causal", paged=True)
LOCAL = ForwardVariant("bf16", 64, 64, mask="local", paged=True)
ALL = replace(CAUSAL, mask="none")
FOLDED = replace(CAUSAL, pack_gqa=True)
PAGE_SIZES = (8, 16, 48, 64, 128, 176, 256, 528)
OTHERS = (
    ForwardVariant("fp16", 64, 64, softcap=True, mask="causal", paged=True),
    ForwardVariant("bf16", 96, 96, mask="causal", alibi=True, paged=True),
    ForwardVariant("bf16", 192, 128, mask="causal", paged=True),
    ForwardVariant("fp16", 192, 192, mask="local", paged=True),
    ForwardVariant("bf16", 256, 256, mask="causal", paged=True),
    ForwardVariant("bf16", 256, 256, mask="local", softcap=True, paged=True),
)


@pytest.mark.parametrize("page_size", by_default(PAGE_SIZES, [16, 128, 176]))
def test_pages_give_the_bits_of_a_dense_cache(page_size):
    check_bits(CAUSAL, dense_call(CAUSAL), page_size)


def test_float64():
    call = dense_call(CAUSAL, seqlen_q=150)
    compare(call, *launch(CAUSAL, paged(call, 16)))


@pytest.mark.slow
@pytest.mark.parametrize("variant", OTHERS, ids=lambda v: v.name)
@pytest.mark.parametrize("page_size", [8, 80, 96])
def test_other_tiles(variant, page_size):
    given = {"alibi_slopes": torch.tensor([0.02, 0.1])} if variant.alibi else {}
    check_bits(variant, dense_call(variant, (0, 1, 79, 80, 97, 210), **given), page_size)


@pytest.mark.slow
def test_without_a_mask_tiles_have_other_keys_than_of_a_dense_cache():
    assert kernel(ALL).info.block_n == 128
    for page_size in (16, 176):
        call = dense_call(ALL, seqlen_q=150)
        compare(call, *launch(ALL, paged(call, page_size)))


@pytest.mark.parametrize("mask", by_default(MASKS, ["window", "chunks"]))
@pytest.mark.parametrize("page_size", by_default([16, 128], [16]))
def test_pages_left_of_the_window_are_freed(mask, page_size):
    """They hold NaN, and the table has lost them."""
    check_bits(LOCAL, call_with_freed_pages(LOCAL, mask), page_size)


@pytest.mark.parametrize("mask", by_default(MASKS, ["chunks", "causal"]))
@pytest.mark.parametrize("page_size", by_default([24, 128], [24]))
def test_left_padding(mask, page_size):
    """Also all of a sequence, and more than a tile; whatever page it ends in."""
    call = padded_call(LOCAL, mask)
    for seed in (0, 1):
        compare(call, *launch(LOCAL, paged(call, page_size, seed=seed), seed=seed))


def test_rows_of_the_cache():
    """In any order, twice, and none."""
    indices = {
        "kv_batch_idx": int32([5, 2, 4, -1, 4, 0]),
        "seqused_k": int32([300, 1, 90, 9, 7, 0]),
    }
    check_bits(CAUSAL, dense_call(CAUSAL, indices=indices), 16)


def test_packed_queries():
    call = dense_call(CAUSAL, heads=1)
    rows = (0, 150, 1, 20, 3, 140)
    q = torch.randn(sum(rows), 1, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    indices = {**call.indices, "cu_seqlens_q": packed(rows)}
    call = replace(call, q=q, indices=indices, max_seqlen_q=150)
    check_bits(CAUSAL, call, 16, Schedule(num_ctas=3), seeds=(0, 1, 2))


@pytest.mark.slow
def test_heads_that_share_keys():
    call = dense_call(FOLDED, heads=8, seqlen_q=17)
    check_bits(FOLDED, call, 16)
    check_bits(FOLDED, replace(call, s_aux=torch.linspace(-1.0, 4.0, 8)), 64)


def test_numbers_of_no_page():
    """A page that does not exist reads as zeros; nothing outside is read."""
    call = dense_call(CAUSAL, (150, 64, 0, 77), heads=1)
    hostile = paged(call, 16)
    table = hostile.page_table.clone()
    gone = [(0, 1, -1), (0, 3, MOST), (1, 0, hostile.k.shape[0]), (3, 2, -(2**31))]
    k, v = call.k.clone(), call.v.clone()
    for row, column, number in gone:
        table[row, column] = number
        k[row, 16 * column : 16 * column + 16] = v[row, 16 * column : 16 * column + 16] = 0.0
    compare(replace(call, k=k, v=v), *launch(CAUSAL, replace(hostile, page_table=table)))
    table[:] = MOST
    o, lse = launch(CAUSAL, replace(hostile, page_table=table))
    assert not o.any() and not lse.isnan().any()


def test_lengths_beyond_the_pages():
    call = paged(dense_call(CAUSAL, (128, 128, 128), heads=1), 64)
    (room,) = {call.page_table.shape[1] * 64}
    call = replace(call, k=torch.ones_like(call.k), v=torch.ones_like(call.v))
    table = call.page_table.clamp(0, call.k.shape[0] - 1)
    found = []
    for lengths in ((room, 0, 0), (MOST, -1, -(2**31))):
        indices = {**call.indices, "seqused_k": int32(lengths)}
        found.append(launch(CAUSAL, replace(call, indices=indices, page_table=table)))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.slow
def test_many_seeds_give_the_same_bits():
    check_bits(CAUSAL, dense_call(CAUSAL, (400, 260)), 16, seeds=range(12))


LOADER, PAGES = "forward/page_loader.cuh", "attention/pages.cuh"
MUTATIONS = {
    "another page": (PAGES, "product >> pages.page_shift)", "product >> pages.page_shift) ^ 1"),
    "another row": (PAGES, "position - index * pages.page_size", "0"),
    "a box is missing": (LOADER, "first < kBlockN; ++box", "first + rows < kBlockN; ++box"),
    "entries of no key are read": (PAGES, "if (seen && index < pages.max_pages)", "if (true)"),
    "values of the next block": (
        "forward/producer.cuh",
        "load_v(kv_state_, loader, place);\n            place = next;",
        "load_v(kv_state_, loader, next);\n            place = next;",
    ),
}


@pytest.mark.parametrize("name", by_default(MUTATIONS, []))
def test_the_cases_catch(name, tmp_path):
    changed = changed_kernel(tmp_path, CAUSAL, MUTATIONS[name])
    call = dense_call(CAUSAL, (300, 200), heads=1)
    with pytest.raises((AssertionError, RuntimeError)):
        compare(call, *changed(paged(call, 48), Schedule()))


@pytest.mark.slow
def test_the_cases_catch_padding_that_is_seen(tmp_path):
    edit = ("attention/mask.cuh", "keys.begin = max(keys.begin, hidden_);", "")
    changed = changed_kernel(tmp_path, LOCAL, edit)
    call = dense_call(LOCAL, (140,), heads=1, indices={"leftpad_k": int32([5])}, **MASKS["causal"])
    with pytest.raises(AssertionError):
        compare(call, *changed(paged(call, 64), Schedule()))
