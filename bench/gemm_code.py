"""What the compiler makes of the GEMM kernel's loop over blocks of 128 of K.

`python bench/gemm_code.py` prints the table of docs/gemm.md. The loop is the one with the matrix
products that adds up blocks: the shortest range of the disassembly that ends in a branch back and
has one block's products, or two blocks' where the loop takes them in pairs: counts are of one.
Static counts, no measurement.
"""

import re
from dataclasses import dataclass

from flash8.backends.hopper.gemm_variants import (
    CLUSTERED_GEMMS,
    SHIPPED_GEMMS,
    SHIPPED_GROUPED_GEMMS,
    GemmVariant,
)
from flash8.backends.hopper.qkv_variants import SHIPPED_QKV_PROJECTIONS, QkvVariant
from flash8.compiler import compile_unit
from machine_code import MachineCode

_BACK = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
_BLOCKS_SMALL_M = 2  # of an iteration
_PROMOTES = re.compile(r"\bF(FMA|ADD)\b")


@dataclass(frozen=True)
class Loop:
    """The loop over blocks of K of one variant, for a warp."""

    name: str
    registers: int
    spill_bytes: int
    promotions: int  # FFMA or FADD
    others: int

    @property
    def instructions(self) -> int:
        return self.promotions + self.others


def loop(variant: GemmVariant | QkvVariant) -> Loop:
    compiled = compile_unit(variant.unit())
    costs = compiled.report.kernels
    body = shortest_loop(MachineCode.of(compiled.cubin).lines)
    promotions = sum(_PROMOTES.search(text) is not None for text in body)
    is_small = isinstance(variant, GemmVariant) and variant.small_m
    blocks = _BLOCKS_SMALL_M if is_small else 1
    return Loop(
        variant.name,
        max(c.registers for c in costs),
        sum(c.spill_stores + c.spill_loads for c in costs),
        promotions // blocks,
        -(-(len(body) - promotions) // blocks),
    )


def shortest_loop(lines: tuple[tuple[int, str], ...]) -> list[str]:
    """The instructions of the shortest loop with matrix products."""
    at = {address: i for i, (address, _) in enumerate(lines)}
    found = []
    for i, (_, text) in enumerate(lines):
        target = _BACK.search(text)
        first = at.get(int(target[1], 16), i + 1) if target else i + 1
        body = [text for _, text in lines[first : i + 1]]
        if any("QGMMA" in text for text in body):
            found.append(body)
    return min(found, key=len)


def table(loops: list[Loop]) -> str:
    rows = [
        f"| {x.name} | {x.registers} | {x.spill_bytes} | {x.promotions} | {x.others} |"
        for x in loops
    ]
    head = "| kernel | registers at launch | spills | FFMA or FADD | other instructions |"
    return "\n".join([head, "|---|---|---|---|---|", *rows])


if __name__ == "__main__":
    products = (*SHIPPED_GEMMS, *SHIPPED_GROUPED_GEMMS, *CLUSTERED_GEMMS)
    print(table([loop(variant) for variant in (*products, *SHIPPED_QKV_PROJECTIONS)]))
