"""Variants of the quantizer kernels in cutlass_kernels/quantize: what is chosen when they compile.

Rotary embedding, mean, rotation, packed sequences and the granularity of the scales are parameters.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from flash8.compiler import Unit, cutlass_root, enumerator

Job = Literal["cast", "amax", "mean", "mean_finish"]
Input = Literal["fp16", "bf16", "fp32"]
Output = Literal["e4m3", "e5m2"]
TILE_HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True)
class QuantizeVariant:
    """One compilation of cutlass_kernels/quantize/<job>.cu.

    Attributes:
        job: What the kernel does: the cast, or a pass before it.
        dtype: Element type of x. "mean_finish" reads sums, so fp32.
        head_dim: Channels that a tile has room for.
        out: The 8-bit type; of the cast only.
        v_colmajor: Whether the cast writes (head_dim, tokens); of the cast only.

    Raises:
        ValueError: A choice is unknown, or another job than the cast has a choice of the cast.
    """

    job: Job
    dtype: Input
    head_dim: int
    out: Output = "e4m3"
    v_colmajor: bool = False

    def __post_init__(self) -> None:
        choices = {"job": Job, "dtype": Input, "out": Output}
        for name, supported in choices.items():
            if getattr(self, name) not in get_args(supported):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; supported are {get_args(supported)}"
                )
        if self.head_dim not in TILE_HEAD_DIMS:
            raise ValueError(f"head_dim is {self.head_dim}; supported are {TILE_HEAD_DIMS}")
        if self.job == "mean_finish" and self.dtype != "fp32":
            raise ValueError(f"dtype is {self.dtype!r}; 'mean_finish' reads sums, which are 'fp32'")
        if self.job != "cast" and (self.out != "e4m3" or self.v_colmajor):
            raise ValueError(f"job is {self.job!r}; only 'cast' has out and v_colmajor")

    @cached_property
    def name(self) -> str:
        """A name that no other variant has: quantize_cast_bf16_d128."""
        parts = [self.job, self.dtype, f"d{self.head_dim}"]
        parts += [self.out] if self.out != "e4m3" else []
        parts += ["vcolmajor"] if self.v_colmajor else []
        return "_".join(["quantize", *parts])

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        """The -D options; a choice of words is handed over as the name of an enumerator."""
        return (
            ("FLASH8_DTYPE", enumerator(self.dtype)),
            ("FLASH8_HEAD_DIM", str(self.head_dim)),
            ("FLASH8_OUT", enumerator(self.out)),
            ("FLASH8_V_COLMAJOR", str(int(self.v_colmajor))),
        )

    def unit(self) -> Unit:
        """What the compiler is asked for."""
        return Unit(cutlass_root() / "quantize" / f"{self.job}.cu", self.defines, self.name)


def tile_head_dim(head_dim: int) -> int:
    """The smallest tile that has room for a head."""
    return next(size for size in TILE_HEAD_DIMS if head_dim <= size)


def _shipped() -> tuple[QuantizeVariant, ...]:
    rows: list[QuantizeVariant] = []
    jobs: tuple[Job, ...] = ("cast", "amax", "mean")
    for head_dim in TILE_HEAD_DIMS:
        rows += [QuantizeVariant(job, "bf16", head_dim) for job in jobs]
        rows.append(QuantizeVariant("mean_finish", "fp32", head_dim))
        rows.append(QuantizeVariant("cast", "bf16", head_dim, v_colmajor=True))
    rows.append(QuantizeVariant("cast", "fp16", 128))
    rows.append(QuantizeVariant("cast", "fp32", 128))
    rows.append(QuantizeVariant("cast", "bf16", 128, out="e5m2"))
    return tuple(rows)


# The variants that release wheels carry.
SHIPPED_QUANTIZERS = _shipped()
