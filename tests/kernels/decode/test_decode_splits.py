"""Splits of fixed boundaries in the decode kernel: a sequence's bits are its own."""

from dataclasses import replace

import pytest
import torch

from decode_cases import Cache, check, draw, found_by, launch, poisoned
from defaults import by_default
from faults import Fault
from flash8.backends.hopper.decode_variants import DecodeVariant
from flash8.call.checks import NO_SPLIT
from forward_cases import int32
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

E8 = DecodeVariant("bf16", "e4m3", 128, 128, 8)
OTHERS = (
    replace(E8, load="gather"),
    replace(E8, rows=32),
    replace(E8, scales="key"),
    DecodeVariant("fp16", "same", 256, 256, 8),
    DecodeVariant("bf16", "same", 64, 512, 32, qv=True),
)
LENGTHS = (1100, 0, 2, 640, 130, 641)


def splits(variant, split_keys=128, lengths=LENGTHS, **options):
    call = draw(
        variant,
        lengths,
        seqlen_q=2,
        heads=28 if variant.rows == 32 else 4,
        cache=Cache(3 if variant.load == "gather" else 24),
        s_aux=torch.linspace(-1.0, 2.0, 28 if variant.rows == 32 else 4),
        **options,
    )
    return replace(call, split_keys=split_keys)


@pytest.mark.parametrize("variant", by_default([E8, *OTHERS], [E8]))
def test_variants(variant):
    check(variant, splits(variant, causal=True), ctas=5, seeds=(0, 1, 2))


@pytest.mark.parametrize("split_keys", [64, 192, 640, NO_SPLIT])
@pytest.mark.parametrize("ctas", [1, 4, 19])
def test_shares_do_not_change_the_bits(split_keys, ctas):
    """Units of one CTA, of several, of parts of two."""
    call = splits(E8, split_keys, heads_kv=2, window=(900, 0))
    call = replace(call, indices={**call.indices, "leftpad_k": int32([70, 0, 0, 3, 0, 0])})
    found = check(E8, call, ctas=ctas)
    (want,) = launch(E8, poisoned(call), ctas=7)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


def alone(call, b):
    indices = {name: x[b : b + 1] for name, x in call.indices.items()}
    given = {"q": call.q[b : b + 1], "page_table": call.page_table[b : b + 1], "indices": indices}
    for name in ("k_descale", "v_descale"):
        given[name] = getattr(call, name)[b : b + 1]
    return replace(call, **given)


@pytest.mark.parametrize("split_keys", [128, NO_SPLIT])
@pytest.mark.parametrize("ctas", [3, 11])
def test_neighbours_do_not_change_the_bits(ctas, split_keys):
    call = splits(E8, split_keys, heads_kv=2)
    ((o, lse),) = launch(E8, call, ctas=ctas)
    for b in range(len(LENGTHS)):
        ((own, own_lse),) = launch(E8, alone(call, b), ctas=ctas)
        assert torch.equal(own[0], o[b]) and torch.equal(own_lse[0], lse[b]), b


def test_equal_shares_do_depend_on_neighbours():
    call = splits(E8, 0, heads_kv=2)
    ((o, _),) = launch(E8, call)
    ((own, _),) = launch(E8, alone(call, 0))
    assert not torch.equal(own[0], o[0])


def test_launches_one_after_the_other():
    """With other lengths, and with equal shares in between."""
    calls = [
        poisoned(splits(E8, keys, lengths=lengths, seed=i))
        for i, (keys, lengths) in enumerate([(64, LENGTHS), (0, LENGTHS), (256, (5, 900, 0))])
    ]
    together = launch(E8, *calls, ctas=9)
    for call, found in zip(calls, together, strict=True):
        (want,) = launch(E8, call, ctas=9, seed=3)
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


WORK, MERGE = "decode/work.cuh", "decode/merge.cuh"
FAULTS = (
    Fault(
        "a_ticket_for_one_cta",
        E8,
        (MERGE, "if (segment.first_cta == segment.last_cta) {", "if (false) {"),
    ),
    Fault("a_ticket_for_each_split", E8, (MERGE, "!whole && segment.ends_here &&", "!whole &&")),
    Fault(
        "parts_in_one_place",
        E8,
        (MERGE, "int64_t{segment.piece} * kPartial", "int64_t{segment.first_piece} * kPartial"),
    ),
    Fault("the_last_split_left_out", E8, (MERGE, "? sequence.pieces :", "? sequence.pieces - 1 :")),
    Fault(
        "a_split_too_short",
        E8,
        (
            WORK,
            "segment.begin + taken * tiles_of_piece, sequence",
            "segment.begin + taken * tiles_of_piece - (index == 1), sequence",
        ),
    ),
    Fault(
        "all_of_a_unit_at_once", E8, (WORK, "of_split != 0 ? 1 : min(end", "false ? 1 : min(end")
    ),
)


@pytest.mark.parametrize("fault", by_default(FAULTS, FAULTS[:1]))
def test_fault_is_found(fault, tmp_path):
    """By results, or by bits that depend on shares."""
    problems = [(splits(E8, 128, heads_kv=2), 5), (splits(E8, 64), 9)]
    found = found_by(fault, problems, range(6), tmp_path)
    assert found is not None, f"{fault.name} is not found"
    print(found)
