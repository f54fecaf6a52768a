"""flash8: FP8 and 16-bit attention for NVIDIA Hopper, with a CPU backend for everything."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flash8._version import __version__
from flash8.attention import flash_attn_func, flash_attn_varlen_func
from flash8.dropout import dropout_mask
from flash8.kvcache import flash_attn_combine, flash_attn_with_kvcache
from flash8.packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash8.scheduler import get_scheduler_metadata

if TYPE_CHECKING:
    from flash8 import backends, distributed, fp8, gemm, nn, varlen
    from flash8.fp8 import fp8_attention

__all__ = [
    "__version__",
    "backends",
    "distributed",
    "dropout_mask",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "fp8",
    "fp8_attention",
    "gemm",
    "get_scheduler_metadata",
    "nn",
    "varlen",
]

_LAZY_SUBMODULES = frozenset({"backends", "distributed", "fp8", "gemm", "nn", "varlen"})


def __getattr__(name: str) -> Any:
    if name in _LAZY_SUBMODULES:
        return import_module(f"flash8.{name}")
    if name == "fp8_attention":
        return import_module("flash8.fp8").fp8_attention
    raise AttributeError(f"module 'flash8' has no attribute {name!r}")
