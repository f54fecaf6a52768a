"""Variants of the QKV projection, cutlass_kernels/gemm/qkv.cu.

Heads, sequences, norms, the rotary embedding and bias are parameters.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import get_args

from flash8.backends.hopper.gemm_variants import GemmVariant, Scales
from flash8.compiler import Unit, cutlass_root
from flash8.tensors.descales import BLOCK


@dataclass(frozen=True)
class QkvVariant:
    """One compilation. Its tile is 128 tokens of a head of 128.

    Attributes:
        scales: "outer": of tensors or rows, applied to the sum; "block": of 128 of K.

    Raises:
        ValueError: A choice is unknown.
    """

    scales: Scales

    def __post_init__(self) -> None:
        if self.scales not in get_args(Scales):
            raise ValueError(f"scales is {self.scales!r}; supported are {get_args(Scales)}")

    @cached_property
    def name(self) -> str:
        """qkv_projection_outer or qkv_projection_block."""
        return f"qkv_projection_{self.scales}"

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        """Those of the product whose producer and mainloop it shares."""
        return GemmVariant(self.scales, BLOCK, HEAD_DIM).defines

    def unit(self) -> Unit:
        """What the compiler is asked for."""
        return Unit(cutlass_root() / "gemm" / "qkv.cu", self.defines, self.name)


HEAD_DIM = 128
#: The variants that release wheels carry.
SHIPPED_QKV_PROJECTIONS = tuple(QkvVariant(scales) for scales in get_args(Scales))
