"""What ptxas makes of the decode kernel: no spills, and how many instructions a byte costs."""

from dataclasses import replace

import pytest

from defaults import by_default
from flash8.backends.hopper.decode_variants import (
    QV_TILES,
    SHIPPED_DECODERS,
    TILES,
    DecodeVariant,
    tile_rows,
)
from flash8.compiler import compile_unit
from machine_code import missing_disassembler
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

#: Instructions for a byte of the cache: d128, absorbed MLA.
LIMITS = {
    DecodeVariant("bf16", "e4m3", 128, 128, 8): 0.045,
    DecodeVariant("bf16", "same", 128, 128, 8): 0.020,
    DecodeVariant("bf16", "e4m3", 128, 128, 8, append=True): 0.045,
    DecodeVariant("bf16", "same", 128, 128, 8, append=True): 0.020,
    DecodeVariant("bf16", "e4m3", 128, 128, 16): 0.062,
    DecodeVariant("bf16", "e4m3", 128, 128, 32): 0.13,
    DecodeVariant("bf16", "e4m3", 128, 128, 8, scales="key"): 0.048,
    DecodeVariant("bf16", "e4m3", 128, 128, 16, scales="key"): 0.062,
    DecodeVariant("bf16", "e4m3", 64, 512, 16, qv=True): 0.12,
    DecodeVariant("bf16", "same", 64, 512, 32, qv=True): 0.075,
}
WIDEST = tuple(
    DecodeVariant("bf16", cache, *tile, rows, load=load, score_mod=True, qv=tile in QV_TILES)
    for tile in (*TILES, *QV_TILES)
    for rows in tile_rows(tile[1])[-2:]
    for cache in ("same", "e4m3")
    for load in ("tma", "gather")
)
WIDEST += tuple(
    replace(v, scales="key") for v in WIDEST if v.cache == "e4m3" and v.head_dim_v <= 256
)


@pytest.mark.parametrize("variant", by_default([*SHIPPED_DECODERS, *WIDEST], LIMITS))
def test_nothing_spills(variant):
    report = compile_unit(variant.unit()).report
    assert report.problems() == []
    assert all(cost.spill_stores == cost.spill_loads == 0 for cost in report.kernels)


@pytest.mark.skipif(missing_disassembler() is not None, reason=str(missing_disassembler()))
@pytest.mark.parametrize("variant", LIMITS, ids=lambda v: v.name)
def test_instructions_for_a_byte(variant):
    import decode_code

    found = decode_code.loop(variant)
    assert found.per_byte <= LIMITS[variant], found
    # A way that left out a product or a load would be shorter than its products alone.
    assert found.instructions > 200


def test_the_append_is_there_three_times():
    """Each copy of the norm and the rotation costs half a second of compilation."""
    ptx = compile_unit(DecodeVariant("bf16", "e4m3", 128, 128, 8, append=True).unit()).ptx
    assert ptx.read_text().count("sqrt.rn.f32") == 3
