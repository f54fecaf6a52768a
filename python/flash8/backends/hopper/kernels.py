"""Compiled kernels by variant: loaded once, compiled when they are first used."""

import functools

from flash8 import _native
from flash8.backends.hopper.quantize_variants import QuantizeVariant
from flash8.backends.hopper.variants import ForwardVariant
from flash8.compiler import kernel_image

Variant = ForwardVariant | QuantizeVariant


def kernel(variant: Variant) -> _native.Kernel:
    """The kernel of a variant, loaded, and compiled before where it has to be."""
    _VARIANTS.setdefault(variant.name, variant)
    return registry().get(variant.name)


def variant_of(key: str) -> Variant:
    """The variant that was asked of the registry by this key."""
    return _VARIANTS[key]


_VARIANTS: dict[str, Variant] = {}


@functools.cache
def registry() -> _native.Registry:
    def image(key: str, kind: str) -> bytes:
        return kernel_image(variant_of(key).unit(), kind)

    return _native.Registry(_native.Driver.process(), image)
