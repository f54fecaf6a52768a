"""Lengths, padding, rows and page numbers that only the device sees, with every kind of nonsense in
them: nothing outside is touched, nothing hangs, every row is written, the other sequences and the
next call are right."""

from dataclasses import replace

import pytest
import torch

from decode_cases import Cache, check, compare, draw, launch, poisoned
from flash8.backends.hopper.decode_variants import DecodeVariant
from forward_cases import int32
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

TMA = DecodeVariant("bf16", "e4m3", 128, 128, 8)
GATHER = replace(TMA, load="gather")
VARIANTS = pytest.mark.parametrize("variant", [TMA, GATHER], ids=lambda v: v.load)
MOST, LEAST = 2**31 - 1, -(2**31)


def call_of(variant, lengths=(150, 64, 0, 77), **options):
    cache = Cache(3 if variant.load == "gather" else 16, room=160)
    return draw(variant, lengths, seqlen_q=2, heads=2, causal=True, cache=cache, **options)


def launch_hostile(variant, call, ctas=3):
    """What the cache holds is finite, so NaN is what the outputs were filled with."""
    found = []
    for seed in (0, 1):
        ((o, lse),) = launch(variant, call, ctas=ctas, seed=seed)
        assert not o.isnan().any() and not lse.isnan().any(), "a row was not written"
        found.append(o)
    assert torch.equal(*found)
    check(variant, call_of(variant), seeds=(0,))
    return o


@VARIANTS
@pytest.mark.parametrize("number", [-1, LEAST, MOST, "pages"])
def test_page_numbers(variant, number):
    """A page that does not exist reads as zeros."""
    call = call_of(variant)
    number = call.k.shape[0] if number == "pages" else number
    table = call.page_table.clone()
    table[0, 0] = table[1, 1] = table[3, -1] = number
    hostile = replace(call, page_table=table)
    compare(hostile, *launch(variant, poisoned(hostile))[0])
    table[:] = number
    assert not launch_hostile(variant, replace(call, page_table=table)).any()


@VARIANTS
def test_freed_pages(variant):
    """Those left of the window hold NaN or have any number, and so have those past the end."""
    call = replace(call_of(variant, (150, 140, 0, 77)), causal=False, window=(40, 0))
    page_size = call.k.shape[1]
    table = call.page_table.clone()
    for b, length in enumerate([150, 140, 0, 77]):
        table[b, : max(0, length - 42) // page_size] = (-1, MOST, 0, 7)[b]
        table[b, -(-length // page_size) :] = (MOST, -1, 10**6, -7)[b]
    check(variant, replace(call, page_table=table), seeds=(0, 1))


@VARIANTS
@pytest.mark.parametrize("lengths", [(-1, LEAST, MOST, 161), (MOST,) * 4, (LEAST,) * 4])
def test_lengths(variant, lengths):
    """They are clamped to what there is room for."""
    call = call_of(variant)
    room = call.page_table.shape[1] * call.k.shape[1]
    hostile = replace(call, indices={"seqused_k": int32(lengths)})
    clamped = replace(call, indices={"seqused_k": int32(lengths).clamp(0, room)})
    compare(clamped, *launch(variant, hostile)[0])
    launch_hostile(variant, hostile)


@VARIANTS
def test_left_padding(variant):
    """Negative is none, and no more than all."""
    call = call_of(variant)
    given = {**call.indices, "leftpad_k": int32([-1, LEAST, MOST, 78])}
    clamped = {**call.indices, "leftpad_k": int32([0, 0, 0, 77])}
    hostile = replace(call, indices=given)
    compare(replace(call, indices=clamped), *launch(variant, hostile)[0])
    launch_hostile(variant, hostile)


@VARIANTS
def test_rows_of_the_cache(variant):
    """One that does not exist is no work."""
    call = call_of(variant)
    hostile = replace(call, indices={**call.indices, "kv_batch_idx": int32([4, LEAST, 0, MOST])})
    none = replace(call, indices={**call.indices, "kv_batch_idx": int32([-1, -1, 0, -1])})
    compare(none, *launch(variant, hostile)[0])
    launch_hostile(variant, hostile)


@pytest.mark.parametrize(
    "offsets",
    [
        (0, -1, 5, 2, 8),
        (MOST,) * 5,
        (8, 6, 4, 2, 0),
        (LEAST, 3, 3, MOST, 0),
        (2, 3, 3, 5, 6),
    ],
)
def test_offsets_of_queries(offsets):
    """A row belongs to one sequence, by the largest offset before it, or to none: then O = 0."""
    call = call_of(TMA)
    given = {**call.indices, "cu_seqlens_q": int32(offsets)}
    hostile = replace(call, q=call.q.reshape(8, 2, 128), indices=given, max_seqlen_q=8)
    effective = {**given, "cu_seqlens_q": int32(offsets).clamp(0, 8).cummax(0).values.int()}
    for seed in (0, 1):
        compare(replace(hostile, indices=effective), *launch(TMA, hostile, seed=seed)[0])
    check(TMA, call_of(TMA), seeds=(0,))


def test_offsets_of_more_queries_than_a_warp_has_lanes():
    """Up and down over several groups of 32 sequences."""
    generator = torch.Generator().manual_seed(4)
    call = draw(TMA, [17, 0, 70, 3] * 20, heads=2, causal=True)
    offsets = torch.randint(-9, 60, (81,), generator=generator) + torch.arange(81) // 8
    given = {**call.indices, "cu_seqlens_q": offsets.int()}
    hostile = replace(call, q=call.q.reshape(80, 2, 128), indices=given, max_seqlen_q=80)
    effective = {**given, "cu_seqlens_q": offsets.clamp(0, 80).cummax(0).values.int()}
    compare(replace(hostile, indices=effective), *launch(TMA, hostile, ctas=7)[0])


def test_no_sequence_at_all():
    """Rows of a packed q without one are zeros."""
    call = call_of(TMA)
    given = {"cu_seqlens_q": int32([0])}
    q = call.q.reshape(8, 2, 128)
    ((o, lse),) = launch(TMA, replace(call, q=q, indices=given, max_seqlen_q=2))
    assert not o.any() and (lse == -float("inf")).all()


@pytest.mark.parametrize("heads", [2, 16])
def test_a_bound_of_queries_that_is_too_low(heads):
    """The rows within it see the keys that they always see, the others are zeros."""
    variant = replace(TMA, rows=8 if heads == 2 else 16)
    call = draw(variant, (150, 64, 0, 77), heads=heads, seqlen_q=2, causal=True, cache=Cache(16))
    given = {**call.indices, "cu_seqlens_q": int32([0, 3, 5, 7, 8])}
    call = replace(call, q=call.q.reshape(8, heads, 128), indices=given, max_seqlen_q=3)
    ((want, want_lse),) = launch(variant, call)
    ((o, lse),) = launch(variant, replace(call, max_seqlen_q=1))
    kept = torch.tensor([0, 3, 5, 7])
    torch.testing.assert_close(o[kept], want[kept], atol=4e-3, rtol=8e-3)
    torch.testing.assert_close(lse[:, kept], want_lse[:, kept], atol=1e-5, rtol=1e-5)
    dropped = torch.tensor([1, 2, 4, 6])
    assert not o[dropped].any() and (lse[:, dropped] == -float("inf")).all()


def test_a_scale_that_overflows():
    """NaN in the sequences that have it: by infinity, a row of negative scores would look like one
    without keys."""
    call = call_of(TMA)
    k_descale = call.k_descale.clone()
    k_descale[1] = 2.0**126
    call = replace(call, q=call.q.abs(), k=(-call.k.float().abs()).to(call.k.dtype))
    ((o, lse),) = launch(TMA, replace(call, k_descale=k_descale, softmax_scale=2.0**20))
    assert o[1].isnan().all() and lse[1].isnan().all()
    assert not o[[0, 2, 3]].isnan().any() and not lse[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("descale", [0.0, -1.0, float("inf"), float("nan"), 2.0**127])
@pytest.mark.parametrize("name", ["k_descale", "v_descale"])
def test_descales(name, descale):
    """An invalid one shows: its sequence is NaN, where it has keys, and no other."""
    call = call_of(TMA)
    given = getattr(call, name).clone()
    given[0] = descale
    ((o, _),) = launch(TMA, replace(call, **{name: given}))
    assert o[0].isnan().all()
    ((want, _),) = launch(TMA, call)
    assert torch.equal(o[1:], want[1:])
