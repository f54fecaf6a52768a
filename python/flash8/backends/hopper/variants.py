"""Kernel variants: the choices that are made when a kernel is compiled.

What costs nothing at run time is no choice: packed sequences, used lengths, the ratio of query to
KV heads, sinks and LSE are parameters of every kernel.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal, get_args

from flash8.compiler import Unit, enumerator, kernel_root

Element = Literal["fp16", "bf16", "e4m3"]
Mask = Literal["none", "causal", "local"]
Scales = Literal["none", "head", "block"]
Cache = Literal["same", "e4m3"]
Out = Literal["wide", "e4m3"]

_CHOICES = {"dtype": Element, "cache": Cache, "mask": Mask, "scales": Scales, "out": Out}
MAX_HEAD_DIM = 512
OUT_SCALE_CHANNELS = 128  # of an e4m3 output, that share a scale


@dataclass(frozen=True)
class ForwardVariant:
    """One compilation of hopper/forward/kernel.cu.

    Attributes:
        dtype: Element type of q, and of k and v but for `cache`.
        head_dim: Head dimension of q and k that the tiles are made for.
        head_dim_v: Head dimension of v and of the output.
        mask: "local" serves windows and chunks, with or without causal.
        softcap: Whether scores go through softcap * tanh(x / softcap).
        pack_gqa: Whether the query heads of one KV head share a tile.
        scales: Granularity of the descales of e4m3: one per (batch, head), or one per block.
        alibi: Whether scores fall with the distance between query and key.
        dropout: Whether probabilities are dropped.
        cluster: Whether two CTAs load K and V together; without a mask only.
        v_colmajor: Whether v of e4m3 has keys innermost, as the quantizer writes it.
        paged: Whether k and v are the pages of a cache; left padding of them needs mask "local",
            unless they are gathered.
        gather: Whether pages are gathered, which may have any size; TMA loads those of a multiple
            of 8 keys.
        cache: Element type of k and v: q's, or e4m3 under a q of 16 bits, with one descale per
            head. Such k and v are dense, packed, or pages of any size.
        out: The output: of 16 bits, or e4m3 with a scale for each 128 channels of a row, or one
            that is given.

    Raises:
        ValueError: A choice is unknown, or the choices exclude each other.
    """

    dtype: Element
    head_dim: int
    head_dim_v: int
    mask: Mask = "none"
    softcap: bool = False
    pack_gqa: bool = False
    scales: Scales = "none"
    alibi: bool = False
    cluster: bool = False
    v_colmajor: bool = False
    dropout: bool = False
    paged: bool = False
    gather: bool = False
    cache: Cache = "same"
    out: Out = "wide"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(f"{name} is {value!r}; supported are {get_args(choices)}")
        for name in ("head_dim", "head_dim_v"):
            value = getattr(self, name)
            if not (0 < value <= MAX_HEAD_DIM and value % 8 == 0):
                raise ValueError(
                    f"{name} is {value}; supported are the multiples of 8 up to {MAX_HEAD_DIM}"
                )
        if (self.dtype == "e4m3") != (self.scales != "none"):
            raise ValueError(
                f"scales is {self.scales!r} with dtype {self.dtype!r}; e4m3 needs 'head' or "
                f"'block', the 16-bit types 'none'"
            )
        if self.v_colmajor and self.dtype != "e4m3":
            raise ValueError(
                f"v_colmajor is True with dtype {self.dtype!r}; 16-bit products take v as it is"
            )
        if self.cluster and self.mask != "none":
            raise ValueError(f"cluster is True with mask {self.mask!r}; supported is mask 'none'")
        if self.paged and (
            self.cluster or self.dropout or self.v_colmajor or self.scales == "block"
        ):
            raise ValueError(
                "paged is True with cluster, dropout, v_colmajor or scales 'block'; supported are "
                "pages without them"
            )
        if self.cache == "e4m3" and (
            self.dtype == "e4m3" or self.cluster or self.dropout or self.paged
        ):
            raise ValueError(
                f"cache is 'e4m3' with dtype {self.dtype!r}, cluster {self.cluster}, dropout "
                f"{self.dropout} and paged {self.paged}; supported are the 16-bit types without "
                "them: any k and v are read, pages too"
            )
        if self.out == "e4m3" and (self.dropout or self.head_dim_v % OUT_SCALE_CHANNELS != 0):
            raise ValueError(
                f"out is 'e4m3' with head_dim_v {self.head_dim_v} and dropout {self.dropout}; "
                f"supported are the multiples of {OUT_SCALE_CHANNELS}, without dropout"
            )
        if self.gather and not self.paged:
            raise ValueError("gather is True without paged; what is gathered are pages")

    @cached_property
    def name(self) -> str:
        """A name that no other variant has, fit for a file: forward_bf16_d128_causal."""
        same = self.head_dim == self.head_dim_v
        parts: list[str] = [self.dtype, *(["e4m3"] if self.cache == "e4m3" else [])]
        parts.append(f"d{self.head_dim}" + ("" if same else f"v{self.head_dim_v}"))
        parts += [self.mask] if self.mask != "none" else []
        parts += ["softcap"] if self.softcap else []
        parts += ["alibi"] if self.alibi else []
        parts += ["dropout"] if self.dropout else []
        parts += ["packgqa"] if self.pack_gqa else []
        parts += ["cluster"] if self.cluster else []
        parts += ["vcolmajor"] if self.v_colmajor else []
        parts += ["paged"] if self.paged else []
        parts += ["gather"] if self.gather else []
        parts += [f"{self.scales}scales"] if self.scales != "none" else []
        parts += ["oute4m3"] if self.out == "e4m3" else []
        return "_".join(["forward", *parts])

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        """The -D options: FLASH8_HEAD_DIM=128, FLASH8_MASK=kCausal."""
        options = []
        for field in fields(self):
            value = getattr(self, field.name)
            given = enumerator(value) if field.name in _CHOICES else str(int(value))
            options.append((f"FLASH8_{field.name.upper()}", given))
        return tuple(options)

    def unit(self) -> Unit:
        """What the compiler is asked for."""
        return Unit(kernel_root() / "forward" / "kernel.cu", self.defines, self.name)


# The variants that release wheels carry, one row each.
SHIPPED: tuple[ForwardVariant, ...] = (
    ForwardVariant("bf16", 64, 64),
    ForwardVariant("bf16", 64, 64, mask="causal"),
    ForwardVariant("bf16", 64, 64, mask="local"),
    ForwardVariant("fp16", 64, 64, softcap=True),
    ForwardVariant("bf16", 96, 96),
    ForwardVariant("bf16", 128, 128),
    ForwardVariant("bf16", 128, 128, cluster=True),
    ForwardVariant("bf16", 128, 128, mask="causal"),
    ForwardVariant("bf16", 128, 128, mask="causal", pack_gqa=True),
    ForwardVariant("fp16", 128, 128, mask="causal"),
    ForwardVariant("bf16", 128, 128, mask="local"),
    ForwardVariant("bf16", 128, 128, mask="causal", paged=True),
    ForwardVariant("bf16", 128, 128, mask="causal", pack_gqa=True, paged=True),
    ForwardVariant("fp16", 128, 128, mask="causal", paged=True),
    ForwardVariant("bf16", 128, 128, mask="local", paged=True),
    ForwardVariant("bf16", 128, 128, mask="causal", paged=True, gather=True),
    ForwardVariant("bf16", 128, 128, mask="causal", pack_gqa=True, paged=True, gather=True),
    ForwardVariant("bf16", 64, 64, mask="causal", cache="e4m3"),
    ForwardVariant("bf16", 128, 128, mask="causal", cache="e4m3"),
    ForwardVariant("bf16", 128, 128, mask="causal", pack_gqa=True, cache="e4m3"),
    ForwardVariant("bf16", 128, 128, mask="local", cache="e4m3"),
    ForwardVariant("bf16", 128, 128, mask="causal", out="e4m3"),
    ForwardVariant("bf16", 192, 128, mask="causal"),
    ForwardVariant("fp16", 192, 192, mask="local"),
    ForwardVariant("bf16", 256, 256, mask="causal"),
    ForwardVariant("bf16", 256, 256, mask="local", softcap=True),
    ForwardVariant("e4m3", 64, 64, mask="causal", scales="head"),
    ForwardVariant("e4m3", 64, 64, mask="local", softcap=True, scales="block"),
    ForwardVariant("e4m3", 96, 96, scales="head"),
    ForwardVariant("e4m3", 128, 128, scales="head"),
    ForwardVariant("e4m3", 128, 128, mask="causal", scales="head"),
    ForwardVariant("e4m3", 128, 128, mask="causal", scales="head", out="e4m3"),
    ForwardVariant("e4m3", 128, 128, mask="causal", scales="head", paged=True),
    ForwardVariant("e4m3", 128, 128, mask="causal", scales="head", paged=True, gather=True),
    ForwardVariant("e4m3", 128, 128, scales="head", v_colmajor=True),
    ForwardVariant("e4m3", 128, 128, mask="causal", scales="head", v_colmajor=True),
    ForwardVariant("e4m3", 128, 128, scales="block"),
    ForwardVariant("e4m3", 128, 128, mask="causal", scales="block"),
    ForwardVariant("e4m3", 192, 128, mask="causal", scales="head"),
    ForwardVariant("e4m3", 192, 192, scales="head", cluster=True),
    ForwardVariant("e4m3", 192, 192, mask="local", scales="block"),
    ForwardVariant("e4m3", 256, 256, scales="head"),
    ForwardVariant("e4m3", 256, 256, mask="causal", scales="head"),
    ForwardVariant("e4m3", 256, 256, mask="causal", scales="head", v_colmajor=True),
)
