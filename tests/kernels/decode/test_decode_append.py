"""Decode kernels that append on the simulated device: new keys go into the caches bit by bit as by
the portable append, and the queries of the same launch see them."""

from dataclasses import replace

import pytest
import torch

from decode_append_cases import bits, check, run, with_new_keys
from decode_cases import Cache, draw
from defaults import by_default
from flash8.backends.hopper.decode_variants import DecodeVariant
from flash8.backends.hopper.schedule_variants import SCHEDULE
from forward_cases import device, int32, packed
from schedule_launch import ScheduleKernel, counted
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

B8 = DecodeVariant("bf16", "same", 128, 128, 8, append=True)
E8 = DecodeVariant("bf16", "e4m3", 128, 128, 8, append=True)
GATHER = replace(E8, load="gather")
DEFAULT = (B8, E8, GATHER)
OTHERS = (
    replace(B8, load="gather"),
    replace(B8, dtype="fp16"),
    DecodeVariant("fp16", "e4m3", 64, 64, 8, append=True),
    DecodeVariant("bf16", "same", 192, 128, 16, append=True),
    DecodeVariant("bf16", "e4m3", 256, 256, 8, append=True),
    DecodeVariant("bf16", "e4m3", 128, 128, 32, append=True),
    replace(B8, score_mod=True),
)
#: Before the append: none, one, around a tile of 64, and several CTAs.
LENGTHS = (1100, 0, 1, 61, 62, 63, 64, 257)
ROOM = 1110


def pages_of(variant):
    return Cache(3 if variant.load == "gather" else 24, room=ROOM)


@pytest.mark.parametrize("variant", by_default([*DEFAULT, *OTHERS], DEFAULT), ids=lambda v: v.name)
def test_ragged_lengths(variant):
    """Two keys a sequence: within a tile and a page, at its end, and across it. As two launches."""
    cache = Cache(room=ROOM) if variant is B8 else pages_of(variant)
    call = draw(variant, LENGTHS, seqlen_q=2, heads=4, heads_kv=2, causal=True, cache=cache)
    width = min(128, call.q.shape[-1])
    step = with_new_keys(call, 2, rotary_dim=width, interleaved=variant is E8, normalises=True)
    check(variant, step, ctas=7, seeds=(0, 1, 2), two_launches=True)


COUNTS = (2, 1, 0, 3, 6, 0, 2, 8)


@pytest.mark.parametrize("variant", by_default([*DEFAULT, *OTHERS], DEFAULT), ids=lambda v: v.name)
@pytest.mark.parametrize("interleaved", [True, False], ids=["neighbours", "halves"])
def test_packed(variant, interleaved):
    """Sequences with queries and without new keys, and the other way round: nobody computes a tile
    of these, and they are stored."""
    cache = pages_of(variant)
    call = draw(variant, LENGTHS, seqlen_q=2, heads=2, heads_kv=2, causal=True, cache=cache)
    queries = (2, 1, 2, 3, 6, 0, 1, 1)
    q = call.q.reshape(16, 2, -1)
    indices = {**call.indices, "cu_seqlens_q": packed(queries)}
    call = replace(call, q=q, indices=indices, max_seqlen_q=6)
    width = call.q.shape[-1] // 2
    step = with_new_keys(call, COUNTS, rotary_dim=width, interleaved=interleaved)
    check(variant, step, ctas=7, seeds=(0, 1))


@pytest.mark.parametrize("variant", DEFAULT, ids=lambda v: v.name)
def test_new_keys_that_no_query_sees(variant):
    """Eight behind one query with a window of two, across a tile; and left padding over all of a
    sequence."""
    call = draw(variant, (59, 300, 0, 64), seqlen_q=1, window=(1, 0), cache=pages_of(variant))
    indices = {"leftpad_k": int32([0, 4, 8, 72])}
    step = with_new_keys(replace(call, indices={**call.indices, **indices}), 8, rotary_dim=64)
    step.new_v[:, :6] = torch.inf
    check(variant, step, ctas=5)


@pytest.mark.parametrize("variant", [B8, E8], ids=lambda v: v.name)
def test_rows_of_the_cache(variant):
    """In any order, and none: nothing of that sequence is written."""
    call = draw(variant, (200, 0, 63, 64, 130), causal=True, cache=Cache(room=257))
    rows = {"kv_batch_idx": int32([3, 0, 4, -1, 1])}
    step = with_new_keys(call, 1, rotary_dim=32, interleaved=False)
    check(variant, replace(step, indices={**call.indices, **rows}), ctas=5)


@pytest.mark.parametrize("variant", DEFAULT, ids=lambda v: v.name)
@pytest.mark.parametrize("split_keys", [0, 128])
def test_several_ctas_and_splits(variant, split_keys):
    """The last of nine CTAs has the new keys, of heads that begin and end in one."""
    lengths = (4000, 127, 250)
    cache = replace(pages_of(variant), room=4010)
    call = draw(variant, lengths, seqlen_q=4, heads=6, heads_kv=3, causal=True, cache=cache)
    step = with_new_keys(replace(call, split_keys=split_keys), 4, rotary_dim=128)
    check(variant, step, ctas=9, seeds=(0,), two_launches=True)


@pytest.mark.parametrize("variant", DEFAULT, ids=lambda v: v.name)
def test_a_tree_of_drafts(variant):
    """The new keys are the drafts that a query sees, or not, beside a sink; and the metadata of
    the step counts them."""
    lengths = (300, 0, 61, 63, 128)
    cache = replace(pages_of(variant), room=310)
    given = {"tree_mask": int32([[1, 3, 5, 11]] * 5), "s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}
    call = draw(variant, lengths, seqlen_q=4, heads=4, heads_kv=2, cache=cache, **given)
    step = with_new_keys(replace(call, causal=True), 4, rotary_dim=64, normalises=True)
    metadata = ScheduleKernel(device().driver, device().ptx(SCHEDULE))(variant, step, new=4)
    tile = 64 if variant.cache == "e4m3" else 32
    assert metadata.tolist() == counted(step.done(), 8, tile)
    check(variant, replace(step, scheduler_metadata=metadata), ctas=5, two_launches=True)


@pytest.mark.parametrize("variant", [E8], ids=lambda v: v.name)
def test_means_and_tables_of_16_bits(variant):
    generator = torch.Generator().manual_seed(3)
    given = {f"{x}_mean": torch.randn(5, 2, 128, generator=generator) for x in "kv"}
    call = draw(variant, (700, 0, 1, 63, 257), heads_kv=2, seqlen_q=2, causal=True, **given)
    call = replace(call, k=_room(call.k), v=_room(call.v))
    step = with_new_keys(call, 2, rotary_dim=64, normalises=True, table_dtype=torch.bfloat16)
    check(variant, step, ctas=7)


def _room(cache):
    return torch.cat([cache, cache[:, :8]], dim=1)


def test_no_rotation_and_no_norm():
    """All queries are copied, and all positions are one where nothing is masked."""
    call = draw(B8, (100, 63, 5), seqlen_q=2, cache=Cache(16, room=120))
    check(B8, with_new_keys(call, 3), ctas=3)
    check(B8, with_new_keys(call, 3, rotary_dim=128), ctas=3)


def test_narrow_heads():
    """The rest of a tile's channels stay zeros."""
    for variant in (B8, E8):
        call = draw(variant, (200, 63), cache=Cache(16, room=220))
        q, k, v = (x[..., :96].contiguous() for x in (call.q, call.k, call.v))
        step = with_new_keys(replace(call, q=q, k=k, v=v), 2, rotary_dim=64, normalises=True)
        check(variant, step, ctas=3)


@pytest.mark.parametrize("variant", [B8, E8], ids=lambda v: v.name)
def test_rows_without_a_place_are_dropped(variant):
    """Lengths below zero and beyond the room, and pages that do not exist."""
    paged = variant is E8
    starts, wrong = (40, 20, 45, 30), (40, -2, 46, 2**31 - 2)
    call = draw(variant, starts, causal=True, cache=Cache(16 if paged else None, room=48))
    step = with_new_keys(call, 3, rotary_dim=64)
    after, table = step.done(), step.page_table
    if paged:
        table = step.page_table.clone()
        table[0, 2] = 2**30
    indices = {**step.indices, "seqused_k": int32(wrong)}
    o, lse, k, v = run(variant, replace(step, indices=indices, page_table=table), 5, 0)
    for found, before, want in ((k, step.k, after.k), (v, step.v, after.v)):
        expected = before.clone()
        for b, count in enumerate((0 if paged else 3, 0, 2, 0)):  # those that have a place
            for i in range(count):
                there, here = (slot(step, b, start[b] + i) for start in (wrong, starts))
                expected[there] = want[here]
        assert torch.equal(bits(found), bits(expected))
    assert not lse.isnan().any() and not o.isnan().any()


def slot(step, b, position):
    if step.page_table is None:
        return b, position
    return int(step.page_table[b, position // 16]), position % 16


@pytest.mark.slow
@pytest.mark.parametrize("variant", DEFAULT, ids=lambda v: v.name)
def test_many_seeds(variant):
    call = draw(variant, LENGTHS, seqlen_q=2, causal=True, cache=pages_of(variant))
    step = with_new_keys(call, 2, rotary_dim=128, normalises=True)
    check(variant, step, ctas=7, seeds=range(50))
