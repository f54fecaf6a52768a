"""Descales that keys have for themselves in the decode kernel: of tokens, blocks and pages."""

from dataclasses import replace

import pytest
import torch

from decode_cases import Cache, check, compare, draw, launch, poisoned
from defaults import by_default
from flash8.backends.hopper.decode_variants import TILES, DecodeVariant, tile_rows
from forward_cases import int32
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

K8 = DecodeVariant("bf16", "e4m3", 128, 128, 8, scales="key")
K32 = replace(K8, rows=32)
GATHER = replace(K8, load="gather")
MODIFIED = replace(K8, dtype="fp16", score_mod=True)
#: None, one key, and around a tile of 64; several CTAs of the first.
LENGTHS = (1100, 0, 1, 63, 64, 65, 257)
OTHERS = tuple(
    DecodeVariant("fp16", "e4m3", *tile, tile_rows(tile[1])[-1], load=load, scales="key")
    for tile in TILES
    for load in ("tma", "gather")
    if tile[1] <= 256
)
LAYOUTS = {
    "tokens of a dense cache": (Cache(), ("token", "token")),
    "blocks of a dense cache": (Cache(), ("block", "block")),
    "tokens of pages": (Cache(24), ("token", "token")),
    "pages": (Cache(24), ("page", "page")),
    "large pages": (Cache(136), ("page", "token")),
    "k alone": (Cache(16), ("token", "head")),
    "v alone": (Cache(16), ("head", "page")),
}


def pages_of(variant):
    return Cache(3 if variant.load == "gather" else 24)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    cache, scales = LAYOUTS[layout]
    call = draw(K8, LENGTHS, seqlen_q=2, heads_kv=2, causal=True, cache=cache, scales=scales)
    check(K8, call, ctas=7)


@pytest.mark.parametrize("variant", by_default([K8, GATHER, K32, MODIFIED, *OTHERS], [K8, GATHER]))
def test_variants(variant):
    """Ragged pages, windows, padding."""
    call = draw(
        variant,
        LENGTHS,
        seqlen_q=2,
        heads=16 if variant.rows == 32 else 4,
        window=(150, 0),
        cache=pages_of(variant),
        softcap=3.0 if variant.score_mod else 0.0,
        indices={"leftpad_k": int32([5, 0, 1, 63, 0, 64, 200])},
    )
    check(variant, call, ctas=7, seeds=(0, 1, 2))


def test_means_and_sinks():
    generator = torch.Generator().manual_seed(3)
    given = {f"{x}_mean": torch.randn(5, 2, 128, generator=generator) for x in "kv"}
    given["s_aux"] = torch.linspace(-2.0, 6.0, 4)
    check(K8, draw(K8, (700, 0, 1, 2, 257), heads_kv=2, causal=True, **given), ctas=7)


@pytest.mark.parametrize("variant", [K8, GATHER], ids=lambda v: v.load)
@pytest.mark.parametrize("ctas", [1, 3, 11])
def test_shares(variant, ctas):
    """A unit of V's descales in each warp of each CTA."""
    lengths = (64 * 40, 64 * 8, 0, 1, 64 * 13 + 5)
    check(variant, draw(variant, lengths, heads=2, cache=pages_of(variant)), ctas=ctas)


@pytest.mark.parametrize("size", [2.0**-100, 2.0**-20, 2.0**20, 2.0**60])
def test_values_of_any_size(size):
    """P of fp16 is in units that V's descales choose."""
    call = draw(K8, (1100, 70), heads=2)
    assert call.v_descale is not None
    grows = torch.linspace(-10.0, 10.0, call.v.shape[1]).exp2()[None, :, None]
    # O of a size that bf16 does not round as a subnormal.
    check(K8, replace(call, v_descale=size * grows * call.v_descale), ctas=3)


@pytest.mark.parametrize("name", ["k_descale", "v_descale"])
@pytest.mark.parametrize("descale", [0.0, -1.0, float("inf"), float("nan"), 2.0**127])
def test_an_invalid_descale_shows(name, descale):
    """In the sequence that sees it, and in no other."""
    call = draw(K8, (150, 64, 0, 77), seqlen_q=2, heads=2, causal=True, cache=Cache(16, room=160))
    given = getattr(call, name).clone()
    page = int(call.page_table[0, 3])
    given[page, 5] = descale
    ((o, _),) = launch(K8, replace(call, **{name: given}))
    assert o[0].isnan().all()
    ((want, _),) = launch(K8, call)
    assert torch.equal(o[1:], want[1:])


@pytest.mark.parametrize("variant", [K8, GATHER], ids=lambda v: v.load)
def test_pages_that_do_not_exist(variant):
    call = draw(variant, (150, 64, 0, 77), seqlen_q=2, heads=2, cache=pages_of(variant))
    table = call.page_table.clone()
    table[0, 0] = table[1, 1] = -5
    table[3, -1] = 2**31 - 1
    hostile = replace(call, page_table=table)
    compare(hostile, *launch(variant, poisoned(hostile))[0])
