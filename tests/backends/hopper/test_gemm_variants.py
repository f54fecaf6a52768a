"""Which tile of the GEMM kernels a product gets."""

import pytest

from flash8.backends.hopper.gemm_variants import TILES, GemmVariant, choose_variant

MULTIPROCESSORS = 132


def tile(m, n, *, fast=False, scales="outer"):
    found = choose_variant(scales, fast, m, n, MULTIPROCESSORS)
    return found.block_m, found.block_n


@pytest.mark.parametrize(
    ("m", "n", "want"),
    [
        (256, 2048, (128, 128)),  # fewer tiles than multiprocessors
        (4096, 4096, (256, 128)),
        (2048, 1280, (128, 160)),  # 128 of its tiles: more columns would leave more of them idle
        (1536, 2112, (128, 192)),  # 132 of its tiles
        (65536, 3072, (128, 192)),
    ],
)
def test_tiles(m, n, want):
    assert tile(m, n) == tile(m, n, scales="block") == want


def test_waves_of_no_other_tile_are_shorter():
    for m in (65, 1000, 4096, 12345):
        for n in (128, 1000, 5120, 7168, 18432):
            for (scales, fast), tiles in TILES.items():
                found = tile(m, n, fast=fast, scales=scales)
                cycles = {
                    (t.block_m, t.block_n): t.cycles
                    * -(-(-(-m // t.block_m) * -(-n // t.block_n)) // MULTIPROCESSORS)
                    for t in tiles
                }
                assert cycles[found] == min(cycles.values())


@pytest.mark.parametrize("block_n", [96, 144, 224])
def test_no_other_tiles(block_n):
    with pytest.raises(ValueError, match=f"block_m and block_n are 128 and {block_n}; supported"):
        GemmVariant("block", 128, block_n)
