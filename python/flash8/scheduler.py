"""Scheduler metadata: the plan of a KV-cache call, made once and used by many calls.

The tensor carries the sizes it was made for, so a call with other sizes refuses it instead of
running with a plan that does not fit (on CPU tensors; on a GPU that would cost a synchronisation).
"""

from typing import Any

import torch
from torch import Tensor

from flash8.backends import choose_num_splits
from flash8.call import checks
from flash8.call.geometry import Geometry
from flash8.call.options import Options
from flash8.tensors.arguments import (
    INDEX_DTYPES,
    require_bool,
    require_int,
    require_shape,
    require_tensor,
)

_INT32_MAX = 2**31 - 1
_VERSION = 1
#: What the tensor holds after the version, in this order; int32 each.
_FIELDS = (
    "num_splits",
    "batch",
    "heads",
    "heads_kv",
    "head_dim",
    "head_dim_v",
    "causal",
    "window_left",
    "window_right",
    "attention_chunk",
    "page_size",
)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """The plan of a `flash_attn_with_kvcache` call with these sizes, as FA3 names them.

    Returns an int32 tensor on cache_seqlens' device, for the call's `scheduler_metadata`. Raises
    TypeError or ValueError naming the argument that is wrong.
    """
    sizes = {"batch_size": batch_size, "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    sizes["max_seqlen_k_new"] = max_seqlen_k_new
    for name, size in sizes.items():
        require_int(name, size, minimum=0, maximum=_INT32_MAX)
    require_tensor("cache_seqlens", cache_seqlens, INDEX_DTYPES)
    require_shape("cache_seqlens", cache_seqlens, (batch_size,), "(batch_size,)")
    for name, lengths in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k_new", cu_seqlens_k_new)):
        if lengths is not None:
            require_tensor(name, lengths, INDEX_DTYPES, cache_seqlens)
            require_shape(name, lengths, (batch_size + 1,), "(batch_size + 1,)")
    if cache_leftpad is not None:
        require_tensor("cache_leftpad", cache_leftpad, INDEX_DTYPES, cache_seqlens)
        require_shape("cache_leftpad", cache_leftpad, (batch_size,), "(batch_size,)")
    if qkv_dtype not in checks.INPUT_DTYPES:
        names = ", ".join(str(dtype) for dtype in checks.INPUT_DTYPES)
        raise TypeError(f"qkv_dtype must be one of {names}, got {qkv_dtype}")
    require_bool("has_softcap", has_softcap)
    left, right = checks.window(window_size)
    options = checks.scalars(
        Options(
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            causal=causal,
            window_left=left,
            window_right=right,
            attention_chunk=attention_chunk,
            num_splits=num_splits,
            pack_gqa=pack_gqa,
            sm_margin=sm_margin,
        )
    )
    max_head_dim = checks.MAX_HEAD_DIM
    head_dim_v = headdim if headdim_v is None else headdim_v
    geometry = Geometry(
        batch=batch_size,
        heads=require_int("num_heads_q", num_heads_q, minimum=1, maximum=_INT32_MAX),
        heads_kv=require_int("num_heads_kv", num_heads_kv, minimum=1, maximum=_INT32_MAX),
        head_dim=require_int("headdim", headdim, minimum=1, maximum=max_head_dim),
        head_dim_v=require_int("headdim_v", head_dim_v, minimum=1, maximum=max_head_dim),
        q_packed=cu_seqlens_q is not None,
        k_packed=False,
        paged=page_size is not None,
    )
    if geometry.heads % geometry.heads_kv != 0:
        raise ValueError(
            f"num_heads_q must be a multiple of num_heads_kv = {num_heads_kv}, got {num_heads_q}"
        )
    pages = 0
    if page_size is not None:
        pages = require_int("page_size", page_size, minimum=1, maximum=_INT32_MAX)
    splits = options.num_splits or choose_num_splits(cache_seqlens.device, geometry, options)
    values = [_VERSION, splits, *_described(geometry, options, pages)]
    return torch.tensor(values, dtype=torch.int32, device=cache_seqlens.device)


def num_splits_of(metadata: Any, geometry: Geometry, options: Options, page_size: int) -> int:
    """The planned number of splits. Raises ValueError if the plan was made for another call."""
    require_tensor("scheduler_metadata", metadata, torch.int32)
    expected = len(_FIELDS) + 1
    require_shape("scheduler_metadata", metadata, (expected,), "that of get_scheduler_metadata")
    if metadata.device.type != "cpu" or torch.compiler.is_compiling():
        return options.num_splits
    version, splits, *planned = metadata.tolist()
    if version != _VERSION:
        raise ValueError(f"scheduler_metadata must have version {_VERSION}, got {version}")
    actual = _described(geometry, options, page_size)
    for name, have, want in zip(_FIELDS[1:], planned, actual, strict=True):
        if have != want:
            raise ValueError(
                f"scheduler_metadata was made for {name} = {have}, but this call has {want}"
            )
    if options.num_splits not in (0, splits):
        raise ValueError(
            f"scheduler_metadata was made for num_splits = {splits}, "
            f"but this call has {options.num_splits}"
        )
    return int(splits)


def _described(geometry: Geometry, options: Options, page_size: int) -> list[int]:
    return [
        geometry.batch,
        geometry.heads,
        geometry.heads_kv,
        geometry.head_dim,
        geometry.head_dim_v,
        int(options.causal),
        options.window_left,
        options.window_right,
        options.attention_chunk,
        page_size,
    ]
