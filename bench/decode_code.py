"""What the compiler makes of the decode kernel's loop: instructions for a byte of the cache.

`python bench/decode_code.py` prints the table of docs/decode.md. The count is that of the shortest
way round the loop over tiles that passes every matrix product and every TMA load in it: a tile that
needs no mask, and moves no row's maximum. Static counts of the disassembly, no measurement.
"""

import itertools
import re
from collections import deque
from dataclasses import dataclass

from flash8.backends.hopper.decode_variants import SHIPPED_DECODERS, DecodeVariant
from flash8.compiler import compile_unit
from machine_code import MachineCode

_TARGET = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
_PREDICATED = re.compile(r"^@|\bBRA(\.\w+)*\s+!?U?P\d")
_ENDS = re.compile(r"^(EXIT|RET|BRX)")


@dataclass(frozen=True)
class Loop:
    """The loop over tiles of one variant."""

    name: str
    registers: int
    spill_bytes: int
    instructions: int
    tile_bytes: int  # of K and V, for as many instructions: a tile, or one warp's share of a team's

    @property
    def per_byte(self) -> float:
        return self.instructions / self.tile_bytes


def loop(variant: DecodeVariant) -> Loop:
    compiled = compile_unit(variant.unit())
    costs = compiled.report.kernels
    return Loop(
        variant.name,
        max(c.registers for c in costs),
        sum(c.spill_stores + c.spill_loads for c in costs),
        way_round(MachineCode.of(compiled.cubin).lines),
        round(block_n(variant) * _warp_channels(variant) * _element_bytes(variant)),
    )


def block_n(variant: DecodeVariant) -> int:
    """Keys of a tile, as hopper/decode/config.cuh has it."""
    widest = max(variant.head_dim_v, 0 if variant.qv else variant.head_dim)
    row = widest // _team_warps(variant) * _element_bytes(variant)
    if row > 256:
        return 16
    return 32 if row > 128 or variant.rows == 32 else 64


def _warp_channels(variant: DecodeVariant) -> float:
    """Of K and V, that the loop of a warp reads. The warps of a team share them out; with qv two
    have half of K each, and all are counted as if they did the work of these."""
    return (variant.head_dim + variant.head_dim_v) / _team_warps(variant)


def _team_warps(variant: DecodeVariant) -> int:
    return 4 if variant.head_dim_v > 256 else 1


def _element_bytes(variant: DecodeVariant) -> int:
    return 1 if variant.cache == "e4m3" else 2


def way_round(lines: tuple[tuple[int, str], ...]) -> int:
    """The instructions on the shortest way through all products and loads of the loop, and back."""
    after = _successors(lines)
    products = [i for i, (_, text) in enumerate(lines) if "HMMA" in text]
    reached = _distances(after, products[0])
    # And those of the softmax, which of a team not every warp has.
    loads = [i for i, (_, text) in enumerate(lines) if "UTMALDG" in text or "MOVM" in text]
    stops = {*products[1:], *(i for i in loads if i in reached)}
    # A way past the softmax may be shorter than one into it; the compiler lays it out in order.
    orders = sorted(stops, key=reached.__getitem__), sorted(stops)
    return min(_way(after, [products[0], *order, products[0]]) for order in orders)


def _way(after: list[list[int]], stops: list[int]) -> int:
    return sum(_distances(after, i)[j] for i, j in itertools.pairwise(stops))


def _successors(lines: tuple[tuple[int, str], ...]) -> list[list[int]]:
    at = {address: i for i, (address, _) in enumerate(lines)}
    after = []
    for i, (_, text) in enumerate(lines):
        target = _TARGET.search(text)
        always = not _PREDICATED.search(text) and "BRA.DIV" not in text
        following = [] if always and (target or _ENDS.search(text)) else [i + 1]
        following += [at[int(target[1], 16)]] if target else []
        after.append([j for j in following if j < len(lines)])
    return after


def _distances(after: list[list[int]], start: int) -> dict[int, int]:
    """Instructions from `start` to every other that it reaches, itself for a way round."""
    found: dict[int, int] = {}
    waiting = deque([(start, 0)])
    while waiting:
        here, distance = waiting.popleft()
        for i in after[here]:
            if i not in found:
                found[i] = distance + 1
                waiting.append((i, distance + 1))
    return found


def table(loops: list[Loop]) -> str:
    rows = [
        f"| {x.name} | {x.registers} | {x.spill_bytes} | {x.instructions} | {x.tile_bytes} "
        f"| {x.per_byte:.4f} |"
        for x in loops
    ]
    head = "| kernel | registers | spills | instructions | bytes of a tile | per byte |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


if __name__ == "__main__":
    # What is gathered goes through loops of its own, which a way round counts once.
    print(table([loop(variant) for variant in SHIPPED_DECODERS if variant.load == "tma"]))
