"""Scheduler metadata on the simulated device: what it counts, that a decode kernel which is given
it computes the same bits, and that any other contents make no call wrong."""

import functools
from dataclasses import replace

import pytest
import torch

from decode_cases import Cache, changed_kernel, draw, launch, poisoned
from defaults import by_default
from faults import Fault
from flash8.backends.hopper.decode_variants import DecodeVariant
from flash8.backends.hopper.schedule_variants import SCHEDULE
from forward_cases import device, int32
from schedule_launch import MOST, ScheduleKernel, counted
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

E8 = DecodeVariant("bf16", "e4m3", 128, 128, 8)
OTHERS = (
    replace(E8, load="gather"),
    replace(E8, rows=32),
    DecodeVariant("fp16", "same", 256, 256, 8),
    DecodeVariant("bf16", "same", 64, 512, 32, qv=True),
)
#: Keys of a tile.
TILES = {E8: 64, OTHERS[0]: 64, OTHERS[1]: 32, OTHERS[2]: 16, OTHERS[3]: 32}
LENGTHS = (700, 0, 1, 333, 64, 65)
LEAST = -MOST - 1


@functools.cache
def schedule() -> ScheduleKernel:
    return ScheduleKernel(device().driver, device().ptx(SCHEDULE))


def call_of(variant=E8, lengths=LENGTHS, **options):
    heads = 28 if variant.rows == 32 else 4
    cache = Cache(3 if variant.load == "gather" else 24, room=720)
    return draw(variant, lengths, seqlen_q=2, heads=heads, cache=cache, **options)


def packed(call):
    """Its queries packed, with a sequence of none and one of more."""
    cu_seqlens = int32([0, 2, 4, 4, 7, 9, 12])
    given = {**call.indices, "cu_seqlens_q": cu_seqlens}
    return replace(call, q=call.q.flatten(0, 1), indices=given, max_seqlen_q=3)


def with_metadata(variant, call, **options):
    return replace(call, scheduler_metadata=schedule()(variant, call, **options))


PADDING = {"leftpad_k": int32([130, 0, 1, 64, 0, 65])}
CALLS = {
    "causal": call_of(causal=True),
    "a window": call_of(window=(100, 1)),
    "chunks": call_of(attention_chunk=130, causal=True),
    "packed": packed(call_of(causal=True)),
    "padding": call_of(causal=True, indices=PADDING),
    "rows": call_of(indices={"kv_batch_idx": int32([5, 0, -1, -1, 1, 2])}),
    "splits": replace(call_of(causal=True), split_keys=128),
    "heads": call_of(heads_kv=2),
    "no key": call_of(lengths=(0, 0)),
    "one": call_of(lengths=(5,)),
}


@pytest.mark.parametrize("name", CALLS)
def test_counts(name):
    call = CALLS[name]
    assert schedule()(E8, call).tolist() == counted(call, 8, 64)


@pytest.mark.parametrize("variant", OTHERS, ids=lambda v: v.name)
def test_counts_of_tiles(variant):
    call = replace(call_of(variant, causal=True), split_keys=64)
    assert schedule()(variant, call).tolist() == counted(call, variant.rows, TILES[variant])


@pytest.mark.parametrize("batch", [31, 32, 511, 512, 513, 1100])
def test_counts_of_many_sequences(batch):
    """More than a warp, and the CTA, has threads."""
    lengths = [37 * b % 97 for b in range(batch)]
    call = draw(E8, lengths, heads=1, cache=Cache(24))
    assert schedule()(E8, call).tolist() == counted(call, 8, 64)


def test_counts_of_new_keys():
    """Of sequences that are appended to before attention sees them."""
    call = call_of(causal=True)
    for new, lengths in ((3, int32(LENGTHS) + 3), (int32([0, 1, 1, 9, 9, 64, 64]), None)):
        if lengths is None:
            lengths = int32(LENGTHS) + new.diff()
        longer = replace(call, indices={"seqused_k": lengths})
        assert schedule()(E8, call, new=new).tolist() == counted(longer, 8, 64)


def test_indices_of_every_kind_are_counted_somehow():
    """Nothing beside the tensors is touched, and the kernel ends."""
    call = packed(call_of(causal=True))
    for value in (MOST, LEAST, -1):
        for name in ("seqused_k", "cu_seqlens_q"):
            index = torch.full_like(call.indices[name], value)
            schedule()(E8, replace(call, indices={**call.indices, name: index}), new=index[:1])


@functools.cache
def without_own_count(folder) -> object:
    """E8 in which CTAs have no share but by metadata."""
    own = "return Shares<Config>::of_cta(params);"
    none = "return Shares<Config>::of_pieces(params, 0);"
    return changed_kernel(folder, E8, ("decode/scheduler_metadata.cuh", own, none))


@pytest.fixture(scope="module")
def by_metadata_only(tmp_path_factory):
    return without_own_count(tmp_path_factory.mktemp("without_own_count"))


@pytest.mark.parametrize("ctas", [3, 40])
@pytest.mark.parametrize("name", CALLS)
def test_bits_are_those_without_it(name, ctas, by_metadata_only):
    """And it is what shares come from."""
    call = poisoned(CALLS[name])
    (want,) = launch(E8, call, ctas=ctas)
    given = with_metadata(E8, call)
    (found,) = launch(E8, given, ctas=ctas, seed=1, changed=by_metadata_only)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


def test_many_sequences(by_metadata_only):
    """More than the decode kernel has threads."""
    call = poisoned(draw(E8, [b if b % 5 == 0 else 0 for b in range(300)], heads=1))
    (want,) = launch(E8, call, ctas=7)
    (found,) = launch(E8, with_metadata(E8, call), ctas=7, changed=by_metadata_only)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


@pytest.mark.parametrize("variant", by_default(OTHERS, []), ids=lambda v: v.name)
def test_other_kernels(variant):
    call = poisoned(call_of(variant, causal=True))
    (want,) = launch(variant, call, ctas=5)
    (found,) = launch(variant, with_metadata(variant, call), ctas=5, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


def test_launches_with_metadata_of_each(by_metadata_only):
    """One after the other, as the replays of a graph are."""
    calls = [
        call_of(lengths=lengths, seed=i) for i, lengths in enumerate([LENGTHS, (9,), (0, 650)])
    ]
    given = [with_metadata(E8, poisoned(call)) for call in calls]
    together = launch(E8, *given, ctas=5, changed=by_metadata_only)
    for call, found in zip(calls, together, strict=True):
        (want,) = launch(E8, poisoned(call), ctas=5, seed=3)
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


def stale(call, **indices):
    """What holds for the same call with other indices."""
    return schedule()(E8, replace(call, indices={**call.indices, **indices}))


def words(call, *given):
    right = schedule()(E8, call)
    for at, value in given:
        right[at] = value
    return right


HOSTILE = {
    "longer": lambda call: stale(call, seqused_k=int32([700, 300, 1, 333, 64, 65])),
    "shorter": lambda call: stale(call, seqused_k=int32([700, 0, 1, 64, 64, 65])),
    "in another order": lambda call: stale(call, seqused_k=int32([333, 0, 1, 700, 64, 65])),
    "one more tile": lambda call: stale(call, seqused_k=int32([700, 0, 1, 333, 64, 129])),
    "of none": lambda call: stale(call, seqused_k=int32([0] * 6)),
    "another mask": lambda call: schedule()(E8, replace(call, window=(64, 0))),
    "other heads": lambda call: schedule()(E8, call, heads_kv=2),
    "splits": lambda call: schedule()(E8, call, split_keys=128),
    "other rows": lambda call: schedule()(replace(E8, rows=32), call),
    "other keys": lambda call: schedule()(OTHERS[2], call),
    "zeros": lambda call: torch.zeros(7, dtype=torch.int32),
    "ones": lambda call: torch.full((7,), -1, dtype=torch.int32),
    "the most": lambda call: words(call, *((i, MOST) for i in range(1, 7))),
    "the least": lambda call: words(call, *((i, LEAST) for i in range(1, 7))),
    "an end beyond": lambda call: words(call, (6, 10**9)),
    "a negative end": lambda call: words(call, (6, -1)),
    "one that wraps": lambda call: words(call, (3, LEAST)),
    "another version": lambda call: words(call, (0, 2 << 16 | 8 << 8 | 64)),
    "two at once": lambda call: words(call, (1, 0), (2, 0)),
}


@functools.cache
def without_metadata(kind, ctas):
    call = call_of(causal=True)
    call = poisoned(packed(call) if kind == "packed" else call)
    return call, launch(E8, call, ctas=ctas)[0]


@pytest.mark.parametrize("name", HOSTILE)
def test_any_other_contents_make_no_call_wrong(name):
    for seed, (kind, ctas) in enumerate([("dense", 3), ("packed", 3), ("dense", 40)]):
        call, want = without_metadata(kind, ctas)
        given = replace(call, scheduler_metadata=HOSTILE[name](call))
        (found,) = launch(E8, given, ctas=ctas, seed=seed)
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


@pytest.mark.parametrize("name", ["seqused_k", "leftpad_k", "kv_batch_idx", "cu_seqlens_q"])
def test_hostile_indices_with_metadata_of_the_same(name):
    """Those that the two kernels clamp differently, and offsets that go down."""
    values = {
        "seqused_k": [MOST, -1, LEAST, 721, 64, 65],
        "leftpad_k": [MOST, -1, LEAST, 721, 0, 65],
        "kv_batch_idx": [MOST, 0, LEAST, 6, 1, 2],
        "cu_seqlens_q": [0, 7, 4, -3, MOST, 9, 12],
    }
    call = packed(call_of(causal=True))
    call = replace(call, indices={**call.indices, name: int32(values[name])}, max_seqlen_q=12)
    (want,) = launch(E8, call)
    for seed in (0, 1):
        (found,) = launch(E8, with_metadata(E8, call), seed=seed)
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


METADATA = "decode/scheduler_metadata.cuh"
FAULTS = (
    Fault(
        "a_table_is_believed",
        E8,
        (METADATA, "pieces == static_cast<unsigned>(sequence.all_pieces(params_))", "true"),
    ),
    Fault("rows_may_go_down", E8, (METADATA, "agrees = b == 0 || row >= row_of(b - 1);", "")),
    Fault(
        "each_thread_decides",
        E8,
        (METADATA, "__shfl_sync(0xffffffff, __syncthreads_and(agrees), 0) == 0", "!agrees"),
    ),
    Fault(
        "nobody_has_no_piece", E8, (METADATA, "without_pieces ? threadIdx.x == 0 :", "false ? 0 :")
    ),
    Fault(
        "a_share_that_is_not_waited_for",
        E8,
        (METADATA, "        __syncthreads();\n        return true;", "        return true;"),
    ),
    Fault("only_the_first_threads_look", E8, (METADATA, "b += Config::kThreads", "b += 1 << 30")),
)


@pytest.mark.parametrize("fault", by_default(FAULTS, FAULTS[:1]))
def test_fault_is_found(fault, tmp_path):
    call = call_of(causal=True)
    down = {**packed(call).indices, "cu_seqlens_q": int32([0, 7, 4, -3, 8, 9, 12])}
    rows_down = replace(packed(call), indices=down, max_seqlen_q=12)
    ascending = {**down, "cu_seqlens_q": int32([0, 7, 7, 7, 8, 9, 12])}
    lengths = [b if b % 5 == 0 else 0 for b in range(300)]
    many = draw(E8, lengths, heads=1)
    longer = int32([*lengths[:-1], 70])
    problems = [
        (replace(call, scheduler_metadata=HOSTILE["longer"](call)), call),
        (with_metadata(E8, call), call),
        (with_metadata(E8, rows_down), replace(rows_down, indices=ascending)),
        (replace(many, scheduler_metadata=stale(many, seqused_k=longer)), many),
    ]
    changed = changed_kernel(tmp_path, fault.variant, fault.edit)
    assert shows(changed, problems), f"{fault.name} is not found"


def shows(changed, problems):
    """Whether some launch fails, or differs from what the kernel makes without metadata."""
    for seed in range(6):
        for given, plain in problems:
            for ctas in (5, 40):
                ((o, lse),) = launch(E8, plain, ctas=ctas)
                try:
                    ((found, found_lse),) = launch(E8, given, ctas=ctas, seed=seed, changed=changed)
                except (AssertionError, RuntimeError):
                    return True
                if not (torch.equal(found, o) and torch.equal(found_lse, lse)):
                    return True
    return False
