"""What ptxas made of the shipped backward kernels, and what a tile moves through shared memory.

For every row of `flash8.backends.hopper.backward_variants.SHIPPED_BACKWARDS`: registers, spills,
and of the consumer's mainloop the machine instructions of an unmasked and of the longest masked
pass over a tile, with its matrix products (wgmma instructions of a warpgroup). Beside them the KiB
that a tile moves through shared memory, for the whole CTA:

    loads     Q, dO and the rows' statistics, as TMA writes them
    operands  of all products that are not in registers, each once a wgmma: 64 rows of one and n of
              the other; the two warpgroups read on their own
    P, dS     as they are stored
    dQ        as it is staged, and read again by the bulk reduction

`tests/bench/test_machine_code_backward.py` finds these bytes in the simulated device's counters.
What is not in them: each warp's reads of LSE and D, few bytes of which one access brings little;
they are counted in accesses of 128 bytes, one for every two rows that a lane takes.

Cycles are arithmetic, not a measurement: 2048 16-bit multiply-adds (4096 of e4m3), 4 warp
instructions and 128 bytes of shared memory, or one access, a cycle and SM.

usage: python bench/machine_code_backward.py    (writes bench/results/machine_code_backward.*)
"""

import json
from dataclasses import asdict, dataclass

from flash8.backends.hopper.backward_variants import SHIPPED_BACKWARDS, BackwardVariant
from flash8.compiler import compile_unit
from machine_code import ROOT, MachineCode

_WARPGROUPS = 2
_WIDE = 2  # bytes of an element; an FP8 forward's own operands have one


@dataclass(frozen=True)
class Tile:
    """As hopper/backward/tile_size.cuh and config.cuh choose it."""

    variant: BackwardVariant

    @property
    def splits_channels(self) -> bool:
        return self._widest > 128

    @property
    def queries(self) -> int:
        return 128 if self._widest <= 64 else 64

    @property
    def keys(self) -> int:
        return 64 if self.splits_channels else 128

    @property
    def dq_slices(self) -> int:
        narrow = 128 if self.variant.fp8 else 192
        width = self.variant.head_dim_v if self.variant.fp8 else self._widest
        return 2 if width > narrow or self._widest > 192 else 1

    @property
    def _widest(self) -> int:
        return max(self.variant.head_dim, self.variant.head_dim_v)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a tile moves through shared memory."""

    loads: int
    operands: int
    stores: int  # of P and dS
    dq: int

    @property
    def total(self) -> int:
        return self.loads + self.operands + self.stores + self.dq


def traffic(variant: BackwardVariant) -> Traffic:
    tile, wide = Tile(variant), _WIDE
    m, n, d, dv = tile.queries, tile.keys, variant.head_dim, variant.head_dim_v
    stored = 1 if variant.fp8 else wide
    statistics = 4 * (2 * m + (4 if variant.fp8 else 0))
    loads = m * (wide * (d + dv) + (d if variant.fp8 else 0)) + statistics
    reads = _split_operands if tile.splits_channels else _operands
    stores = wide * m * n * (2 if tile.splits_channels else 1)
    dq = 2 * 4 * m * d if variant.dq == "staged" else 0
    return Traffic(loads, _WARPGROUPS * reads(tile, stored, d, dv), stores, dq)


def _operands(tile: Tile, stored: int, d: int, dv: int) -> int:
    """Of a warpgroup with 64 of the keys. P^T and dS^T are in registers."""
    m, n, wide = tile.queries, tile.keys, _WIDE
    parts = m // 64  # of dP, each with V of its own
    s = (64 + m) * d * stored
    dp = (64 * parts + m) * dv * wide
    dv_dk = m * (dv + d) * wide
    columns = d if m == 128 else d // _WARPGROUPS
    dq = (64 + columns) * n * wide
    return s + dp + dv_dk + dq


def _split_operands(tile: Tile, stored: int, d: int, dv: int) -> int:
    """Of a warpgroup with half the queries of S and dP, and half the channels of the others."""
    m, n, wide = tile.queries, tile.keys, _WIDE
    s_dp = (n + m // 2) * (d * stored + dv * wide)
    dv_dk = (2 * n + (dv + d) // 2) * m * wide
    dq = (m * tile.dq_slices + d // 2) * n * wide
    return s_dp + dv_dk + dq


def statistics_accesses(variant: BackwardVariant) -> int:
    """A warp reads LSE and D of all its queries, eight at a time."""
    tile = Tile(variant)
    queries = tile.queries // (2 if tile.splits_channels else 1)
    return 2 * queries // 8 * _WARPGROUPS * 4


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    tile: str  # queries x keys
    registers: int
    spill_bytes: int
    unmasked: int
    masked: int
    products: int
    bytes: dict[str, int]
    tensor_cycles: int
    shared_cycles: int
    issue_cycles: int


def row(variant: BackwardVariant) -> Row:
    compiled = compile_unit(variant.unit())
    (cost,) = compiled.report.kernels
    unmasked, *others = MachineCode.of(compiled.cubin).mainloops
    tile, moved = Tile(variant), traffic(variant)
    heads = 2 * (variant.head_dim + variant.head_dim_v)  # of dP, dV, dK and dQ
    scores = variant.head_dim if not variant.fp8 else variant.head_dim // 2
    return Row(
        variant.name,
        f"{tile.queries} x {tile.keys}",
        cost.registers,
        cost.spill_stores + cost.spill_loads,
        unmasked.instructions,
        max(loop.instructions for loop in others),
        unmasked.products,
        asdict(moved),
        tile.queries * tile.keys * (heads + scores) // 2048,
        moved.total // 128 + statistics_accesses(variant),
        unmasked.instructions * _WARPGROUPS * 4 // 4,
    )


def table(rows: list[Row]) -> str:
    lines = [
        "| kernel | tile | registers | spills | unmasked | masked | wgmma | loads | operands "
        "| P, dS | dQ | KiB | tensor | shared | issue |",
        "|---" * 15 + "|",
    ]
    for r in rows:
        moved = [r.bytes[name] / 1024 for name in ("loads", "operands", "stores", "dq")]
        counts = (r.registers, r.spill_bytes, r.unmasked, r.masked, r.products)
        kib = [f"{x:.1f}" for x in (*moved, sum(moved))]
        cells = (r.name, r.tile, *counts, *kib, r.tensor_cycles, r.shared_cycles, r.issue_cycles)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = [row(variant) for variant in SHIPPED_BACKWARDS]
    results = ROOT / "bench" / "results" / "machine_code_backward.json"
    results.write_text(json.dumps([asdict(r) for r in rows], indent=2) + "\n")
    results.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
