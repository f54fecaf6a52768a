"""Attention modules on top of the flash8 functions, and the caches they decode from."""

from flash8.nn.cache import (
    CacheStep,
    DenseKVCache,
    LayerCache,
    OutOfPagesError,
    PageAllocator,
    PagedKVCache,
)
from flash8.nn.core import FlashCrossAttention, FlashSelfAttention
from flash8.nn.mha import FlashMHA
from flash8.nn.rotary import RotaryEmbedding

__all__ = [
    "CacheStep",
    "DenseKVCache",
    "FlashCrossAttention",
    "FlashMHA",
    "FlashSelfAttention",
    "LayerCache",
    "OutOfPagesError",
    "PageAllocator",
    "PagedKVCache",
    "RotaryEmbedding",
]
