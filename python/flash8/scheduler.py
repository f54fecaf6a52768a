"""Scheduler metadata: the plan of a KV-cache call, made once and used by many calls.

On a GPU it is one launch, which counts the work of each sequence for the decode kernels of all
layers, into a tensor whose shape follows from the batch alone (`backends/hopper/schedule.py`).
Those kernels check what they read, so metadata of other lengths or sizes makes no call wrong.

On CPU tensors it holds the sizes it was made for, and a call with other sizes refuses it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from flash8 import backends
from flash8.backends import choose_num_splits
from flash8.call import checks
from flash8.call.geometry import Geometry
from flash8.call.options import Options
from flash8.ops import planned
from flash8.tensors import memory
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
    *,
    cache_batch_idx: Tensor | None = None,
    split_keys: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """The plan of `flash_attn_with_kvcache` calls with these sizes, as FA3 names them.

    Args:
        batch_size, max_seqlen_q, num_heads_q, num_heads_kv, headdim, headdim_v: The calls' sizes.
            headdim up to 64 with headdim_v above 256 are those of q and qv, as MLA has them.
        max_seqlen_k: At least the longest sequence.
        cache_seqlens, cu_seqlens_q, cache_leftpad, cache_batch_idx: The calls' int32 indices.
            cache_seqlens are those before an append.
        cu_seqlens_k_new, max_seqlen_k_new: What the calls append: int32 (batch_size + 1,) where k
            and v are packed, or k's and v's seqlen_new.
        qkv_dtype: That of the cache.
        page_size, causal, window_size, attention_chunk, num_splits, split_keys: As in the calls.
        has_softcap, pack_gqa, sm_margin: Make no difference.
        out: What a call before returned for these sizes, to be written anew: so a CUDA graph has
            the metadata of each step at one address.

    Returns:
        int32 on cache_seqlens' device, for the calls' `scheduler_metadata`. On a GPU it has shape
        (batch_size + 1,) and is made by one launch, from what the indices hold when it runs. It
        may be copied to wherever the calls find it. A call for whose lengths, masks or sizes it
        does not hold computes the same, and takes as long as one without.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
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
    by_sequence = (("cache_leftpad", cache_leftpad), ("cache_batch_idx", cache_batch_idx))
    for name, index in by_sequence:
        if index is not None:
            require_tensor(name, index, INDEX_DTYPES, cache_seqlens)
            require_shape(name, index, (batch_size,), "(batch_size,)")
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
            split_keys=split_keys,
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
    indices: dict[str, Any] = {"seqused_k": cache_seqlens, "leftpad_k": cache_leftpad}
    indices |= {"kv_batch_idx": cache_batch_idx, "cu_seqlens_q": cu_seqlens_q}
    counts = _is_on_device(cache_seqlens)
    if counts and options.num_splits == 1 and options.split_keys == 0:
        options = options._replace(split_keys=checks.NO_SPLIT)  # as in the calls
    shape = _shape_on_device(geometry) if counts else (len(_FIELDS) + 1,)
    if out is not None:
        _check_out(out, shape, [cu_seqlens_k_new, *indices.values()])
    if counts:
        if out is None:
            out = torch.empty(shape, dtype=torch.int32, device=cache_seqlens.device)
        new = (cu_seqlens_k_new, max_seqlen_k_new if cu_seqlens_k_new is None else 0)
        _fill(out, geometry, options._replace(**indices), qkv_dtype, *new)
        return out
    splits = options.num_splits or choose_num_splits(cache_seqlens.device, geometry, options)
    values = [_VERSION, splits, *_described(geometry, options, pages)]
    made = torch.tensor(values, dtype=torch.int32, device=cache_seqlens.device)
    return made if out is None else out.copy_(made)


def _is_on_device(x: Tensor) -> bool:
    """Whether metadata is for kernels, as far as its device tells."""
    return x.is_cuda or backends.kernels_wanted(x)


def _shape_on_device(geometry: Geometry) -> tuple[int]:
    """FA3's, too, for whose metadata frameworks keep memory."""
    return (geometry.batch + 1,)


def _check_out(out: Any, shape: tuple[int], indices: list[Tensor | None]) -> None:
    given = [x for x in indices if x is not None]
    require_tensor("out", out, torch.int32, given[0])
    require_shape("out", out, shape, "that of the metadata")
    _require_contiguous("out", out)
    memory.require_writable("out", out)
    if not torch.compiler.is_compiling() and memory.is_shared(out, given):
        raise ValueError("out must not share memory with the indices it is made of")


def _require_contiguous(name: str, metadata: Tensor) -> None:
    if not metadata.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {metadata.stride()}")


def _fill(
    metadata: Tensor,
    geometry: Geometry,
    options: Options,
    cache_dtype: torch.dtype,
    cu_seqlens_k_new: Tensor | None,
    seqlen_k_new: int,
) -> None:
    """On its stream; zeros, which no call takes for metadata, where there is no kernel for it."""
    if planned.may_launch(metadata):
        from flash8.backends.hopper import schedule
        from flash8.backends.hopper.schedule_variants import SCHEDULE
        from flash8.backends.hopper.verify import trust

        step = schedule.Step(geometry, options, cache_dtype, cu_seqlens_k_new, seqlen_k_new)
        if schedule.has_kernel(step) and trust.is_trusted(SCHEDULE, metadata.device):
            with torch.no_grad():
                schedule.fill(metadata, step)
            increment_version((metadata,))
            return
    metadata.zero_()


def check_metadata(metadata: Any, q: Tensor, geometry: Geometry) -> None:
    """Raises TypeError or ValueError if a call with this q cannot have it. On a GPU nobody reads
    what it holds but the kernels."""
    require_tensor("scheduler_metadata", metadata, torch.int32, q)
    shape = _shape_on_device(geometry) if _is_on_device(q) else (len(_FIELDS) + 1,)
    require_shape("scheduler_metadata", metadata, shape, "that of get_scheduler_metadata")
    _require_contiguous("scheduler_metadata", metadata)


def choice_on_device(q: Tensor, options: Options) -> int:
    """num_splits of a call with metadata. On a GPU more than one is a bound, as in FA3, which a
    framework gives for the memory of its graphs: the kernel chooses."""
    return 0 if _is_on_device(q) and options.num_splits > 1 else options.num_splits


def num_splits_of(
    metadata: Any, q: Tensor, geometry: Geometry, options: Options, page_size: int
) -> int:
    """The planned number of splits. Raises ValueError if the plan was made for another call."""
    check_metadata(metadata, q, geometry)
    if _is_on_device(q):
        return choice_on_device(q, options)
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
