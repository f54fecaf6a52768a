"""Attention modules on top of the flash8 functions, the caches they decode from, and linear layers
in FP8."""

from flash8.nn.cache import (
    CacheStep,
    DenseKVCache,
    LayerCache,
    OutOfPagesError,
    PageAllocator,
    PagedKVCache,
)
from flash8.nn.core import FlashCrossAttention, FlashSelfAttention
from flash8.nn.frozen_linear import FrozenFp8Linear
from flash8.nn.linear import Fp8Linear, to_fp8_linears
from flash8.nn.mha import FlashMHA
from flash8.nn.rotary import RotaryEmbedding

__all__ = [
    "CacheStep",
    "DenseKVCache",
    "FlashCrossAttention",
    "FlashMHA",
    "FlashSelfAttention",
    "Fp8Linear",
    "FrozenFp8Linear",
    "LayerCache",
    "OutOfPagesError",
    "PageAllocator",
    "PagedKVCache",
    "RotaryEmbedding",
    "to_fp8_linears",
]
