"""Variants of the kernels of cutlass_kernels/gemm: what is chosen when they compile, and tiles.

Sizes, strides, bias, the output's type and whether a scale is a tensor's or a row's are parameters.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, get_args

from flash8.call.split_k import SMALL_M
from flash8.compiler import Unit, cutlass_root, enumerator

Scales = Literal["outer", "block"]
#: A's type. Of 16 bits it has no scales: the kernel quantizes it by 1x128.
InputOfA = Literal["e4m3", "bf16", "fp16"]


@dataclass(frozen=True)
class GemmVariant:
    """One compilation of cutlass_kernels/gemm/kernel.cu, or with small_m of small_m.cu beside it.

    Attributes:
        scales: "outer": of tensors or rows, applied to the sum; "block": of 128 of K.
        block_m, block_n: The tile of the output that a CTA computes at a time.
        fast_accum: The tensor core adds up all of K, in 14 bits; otherwise every 128 of K are added
            to a sum in fp32.
        small_m: B is the tensor core's first operand, and A, of few rows, its second.
        a: A's type.
        grouped: Rows of A belong to groups, each with a B of its own.
        grouped_k: K belongs to groups, each with an output of its own.
        cluster: Two CTAs with neighbouring rows load B together, each half of it into both. No call
            takes it until a GPU has said that it pays (bench/bench_gemm_choices.py).

    Raises:
        ValueError: A choice is unknown, or no tile of its kind.
    """

    scales: Scales
    block_m: int
    block_n: int
    fast_accum: bool = False
    small_m: bool = False
    a: InputOfA = "e4m3"
    grouped: bool = False
    grouped_k: bool = False
    cluster: bool = False

    def __post_init__(self) -> None:
        if self.scales not in get_args(Scales):
            raise ValueError(f"scales is {self.scales!r}; supported are {get_args(Scales)}")
        if self.scales == "block" and self.fast_accum:
            raise ValueError("fast_accum is True; scales of blocks need sums in fp32")
        if self.small_m and self.fast_accum:
            raise ValueError("fast_accum is True; the kernel for few rows has sums in fp32")
        if self.small_m and (self.grouped or self.grouped_k):
            raise ValueError("grouped or grouped_k is True; the kernel for few rows has one B")
        if self.grouped and self.grouped_k:
            raise ValueError("grouped and grouped_k are True; groups have rows or K")
        if self.cluster and (self.small_m or self.grouped or self.grouped_k):
            raise ValueError("cluster is True; supported is a kernel for many rows and one B")
        if self.a not in get_args(InputOfA):
            raise ValueError(f"a is {self.a!r}; supported are {get_args(InputOfA)}")
        if self.a != "e4m3" and not (self.small_m and self.scales == "block"):
            raise ValueError(f"a is {self.a!r}; it goes with small_m and scales of blocks")
        tiles = self._known_tiles()
        if (self.block_m, self.block_n) not in tiles:
            raise ValueError(
                f"block_m and block_n are {self.block_m} and {self.block_n}; supported are {tiles}"
            )

    def _known_tiles(self) -> list[tuple[int, int]]:
        if self.small_m:
            return [tile[:2] for tile in small_m_tiles(self.a)]
        known = (_SMALL,) if self.grouped or self.grouped_k else TILES[self.scales, self.fast_accum]
        return [tile[:2] for tile in known]

    @property
    def splits(self) -> bool:
        """Whether the CTAs of a cluster may share the K of a tile."""
        return self.small_m and SmallMTile(self.block_m, self.block_n).splits

    @cached_property
    def name(self) -> str:
        """A name that no other variant has: gemm_block_128x128, gemm_outer_fast_128x256,
        gemm_small_m_block_bf16_16x64, gemm_grouped_block_128x128, gemm_grouped_k_block_128x128,
        gemm_block_cluster_256x128."""
        kind = "small_m_" if self.small_m else "grouped_" if self.grouped else ""
        kind = "grouped_k_" if self.grouped_k else kind
        fast = "_fast" if self.fast_accum else ""
        wide = "" if self.a == "e4m3" else f"_{self.a}"
        pair = "_cluster" if self.cluster else ""
        return f"gemm_{kind}{self.scales}{fast}{wide}{pair}_{self.block_m}x{self.block_n}"

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        """The -D options; a choice of words is handed over as the name of an enumerator."""
        kind: tuple[tuple[str, str], ...] = (("FLASH8_INPUT", enumerator(self.a)),)
        if not self.small_m:
            flags = {
                "FAST_ACCUM": self.fast_accum,
                "GROUPED": self.grouped,
                "GROUPED_K": self.grouped_k,
            }
            flags |= {"CLUSTER": True} if self.cluster else {}
            kind = tuple((f"FLASH8_{name}", str(int(flag))) for name, flag in flags.items())
        return (
            ("FLASH8_SCALES", enumerator(self.scales)),
            ("FLASH8_BLOCK_M", str(self.block_m)),
            ("FLASH8_BLOCK_N", str(self.block_n)),
            *kind,
        )

    def unit(self) -> Unit:
        """What the compiler is asked for."""
        source = "small_m.cu" if self.small_m else "kernel.cu"
        return Unit(cutlass_root() / "gemm" / source, self.defines, self.name)


class Tile(NamedTuple):
    """A tile, and the cycles that 128 of K of it take: the larger of its products on the tensor
    core and of what they and TMA move through shared memory. Calculated, not measured."""

    block_m: int
    block_n: int
    cycles: int


_SMALL = Tile(128, 128, 640)  # small outputs: the most tiles to share out. 80% of the peak
#: Reads least of shared memory for its products that a promoted sum leaves registers for: 89%.
_TALL = Tile(256, 128, 1152)
#: As many sums, nearer to a square: 87% and 92%. What fits depends on N.
_BROAD, _BROADEST = Tile(128, 160, 736), Tile(128, 192, 832)
#: Without a second accumulator there are registers for 256 columns: products alone bound it.
_WIDE = Tile(128, 256, 1024)
TILES: dict[tuple[Scales, bool], tuple[Tile, ...]] = {
    ("outer", False): (_SMALL, _BROAD, _BROADEST, _TALL),
    ("block", False): (_SMALL, _BROAD, _BROADEST, _TALL),
    ("outer", True): (_SMALL, _WIDE),
}


class SmallMTile(NamedTuple):
    """A tile for few rows of A: wgmma has 64 rows of B, and as many columns as A has rows."""

    block_m: int
    block_n: int

    @property
    def rows(self) -> int:
        """Rows of A and of B that are read for it: what a multiprocessor waits for."""
        return self.block_m + self.block_n

    @property
    def splits(self) -> bool:
        """Whether the CTAs of a cluster may share its K: where it has the most tiles, or too few
        of them."""
        return self.block_n == 64


#: 64 rows of B: twice the tiles to share out. 128: A is read from L2 half as often.
SMALL_M_TILES = tuple(SmallMTile(m, n) for m in (16, SMALL_M) for n in (64, 128))


def small_m_tiles(a: InputOfA) -> tuple[SmallMTile, ...]:
    """Those of A's type. Where it is quantized, a fourth warpgroup would leave too few registers
    for the sums of 64 rows."""
    if a == "e4m3":
        return SMALL_M_TILES
    return tuple(tile for tile in SMALL_M_TILES if tile != (SMALL_M, 128))


#: The variants that release wheels carry, of one B: of many rows, of few, and of few of 16 bits.
SHIPPED_GEMMS = (
    *(
        GemmVariant(scales, tile.block_m, tile.block_n, fast)
        for (scales, fast), tiles in TILES.items()
        for tile in tiles
    ),
    *(
        GemmVariant(scales, tile.block_m, tile.block_n, small_m=True)
        for scales in get_args(Scales)
        for tile in SMALL_M_TILES
    ),
    *(
        GemmVariant("block", tile.block_m, tile.block_n, small_m=True, a=a)
        for a in get_args(InputOfA)[1:]
        for tile in small_m_tiles(a)
    ),
)
#: What two CTAs may do together: none of them ships, or serves a call.
CLUSTERED_GEMMS = tuple(
    replace(variant, cluster=True) for variant in SHIPPED_GEMMS if not variant.small_m
)
#: Groups have the small tile: few of them fill another, and 256 x 128 with scales of blocks has no
#: registers left for the walk over groups.
SHIPPED_GROUPED_GEMMS = tuple(
    GemmVariant(
        scales, _SMALL.block_m, _SMALL.block_n, fast, grouped=not along_k, grouped_k=along_k
    )
    for along_k in (False, True)
    for scales, fast in TILES
)


@lru_cache(maxsize=4096)
def choose_variant(
    scales: Scales,
    fast_accum: bool,
    m: int,
    n: int,
    multiprocessors: int,
    a: InputOfA = "e4m3",
    splits: int = 1,
) -> GemmVariant:
    """The tile with which the waves of tiles over all multiprocessors take the fewest cycles. Few
    rows have their own kernel, unless the tensor core is to add up all of K; and of them K may be
    split."""
    if m <= SMALL_M and not fast_accum:
        return _choose_small_m(scales, m, n, multiprocessors, a, splits)

    def cycles(tile: Tile) -> int:
        tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
        return -(-tiles // multiprocessors) * tile.cycles

    best = min(TILES[scales, fast_accum], key=cycles)
    return GemmVariant(scales, best.block_m, best.block_n, fast_accum)


def _choose_small_m(
    scales: Scales, m: int, n: int, multiprocessors: int, a: InputOfA, splits: int
) -> GemmVariant:
    """The fewest rows of A that fit, and the tile with which the multiprocessors read least."""
    block_m = min(tile.block_m for tile in SMALL_M_TILES if tile.block_m >= m)
    fits = [tile for tile in small_m_tiles(a) if tile.block_m == block_m]
    tiles = [tile for tile in fits if tile.splits or splits == 1]

    def rows(tile: SmallMTile) -> int:
        return -(-n // (tile.block_n * multiprocessors)) * tile.rows

    best = min(tiles, key=rows)
    return GemmVariant(scales, best.block_m, best.block_n, small_m=True, a=a)
