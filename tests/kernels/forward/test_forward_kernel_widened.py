"""The forward kernel with a 16-bit Q over K and V of e4m3, which the producer widens.

Wherever the keys lie, dense, packed or in pages of any size, they give the same bits; without
descales those of a 16-bit kernel whose K and V have the same values. What no query sees is NaN.
"""

import math
import re
from dataclasses import replace

import pytest
import torch

from defaults import by_default
from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import (
    check,
    compare,
    device,
    draw,
    int32,
    kernel,
    launch,
    masks,
    packed,
    poisoned,
)
from forward_launch import Call, ForwardKernel, Schedule
from fp8_forward_cases import cache_descales, changed_kernel
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

E4M3 = torch.float8_e4m3fn
CAUSAL = ForwardVariant("bf16", 128, 128, mask="causal", cache="e4m3")
LOCAL = ForwardVariant("fp16", 64, 64, mask="local", cache="e4m3")
PAGE_SIZES = (1, 3, 7, 16, 20, 127, 129, 300)
OTHERS = (
    LOCAL,
    ForwardVariant("bf16", 64, 64, mask="causal", cache="e4m3"),
    ForwardVariant("bf16", 96, 96, mask="causal", alibi=True, cache="e4m3"),
    ForwardVariant("bf16", 128, 128, cache="e4m3"),
    ForwardVariant("fp16", 128, 128, mask="causal", softcap=True, alibi=True, cache="e4m3"),
    ForwardVariant("bf16", 192, 128, mask="causal", cache="e4m3"),
    ForwardVariant("bf16", 192, 96, mask="causal", cache="e4m3"),  # panels of different widths
    ForwardVariant("fp16", 192, 192, mask="local", cache="e4m3"),
    ForwardVariant("bf16", 256, 256, mask="causal", cache="e4m3"),
    ForwardVariant("bf16", 256, 256, mask="local", softcap=True, cache="e4m3"),
)


def call_of(variant, lengths=(0, 1, 127, 128, 129, 300), **given):
    return dense_call(variant, lengths, descales=cache_descales(len(lengths)), **given)


def test_float64():
    check(CAUSAL, call_of(CAUSAL, seqlen_q=150))


@pytest.mark.parametrize("page_size", by_default(PAGE_SIZES, [1, 16, 129]))
def test_pages_give_the_bits_of_a_dense_cache(page_size):
    check_bits(CAUSAL, call_of(CAUSAL), page_size)


def test_the_bits_of_a_16_bit_cache():
    """Whose tiles are the same. A tensor's K descale is a factor of softmax_scale."""
    call = dense_call(CAUSAL, (1, 127, 300), seqlen_q=150)
    factors = {"k_descale": torch.tensor(0.25), "v_descale": torch.tensor(0.5)}
    found, found_lse = launch(CAUSAL, replace(poisoned(call), descales=factors))
    wide = {name: getattr(call, name).to(call.q.dtype) for name in "kv"}
    wide = replace(call, **wide, softmax_scale=0.25 * call.softmax_scale)
    want, want_lse = launch(replace(CAUSAL, cache="same"), poisoned(wide))
    assert torch.equal(found, 0.5 * want)
    assert torch.equal(found_lse, want_lse)


def test_every_code_is_exact():
    """Of one key, whose V is O and whose score is LSE: subnormal values too, and NaN stays what
    and where it is."""
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3)
    q = torch.zeros(256, 1, 1, 128, dtype=torch.bfloat16)
    q[..., 3] = 1.0
    k = torch.zeros(256, 1, 1, 128).to(E4M3)
    k[:, 0, 0, 3] = codes
    v = codes.view(2, 1, 1, 128).expand(-1, 128, -1, -1).reshape(256, 1, 1, 128)
    o, lse = launch(CAUSAL, Call(q, k, v, 1.0, **masks(CAUSAL)), Schedule(num_ctas=8))
    values = codes.float()
    lost = values.isnan()
    assert lost.nonzero().flatten().tolist() == [127, 255]
    torch.testing.assert_close(lse[~lost].flatten(), values[~lost], atol=0.0, rtol=2e-7)
    assert lse[lost].isnan().all() and o[lost].isnan().all()
    torch.testing.assert_close(o[~lost], v.bfloat16()[~lost], atol=0.0, rtol=0.0, equal_nan=True)


@pytest.mark.parametrize("name", ["k_descale", "v_descale"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_an_invalid_descale_is_loud(name, value):
    """In the sequences that have it."""
    call = dense_call(CAUSAL, (40, 30), seqlen_q=20)
    given = cache_descales(2)
    given[name] = given[name].clone()
    given[name][1] = value
    o, lse = launch(CAUSAL, replace(call, descales=given))
    assert not o[0].isnan().any() and not lse[0].isnan().any()
    assert o[1].isnan().all()
    assert lse[1].isnan().all() == (name == "k_descale")


def test_a_scale_that_overflows_is_loud():
    """In the sequences that have such a descale. By infinity, negative scores alone would make O
    zero."""
    call = dense_call(CAUSAL, (40, 30), seqlen_q=20)
    call = replace(call, q=call.q.abs(), k=(-call.k.float().abs()).to(E4M3), softmax_scale=3.0)
    given = cache_descales(2)
    given["k_descale"] = torch.tensor([[1.0], [2.0**126]])
    o, lse = launch(CAUSAL, replace(call, descales=given))
    assert not o[0].isnan().any() and not lse[0].isnan().any()
    assert o[1].isnan().all() and lse[1].isnan().all()


def test_a_scale_that_vanishes():
    """All keys weigh the same then; 0 times the -inf of a hidden key would be NaN."""
    call = dense_call(CAUSAL, (40,), seqlen_q=20, heads=1)
    given = {"k_descale": torch.tensor(2.0**-126), "v_descale": torch.tensor(1.0)}
    _, lse = launch(CAUSAL, replace(call, softmax_scale=2.0**-120, descales=given))
    torch.testing.assert_close(lse.flatten(), torch.arange(21.0, 41.0).log())


@pytest.mark.parametrize("page_size", by_default([1, 23], [23]))
def test_left_padding(page_size):
    """Of all of a sequence, and of more than a tile."""
    call = padded_call(CAUSAL, descales=cache_descales(7))
    compare(call, *launch(CAUSAL, poisoned(call)))
    check_bits(CAUSAL, call, page_size)


def test_rows_of_the_cache():
    """In any order, twice, and none; their queries are packed."""
    call = call_of_rows(CAUSAL, descales=cache_descales(6))
    no_row = {"kv_batch_idx": int32([5, 2, 4, 0, 4, 0]), "seqused_k": int32([300, 1, 90, 0, 7, 0])}
    found = launch(CAUSAL, poisoned(call), Schedule(num_ctas=3))
    compare(replace(call, indices={**call.indices, **no_row}), *found)
    check_bits(CAUSAL, call, 3, Schedule(num_ctas=3))


def test_packed_keys():
    rows, keys = (0, 150, 1, 20, 130), (0, 140, 300, 5, 0)
    q, k, v = draw(CAUSAL, sum(rows), sum(keys), 2, 1)
    indices = {
        "cu_seqlens_q": packed(rows),
        "cu_seqlens_k": packed(keys),
        "seqused_k": int32([0, 137, 299, 5, 0]),
    }
    given = {
        "max_seqlen_q": 150,
        "max_seqlen_k": 300,
        "descales": cache_descales(5),
        **masks(CAUSAL),
    }
    check(CAUSAL, Call(q, k, v, 128**-0.5, indices=indices, **given), seeds=(0, 1))


def test_numbers_of_no_page():
    """A page that does not exist reads as zeros; nothing outside is read."""
    call = call_of(CAUSAL, (150, 64, 0, 77), heads=1)
    hostile = paged(call, 12)
    table = hostile.page_table.clone()
    gone = [(0, 1, -1), (0, 3, MOST), (1, 0, hostile.k.shape[0]), (3, 2, -(2**31))]
    k, v = call.k.clone(), call.v.clone()
    for row, column, number in gone:
        table[row, column] = number
        for x in (k, v):
            x.view(torch.uint8)[row, 12 * column : 12 * column + 12] = 0
    compare(replace(call, k=k, v=v), *launch(CAUSAL, replace(hostile, page_table=table)))
    table[:] = MOST
    o, lse = launch(CAUSAL, replace(hostile, page_table=table))
    assert not o.any() and not lse.isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("variant", OTHERS, ids=lambda v: v.name)
def test_other_tiles(variant):
    given = {"alibi_slopes": torch.tensor([0.02, 0.1])} if variant.alibi else {}
    call = call_of(variant, (0, 1, 79, 80, 97, 210), **given)
    check(variant, call)
    for page_size in (1, 20):
        check_bits(variant, call, page_size)


@pytest.mark.slow
def test_rows_shorter_than_the_tile():
    """Lanes beyond them fill their part with zeros."""
    call = call_of(CAUSAL)
    narrow = {x: getattr(call, x)[..., :width] for x, width in (("q", 80), ("k", 80), ("v", 112))}
    call = replace(call, **{x: y.contiguous() for x, y in narrow.items()})
    compare(call, *launch(CAUSAL, paged(call, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("page_size", [1, 20])
def test_pages_left_of_the_window_are_freed(mask, page_size):
    """They hold NaN, and the table has lost them."""
    call = call_with_freed_pages(LOCAL, mask, descales=cache_descales(4))
    compare(call, *launch(LOCAL, poisoned(call)))
    check_bits(LOCAL, call, page_size)


@pytest.mark.slow
def test_heads_that_share_keys():
    folded = replace(CAUSAL, pack_gqa=True)
    call = call_of(folded, heads=8, seqlen_q=17)
    compare(call, *launch(folded, paged(call, 7)))
    check_bits(folded, replace(call, s_aux=torch.linspace(-1.0, 4.0, 8)), 1)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [CAUSAL, LOCAL], ids=lambda v: v.name)
def test_many_seeds_give_the_same_bits(variant):
    check_bits(variant, call_of(variant, (400, 260)), 5, Schedule(num_ctas=1), seeds=range(12))


def check_cases(kernel: ForwardKernel, seeds=range(4)) -> None:
    """Several tiles of queries and of keys on one CTA, over pages."""
    call = call_of(CAUSAL, (700, 201), seqlen_q=200, heads=1)
    for seed in seeds:
        device().configure(seed=seed)
        compare(call, *kernel(paged(call, 5), Schedule(num_ctas=1)))


#: What orders the producer's copies and writes; without any one of them some case fails.
PTX_PIECES = {
    "proxy fences": rb"fence\.proxy\.async\.shared::cta;",
    "waits for copies": rb"cp\.async\.wait_group \d;",
}


@pytest.mark.parametrize("name", PTX_PIECES)
def test_the_cases_catch_each_that_is_missing(name):
    """By the text of the kernel that is compiled already."""
    text = device().ptx(CAUSAL)
    places = [found.span() for found in re.finditer(PTX_PIECES[name], text)]
    assert len(places) == 4
    for begin, end in places:
        mutant = ForwardKernel(device().driver, text[:begin] + text[end:])
        with pytest.raises((AssertionError, RuntimeError)):
            check_cases(mutant)


CONSUMER, WIDENER = "forward/consumer.cuh", "forward/widener.cuh"
CONFIG, KEYS = "forward/config.cuh", "forward/gathered_keys.cuh"
MUTATIONS = {
    "K's descale ignored": (CONSUMER, "scale * checked_descale(k_descale.of(0))", "scale"),
    "V's descale ignored": (
        CONSUMER,
        "of_o.v_scale = checked_descale(v_descale.of(0));",
        "",
    ),
    "a stage is not awaited": (WIDENER, "pipeline.wait_empty(state);", ""),
    "one copy too few is awaited": (
        WIDENER,
        "ptx::copy_async_wait<1>();\n            widen_v",
        "ptx::copy_async_wait<2>();\n            widen_v",
    ),
    "the next block's place": (WIDENER, "place = next;", ""),
    "the row of another lane": (WIDENER, "Steps::row(step) + lane /", "lane /"),
    "halves in the wrong order": (WIDENER, "widened(words[i].z", "widened(words[i].x"),
    "hidden keys": (KEYS, " && position < end_seen", ""),
    "one warp's arrival": (
        CONFIG,
        "kLoadersOfK = Config::kWidens   ? Config::kWidenerWarps",
        "kLoadersOfK = Config::kWidens   ? 1",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_cases_catch(name, tmp_path):
    changed = changed_kernel(tmp_path, CAUSAL, MUTATIONS[name])
    with pytest.raises((AssertionError, RuntimeError)):
        check_cases(changed)


def test_the_cases_are_passed():
    check_cases(kernel(CAUSAL))
