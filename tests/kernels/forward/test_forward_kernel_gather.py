"""The forward kernel over pages that TMA cannot load, which are gathered.

They give the bits of a dense cache. What no query sees is NaN, in pages of no order, and the table
has no page for it (paged_cases.py).
"""

from dataclasses import replace

import pytest
import torch

from defaults import by_default
from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import compare, device, kernel, launch
from forward_launch import ForwardKernel, Schedule
from fp8_forward_cases import changed_kernel, changed_ptx, descales
from paged_cases import (
    MASKS,
    MOST,
    call_of_rows,
    call_with_freed_pages,
    check_bits,
    dense_call,
    padded_call,
    paged,
)
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CAUSAL = ForwardVariant("bf16", 128, 128, mask="causal", paged=True, gather=True)
LOCAL = ForwardVariant("bf16", 64, 64, mask="local", paged=True, gather=True)
FLOAT8 = ForwardVariant("e4m3", 128, 128, mask="causal", scales="head", paged=True, gather=True)
#: One key, less than a swizzle's period, odd ones around a tile, and what TMA would load, too.
PAGE_SIZES = (1, 3, 7, 16, 20, 127, 129, 300)
OTHERS = (
    ForwardVariant("fp16", 64, 64, softcap=True, mask="causal", paged=True, gather=True),
    ForwardVariant("bf16", 96, 96, mask="causal", alibi=True, paged=True, gather=True),
    ForwardVariant("bf16", 192, 128, mask="causal", paged=True, gather=True),
    ForwardVariant("fp16", 192, 192, mask="local", paged=True, gather=True),
    ForwardVariant("bf16", 256, 256, mask="causal", paged=True, gather=True),
    ForwardVariant("bf16", 256, 256, mask="local", softcap=True, paged=True, gather=True),
    ForwardVariant("e4m3", 64, 64, mask="causal", scales="head", paged=True, gather=True),
    ForwardVariant("e4m3", 96, 96, mask="local", scales="head", paged=True, gather=True),
    ForwardVariant("e4m3", 256, 256, mask="causal", scales="head", paged=True, gather=True),
)


def call_of(variant, lengths=(0, 1, 127, 128, 129, 300), **given):
    if variant.dtype == "e4m3":
        given["descales"] = descales(variant, len(lengths), given.get("heads", 2), 1, 1, 1)
    return dense_call(variant, lengths, **given)


@pytest.mark.parametrize("page_size", by_default(PAGE_SIZES, [1, 7, 129]))
def test_pages_give_the_bits_of_a_dense_cache(page_size):
    check_bits(CAUSAL, call_of(CAUSAL), page_size)


@pytest.mark.slow
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_float8_pages_give_the_bits_of_a_dense_cache(page_size):
    """P V overlaps the softmax: three stages."""
    check_bits(FLOAT8, call_of(FLOAT8, (0, 1, 127, 128, 129, 460)), page_size)


@pytest.mark.parametrize("variant", by_default((CAUSAL, FLOAT8), [CAUSAL]))
def test_float64(variant):
    call = call_of(variant, seqlen_q=150)
    compare(call, *launch(variant, paged(call, 5)))


@pytest.mark.slow
@pytest.mark.parametrize("variant", OTHERS, ids=lambda v: v.name)
@pytest.mark.parametrize("page_size", [1, 20])
def test_other_tiles(variant, page_size):
    given = {"alibi_slopes": torch.tensor([0.02, 0.1])} if variant.alibi else {}
    check_bits(variant, call_of(variant, (0, 1, 79, 80, 97, 210), **given), page_size)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [CAUSAL, FLOAT8], ids=lambda v: v.name)
def test_rows_shorter_than_the_tile(variant):
    """Lanes beyond them fill their part with zeros."""
    call = call_of(variant)
    narrow = {x: getattr(call, x)[..., :width] for x, width in (("q", 80), ("k", 80), ("v", 112))}
    call = replace(call, **{x: y.contiguous() for x, y in narrow.items()})
    compare(call, *launch(variant, paged(call, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("page_size", [1, 20])
def test_pages_left_of_the_window_are_freed(mask, page_size):
    """They hold NaN, and the table has lost them."""
    check_bits(LOCAL, call_with_freed_pages(LOCAL, mask), page_size)


@pytest.mark.parametrize("page_size", by_default([1, 23], [23]))
def test_left_padding(page_size):
    """Of all of a sequence, and of more than a tile; tiles begin where it ends, as in a dense
    cache."""
    check_bits(CAUSAL, padded_call(CAUSAL), page_size)


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
def test_left_padding_and_windows(mask):
    check_bits(LOCAL, padded_call(LOCAL, mask), 7)


def test_rows_of_the_cache():
    """In any order, twice, and none; their queries are packed."""
    check_bits(CAUSAL, call_of_rows(CAUSAL), 3, Schedule(num_ctas=3), seeds=(0, 1, 2))


@pytest.mark.slow
def test_heads_that_share_keys():
    folded = replace(CAUSAL, pack_gqa=True)
    call = call_of(folded, heads=8, seqlen_q=17)
    check_bits(folded, call, 7)
    check_bits(folded, replace(call, s_aux=torch.linspace(-1.0, 4.0, 8)), 1)


@pytest.mark.parametrize("variant", by_default((CAUSAL, FLOAT8), [CAUSAL]))
def test_numbers_of_no_page(variant):
    """A page that does not exist reads as zeros; nothing outside is read."""
    call = call_of(variant, (150, 64, 0, 77), heads=1)
    hostile = paged(call, 12)
    table = hostile.page_table.clone()
    gone = [(0, 1, -1), (0, 3, MOST), (1, 0, hostile.k.shape[0]), (3, 2, -(2**31))]
    k, v = call.k.clone(), call.v.clone()
    for row, column, number in gone:
        table[row, column] = number
        for x in (k, v):
            x.view(torch.uint8)[row, 12 * column : 12 * column + 12] = 0
    compare(replace(call, k=k, v=v), *launch(variant, replace(hostile, page_table=table)))
    table[:] = MOST
    o, lse = launch(variant, replace(hostile, page_table=table))
    assert not o.any() and not lse.isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("variant", [CAUSAL, LOCAL, FLOAT8], ids=lambda v: v.name)
def test_many_seeds_give_the_same_bits(variant):
    check_bits(variant, call_of(variant, (400, 260)), 5, Schedule(num_ctas=1), seeds=range(12))


GATHERER, CONFIG = "forward/page_gatherer.cuh", "forward/config.cuh"
KEYS = "forward/gathered_keys.cuh"
ARRIVAL = "ptx::copy_async_arrive(&pipeline.full[state.stage]);"
MUTATIONS = {
    "another page's row": (KEYS, "place.row * ref.row_stride", "0 * ref.row_stride"),
    "a negative page": (KEYS, "place.page >= 0 && ", ""),
    "a page too large": (KEYS, " && place.page < pages.num_pages", ""),
    "keys behind the last one": (KEYS, " && position < end_seen", ""),
    "freed pages": (KEYS, "position >= first_seen && ", ""),
    "the next chunk's place": (GATHERER, "chunk + kKeys + key", "chunk + key"),
    "a stage is not awaited": (GATHERER, "pipeline.wait_empty(state);", ""),
    "a stage is full early": (
        GATHERER,
        ARRIVAL,
        "ptx::mbarrier_arrive(&pipeline.full[state.stage]);",
    ),
    "no proxy fence": (GATHERER, "if constexpr (Config::kGather) {", "if constexpr (false) {"),
    "one lane's arrival": (
        CONFIG,
        "Config::kGather ? kGatherLanes\n",
        "Config::kGather ? 1\n",
    ),
}


def check_window(kernel: ForwardKernel) -> None:
    """Freed pages, and pages that do not exist."""
    call = dense_call(LOCAL, (303, 201), seqlen_q=9, heads=1, **MASKS["window"])
    hostile = paged(call, 5)
    gone = (hostile.page_table < 0) | (hostile.page_table >= hostile.k.shape[0])
    for number in (-1, MOST):
        table = hostile.page_table.masked_fill(gone, number)
        for seed in range(4):
            device().configure(seed=seed)
            compare(call, *kernel(replace(hostile, page_table=table), Schedule(num_ctas=1)))
        nowhere = torch.full_like(table, number)
        o, _ = kernel(replace(hostile, page_table=nowhere), Schedule())
        assert not o.any(), f"page {number} is read"


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_cases_catch(name, tmp_path):
    changed = changed_kernel(tmp_path, LOCAL, MUTATIONS[name])
    with pytest.raises((AssertionError, RuntimeError)):
        check_window(changed)


@pytest.mark.slow
def test_the_cases_are_passed():
    check_window(kernel(LOCAL))


def test_the_cases_catch_a_missing_fence():
    """By the text of the kernel that is compiled already."""
    text = changed_ptx(CAUSAL, rb"fence\.proxy\.async\.shared::cta;", b"")
    call = call_of(CAUSAL, (300, 200), heads=1)
    with pytest.raises(RuntimeError):
        ForwardKernel(device().driver, text)(paged(call, 5), Schedule())
    assert "proxy-fence" in device().last_error()
