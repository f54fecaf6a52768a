"""Variants of cutlass_kernels/quantize/matrix.cu: what is chosen when it compiles.

Sizes, strides, alignment, and whether a row or 128 of its columns have a scale are parameters.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from flash8.compiler import Unit, cutlass_root, enumerator

Input = Literal["fp16", "bf16", "fp32"]
Prologue = Literal["none", "rms_norm", "silu_mul"]


@dataclass(frozen=True)
class QuantizeMatrixVariant:
    """One compilation of cutlass_kernels/quantize/matrix.cu.

    Attributes:
        dtype: Element type of the matrix.
        prologue: What is made of it before it is quantized.

    Raises:
        ValueError: A choice is unknown.
    """

    dtype: Input
    prologue: Prologue = "none"

    def __post_init__(self) -> None:
        for name, choices in {"dtype": Input, "prologue": Prologue}.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; supported are {get_args(choices)}"
                )

    @cached_property
    def name(self) -> str:
        """A name that no other variant has: quantize_matrix_bf16, quantize_matrix_bf16_rms_norm."""
        prologue = "" if self.prologue == "none" else f"_{self.prologue}"
        return f"quantize_matrix_{self.dtype}{prologue}"

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        """The -D options; a choice of words is handed over as the name of an enumerator."""
        return (
            ("FLASH8_DTYPE", enumerator(self.dtype)),
            ("FLASH8_PROLOGUE", enumerator(self.prologue)),
        )

    def unit(self) -> Unit:
        """What the compiler is asked for."""
        return Unit(cutlass_root() / "quantize" / "matrix.cu", self.defines, self.name)


#: The variants that release wheels carry.
SHIPPED_MATRIX_QUANTIZERS = (
    QuantizeMatrixVariant("bf16"),
    QuantizeMatrixVariant("bf16", "rms_norm"),
    QuantizeMatrixVariant("bf16", "silu_mul"),
    QuantizeMatrixVariant("fp16"),
    QuantizeMatrixVariant("fp32"),
)
