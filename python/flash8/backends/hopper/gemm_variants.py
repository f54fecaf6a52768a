"""Variants of cutlass_kernels/gemm/kernel.cu: what is chosen when it compiles, and its tiles.

Sizes, strides, bias, the output's type and whether a scale is a tensor's or a row's are parameters.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, get_args

from flash8.compiler import Unit, cutlass_root, enumerator

Scales = Literal["outer", "block"]


@dataclass(frozen=True)
class GemmVariant:
    """One compilation of cutlass_kernels/gemm/kernel.cu.

    Attributes:
        scales: "outer": of tensors or rows, applied to the sum; "block": of 128 of K.
        block_m, block_n: The tile of the output that a CTA computes at a time.
        fast_accum: The tensor core adds up all of K, in 14 bits; otherwise every 128 of K are added
            to a sum in fp32.

    Raises:
        ValueError: A choice is unknown, or no tile of its kind.
    """

    scales: Scales
    block_m: int
    block_n: int
    fast_accum: bool = False

    def __post_init__(self) -> None:
        if self.scales not in get_args(Scales):
            raise ValueError(f"scales is {self.scales!r}; supported are {get_args(Scales)}")
        if self.scales == "block" and self.fast_accum:
            raise ValueError("fast_accum is True; scales of blocks need sums in fp32")
        tiles = [tile[:2] for tile in TILES[self.scales, self.fast_accum]]
        if (self.block_m, self.block_n) not in tiles:
            raise ValueError(
                f"block_m and block_n are {self.block_m} and {self.block_n}; supported are {tiles}"
            )

    @cached_property
    def name(self) -> str:
        """A name that no other variant has: gemm_block_128x128, gemm_outer_fast_128x256."""
        fast = "_fast" if self.fast_accum else ""
        return f"gemm_{self.scales}{fast}_{self.block_m}x{self.block_n}"

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        """The -D options; a choice of words is handed over as the name of an enumerator."""
        return (
            ("FLASH8_SCALES", enumerator(self.scales)),
            ("FLASH8_FAST_ACCUM", str(int(self.fast_accum))),
            ("FLASH8_BLOCK_M", str(self.block_m)),
            ("FLASH8_BLOCK_N", str(self.block_n)),
        )

    def unit(self) -> Unit:
        """What the compiler is asked for."""
        return Unit(cutlass_root() / "gemm" / "kernel.cu", self.defines, self.name)


class Tile(NamedTuple):
    """A tile, and the cycles that 128 of K of it take: the larger of its products on the tensor
    core and of what they and TMA move through shared memory. Calculated, not measured."""

    block_m: int
    block_n: int
    cycles: int


_SMALL = Tile(128, 128, 640)  # small outputs: the most tiles to share out. 80% of the peak
#: Reads least of shared memory for its products that a promoted sum leaves registers for: 89%.
_TALL = Tile(256, 128, 1152)
#: Without a second accumulator there are registers for 256 columns: products alone bound it.
_WIDE = Tile(128, 256, 1024)
TILES: dict[tuple[Scales, bool], tuple[Tile, ...]] = {
    ("outer", False): (_SMALL, _TALL),
    ("block", False): (_SMALL, _TALL),
    ("outer", True): (_SMALL, _WIDE),
}

#: The variants that release wheels carry.
SHIPPED_GEMMS = tuple(
    GemmVariant(scales, tile.block_m, tile.block_n, fast)
    for (scales, fast), tiles in TILES.items()
    for tile in tiles
)


@lru_cache(maxsize=4096)
def choose_variant(
    scales: Scales, fast_accum: bool, m: int, n: int, multiprocessors: int
) -> GemmVariant:
    """The tile with which the waves of tiles over all multiprocessors take the fewest cycles."""

    def cycles(tile: Tile) -> int:
        tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
        return -(-tiles // multiprocessors) * tile.cycles

    best = min(TILES[scales, fast_accum], key=cycles)
    return GemmVariant(scales, best.block_m, best.block_n, fast_accum)
