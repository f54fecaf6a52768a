"""The decode kernel on the simulated device: float64 attention on what the cache stands for."""

from dataclasses import replace

import pytest
import torch

from decode_cases import Cache, check, draw, launch, poisoned
from defaults import by_default
from flash8.backends.hopper.decode_variants import TILES, DecodeVariant, tile_rows
from forward_cases import int32, packed
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

E8 = DecodeVariant("bf16", "e4m3", 128, 128, 8)
B8 = DecodeVariant("bf16", "same", 128, 128, 8)
GATHER = replace(E8, load="gather")
MODIFIED = DecodeVariant("fp16", "e4m3", 128, 128, 8, score_mod=True)
#: None, one key, and around a tile of 64; several CTAs of the first.
LENGTHS = (1100, 0, 1, 63, 64, 65, 257)
DEFAULT = (E8, B8, GATHER)
OTHERS = tuple(
    DecodeVariant(dtype, cache, *tile, tile_rows(tile[1])[-1], load=load)
    for tile in TILES
    for dtype, cache in (("fp16", "same"), ("fp16", "e4m3"), ("bf16", "same"))
    for load in ("tma", "gather")
)


def pages_of(variant):
    """A size that the variant loads, and that its tiles do not divide."""
    return Cache(3 if variant.load == "gather" else 24)


@pytest.mark.parametrize("variant", by_default([*DEFAULT, *OTHERS], DEFAULT))
def test_ragged_pages(variant):
    call = draw(variant, LENGTHS, seqlen_q=2, causal=True, cache=pages_of(variant))
    check(variant, call, ctas=7, seeds=(0, 1, 2))


ROWS = {1: (1, 1), 5: (5, 1), 8: (4, 2), 12: (6, 2), 16: (16, 1), 28: (7, 4), 32: (4, 8)}


@pytest.mark.parametrize("cache", by_default(["same", "e4m3"], ["e4m3"]))
@pytest.mark.parametrize("rows", ROWS)
def test_rows(rows, cache):
    ratio, seqlen_q = ROWS[rows]
    tile = next(n for n in (8, 16, 32) if rows <= n)
    variant = DecodeVariant("bf16", cache, 128, 128, tile)
    given = {"heads": 2 * ratio, "heads_kv": 2, "seqlen_q": seqlen_q, "causal": True}
    check(variant, draw(variant, (300, 0, 65, 3), cache=Cache(16), **given), ctas=5)


@pytest.mark.parametrize("page_size", [1, 3, 8, 16, 64, 128, 528])
def test_page_sizes_give_the_same_bits(page_size):
    """Sixteen sequences, each with other pages than before, as a dense cache."""
    variant = E8 if page_size % 8 == 0 else GATHER
    dense = draw(E8, (530, 90, 0, 17), seqlen_q=2, causal=True)
    columns = -(-dense.k.shape[1] // page_size)
    order = torch.randperm(4 * columns + 3, generator=torch.Generator().manual_seed(2))
    table = order[: 4 * columns].view(4, columns)

    def paged(x):
        pages = x.new_zeros(len(order), page_size, *x.shape[2:])
        padded = x.new_zeros(4, columns * page_size, *x.shape[2:])
        padded[:, : x.shape[1]] = x
        pages[table] = padded.view(4, columns, page_size, *x.shape[2:])
        return pages

    call = replace(dense, k=paged(dense.k), v=paged(dense.v), page_table=table.int())
    found = check(variant, call, ctas=5)
    (want,) = launch(E8, poisoned(dense), ctas=5)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


MASKS = {
    "causal": {"causal": True},
    "all": {},
    "window": {"window": (70, 0)},
    "wide window": {"window": (700, 3)},
    "right window": {"window": (-1, 1)},
    "chunk": {"attention_chunk": 100, "causal": True},
}


@pytest.mark.parametrize("variant", [E8, GATHER], ids=lambda v: v.load)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(variant, mask):
    """More queries than keys, too: some see none."""
    call = draw(variant, (500, 2, 0, 131), seqlen_q=4, heads=2, cache=pages_of(variant))
    check(variant, replace(call, **MASKS[mask]), ctas=5)


def test_sinks():
    sinks = torch.tensor([-1.0, 0.5, 9.0, -30.0])
    check(E8, draw(E8, LENGTHS, seqlen_q=2, causal=True, s_aux=sinks), ctas=7)


@pytest.mark.parametrize("dtype", by_default(["bf16", "fp16"], ["bf16"]))
def test_means(dtype):
    """K's comes back in LSE and beside a sink, V's in O as far as the keys weigh."""
    generator = torch.Generator().manual_seed(3)
    given = {f"{x}_mean": torch.randn(5, 2, 128, generator=generator) for x in "kv"}
    given["s_aux"] = torch.linspace(-2.0, 6.0, 4)
    variant = DecodeVariant(dtype, "e4m3", 128, 128, 8)
    call = draw(variant, (700, 0, 1, 2, 257), heads_kv=2, seqlen_q=3, causal=True, **given)
    check(variant, call, ctas=7)


@pytest.mark.parametrize("softcap, slopes", [(5.0, None), (0.0, (4,)), (4.0, (4, 4))])
def test_softcap_and_alibi(softcap, slopes):
    generator = torch.Generator().manual_seed(1)
    slopes = None if slopes is None else 0.1 * torch.rand(slopes, generator=generator)
    given = {"softcap": softcap, "alibi_slopes": slopes, "s_aux": torch.linspace(-1, 1, 4)}
    indices = {"leftpad_k": int32([7, 0, 0, 70])}
    call = draw(MODIFIED, (300, 1, 0, 131), seqlen_q=2, causal=True, indices=indices, **given)
    check(MODIFIED, call, ctas=5)


@pytest.mark.parametrize("variant", [E8, GATHER], ids=lambda v: v.load)
def test_left_padding(variant):
    """Also all of a sequence, and what a tile begins with."""
    indices = {"leftpad_k": int32([5, 0, 1, 63, 64, 64, 200])}
    call = draw(variant, LENGTHS, seqlen_q=2, window=(90, 0), cache=pages_of(variant))
    check(variant, replace(call, indices={**call.indices, **indices}), ctas=7)


def test_rows_of_the_cache():
    """In any order, twice, and none."""
    rows = {"kv_batch_idx": int32([3, 2, 6, -1, 4, 5, 6])}
    for cache in (Cache(), Cache(16)):
        call = draw(E8, (200, 0, 1, 63, 64, 65, 90), cache=replace(cache, room=257))
        check(E8, replace(call, indices={**call.indices, **rows}), ctas=7)


def test_packed_queries():
    lengths = (2, 1, 0, 3, 6, 0, 2)
    call = draw(E8, LENGTHS, seqlen_q=2, heads=2, causal=True, cache=Cache(16))
    q = call.q.reshape(14, 2, 128)
    indices = {**call.indices, "cu_seqlens_q": packed(lengths)}
    check(E8, replace(call, q=q, indices=indices, max_seqlen_q=6), ctas=7)


def test_more_rows_than_a_tile_has():
    call = draw(E8, (300, 5, 0, 65), heads=6, seqlen_q=3, causal=True, cache=Cache(16))
    check(E8, call, ctas=5)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_narrow_heads(head_dim):
    """The rest of a tile's channels are zeros."""
    for load in ("tma", "gather"):
        variant = DecodeVariant("bf16", "e4m3", head_dim, head_dim, 8, load=load)
        call = draw(variant, (200, 70), cache=Cache(16))
        width = head_dim - 16
        q, k, v = (x[..., :width].contiguous() for x in (call.q, call.k, call.v))
        check(variant, replace(call, q=q, k=k, v=v), ctas=3)


@pytest.mark.parametrize("size", [1e5, 1e-30])
def test_queries_that_fp16_has_no_room_for(size):
    """bf16 rows over e4m3 keys, beside one of an ordinary size."""
    call = draw(E8, (200, 70), seqlen_q=2, causal=True)
    q = call.q.clone()
    q[:, 0] *= size
    check(E8, replace(call, q=q), ctas=3)


@pytest.mark.parametrize("variant", [E8, MODIFIED], ids=["plain", "softcap"])
@pytest.mark.parametrize("scale, descale", [(2.0**-9, 2.0**-5), (2.0**-60, 2.0**-126)])
def test_scales_that_are_zero_in_fp32(scale, descale, variant):
    """A row of zeros, and descales as small as they may be: every score is 0, none NaN."""
    softcap = 20.0 if variant.score_mod else 0.0
    call = draw(variant, (200, 70), seqlen_q=2, causal=True, softmax_scale=scale, softcap=softcap)
    q = call.q.clone()
    q[:, 1] = 0.0
    check(variant, replace(call, q=q, k_descale=torch.tensor(descale)), ctas=3)


def test_a_scale_of_factors_far_apart():
    """softmax_scale * k_descale alone is 0 in fp32, and Q makes it an ordinary number."""
    call = draw(E8, (200, 70), seqlen_q=2, causal=True, softmax_scale=2.0**-18)
    check(E8, replace(call, q=call.q * 2.0**120, k_descale=torch.tensor(2.0**-110)), ctas=3)


def test_faint_keys_count():
    """Keys of weight 2^-26, less than fp16 has, beside one without a value."""
    call = draw(E8, (1000,), heads=1)
    k, v, q = torch.zeros_like(call.k.float()), call.v.float(), torch.zeros_like(call.q)
    k[..., 0], k[:, 100, :, 0], v[:, 100], q[..., 0] = -9.0, 0.0, 0.0, 1.0
    given = {"q": q, "k": k.to(call.k.dtype), "v": v.to(call.v.dtype), "softmax_scale": 1.0}
    check(E8, replace(call, **given, k_descale=torch.tensor(2.0)), ctas=5)


@pytest.mark.parametrize("variant", by_default(DEFAULT, [E8]))
@pytest.mark.parametrize("ctas", [1, 2, 3, 4, 11, 19])
def test_shares(variant, ctas):
    """Sequences end within shares, at their ends, and span three and more."""
    lengths = (64 * 40, 64 * 8, 0, 1, 64 * 13 + 5)
    check(variant, draw(variant, lengths, heads=2, cache=pages_of(variant)), ctas=ctas)


@pytest.mark.parametrize("seed", range(0, 24, 6))
def test_the_last_to_arrive_may_be_any(seed):
    """Nine CTAs of one sequence: the bits do not depend on who adds the parts."""
    check(E8, draw(E8, (64 * 80,), heads=1), ctas=9, seeds=range(seed, seed + 6))


def test_launches_one_after_the_other():
    """With the same workspace, and other lengths, as a graph is replayed."""
    calls = [
        poisoned(draw(E8, lengths, heads=2, cache=Cache(16, room=3000), seed=i))
        for i, lengths in enumerate([(3000, 64, 0), (0, 0, 0), (1, 2900, 77), (3000, 3000, 3000)])
    ]
    together = launch(E8, *calls, ctas=9)
    for call, found in zip(calls, together, strict=True):
        (alone,) = launch(E8, call, ctas=9, seed=3)
        assert all(torch.equal(x, y) for x, y in zip(found, alone, strict=True))


@pytest.mark.slow
def test_as_many_keys_as_contexts_have():
    check(E8, draw(E8, (131072,), heads=1, cache=Cache(16)), ctas=132, seeds=(0,))
