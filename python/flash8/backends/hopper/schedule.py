"""Scheduler metadata: how much work each sequence of a step is, counted once for its decode calls.

The kernel writes (batch + 1) words; a decode kernel that is given them need not go through all
lengths 32 at a time. It checks what it reads (hopper/decode/scheduler_metadata.cuh), so what was
made for other lengths or sizes, or is no metadata at all, costs time and nothing else.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flash8 import _native
from flash8.backends.hopper import attention_params, decode, kernels, streams
from flash8.backends.hopper.decode_variants import WIDEST_OF_WARP, tile_rows
from flash8.backends.hopper.schedule_variants import SCHEDULE
from flash8.call.geometry import Geometry
from flash8.call.options import Options
from flash8.tensors.arguments import to_int32
from flash8.tensors.float8 import E4M3

_MOST_KEYS = 1 << 30  # of a sequence: only wrong lengths reach it


class Step(NamedTuple):
    """The decode calls of a step."""

    geometry: Geometry
    options: Options  # masks, indices, max_seqlen_q and split_keys
    cache_dtype: torch.dtype
    cu_seqlens_k_new: Tensor | None = None
    seqlen_k_new: int = 0

    @property
    def rows(self) -> int:
        """Of q for a KV head."""
        return self.geometry.heads // self.geometry.heads_kv * (self.options.max_seqlen_q or 0)

    @property
    def has_qv(self) -> bool:
        """Whether its sizes are those of absorbed MLA."""
        return self.geometry.head_dim <= 64 and self.geometry.head_dim_v > WIDEST_OF_WARP

    @property
    def tile(self) -> tuple[int, int] | None:
        return decode.tile_of(self.geometry.head_dim, self.geometry.head_dim_v, self.has_qv)


def shape(batch: int) -> tuple[int]:
    """Of the metadata: known without any length."""
    return (batch + 1,)


def has_kernel(step: Step) -> bool:
    """Whether a decode kernel may serve these calls, as far as sizes tell."""
    dtypes = (torch.bfloat16, torch.float16, E4M3)
    return step.cache_dtype in dtypes and step.tile is not None and step.rows <= decode.MOST_ROWS


def fill(metadata: Tensor, step: Step) -> None:
    """Writes it by one launch on its stream."""
    tile = step.tile
    assert tile is not None
    call = _native.ScheduleParams()
    call.scheduler_metadata = metadata.data_ptr()
    call.tile_head_dim, call.tile_head_dim_v = tile
    call.qv = int(step.has_qv)
    call.element_bytes = step.cache_dtype.itemsize
    call.block_m = decode.rows_of_tile(step.rows, tile_rows(tile[1]))
    kept = _describe(call.call, step)
    if step.cu_seqlens_k_new is not None:
        kept.append(to_int32(step.cu_seqlens_k_new).contiguous())
        call.cu_seqlens_k_new = kept[-1].data_ptr()
    call.seqlen_k_new = min(step.seqlen_k_new, _MOST_KEYS)
    kernel = kernels.kernel(SCHEDULE)
    _native.launch_schedule(
        kernel, metadata.device.index or 0, streams.current_stream(metadata), call
    )


def _describe(call: _native.DecodeParams, step: Step) -> list[Tensor]:
    """What counts pieces; returns what the call points to then. How long the cache is, how many
    rows it has and q is not known here: no right index is clamped by the bounds that are set."""
    geometry, options = step.geometry, step.options
    call.heads_q, call.heads_kv = geometry.heads, geometry.heads_kv
    call.split_keys = options.split_keys
    indices = attention_params.indices_of(options)
    indices = {name: to_int32(x).contiguous() for name, x in indices.items()}
    sequences, scores = call.sequences, call.scores
    for name, index in indices.items():
        setattr(sequences, name, index.data_ptr())
    sequences.batch, sequences.batch_k = geometry.batch, attention_params.INT32_MAX
    sequences.max_seqlen_q = options.max_seqlen_q or 0
    sequences.max_seqlen_k = _MOST_KEYS
    sequences.total_q = attention_params.INT32_MAX
    scores.window_left, scores.window_right = options.window_left, options.window_right
    scores.attention_chunk = options.attention_chunk
    return list(indices.values())
