"""New keys or values into an e4m3 cache in one launch: position, mean, scale, cast, the write."""

import torch
from torch import Tensor

from flash8.backends.hopper.quantize import (
    Launcher,
    group_ref,
    refusal_of,
    tensor_ref,
    variant_for,
)
from flash8.backends.hopper.quantize_variants import QuantizeVariant
from flash8.call.request import Appended
from flash8.tensors.arguments import to_int32
from flash8.tensors.float8 import E4M3


def refusal(appended: Appended) -> str | None:
    """Why no kernel appends these rows, or None."""
    cache = appended.cache
    if cache.dtype != E4M3:
        return f"the cache is {cache.dtype}; the appending kernel writes {E4M3}"
    steps = tensor_ref(cache)[1:]
    if cache.stride(-1) != 1 or any(step % 16 != 0 for step in steps):
        return "the cache's strides are not multiples of 16 bytes"
    if not torch.compiler.is_compiling() and cache.data_ptr() % 16 != 0:
        return "the cache's address is not a multiple of 16"
    return refusal_of(appended.x, appended.rope)


def variant(appended: Appended) -> QuantizeVariant:
    """The kernel that appends these rows."""
    return variant_for("append", appended.x)


def append(appended: Appended) -> None:
    """Writes the rows, on x's stream. Rows without a place in the cache are dropped."""
    x, cache = appended.x, appended.cache
    if x.numel() == 0 or cache.numel() == 0:
        return
    launcher = Launcher(x, appended.rope, cu_seqlens=appended.cu_seqlens, seqused=None)
    params, slots = launcher.params, launcher.params.append
    params.out = tensor_ref(cache)
    if appended.mean is not None:
        launcher.set_mean(appended.mean)
    if appended.descale is not None:
        params.descale = group_ref(launcher.keep(appended.descale.contiguous()), False)
        slots.descale_by_slot = int(appended.descale.dim() == 3)
    slots.cache_seqlens = launcher.keep(_int32(appended.starts)).data_ptr()
    slots.num_slots, slots.slot_tokens = cache.shape[:2]
    if appended.page_table is not None:
        table = launcher.keep(_int32(appended.page_table))
        slots.page_table, slots.page_table_stride = table.data_ptr(), table.stride(0)
        slots.max_pages = table.shape[1]
    if appended.kv_batch_idx is not None:
        slots.kv_batch_idx = launcher.keep(_int32(appended.kv_batch_idx)).data_ptr()
    launcher.launch(variant(appended))


def _int32(index: Tensor) -> Tensor:
    contiguous: Tensor = to_int32(index).contiguous()
    return contiguous
