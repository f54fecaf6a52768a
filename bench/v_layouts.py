"""What transposing V costs inside the FP8 forward kernel, and what it saves to get V transposed.

Counted on the simulated device, per KV tile of one CTA: PTX instructions of a warp by warpgroup,
bytes that threads read and write in shared memory, bytes that TMA brings. Two lengths are run, and
their difference is what further tiles cost. Counts, not times; machine instructions of the
consumers are in machine_code.md.

The calls are those of the tests. Writes bench/results/v_layouts.*.

usage: PYTHONPATH=tests/support python bench/v_layouts.py
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import device, kernel, launch
from forward_launch import Schedule
from fp8_forward_cases import dense_call

RESULTS = Path(__file__).resolve().parent / "results"
VARIANTS = (
    ForwardVariant("e4m3", 128, 128, scales="head"),
    ForwardVariant("e4m3", 128, 128, scales="block"),
    ForwardVariant("e4m3", 256, 256, scales="head"),
)
TILES = (3, 7)


@dataclass(frozen=True)
class Counts:
    """Of one KV tile."""

    producer_instructions: float
    consumer_instructions: float  # of all warps of all consumer warpgroups
    shared_read: float  # bytes, by threads
    shared_written: float
    tma_bytes: float


def counted(variant: ForwardVariant, tiles: int) -> dict[str, Any]:
    """The simulator's counters of one CTA over so many whole KV tiles."""
    info = kernel(variant).info
    call = dense_call(variant, 1, info.block_m, tiles * info.block_n, 1, 1)
    launch(variant, call, Schedule(num_ctas=1))
    return dict(device().report()["statistics"])


def per_tile(variant: ForwardVariant) -> Counts:
    few, many = (counted(variant, tiles) for tiles in TILES)

    def difference(total: Any) -> float:
        return float(total(many) - total(few)) / (TILES[1] - TILES[0])

    def instructions(statistics: dict[str, Any], producer: bool) -> int:
        return sum(
            sum(counts.values())
            for role, counts in statistics["by_role"].items()
            if (role == "warpgroup 0") == producer
        )

    return Counts(
        difference(lambda s: instructions(s, True)),
        difference(lambda s: instructions(s, False)),
        difference(lambda s: s["bytes"].get("shared load", 0)),
        difference(lambda s: s["bytes"].get("shared store", 0)),
        difference(lambda s: s["bytes"]["tensor load"]),
    )


def table(rows: dict[str, Counts]) -> str:
    lines = [
        "| kernel | producer warpgroup | consumers | shared read | shared written | TMA |",
        "|---|---|---|---|---|---|",
    ]
    for name, counts in rows.items():
        cells = [name, *(f"{value:.0f}" for value in vars(counts).values())]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = {}
    for variant in VARIANTS:
        for transposed in (False, True):
            chosen = replace(variant, v_colmajor=transposed)
            rows[chosen.name] = per_tile(chosen)
    results = {name: vars(counts) for name, counts in rows.items()}
    (RESULTS / "v_layouts.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "v_layouts.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
