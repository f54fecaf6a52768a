"""Compiled kernels by variant: loaded once, compiled when they are first used."""

import functools
import warnings

from flash8 import _native
from flash8.backends.hopper.append_variants import SHIPPED_APPENDS, AppendVariant
from flash8.backends.hopper.backward_variants import (
    SHIPPED_BACKWARDS,
    BackwardStep,
    BackwardVariant,
)
from flash8.backends.hopper.decode_variants import SHIPPED_DECODERS, DecodeVariant
from flash8.backends.hopper.gemm_variants import (
    SHIPPED_GEMMS,
    SHIPPED_GROUPED_GEMMS,
    GemmVariant,
)
from flash8.backends.hopper.qkv_variants import SHIPPED_QKV_PROJECTIONS, QkvVariant
from flash8.backends.hopper.quantize_matrix_variants import (
    SHIPPED_MATRIX_QUANTIZERS,
    QuantizeMatrixVariant,
)
from flash8.backends.hopper.quantize_variants import SHIPPED_QUANTIZERS, QuantizeVariant
from flash8.backends.hopper.schedule_variants import SCHEDULE, ScheduleVariant
from flash8.backends.hopper.variants import SHIPPED, ForwardVariant
from flash8.compiler import (
    CompileError,
    CompilerNotFoundError,
    MissingVariantError,
    kernel_image,
)

#: What serves a call. A backward takes three kernels.
Attention = ForwardVariant | DecodeVariant | BackwardVariant
Quantizer = QuantizeVariant | QuantizeMatrixVariant
Product = GemmVariant | QkvVariant
Variant = Attention | Quantizer | AppendVariant | ScheduleVariant | Product
#: What is compiled and loaded.
KernelVariant = Variant | BackwardStep


def kernel(variant: KernelVariant) -> _native.Kernel:
    """The kernel of a variant, loaded, and compiled before where it has to be."""
    _VARIANTS.setdefault(variant.name, variant)
    return registry().get(variant.name)


def is_available(variant: KernelVariant) -> bool:
    """Whether it is there, or can be compiled: asked of a kernel that calls can do without. What is
    found once is kept: nobody waits twice for a compiler that takes too long."""
    if variant.name not in _available:
        try:
            kernel(variant)
            _available[variant.name] = True
        except Exception as error:
            _available[variant.name] = False
            if not isinstance(error, _NOT_HERE):
                warnings.warn(
                    f"flash8 cannot load its kernel {variant.name}, and does without it: "
                    f"{type(error).__name__}: {error}",
                    stacklevel=6,
                )
    return _available[variant.name]


def shipped() -> tuple[Variant, ...]:
    """What a release compiles, and `flash8 check` checks."""
    attention: tuple[Variant, ...] = (*SHIPPED, *SHIPPED_DECODERS, *SHIPPED_BACKWARDS)
    others: tuple[Variant, ...] = (*SHIPPED_QUANTIZERS, *SHIPPED_APPENDS, SCHEDULE)
    products: tuple[Variant, ...] = (
        *(*SHIPPED_GEMMS, *SHIPPED_GROUPED_GEMMS),
        *SHIPPED_QKV_PROJECTIONS,
    )
    return (*attention, *others, *products, *SHIPPED_MATRIX_QUANTIZERS)


def kernels_of(variant: Variant) -> tuple[KernelVariant, ...]:
    """What is launched for a variant, in the order of the launches."""
    if isinstance(variant, BackwardVariant):
        return variant.preprocess, variant, variant.postprocess
    return (variant,)


def variant_of(key: str) -> KernelVariant:
    """The variant that was asked of the registry by this key."""
    return _VARIANTS[key]


def wanted() -> list[Variant]:
    """What calls of this process have wanted so far, in the order in which they first did, but for
    what they do without."""
    had = [x for x in _VARIANTS.values() if _available.get(x.name, True)]
    return [x for x in had if not isinstance(x, BackwardStep)]


_VARIANTS: dict[str, KernelVariant] = {}
_available: dict[str, bool] = {}
#: What says that no compiler makes a kernel here.
_NOT_HERE = (CompileError, CompilerNotFoundError, MissingVariantError)


@functools.cache
def registry() -> _native.Registry:
    def image(key: str, kind: str) -> bytes:
        return kernel_image(variant_of(key).unit(), kind)

    return _native.Registry(_native.Driver.process(), image)
