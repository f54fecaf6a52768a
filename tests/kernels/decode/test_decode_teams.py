"""The decode kernel where a team of warps has one O: head_dim 512, and absorbed MLA (qv)."""

import math
from dataclasses import replace

import pytest
import torch

from decode_cases import Cache, check, compare, draw, launch, poisoned
from defaults import by_default
from flash8.backends.hopper.decode_variants import ROWS, DecodeVariant
from forward_cases import int32, packed
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

E16 = DecodeVariant("bf16", "e4m3", 64, 512, 16, qv=True)
B32 = DecodeVariant("bf16", "same", 64, 512, 32, qv=True)
D8 = DecodeVariant("bf16", "same", 512, 512, 8)
DEFAULT = (E16, B32, D8)
ALL = tuple(
    DecodeVariant(dtype, cache, *sizes, rows, load=load, qv=qv)
    for sizes, qv in (((64, 512), True), ((512, 512), False))
    for dtype, cache in (("fp16", "same"), ("fp16", "e4m3"), ("bf16", "same"), ("bf16", "e4m3"))
    for load in ("tma", "gather")
    for rows in ROWS
)
OTHERS = tuple(v for v in ALL if v not in DEFAULT)
#: None, one key, around tiles of 32 and 64 keys, and several CTAs of the first.
LENGTHS = (1100, 0, 1, 31, 32, 33, 63, 64, 65, 257)


def pages_of(variant):
    return Cache(3 if variant.load == "gather" else 24)


def heads_of(variant):
    """Of two queries; some rows of the tile are nobody's."""
    return {8: 3, 16: 7, 32: 14}[variant.rows]


@pytest.mark.parametrize("variant", by_default([*DEFAULT, *OTHERS], DEFAULT))
def test_ragged_pages(variant):
    heads = heads_of(variant)
    sinks = torch.linspace(-1.0, 4.0, heads)
    cache = pages_of(variant)
    call = draw(variant, LENGTHS, seqlen_q=2, heads=heads, causal=True, cache=cache, s_aux=sinks)
    check(variant, call, ctas=7, seeds=(0, 1, 2))


#: Query heads of a KV head, and queries.
SHAPES = {1: (1, 1), 5: (5, 1), 8: (4, 2), 16: (16, 1), 21: (7, 3), 32: (4, 8)}


@pytest.mark.parametrize("variant", by_default([E16, B32, D8], [E16]))
@pytest.mark.parametrize("rows", SHAPES)
def test_rows(rows, variant):
    """Two KV heads; more rows than the tile has are more tiles."""
    ratio, seqlen_q = SHAPES[rows]
    given = {"heads": 2 * ratio, "heads_kv": 2, "seqlen_q": seqlen_q, "causal": True}
    check(variant, draw(variant, (300, 0, 65, 3), cache=Cache(16), **given), ctas=5)


MASKS = {
    "all": {},
    "window": {"window": (70, 0)},
    "right window": {"window": (-1, 1)},
    "chunk": {"attention_chunk": 100, "causal": True},
}


@pytest.mark.parametrize("variant", by_default([E16, B32, D8], [E16]))
@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_a_dense_cache(variant, mask):
    """Padding on the left; more queries than keys, too, of which some see none."""
    indices = {"leftpad_k": int32([5, 0, 0, 70])}
    call = draw(variant, (500, 2, 0, 131), seqlen_q=4, heads=2)
    indices = {**call.indices, **indices}
    check(variant, replace(call, indices=indices, **MASKS[mask]), ctas=5)


@pytest.mark.parametrize("variant", by_default([E16, D8], [E16]))
def test_rows_of_the_cache_and_packed_queries(variant):
    lengths = (2, 1, 0, 3, 6, 0, 2)
    call = draw(variant, (200, 0, 1, 63, 64, 65, 90), seqlen_q=2, heads=2, causal=True)
    given = {"cu_seqlens_q": packed(lengths), "kv_batch_idx": int32([3, 2, 6, -1, 4, 5, 6])}
    qv = None if call.qv is None else call.qv.reshape(14, 2, 512)
    call = replace(call, q=call.q.reshape(14, 2, variant.head_dim), qv=qv)
    check(variant, replace(call, indices={**call.indices, **given}, max_seqlen_q=6), ctas=7)


@pytest.mark.parametrize("variant", by_default([E16, B32, D8], [B32]))
@pytest.mark.parametrize("softcap, slopes", [(4.0, (4, 4))])
def test_softcap_and_alibi(softcap, slopes, variant):
    variant = replace(variant, score_mod=True)
    generator = torch.Generator().manual_seed(1)
    slopes = None if slopes is None else 0.1 * torch.rand(slopes, generator=generator)
    given = {"softcap": softcap, "alibi_slopes": slopes, "s_aux": torch.linspace(-1, 1, 4)}
    indices = {"leftpad_k": int32([7, 0, 0, 70])}
    call = draw(variant, (300, 1, 0, 131), seqlen_q=2, causal=True, indices=indices, **given)
    check(variant, call, ctas=5)


@pytest.mark.parametrize("size", [1e5, 1e-30])
def test_queries_that_fp16_has_no_room_for(size):
    """q, qv, or both, beside a row of an ordinary size."""
    call = draw(E16, (200, 70), seqlen_q=2, causal=True)
    for names in (("q",), ("qv",), ("q", "qv")):
        large = {name: getattr(call, name).clone() for name in names}
        for x in large.values():
            x[:, 0] *= size
        check(E16, replace(call, **large), ctas=3)


@pytest.mark.parametrize(
    "k_descale, v_descale", [(2.0**-5, 1.0), (1.0, 2.0**-5), (2.0, 2.0**-20), (2.0**-20, 2.0)]
)
def test_descales_far_apart(k_descale, v_descale):
    """One by tensor; q . k is brought to the units of qv . v."""
    call = draw(E16, (200, 70), seqlen_q=2, causal=True, softmax_scale=2.0**-9)
    given = {"k_descale": torch.tensor(k_descale), "v_descale": torch.tensor(v_descale)}
    check(E16, replace(call, **given), ctas=3)


@pytest.mark.parametrize("exponent", [13, -13])
def test_descales_too_far_apart(exponent):
    """Beyond 2^24 it shows: the sequence is NaN, the others are right."""
    call = draw(E16, (200, 70), seqlen_q=2, causal=True)
    k_descale, v_descale = call.k_descale.clone(), call.v_descale.clone()
    k_descale[0], v_descale[0] = 2.0**exponent, 2.0**-exponent
    given = replace(call, k_descale=k_descale, v_descale=v_descale)
    ((o, _),) = launch(E16, given)
    assert o[0].isnan().all()
    ((want, _),) = launch(E16, call)
    assert torch.equal(o[1:], want[1:])


def test_caches_of_their_own():
    """K and V need not be channels of one cache."""
    call = draw(E16, (200, 70), seqlen_q=2, causal=True, cache=Cache(16))
    (want,) = launch(E16, poisoned(call))
    apart = replace(call, k=call.k.contiguous(), v=call.v.contiguous())
    (found,) = launch(E16, apart)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
    compare(call, *found)


@pytest.mark.parametrize("variant", by_default([D8, E16], [D8]))
@pytest.mark.parametrize("width", [272, 384, 448])
def test_narrow_heads(variant, width):
    """The rest of a tile's channels are zeros, and whole warps' may be."""
    call = draw(variant, (200, 70), cache=Cache(16))
    if variant.qv:
        given = {"qv": call.qv[..., :width], "v": call.v[..., :width]}
    else:
        given = {x: getattr(call, x)[..., :width] for x in "qkv"}
    check(variant, replace(call, **{k: x.contiguous() for k, x in given.items()}), ctas=3)


@pytest.mark.parametrize("variant", by_default([E16, B32, D8], [B32]))
@pytest.mark.parametrize("ctas", by_default([1, 2, 3, 11], [1, 11]))
def test_shares(variant, ctas):
    """Sequences end within shares, at their ends, and span three and more; a team may have no
    tile of a segment."""
    lengths = (32 * 40, 32 * 8, 0, 1, 32 * 13 + 5)
    check(variant, draw(variant, lengths, heads=2, cache=pages_of(variant)), ctas=ctas)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [E16, B32, D8, replace(E16, load="gather")])
def test_freed_pages_and_page_numbers(variant):
    """A page that does not exist reads as zeros; what no query sees may have any number."""
    call = draw(variant, (150, 140, 0, 77), seqlen_q=2, heads=2, cache=pages_of(variant))
    table = call.page_table.clone()
    table[0, 0] = table[1, 1] = -1
    hostile = replace(call, page_table=table)
    compare(hostile, *launch(variant, poisoned(hostile))[0])
    page_size = call.k.shape[1]
    for b, length in enumerate([150, 140, 0, 77]):
        call.page_table[b, : max(0, length - 42) // page_size] = 2**31 - 1
        call.page_table[b, -(-length // page_size) :] = -(2**31)
    check(variant, replace(call, window=(40, 0)), ctas=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(0, 24, 6))
def test_the_last_to_arrive_may_be_any(seed):
    check(E16, draw(E16, (64 * 80,), heads=1), ctas=9, seeds=range(seed, seed + 6))


def test_without_keys():
    """O = 0, LSE = -inf."""
    call = draw(E16, (0, 0), seqlen_q=2)
    ((o, lse),) = launch(E16, call)
    assert not o.any() and (lse == -math.inf).all()
