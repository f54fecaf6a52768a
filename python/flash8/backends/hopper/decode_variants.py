"""Variants of the decode kernel: what is chosen when it compiles (hopper/decode).

Masks, packed queries, used lengths, padding, pages and their size, the ratio of query to KV heads,
descales, sinks and LSE are parameters.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from flash8.compiler import Unit, enumerator, kernel_root

Element = Literal["fp16", "bf16"]
Cache = Literal["same", "e4m3"]
Load = Literal["tma", "gather"]
Scales = Literal["head", "key"]

_CHOICES = {"dtype": Element, "cache": Cache, "load": Load, "scales": Scales}
#: head_dim and head_dim_v that tiles are made for, the smallest first; others are filled up with
#: zeros as they are loaded.
TILES = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (512, 512))
#: The same where scores are q . k + qv . v: absorbed MLA.
QV_TILES = ((64, 512),)
#: Rows of a tile of Q: query heads of a KV head, times queries.
ROWS = (8, 16, 32)
_MOST_OF_O = 32 * 128  # values of O that the registers of a warp have room for
_TEAM_WARPS = 4  # that share O out by channels where head_dim_v is larger
WIDEST_OF_WARP = 256


@dataclass(frozen=True)
class DecodeVariant:
    """One compilation of hopper/decode/kernel.cu.

    Attributes:
        dtype: Element type of q and of the output.
        cache: Element type of k and v: q's, or e4m3.
        head_dim: Head dimension of q and k that the tiles are made for.
        head_dim_v: Head dimension of v and of the output.
        rows: Rows of q in a tile.
        load: "tma" takes dense caches and pages of a multiple of 8 keys, "gather" all others.
        score_mod: Whether there is softcap or ALiBi.
        qv: Whether scores are q . k + qv . v.
        scales: What a descale of k or v belongs to: a head of a sequence, or a key; of pages and
            blocks, too.
        append: Whether new keys go into the cache first, and q is normalised and rotated.

    Raises:
        ValueError: A choice is unknown, or there is no such tile.
    """

    dtype: Element
    cache: Cache
    head_dim: int
    head_dim_v: int
    rows: int
    load: Load = "tma"
    score_mod: bool = False
    qv: bool = False
    scales: Scales = "head"
    append: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(f"{name} is {value!r}; supported are {get_args(choices)}")
        tiles = QV_TILES if self.qv else TILES
        if (self.head_dim, self.head_dim_v) not in tiles:
            raise ValueError(
                f"head_dim and head_dim_v are {self.head_dim} and {self.head_dim_v}; supported are "
                f"{tiles}" + (" with qv" if self.qv else "")
            )
        if self.scales == "key" and (self.cache != "e4m3" or self.head_dim_v > WIDEST_OF_WARP):
            raise ValueError(
                f"scales is 'key'; that needs an e4m3 cache and head_dim_v up to {WIDEST_OF_WARP}"
            )
        if self.append and (self.scales == "key" or self.head_dim_v > WIDEST_OF_WARP):
            raise ValueError(
                f"append is True; that needs scales of heads and head_dim_v up to {WIDEST_OF_WARP}"
            )
        if self.rows not in tile_rows(self.head_dim_v):
            raise ValueError(
                f"rows is {self.rows}; with head_dim_v {self.head_dim_v} supported are "
                f"{tile_rows(self.head_dim_v)}"
            )

    @cached_property
    def name(self) -> str:
        """A name that no other variant has: decode_bf16_e4m3_d128_rows8_gather."""
        parts = [self.dtype] + (["e4m3"] if self.cache == "e4m3" else [])
        sizes = {self.head_dim: None, self.head_dim_v: None}
        parts += ["d" + "x".join(map(str, sizes)), f"rows{self.rows}"]
        parts += ["qv"] if self.qv else []
        parts += ["gather"] if self.load == "gather" else []
        parts += ["scoremod"] if self.score_mod else []
        parts += ["keyscales"] if self.scales == "key" else []
        parts += ["append"] if self.append else []
        return "_".join(["decode", *parts])

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        """The -D options; a choice of words is handed over as the name of an enumerator."""
        return (
            ("FLASH8_DTYPE", enumerator(self.dtype)),
            ("FLASH8_CACHE", enumerator(self.cache)),
            ("FLASH8_LOAD", enumerator(self.load)),
            ("FLASH8_SCORE_MOD", str(int(self.score_mod))),
            ("FLASH8_QV", str(int(self.qv))),
            ("FLASH8_SCALES", enumerator(self.scales)),
            ("FLASH8_APPEND", str(int(self.append))),
            ("FLASH8_HEAD_DIM", str(self.head_dim)),
            ("FLASH8_HEAD_DIM_V", str(self.head_dim_v)),
            ("FLASH8_ROWS", str(self.rows)),
        )

    def unit(self) -> Unit:
        """What the compiler is asked for."""
        return Unit(kernel_root() / "decode" / "kernel.cu", self.defines, self.name)


def tile_rows(head_dim_v: int) -> tuple[int, ...]:
    """The rows that a tile may have."""
    warps = _TEAM_WARPS if head_dim_v > WIDEST_OF_WARP else 1
    return tuple(rows for rows in ROWS if rows * head_dim_v <= _MOST_OF_O * warps)


def _shipped() -> tuple[DecodeVariant, ...]:
    rows = []
    for head_dim in (64, 128):
        for cache in ("same", "e4m3"):
            rows += [DecodeVariant("bf16", cache, head_dim, head_dim, n) for n in ROWS]
            rows.append(DecodeVariant("bf16", cache, head_dim, head_dim, 8, load="gather"))
    rows.append(DecodeVariant("fp16", "same", 128, 128, 8))
    rows += [DecodeVariant("bf16", "e4m3", 128, 128, n, scales="key") for n in (8, 16)]
    for cache in get_args(Cache):
        rows.append(DecodeVariant("bf16", cache, 128, 128, 8, append=True))
        rows += [DecodeVariant("bf16", cache, 64, 512, n, qv=True) for n in ROWS]
    return tuple(rows)


# The variants that release wheels carry.
SHIPPED_DECODERS = _shipped()
