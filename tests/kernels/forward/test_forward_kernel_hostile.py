"""Index tensors that only the device sees, with every kind of nonsense in them: nothing outside is
touched, nothing hangs, every row is written, and the next call is right."""

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from defaults import by_default
from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import compare, device, draw, int32, launch, packed
from forward_launch import Call, ForwardKernel, Schedule
from fp8_forward_cases import changed_kernel, changed_ptx, descales
from hostile_indices import LENGTHS, MOST, OFFSETS, VALUES
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CAUSAL = ForwardVariant("bf16", 128, 128, mask="causal")
BLOCKS = ForwardVariant("e4m3", 128, 128, mask="causal", scales="block")
V_COLMAJOR = replace(BLOCKS, v_colmajor=True)
FOLDED = replace(CAUSAL, pack_gqa=True)
PARAMETERS = [pytest.param(v, id=v.name) for v in (CAUSAL, V_COLMAJOR)] + [
    pytest.param(v, id=v.name, marks=pytest.mark.slow) for v in (BLOCKS, FOLDED)
]
TOTAL = sum(LENGTHS)
HEADS = 2
#: Two CTAs: they claim tiles from the counter.
SCHEDULE = Schedule(num_ctas=2)


def packed_call(variant: ForwardVariant, **indices: Tensor) -> Call:
    heads = (2 * HEADS, HEADS) if variant.pack_gqa else (HEADS, HEADS)
    q, k, v = draw(variant, TOTAL, TOTAL, *heads)
    offsets = packed(LENGTHS)
    given = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, **indices}
    longest = {"max_seqlen_q": 130, "max_seqlen_k": 130}
    call = Call(q, k, v, 128**-0.5, causal=True, indices=given, v_offsets=offsets, **longest)
    if variant.dtype == "e4m3":
        blocks = TOTAL // 128 + len(LENGTHS)
        scales = descales(variant, len(LENGTHS), HEADS, HEADS, blocks, blocks, packed=True)
        call = replace(call, descales=scales)
    return call


def cache_call(variant: ForwardVariant, **indices: Tensor) -> Call:
    q, k, v = draw(variant, 40, 150, HEADS, HEADS, batch=4)
    return Call(q, k, v, 128**-0.5, causal=True, indices=indices)


def counted(offsets: list[int]) -> Tensor:
    """What offsets of Q count as: the largest so far, within the tensor."""
    return torch.tensor(offsets).clamp(0, TOTAL).cummax(0).values.int()


def written(o: Tensor, lse: Tensor) -> None:
    """Inputs are finite, so NaN is what the outputs were poisoned with."""
    assert not o.isnan().any() and not lse.isnan().any(), "a row was not written"


@functools.cache
def right(variant: ForwardVariant) -> tuple[Tensor, Tensor]:
    """What a correct call gives before any other."""
    return launch(variant, packed_call(variant), SCHEDULE)


def check_next(variant: ForwardVariant) -> None:
    o, lse = launch(variant, packed_call(variant), SCHEDULE)
    assert torch.equal(o, right(variant)[0]) and torch.equal(lse, right(variant)[1])


@pytest.mark.parametrize("variant", PARAMETERS)
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
def test_offsets_of_queries(variant, offsets):
    right(variant)
    call = packed_call(variant, cu_seqlens_q=int32(offsets))
    o, lse = launch(variant, call, SCHEDULE)
    written(o, lse)
    effective = {**call.indices, "cu_seqlens_q": counted(offsets)}
    if variant.dtype != "e4m3":  # whose blocks of descales move with the offsets
        compare(replace(call, indices=effective), o, lse)
    again = launch(variant, replace(call, indices=effective), SCHEDULE)
    assert torch.equal(o, again[0]) and torch.equal(lse, again[1])
    check_next(variant)


@pytest.mark.parametrize("variant", PARAMETERS)
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
def test_offsets_of_keys(variant, offsets):
    right(variant)
    o, lse = launch(variant, packed_call(variant, cu_seqlens_k=int32(offsets)), SCHEDULE)
    # Between the sequences of a v_colmajor V there is NaN here, which such offsets may let in.
    written(torch.zeros_like(o) if variant.v_colmajor else o, lse)
    check_next(variant)


@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("name", ["seqused_q", "seqused_k"])
def test_used_lengths_of_packed_sequences(name, values):
    call = packed_call(CAUSAL, **{name: int32(values)})
    o, lse = launch(CAUSAL, call, SCHEDULE)
    effective = torch.minimum(int32(values).clamp(min=0), int32(LENGTHS))
    compare(replace(call, indices={**call.indices, name: effective}), o, lse)


@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("name", ["seqused_q", "seqused_k", "leftpad_k"])
def test_used_lengths_of_a_cache(name, values):
    used = {"seqused_k": int32([150, 30, 0, 99])} if name == "leftpad_k" else {}
    call = cache_call(CAUSAL, **used, **{name: int32(values)})
    o, lse = launch(CAUSAL, call, SCHEDULE)
    most = {"seqused_q": int32([40] * 4), "seqused_k": int32([150] * 4), **used}
    most["leftpad_k"] = most["seqused_k"]
    effective = torch.minimum(int32(values).clamp(min=0), most[name])
    compare(replace(call, indices={**call.indices, name: effective}), o, lse)


def test_rows_of_a_cache():
    """A row that there is not is a sequence without work: O is 0, LSE -inf, with a sink too."""
    rows = [-1, 3, 4, MOST]
    sinks = torch.tensor([0.5, -1.0])
    call = replace(cache_call(CAUSAL, kv_batch_idx=int32(rows)), s_aux=sinks)
    o, lse = launch(CAUSAL, call, SCHEDULE)
    effective = {"kv_batch_idx": int32([0, 3, 0, 0]), "seqused_q": int32([0, 40, 0, 0])}
    compare(replace(call, indices=effective), o, lse)


def test_a_bound_that_is_too_low():
    """max_seqlen is a promise that a kernel need not rely on."""
    call = packed_call(CAUSAL)
    found = launch(CAUSAL, replace(call, max_seqlen_q=1, max_seqlen_k=1), SCHEDULE)
    expected = launch(CAUSAL, call, SCHEDULE)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_more_sequences_than_lanes():
    """Offsets that go up and down over several groups of 32 sequences."""
    generator = torch.Generator().manual_seed(3)
    offsets = torch.randint(-300, 600, (76,), generator=generator).tolist()
    q, k, v = draw(CAUSAL, TOTAL, TOTAL, HEADS, HEADS)
    given = {"cu_seqlens_q": int32(offsets), "cu_seqlens_k": counted([0, *offsets[1:]])}
    call = Call(q, k, v, 128**-0.5, causal=True, indices=given, max_seqlen_q=9, max_seqlen_k=9)
    o, lse = launch(CAUSAL, call, Schedule(num_ctas=3))
    effective = {**given, "cu_seqlens_q": counted(offsets)}
    compare(replace(call, indices=effective), o, lse)


MUTATIONS = {
    "offsets are as they are": (
        "attention/tile_scheduler.cuh",
        "value = max(value, __shfl_up_sync",
        "value = min(value, __shfl_up_sync",
    ),
    "lengths are as they are": (
        "attention/seqlen_info.cuh",
        "clamped(static_cast<int>(lengths[batch] + more), 0, capacity)",
        "lengths[batch]",
    ),
}


def check_catches(changed: ForwardKernel) -> None:
    offsets = OFFSETS["one that decreases"]
    used = int32([MOST, 2, 3, 4])
    call = packed_call(CAUSAL, cu_seqlens_q=int32(offsets), seqused_q=used)
    effective = {**call.indices, "cu_seqlens_q": counted(offsets)}
    effective["seqused_q"] = torch.minimum(used, effective["cu_seqlens_q"].diff())
    wanted = replace(call, indices=effective)
    compare(wanted, *launch(CAUSAL, call, SCHEDULE))
    with pytest.raises((AssertionError, RuntimeError)):
        compare(wanted, *changed(call, SCHEDULE))


@pytest.mark.parametrize("name", by_default(MUTATIONS, ["offsets are as they are"]))
def test_the_cases_catch(name, tmp_path):
    check_catches(changed_kernel(tmp_path, CAUSAL, MUTATIONS[name]))


def test_the_cases_catch_a_counter_that_stays():
    ptx = changed_ptx(CAUSAL, rb"atom\.global\.exch[^;]*;", b"")
    check_catches(ForwardKernel(device().driver, ptx))
