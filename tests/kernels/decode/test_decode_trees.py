"""Trees of drafts in the decode kernel: a word of bits for each query."""

from dataclasses import replace

import pytest
import torch

from decode_cases import Cache, check, draw, found_by, launch
from defaults import by_default
from faults import Fault
from flash8.backends.hopper.decode_variants import DecodeVariant
from forward_cases import int32, packed
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

E8 = DecodeVariant("bf16", "e4m3", 128, 128, 8)
OTHERS = (
    DecodeVariant("bf16", "same", 128, 128, 32),
    replace(E8, load="gather"),
    replace(E8, dtype="fp16", score_mod=True),
    replace(E8, scales="key"),
    DecodeVariant("bf16", "e4m3", 64, 512, 16, qv=True),
)
#: Around a tile of 64; fewer keys than queries; several CTAs.
LENGTHS = (1100, 0, 2, 65, 130, 67)


def tree(*shape, seed=0):
    """Words of which each query has its own bit, and others at random."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, shape, generator=generator)
    own = torch.arange(shape[-1]) % 32
    return (words | (1 << own)).int()


def drafts(variant, seqlen_q=4, **options):
    call = draw(
        variant,
        LENGTHS,
        seqlen_q=seqlen_q,
        heads=2,
        cache=Cache(3 if variant.load == "gather" else 24),
        softcap=3.0 if variant.score_mod else 0.0,
        indices={"leftpad_k": int32([5, 0, 0, 0, 3, 64])},
        **options,
    )
    return replace(call, tree_mask=tree(len(LENGTHS), seqlen_q))


@pytest.mark.parametrize("variant", by_default([E8, *OTHERS], [E8]))
def test_variants(variant):
    check(variant, drafts(variant, causal=True), ctas=7)


@pytest.mark.parametrize("masks", [{}, {"window": (70, 1)}, {"attention_chunk": 64}], ids=str)
def test_it_hides_besides_what_is_hidden(masks):
    check(E8, drafts(E8, **masks), ctas=7)


@pytest.mark.parametrize("seqlen_q", [1, 7, 31, 32])
def test_queries(seqlen_q):
    """All bits of a word, and further tiles of rows."""
    check(E8, drafts(E8, seqlen_q), ctas=7)


def test_packed_queries():
    call = drafts(E8)
    indices = {**call.indices, "cu_seqlens_q": packed((4, 1, 0, 8, 11, 0))}
    q = call.q.reshape(24, 2, 128)
    given = {"q": q, "indices": indices, "tree_mask": tree(24), "max_seqlen_q": 11}
    check(E8, replace(call, **given), ctas=7)


def test_all_bits_hide_nothing():
    call = drafts(E8, causal=True)
    every = torch.full_like(call.tree_mask, -1)
    (found,) = launch(E8, replace(call, tree_mask=every))
    (want,) = launch(E8, replace(call, tree_mask=None))
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


SOFTMAX, WORK = "decode/softmax.cuh", "decode/work.cuh"
FAULTS = (
    Fault("tree_ignored", E8, (SOFTMAX, "return ~params.tree_mask", "return 0 & params.tree_mask")),
    Fault(
        "bits_the_other_way", E8, (SOFTMAX, "return ~params.tree_mask", "return params.tree_mask")
    ),
    Fault("word_of_another_query", E8, (SOFTMAX, "+ info.offset_q + query]", "+ info.offset_q]")),
    Fault("word_of_another_sequence", E8, (SOFTMAX, "info.batch_q * params.tree_mask_stride", "0")),
    Fault("a_bit_off", E8, (SOFTMAX, "key(i, h) - first_new)", "key(i, h) - first_new + 1)")),
    Fault("the_edge_is_not_masked", E8, (WORK, "min(head.end, work.first_new_key())", "head.end")),
    Fault("bits_wrap", E8, (SOFTMAX, '"r"(bit));', '"r"(bit & 31));')),
    Fault(
        "padding_moves_the_bits",
        E8,
        (SOFTMAX, "sequence.first_new_key() - first;", "sequence.first_new_key() - position;"),
    ),
)


@pytest.mark.parametrize("fault", by_default(FAULTS, FAULTS[:1]))
def test_fault_is_found(fault, tmp_path):
    found = found_by(fault, [(drafts(E8), 7), (drafts(E8, 32), 7)], (0,), tmp_path)
    assert found is not None, f"{fault.name} is not found"
    print(found)
