"""A model of what the order of packed sequences is worth: how long the slowest CTA takes.

Each tile of queries takes as long as its blocks of keys, and as one more for what a tile costs by
itself. A CTA on each multiprocessor takes the next tile whenever it is done with one, as the
forward kernel's do: list scheduling. The time of the last one is divided by the least there can be:
all work shared out equally, or the longest tile.

This is arithmetic and no measurement. It leaves out memory, what is in L2, and that finding a tile
takes time.

usage: python bench/tile_order.py    (writes bench/results/tile_order.*)
"""

import heapq
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from attention_cases import document_lengths

RESULTS = Path(__file__).resolve().parent / "results"
_MULTIPROCESSORS, _ROWS, _KEYS = 132, 128, 128
_SEEDS = range(20)


class Lengths(NamedTuple):
    """Of a sequence."""

    queries: int
    keys: int


@dataclass(frozen=True)
class Batch:
    """Packed sequences, as often as they were drawn."""

    name: str
    draws: tuple[tuple[Lengths, ...], ...]
    heads: int
    causal: bool


@dataclass(frozen=True)
class Row:
    """The mean and the worst time over the draws, of the least there can be, by order."""

    name: str
    heads: int
    causal: bool
    sequences: float
    mean: dict[str, float]
    worst: dict[str, float]


def longest_first(batch: Sequence[Lengths]) -> list[Lengths]:
    """As hopper/attention/sequence_order.cuh has it: by the power of two in the blocks of keys."""
    return sorted(batch, key=lambda lengths: -max(1, -(-lengths.keys // _KEYS)).bit_length())


def sorted_exactly(batch: Sequence[Lengths]) -> list[Lengths]:
    return sorted(batch, key=lambda lengths: -lengths.keys)


#: By name, as in `Row`.
ORDERS: dict[str, Callable[[Sequence[Lengths]], list[Lengths]]] = {
    "of the batch": list,
    "by class": longest_first,
    "sorted": sorted_exactly,
}


def tiles(batch: Iterable[Lengths], heads: int, causal: bool) -> list[int]:
    """Their times, in the order in which they are handed out: a sequence's last queries first."""
    found = []
    for queries, keys in batch:
        for m_block in reversed(range(-(-queries // _ROWS))):
            last = min(queries, (m_block + 1) * _ROWS)
            seen = max(0, keys - queries + last) if causal else keys
            found += [1 + -(-seen // _KEYS)] * heads
    return found


def slowest(times: Iterable[int], ctas: int = _MULTIPROCESSORS) -> int:
    """When the last CTA is done."""
    busy_until = [0] * ctas
    for time in times:
        heapq.heapreplace(busy_until, busy_until[0] + time)
    return max(busy_until)


def least(times: Sequence[int], ctas: int = _MULTIPROCESSORS) -> float:
    return max(sum(times) / ctas, *times)


def row(batch: Batch) -> Row:
    found: dict[str, list[float]] = {name: [] for name in ORDERS}
    for lengths in batch.draws:
        for name, order in ORDERS.items():
            times = tiles(order(lengths), batch.heads, batch.causal)
            found[name].append(slowest(times) / least(times))
    return Row(
        batch.name,
        batch.heads,
        batch.causal,
        mean(len(lengths) for lengths in batch.draws),
        {name: mean(values) for name, values in found.items()},
        {name: max(values) for name, values in found.items()},
    )


def batches() -> list[Batch]:
    """Documents of log-normal lengths, as the benchmark packs them, and chunks of prompts, of which
    the last one has the most keys before it."""
    chosen = []
    for tokens, heads in ((8192, 8), (16384, 8), (16384, 32), (65536, 8)):
        draws = tuple(
            tuple(Lengths(length, length) for length in document_lengths(tokens, seed=seed))
            for seed in _SEEDS
        )
        name = f"{tokens} tokens of documents"
        chosen += [Batch(name, draws, heads, causal) for causal in (True, False)]
    late = (*[Lengths(512, 4096)] * 15, Lengths(512, 65536))
    chosen += [Batch("chunks of 512, the last of 65536", (late,), h, True) for h in (8, 32)]
    return chosen


def table(rows: Sequence[Row]) -> str:
    names = " | ".join(f"{name}: mean, worst" for name in ORDERS)
    lines = [f"| batch, calculated | sequences | heads | mask | {names} |"]
    lines.append("|---" * (4 + len(ORDERS)) + "|")
    for row in rows:
        cells = [row.name, f"{row.sequences:.0f}", str(row.heads), "causal" if row.causal else ""]
        cells += [f"{row.mean[name]:.3f}, {row.worst[name]:.3f}" for name in ORDERS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = [row(batch) for batch in batches()]
    (RESULTS / "tile_order.json").write_text(json.dumps([asdict(x) for x in rows], indent=1) + "\n")
    (RESULTS / "tile_order.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
