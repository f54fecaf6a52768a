"""The bytes of the backward's table are those that the simulated device counts."""

from collections import Counter

import pytest

import machine_code_backward as bench
from backward_cases import device, draw, kernels, saved
from backward_fp8_cases import draw as draw_fp8
from defaults import by_default
from flash8.backends.hopper.backward_variants import BackwardVariant
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

VARIANTS = [
    BackwardVariant("bf16", 128, 128, mask="causal"),
    BackwardVariant("bf16", 192, 128, mask="causal"),
    BackwardVariant("bf16", 128, 128, mask="causal", fp8=True),
    BackwardVariant("bf16", 64, 64, mask="causal"),
    BackwardVariant("bf16", 96, 96, mask="causal"),
    BackwardVariant("bf16", 256, 256, mask="causal"),
    BackwardVariant("fp16", 128, 128, mask="causal", dq="reduced"),
    BackwardVariant("bf16", 192, 128, mask="causal", fp8=True),
    BackwardVariant("bf16", 192, 192, mask="causal", deterministic=True, fp8=True),
]


def counted(variant: BackwardVariant, heads: int) -> Counter[str]:
    """Of so many query heads of a KV head, each with a square of scores: one block of keys."""
    rows = bench.Tile(variant).keys
    make = draw_fp8 if variant.fp8 else draw
    given = saved(make(variant, rows, rows, heads, 1, batch=1, window=(-1, -1)))
    device().configure(seed=0, watch="flash8_backward")
    try:
        kernels(variant)(given.call, given.o, given.lse, given.dout)
        found = device().report()["statistics"]
    finally:
        device().configure(watch="")
    lines = found["shared"]["by_line"]
    pairs = sum(x["executed"] for x in lines if x["opcode"].startswith("ld.shared.v2"))
    sums = {name: found["shared"][name] for name in ("wgmma_a_bytes", "wgmma_b_bytes")}
    return Counter(found["bytes"]) + Counter(sums) + Counter(pairs=pairs)


@pytest.mark.parametrize("variant", by_default(VARIANTS, (VARIANTS[0], VARIANTS[2])))
def test_bytes_of_a_tile(variant):
    """Two more heads bring nothing but their tiles."""
    tile, moved = bench.Tile(variant), bench.traffic(variant)
    tiles = 2 * (tile.keys // tile.queries)
    more = counted(variant, 3)
    more.subtract(counted(variant, 1))
    assert more["tensor load"] + more["bulk load"] == tiles * moved.loads
    assert more["wgmma_a_bytes"] + more["wgmma_b_bytes"] == tiles * moved.operands
    staged = tiles * moved.dq // 2
    assert more["shared store"] == tiles * moved.stores + staged
    assert more["bulk reduce"] == staged
    assert more["pairs"] == tiles * bench.statistics_accesses(variant)
