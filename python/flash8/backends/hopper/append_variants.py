"""Variants of cutlass_kernels/quantize/append.cu: what is chosen when it compiles.

Head dimensions, rotary embedding, means, descales, pages and packed sequences are parameters.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from flash8.compiler import Unit, cutlass_root, enumerator

Input = Literal["fp16", "bf16", "fp32", "e4m3"]
Cache = Literal["same", "e4m3"]


@dataclass(frozen=True)
class AppendVariant:
    """One compilation of cutlass_kernels/quantize/append.cu.

    Attributes:
        dtype: Element type of the new rows.
        cache: That of the caches: "same" as the rows', or "e4m3", into which they are quantized.

    Raises:
        ValueError: A choice is unknown, or e4m3 rows would be quantized.
    """

    dtype: Input
    cache: Cache = "same"

    def __post_init__(self) -> None:
        for name, choices in {"dtype": Input, "cache": Cache}.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; supported are {get_args(choices)}"
                )
        if self.dtype == "e4m3" and self.cache == "e4m3":
            raise ValueError("cache is 'e4m3'; rows of dtype 'e4m3' go there as they are: 'same'")

    @cached_property
    def name(self) -> str:
        """A name that no other variant has: append_bf16, append_bf16_to_e4m3."""
        return f"append_{self.dtype}" + ("" if self.cache == "same" else f"_to_{self.cache}")

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        """The -D options; a choice of words is handed over as the name of an enumerator."""
        return (
            ("FLASH8_DTYPE", enumerator(self.dtype)),
            ("FLASH8_CACHE", enumerator(self.cache)),
        )

    def unit(self) -> Unit:
        """What the compiler is asked for."""
        return Unit(cutlass_root() / "quantize" / "append.cu", self.defines, self.name)


# The variants that release wheels carry.
SHIPPED_APPENDS = (
    AppendVariant("bf16"),
    AppendVariant("fp16"),
    AppendVariant("bf16", "e4m3"),
    AppendVariant("fp16", "e4m3"),
    AppendVariant("e4m3"),
)
