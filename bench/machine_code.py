"""What ptxas made of the shipped kernels: a table of machine instructions per KV tile.

For every row of `flash8.backends.hopper.variants.SHIPPED`: registers, spills, shared memory, and of
the consumer's mainloop the machine instructions of one unmasked and one masked pass over a KV tile,
found as the smallest loops of the disassembly that contain the tile's matrix products. Beside them
the same figures of FlashAttention-3's kernels, compiled with the same compiler, and what share of a
tile's exponentials runs where the design wants it: while the warpgroup does not hold the turn to
issue, and under its own product P V (machine_order.py).

Cycles are arithmetic on those counts, not a measurement: for one KV tile and all consumer
warpgroups, 2048 16-bit multiply-adds, 16 exponentials, 4 warp instructions issued, as many fp32
ones of the FMA pipe, and 128 bytes of shared memory a cycle and SM.

usage: python bench/machine_code.py    (writes bench/results/machine_code.*)
"""

import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import machine_order
from flash8.backends.hopper.variants import SHIPPED, ForwardVariant
from flash8.compiler import Compiled, compile_unit

ROOT = Path(__file__).resolve().parent.parent
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);")
_BRANCH = re.compile(r"BRA(?:\.\w+)*\s+(?:\w+,\s*)?0x([0-9a-f]+)")
_CLASSES = ("FFMA", "FMUL", "FADD", "FMNMX", "MUFU", "F2FP", "FSEL", "ISETP")

_EXPONENTIALS, _ISSUES, _SHARED_BYTES = 16, 4, 128  # a cycle and SM
_MULTIPLY_ADDS = {"fp16": 2048, "bf16": 2048, "e4m3": 4096}
#: kBlockM x kBlockN by head_dim and head_dim_v, as hopper/forward/config.cuh chooses them.
TILES = {
    (64, 64): (192, 128),
    (96, 96): (128, 128),
    (128, 128): (128, 176),
    (192, 128): (128, 128),
    (192, 192): (128, 96),
    (256, 256): (128, 80),
}
#: With a mask, or with pages, that makes the difference.
MASKED_TILES = {
    (128, 128, "causal"): (128, 128),
    (128, 128, "local"): (128, 128),
    (256, 256, "local"): (128, 64),
}
#: The same for an e4m3 cache under a 16-bit q.
TILES_WIDENED = {
    (64, 64): (192, 96),
    (96, 96): (128, 128),
    (128, 128): (128, 128),
    (192, 128): (128, 96),
    (192, 192): (128, 64),
    (256, 256): (128, 64),
}
#: The same for e4m3, with one descale per head; with one per block, or where P V overlaps the
#: softmax (`overlaps_pv`), kBlockN is 128.
TILES_FP8 = {
    (64, 64): (192, 128),
    (96, 96): (128, 192),
    (128, 128): (128, 224),
    (192, 128): (128, 224),
    (192, 192): (128, 128),
    (256, 256): (128, 128),
}

#: FlashAttention-3's kernels, nvcc 13.0.88: (unmasked, masked) instructions per KV tile, kBlockN.
FLASH_ATTENTION_3 = {
    (128, 128, "causal"): (469, 616, 128),
    (128, 128, "none"): (594, None, 176),
    (64, 64, "none"): (632, None, 192),
    (192, 128, "causal"): (483, 631, 128),
    (256, 256, "causal"): (455, 551, 80),
}
#: With one descale per head, without promotion.
FLASH_ATTENTION_3_FP8 = {(128, 128, "causal"): (675, 920, 224)}


@dataclass(frozen=True)
class Loop:
    """A loop of the disassembly."""

    lines: tuple[tuple[int, str], ...]
    products: int
    classes: dict[str, int]

    @property
    def instructions(self) -> int:
        return len(self.lines)


def _search_path() -> str:
    """Where cuobjdump may be, and where it looks for nvdisasm: pip's, the system's, PATH."""
    tools = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"
    return os.pathsep.join((str(tools), "/usr/local/cuda/bin", os.environ.get("PATH", "")))


def missing_disassembler() -> str | None:
    """Why cubins cannot be disassembled on this machine, or None."""
    found = shutil.which("cuobjdump", path=_search_path())
    return None if found else "cuobjdump is not installed (compiler.txt)"


@cache
def disassembly(cubin: Path) -> str:
    """What cuobjdump prints: two lines for an instruction, with its encoding."""
    environment = {**os.environ, "PATH": _search_path()}
    command = ["cuobjdump", "-sass", str(cubin)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return run.stdout


@dataclass(frozen=True)
class MachineCode:
    """The disassembly of one cubin."""

    lines: tuple[tuple[int, str], ...]

    @staticmethod
    @cache
    def of(cubin: Path) -> "MachineCode":
        found = (_INSTRUCTION.match(line) for line in disassembly(cubin).splitlines())
        return MachineCode(tuple((int(m[1], 16), m[2]) for m in found if m))

    @property
    def local_accesses(self) -> int:
        return self._count(r"\b(LDL|STL)\b")

    @property
    def products(self) -> set[str]:
        """The kinds of matrix products: HGMMA is 16-bit, QGMMA 8-bit."""
        return {_mnemonic(text) for _, text in self.lines if "GMMA" in text}

    @property
    def group_closings(self) -> int:
        """Products that close a group; each needs one WARPGROUP.ARRIVE and one wait."""
        return self._count(r"GMMA.*gsb0")

    @property
    def arrivals(self) -> int:
        return self._count(r"WARPGROUP\.ARRIVE")

    @property
    def waits(self) -> int:
        return self._count(r"WARPGROUP\.DEPBAR")

    @cached_property
    def mainloops(self) -> list[Loop]:
        """The loops over KV tiles, the smallest first: unmasked, masked, and of windows another
        masked one. A 16-bit kernel without a mask has the first alone."""
        loops = sorted(self._loops(), key=lambda loop: loop.instructions)
        return [loop for loop in loops if loop.products == loops[0].products]

    def _loops(self) -> Iterator[Loop]:
        index = {address: i for i, (address, _) in enumerate(self.lines)}
        for i, (address, text) in enumerate(self.lines):
            # The way back into a loop from a wait that had to be repeated has no condition.
            target = _BRANCH.search(text) if text.startswith("@") else None
            begin = int(target[1], 16) if target else address
            if begin >= address or begin not in index:
                continue
            body = self.lines[index[begin] : i + 1]
            products = sum("GMMA" in line for _, line in body)
            if products:
                mnemonics = Counter(_mnemonic(line) for _, line in body)
                yield Loop(body, products, {c: mnemonics[c] for c in _CLASSES})

    def _count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, text)) for _, text in self.lines)


def _mnemonic(line: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    tile: str  # kBlockM x kBlockN
    registers: int
    spill_bytes: int
    tensor_cycles: int
    exponential_cycles: int
    fma_cycles: int
    shared_cycles: int
    issue_cycles: int
    unmasked: int
    masked: int | None  # None: only the last block may need the mask, and it is peeled
    peer_unmasked: int | None
    peer_masked: int | None
    peer_block_n: int | None
    without_turn: float | None  # the smallest share of the loops' exponentials; None: no turns
    under_product: float | None  # None: nothing overlaps within a warpgroup
    classes: dict[str, int]


def tile(variant: ForwardVariant) -> tuple[int, int]:
    """(kBlockM, kBlockN) of a variant."""
    heads = (variant.head_dim, variant.head_dim_v)
    if variant.cache == "e4m3":
        return TILES_WIDENED[heads]
    if variant.dtype != "e4m3":
        return MASKED_TILES.get((*heads, variant.mask), TILES[heads])
    block_m, block_n = TILES_FP8[heads]
    return block_m, 128 if variant.scales == "block" or overlaps_pv(variant) else block_n


def overlaps_pv(variant: ForwardVariant) -> bool:
    """Whether a softmax overlaps the product P V of the same warpgroup, as config.cuh decides."""
    if variant.dtype != "e4m3":
        return True
    other = variant.mask == "local" or variant.softcap or variant.alibi or variant.dropout
    if variant.scales == "block":
        other = other or variant.mask == "none" or variant.v_colmajor
    return not other and 64 < variant.head_dim <= 192 and variant.head_dim_v <= 128


def row(variant: ForwardVariant) -> Row:
    compiled = compile_unit(variant.unit())
    code = MachineCode.of(compiled.cubin)
    unmasked, *others = code.mainloops
    key = (variant.head_dim, variant.head_dim_v, variant.mask)
    peers = FLASH_ATTENTION_3_FP8 if variant.scales == "head" else FLASH_ATTENTION_3
    other = variant.softcap or variant.alibi or variant.scales == "block"
    # The peer's pages come by TMA, and it has no e4m3 cache under a 16-bit q.
    comparable = not (other or variant.gather or variant.cache == "e4m3")
    peer = peers.get(key, (None,) * 3) if comparable else (None, None, None)
    registers, spills = _cost(compiled)
    block_m, block_n = tile(variant)
    warpgroups = block_m // 64
    scores = block_m * block_n
    exponentials = scores * (2 if variant.softcap else 1)  # tanh takes the same unit
    return Row(
        variant.name,
        f"{block_m} x {block_n}",
        registers,
        spills,
        scores * (variant.head_dim + variant.head_dim_v) // _MULTIPLY_ADDS[variant.dtype],
        exponentials // _EXPONENTIALS,
        sum(unmasked.classes[c] for c in ("FFMA", "FMUL", "FADD")) * warpgroups * 4 // _ISSUES,
        _shared_bytes(variant) // _SHARED_BYTES,
        unmasked.instructions * warpgroups * 4 // _ISSUES,
        unmasked.instructions,
        others[0].instructions if others else None,
        *peer,
        *_overlap(code, variant),
        unmasked.classes,
    )


def _overlap(code: MachineCode, variant: ForwardVariant) -> tuple[float | None, float | None]:
    found = [machine_order.overlap(loop.lines) for loop in code.mainloops]
    turns = [x.without_turn for x in found if x.without_turn is not None]
    products = [x.under_product for x in found if x.under_product is not None]
    return (
        min(turns) if turns else None,
        min(products) if products and overlaps_pv(variant) else None,
    )


def _shared_bytes(variant: ForwardVariant) -> int:
    """Shared memory that one KV tile moves: TMA writes it, and every warpgroup reads it all, and
    its 64 rows of Q once more. FP8's V is read and written in between where the kernel transposes
    it; where it comes so, TMA brings it in panels of 128 keys. An e4m3 cache under a 16-bit q is
    written as it comes, read, and written twice as large."""
    block_m, block_n = tile(variant)
    fp8 = variant.dtype == "e4m3"
    k, v = block_n * variant.head_dim, block_n * variant.head_dim_v
    brought = k + (-(-block_n // 128) * 128 * variant.head_dim_v if variant.v_colmajor else v)
    turned = 2 * v if fp8 and not variant.v_colmajor else 0
    elements = brought + turned + block_m // 64 * (64 * variant.head_dim + k + v)
    widened = 2 * (k + v) if variant.cache == "e4m3" else 0
    return elements * (1 if fp8 else 2) + widened


def _cost(compiled: Compiled) -> tuple[int, int]:
    costs = compiled.report.kernels
    return max(c.registers for c in costs), sum(c.spill_stores + c.spill_loads for c in costs)


def table(rows: list[Row]) -> str:
    lines = [
        "| kernel | tile | registers | spills | unmasked | masked | FA3 (its kBlockN) "
        "| turn | P V | tensor | exp | FMA | shared | issue |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        peer = "" if r.peer_unmasked is None else f"{r.peer_unmasked} / {r.peer_masked or ''}"
        peer += "" if r.peer_block_n is None else f" ({r.peer_block_n})"
        shares = ["" if x is None else f"{x:.0%}" for x in (r.without_turn, r.under_product)]
        masked = "" if r.masked is None else r.masked
        counts = (r.registers, r.spill_bytes, r.unmasked, masked, peer, *shares)
        cycles = (r.tensor_cycles, r.exponential_cycles, r.fma_cycles, r.shared_cycles)
        cells = (r.name, r.tile, *counts, *cycles, r.issue_cycles)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = []
    for number, variant in enumerate(SHIPPED, 1):
        print(f"[{number}/{len(SHIPPED)}] {variant.name}", flush=True)
        rows.append(row(variant))
    results = ROOT / "bench" / "results" / "machine_code.json"
    results.write_text(json.dumps([asdict(r) for r in rows], indent=2) + "\n")
    (ROOT / "bench" / "results" / "machine_code.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
