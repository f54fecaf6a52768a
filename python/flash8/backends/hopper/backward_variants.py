"""Variants of the backward: what is chosen when its three kernels compile (hopper/backward).

Packed sequences, used lengths, the ratio of query to KV heads, sinks and dLSE are parameters.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from flash8.backends.hopper.variants import Mask
from flash8.compiler import Unit, enumerator, kernel_root

Element = Literal["fp16", "bf16"]
DqStore = Literal["staged", "reduced"]
Job = Literal["preprocess", "postprocess"]

_CHOICES = {"dtype": Element, "mask": Mask, "dq": DqStore, "job": Job}
#: head_dim and head_dim_v that tiles are made for, the smallest first; others are filled up with
#: zeros by TMA.
TILES = ((64, 64), (96, 96), (128, 64), (128, 128), (192, 128), (192, 192), (256, 256))
#: With FP8 operands: Q and K are in shared memory twice, for which 256 channels leave no room.
TILES_FP8 = TILES[:-1]


@dataclass(frozen=True)
class BackwardStep:
    """One compilation of hopper/backward/<job>.cu, which runs before or after the kernel.

    Attributes:
        job: What it does.
        dtype: Element type of all tensors of rows.
        head_dim: Head dimension of q and k that the tiles are made for.
        head_dim_v: Head dimension of v and of the output.
        fp8: As in `BackwardVariant`.

    Raises:
        ValueError: A choice is unknown.
    """

    job: Job
    dtype: Element
    head_dim: int
    head_dim_v: int
    fp8: bool = False

    def __post_init__(self) -> None:
        _check(self, "job", "dtype")

    @cached_property
    def name(self) -> str:
        """A name that no other variant has: backward_preprocess_bf16_d128."""
        parts = ["backward", self.job, *_type_and_tile(self)]
        return "_".join([*parts, *(["fp8"] if self.fp8 else [])])

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        """The -D options."""
        return _common_defines(self)

    def unit(self) -> Unit:
        """What the compiler is asked for."""
        return Unit(kernel_root() / "backward" / f"{self.job}.cu", self.defines, self.name)


@dataclass(frozen=True)
class BackwardVariant:
    """One compilation of hopper/backward/kernel.cu, and what runs around it.

    Attributes:
        dtype: Element type of q, k, v, the output and all gradients; with `fp8` not of q, k and v.
        head_dim: Head dimension of q and k that the tiles are made for.
        head_dim_v: Head dimension of v and of the output.
        mask: "local" serves windows and chunks, with or without causal.
        softcap: Whether scores go through softcap * tanh(x / softcap).
        alibi: Whether scores fall with the distance between query and key.
        dropout: Whether probabilities are dropped.
        dq: How dQ is added up: by bulk reductions of what is staged in shared memory, or by
            reductions from registers.
        deterministic: Whether blocks of keys add to dQ in one order, so that equal calls give
            equal bits. Staged dQ only.
        fp8: Whether q, k and v are e4m3, those of an FP8 forward: S comes from them, the other
            products have operands of `dtype` that are made of them.

    Raises:
        ValueError: A choice is unknown, or the choices exclude each other.
    """

    dtype: Element
    head_dim: int
    head_dim_v: int
    mask: Mask = "none"
    softcap: bool = False
    alibi: bool = False
    dq: DqStore = "staged"
    deterministic: bool = False
    dropout: bool = False
    fp8: bool = False

    def __post_init__(self) -> None:
        _check(self, "dtype", "mask", "dq")
        if self.deterministic and self.dq != "staged":
            raise ValueError(f"deterministic is True with dq {self.dq!r}; supported is 'staged'")
        if self.dropout and self.fp8:
            raise ValueError("dropout and fp8 are True; supported is one of them")

    @cached_property
    def name(self) -> str:
        """A name that no other variant has, fit for a file: backward_bf16_d128_causal."""
        parts = _type_and_tile(self)
        parts += [self.mask] if self.mask != "none" else []
        parts += ["softcap"] if self.softcap else []
        parts += ["alibi"] if self.alibi else []
        parts += ["dropout"] if self.dropout else []
        parts += [self.dq] if self.dq != "staged" else []
        parts += ["deterministic"] if self.deterministic else []
        parts += ["fp8"] if self.fp8 else []
        return "_".join(["backward", *parts])

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        """The -D options: FLASH8_HEAD_DIM=128, FLASH8_MASK=kCausal."""
        return (
            *_common_defines(self),
            ("FLASH8_MASK", enumerator(self.mask)),
            ("FLASH8_SOFTCAP", str(int(self.softcap))),
            ("FLASH8_ALIBI", str(int(self.alibi))),
            ("FLASH8_DROPOUT", str(int(self.dropout))),
            ("FLASH8_DQ", enumerator(self.dq)),
            ("FLASH8_DETERMINISTIC", str(int(self.deterministic))),
        )

    def unit(self) -> Unit:
        """What the compiler is asked for, for the kernel itself."""
        return Unit(kernel_root() / "backward" / "kernel.cu", self.defines, self.name)

    @cached_property
    def preprocess(self) -> BackwardStep:
        """What runs before the kernel."""
        return self._step("preprocess")

    @cached_property
    def postprocess(self) -> BackwardStep:
        """What runs after the kernel."""
        return self._step("postprocess")

    def _step(self, job: Job) -> BackwardStep:
        return BackwardStep(job, self.dtype, self.head_dim, self.head_dim_v, self.fp8)


def _check(variant: BackwardVariant | BackwardStep, *names: str) -> None:
    for name in names:
        value, choices = getattr(variant, name), get_args(_CHOICES[name])
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; supported are {choices}")
    tile = variant.head_dim, variant.head_dim_v
    supported = TILES_FP8 if variant.fp8 else TILES
    if tile not in supported:
        raise ValueError(f"head_dim and head_dim_v are {tile}; supported are {supported}")


def _type_and_tile(variant: BackwardVariant | BackwardStep) -> list[str]:
    same = variant.head_dim == variant.head_dim_v
    return [variant.dtype, f"d{variant.head_dim}" + ("" if same else f"v{variant.head_dim_v}")]


def _common_defines(variant: BackwardVariant | BackwardStep) -> tuple[tuple[str, str], ...]:
    return (
        ("FLASH8_DTYPE", enumerator(variant.dtype)),
        ("FLASH8_HEAD_DIM", str(variant.head_dim)),
        ("FLASH8_HEAD_DIM_V", str(variant.head_dim_v)),
        ("FLASH8_FP8", str(int(variant.fp8))),
    )


# The variants that release wheels carry, one row each.
SHIPPED_BACKWARDS: tuple[BackwardVariant, ...] = (
    BackwardVariant("bf16", 64, 64),
    BackwardVariant("bf16", 64, 64, mask="causal"),
    BackwardVariant("bf16", 64, 64, mask="local"),
    BackwardVariant("fp16", 64, 64, softcap=True),
    BackwardVariant("bf16", 96, 96, mask="causal"),
    BackwardVariant("bf16", 128, 128),
    BackwardVariant("bf16", 128, 128, mask="causal"),
    BackwardVariant("fp16", 128, 128, mask="causal"),
    BackwardVariant("bf16", 128, 128, mask="causal", deterministic=True),
    BackwardVariant("bf16", 128, 128, mask="local"),
    BackwardVariant("bf16", 128, 128, fp8=True),
    BackwardVariant("bf16", 128, 128, mask="causal", fp8=True),
    BackwardVariant("bf16", 192, 128, mask="causal"),
    BackwardVariant("bf16", 256, 256, mask="causal"),
)
