"""Who works on which tile: every tile once, whatever the schedule, and none that does not exist."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import flash8
from defaults import by_default
from flash8.backends.hopper import forward, heuristics, streams
from flash8.backends.hopper.variants import ForwardVariant
from flash8.call.options import Options
from forward_cases import check, compare, device, draw, kernel, launch, packed
from forward_launch import Call, Schedule
from fp8_forward_cases import changed_kernel, descales
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CAUSAL = ForwardVariant("bf16", 128, 128, mask="causal")
LOCAL = ForwardVariant("bf16", 64, 64, mask="local")
FP8 = ForwardVariant("e4m3", 128, 128, mask="causal", scales="block")
SCALE = 128**-0.5

SCHEDULES = [
    Schedule(num_ctas=1),
    Schedule(num_ctas=3, heads_per_section=2),
    Schedule(num_ctas=7, heads_per_section=3),
    Schedule(num_ctas=132, heads_per_section=100),
    Schedule(num_ctas=3, dynamic=False, heads_per_section=2),
    Schedule(num_ctas=132, dynamic=False),
]


def causal_call(seqlen_q=300, seqlen_k=300, heads=5, batch=2) -> Call:
    q, k, v = draw(CAUSAL, seqlen_q, seqlen_k, heads, 1, batch=batch)
    return Call(q, k, v, SCALE, causal=True)


def packed_call(lengths_q, lengths_k, *, heads=2, behind=0, variant=CAUSAL) -> Call:
    q, k, v = draw(variant, sum(lengths_q) + behind, sum(lengths_k), heads, 1)
    indices = {"cu_seqlens_q": packed(lengths_q), "cu_seqlens_k": packed(lengths_k)}
    lengths = {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)}
    return Call(q, k, v, SCALE, causal=True, indices=indices, **lengths)


def ragged(count: int, longest: int, seed: int) -> list[int]:
    """Lengths of which many are 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(-longest // 2, longest, (count,), generator=generator)
    return [*lengths.clamp(min=0).tolist(), 1]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_dense(schedule):
    check(CAUSAL, causal_call(), schedule)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_more_sequences_than_lanes(schedule):
    check(
        CAUSAL, packed_call(ragged(75, 9, 1), ragged(75, 40, 2), behind=3), schedule, seeds=(0, 5)
    )


def one_in_the_last_group(sequences: int, variant: ForwardVariant) -> Call:
    """The last group of 32 sequences is one sequence, and the one before it is not empty."""
    lengths = ragged(sequences - 1, 9, 3), ragged(sequences - 1, 40, 4)
    for of_sequences in lengths:
        of_sequences[-2] = 5
    call = packed_call(*lengths, heads=1, behind=3, variant=variant)
    if variant.dtype == "e4m3":
        blocks = [sum(x) // 128 + sequences for x in lengths]
        scales = descales(variant, sequences, 1, 1, *blocks, packed=True)
        call = replace(call, descales=scales)
    return call


@pytest.mark.parametrize("sequences", [33, 65])
@pytest.mark.parametrize("variant", [CAUSAL, FP8], ids=lambda v: v.name)
def test_one_sequence_more_than_lanes(variant, sequences):
    call = one_in_the_last_group(sequences, variant)
    check(variant, call, Schedule(num_ctas=3), seeds=(2,))


GROUPS = {
    "the last group is left out": (
        "attention/sequence_order.cuh",
        "if (first_batch() < params_.sequences.batch) {",
        "if (first_batch() + 1 < params_.sequences.batch) {",
    ),
    "rows before a group are forgotten": (
        "attention/tile_scheduler.cuh",
        "rows_before_ = __shfl_sync(0xffffffff, row_end, 31);",
        "rows_before_ = 0;",
    ),
    "tiles before a group are those of 31": (
        "attention/tile_scheduler.cuh",
        "tiles_before_ = __shfl_sync(0xffffffff, end, 31);",
        "tiles_before_ = __shfl_sync(0xffffffff, end, 30);",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", GROUPS)
def test_one_sequence_more_catches(fault, tmp_path):
    changed = changed_kernel(tmp_path, CAUSAL, GROUPS[fault])
    for sequences in (33, 65):
        call = one_in_the_last_group(sequences, CAUSAL)
        with pytest.raises((AssertionError, RuntimeError)):
            compare(call, *changed(call, Schedule(num_ctas=3)))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_long_and_empty_sequences(schedule):
    lengths = [0, 0, 257, 1, 0, 128, 129, 0]
    check(CAUSAL, packed_call(lengths, [0, 3, 200, 40, 5, 0, 129, 1], heads=3), schedule)


@pytest.mark.parametrize("lengths", [[0], [0] * 40, [3], [200, 0]], ids=str)
def test_rows_behind_the_last_sequence(lengths):
    check(CAUSAL, packed_call(lengths, [7] * len(lengths), behind=37))


#: Keys of sequences with one query each, in and beside the bounds of the classes of lengths.
LENGTHS_K = [130, 0, 900, 385, 128, 129, 384, 640, 1]


def one_query_each(lengths_k: list[int], **indices: torch.Tensor) -> Call:
    call = packed_call([1] * len(lengths_k), lengths_k, heads=1)
    return replace(call, indices={**call.indices, **indices})


def blocks_in_order(call: Call, *, longest_first: bool) -> list[int]:
    """The blocks of keys of each tile, in the order of the tiles' numbers.

    There is a CTA for each, and its producer copies Q in two panels, and two of K and two of V for
    each block.
    """
    device().configure(seed=0, timeline=True)
    tiles = call.q.shape[0] * call.q.shape[1]
    schedule = Schedule(num_ctas=tiles, dynamic=False, longest_first=longest_first)
    compare(call, *kernel(CAUSAL)(call, schedule))
    copies = [0] * tiles
    for event in device().timeline()["traceEvents"]:
        if event["cat"] == "run" and event["tid"] == 0:
            copies[event["pid"]] += event["args"].get("tma", 0)
    return [max(0, count - 2) // 4 for count in copies]


def by_class(lengths_k: list[int]) -> list[int]:
    """Blocks of 128 keys, by the power of two in them, and as they were where that is equal."""
    blocks = [-(-keys // 128) for keys in lengths_k]
    return sorted(blocks, key=lambda count: -max(1, count).bit_length())


def test_long_sequences_come_first():
    call = one_query_each(LENGTHS_K)
    assert blocks_in_order(call, longest_first=True) == by_class(LENGTHS_K)
    assert blocks_in_order(call, longest_first=False) == [-(-keys // 128) for keys in LENGTHS_K]


def test_the_keys_that_are_used_say_which_are_long():
    used = [0, 0, 40, 300, 128, 100, 384, 2, 1]
    call = one_query_each(LENGTHS_K, seqused_k=torch.tensor(used, dtype=torch.int32))
    assert blocks_in_order(call, longest_first=True) == by_class(used)


@pytest.mark.parametrize("sequences", [1, 9])
def test_the_host_asks_for_it(sequences, monkeypatch):
    lengths = [1] * sequences
    call = packed_call(lengths, LENGTHS_K[:sequences], heads=1)
    plans = []

    def kept(*arguments):
        plans.append(hopper_plan(*arguments))
        return plans[-1]

    hopper_plan = forward.plan
    offsets = call.indices["cu_seqlens_q"], call.indices["cu_seqlens_k"]
    with device().serving_cpu_tensors(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(forward, "plan", kept)
        flash8.flash_attn_varlen_func(call.q, call.k, call.v, *offsets, 1, 900, causal=True)
    (planned,) = plans
    assert planned.call.scheduler.longest_first == (sequences > 1)


def many_sequences() -> Call:
    """Three groups of lanes. The only sequence of its class is the last one, alone in its group,
    and those of the others lie between one another."""
    lengths_q, lengths_k = ragged(64, 9, 1), ragged(64, 300, 2)
    lengths_q[64], lengths_k[64] = 2, 700
    return packed_call(lengths_q, lengths_k, heads=2, behind=3)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_order_of_sequences_changes_no_bit(schedule):
    call = many_sequences()
    found = launch(CAUSAL, call, schedule, seed=3)
    compare(call, *found)
    wanted = launch(CAUSAL, call, replace(schedule, longest_first=False), seed=4)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


ORDERS = {
    "a walk goes on where the rows of the last one ended": (
        "attention/tile_scheduler.cuh",
        "rows_before_ = offset(0);  // through",
        "// through",
    ),
    "a class hides the last group": (
        "attention/sequence_order.cuh",
        "if (first_batch() < params_.sequences.batch) {",
        "if (place_ < params_.sequences.batch) {",
    ),
    "a class is left out": (
        "attention/sequence_order.cuh",
        "longest_below(current_class())",
        "longest_below(current_class() - 1)",
    ),
    "classes of the first group only": (
        "attention/sequence_order.cuh",
        "batch < params_.sequences.batch; batch += 32",
        "batch < min(32, params_.sequences.batch); batch += 32",
    ),
    "the longest class comes last": (
        "attention/sequence_order.cuh",
        "wanted() ? longest_below(32) : 0",
        "wanted() ? longest_below(2) : 0",
    ),
    "a class is of keys, not of blocks": (
        "attention/sequence_order.cuh",
        "(keys + kBlock - 1) / kBlock | 1",
        "keys | 1",
    ),
    "lengths are those of the tensor": (
        "attention/sequence_order.cuh",
        "if (sequences.seqused_k != nullptr) {",
        "if (false) {",
    ),
}


def check_order() -> None:
    """All of the above."""
    call = many_sequences()
    compare(call, *kernel(CAUSAL)(call, Schedule(num_ctas=3)))
    test_long_sequences_come_first()
    test_the_keys_that_are_used_say_which_are_long()


@pytest.mark.parametrize("fault", by_default(ORDERS, ["classes of the first group only"]))
def test_the_cases_of_the_order_catch(fault, tmp_path, monkeypatch):
    changed = changed_kernel(tmp_path, CAUSAL, ORDERS[fault])
    monkeypatch.setitem(globals(), "kernel", lambda variant: changed)
    with pytest.raises((AssertionError, RuntimeError)):
        check_order()


def test_schedules_give_the_same_bits():
    call = causal_call()
    first = launch(CAUSAL, call, SCHEDULES[0], seed=1)
    for schedule in SCHEDULES[1:]:
        o, lse = launch(CAUSAL, call, schedule, seed=2)
        assert torch.equal(o, first[0])
        assert torch.equal(lse, first[1])


def test_a_tile_that_is_not_drawn_is_noticed():
    call = causal_call(heads=1, batch=1, seqlen_q=400)
    o, lse = launch(CAUSAL, call, Schedule(num_ctas=1, first_draw=1))
    with pytest.raises(AssertionError, match="not written"):
        compare(call, o, lse)


def copies_and_claims() -> list[tuple[int, int]]:
    """(TMA copies, atomics) of every stretch of the producer between two waits, in order."""
    events = [e for e in device().timeline()["traceEvents"] if e["cat"] == "run" and e["tid"] == 0]
    counts = [e["args"] for e in sorted(events, key=lambda e: e["ts"])]
    return [(c.get("tma", 0), c.get("atomic", 0)) for c in counts]


def test_the_next_tile_is_claimed_when_this_one_is_loaded():
    """A tile that is claimed early waits for its CTA, while another CTA may have nothing to do.

    Q and K of 6 blocks and V of 5 are 24 copies; when the producer claims, all of them are made.
    """
    q, k, v = draw(CAUSAL, 128, 768, 1, 1, batch=1)
    device().configure(seed=0, timeline=True)
    kernel(CAUSAL)(Call(q, k, v, SCALE, causal=True), Schedule(num_ctas=1))
    stretches = copies_and_claims()
    assert sum(copies for copies, _ in stretches) == 26
    # A claim, and the two by which the last CTA leaves.
    assert sum(atomics for _, atomics in stretches) == 3
    claim = next(i for i, (_, atomics) in enumerate(stretches) if atomics)
    assert sum(copies for copies, _ in stretches[: claim + 1]) >= 24


def test_tiles_behind_the_end_of_a_sequence_cost_nothing():
    call = packed_call([5, 140, 3], [5, 140, 3])
    counts = []
    for longest in (140, 100_000):
        launch(CAUSAL, replace(call, max_seqlen_q=longest), Schedule(num_ctas=132))
        counts.append(device().report()["statistics"]["instructions"])
    assert counts[0] == counts[1]


def test_local_rows_are_drawn_too(monkeypatch):
    q, k, v = draw(LOCAL, 150, 400, 2, 2, batch=2)
    with device().serving_cpu_tensors(monkeypatch, seed=3):
        for _ in range(2):  # the first launch leaves the counter as it was
            o, lse = flash8.flash_attn_func(
                q, k, v, window_size=(50, 9), return_attn_probs=True, softmax_scale=SCALE
            )
            compare(Call(q, k, v, SCALE, window=(50, 9)), o, lse)


def test_tiles_are_drawn_when_their_work_differs():
    lengths = torch.tensor([3], dtype=torch.int32)
    assert not heuristics.has_uneven_tiles(Options())
    for options in (
        Options(window_right=0),
        Options(window_left=5),
        Options(attention_chunk=5),
        Options(cu_seqlens_q=lengths),
        Options(seqused_k=lengths),
    ):
        assert heuristics.has_uneven_tiles(options)


def test_a_section_fits_l2():
    assert heuristics.heads_per_section(16384, 512, 1) == 4
    assert heuristics.heads_per_section(16384, 512, 4) == 16
    assert heuristics.heads_per_section(10**9, 512, 4) == 4
    assert heuristics.heads_per_section(0, 512, 1) > 1000


def test_each_stream_has_its_own_counter():
    cpu = torch.device("cpu")
    first = streams.get_tile_count(cpu, 16)
    assert first is streams.get_tile_count(cpu, 16)
    assert first is not streams.get_tile_count(cpu, 32)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(streams.get_tile_count, cpu, 16).result() is first
        own = streams.get_tile_count(cpu, 2)
        assert pool.submit(streams.get_tile_count, cpu, 2).result() is not own
