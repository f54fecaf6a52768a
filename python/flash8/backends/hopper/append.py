"""New tokens into a KV cache in one launch: position, mean, scale, cast, the write, for Q, K and V.

Rows of one type, and caches of one, go into a launch together; others have their own. Few rows of
one type need none: the decode kernel takes them in its own (`refusal_within`, `describe_within`).
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from flash8 import _native
from flash8.backends.hopper import kernels, streams
from flash8.backends.hopper import quantize as quantizer
from flash8.backends.hopper.append_variants import AppendVariant, Cache, Input
from flash8.call.request import Appended, Queries
from flash8.tensors.arguments import to_int32
from flash8.tensors.float8 import E4M3
from flash8.tensors.rms_norm import Norm
from flash8.tensors.rotary import Rope

_DTYPES: dict[torch.dtype, Input] = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    E4M3: "e4m3",
}
_CHANNELS = 8  # of a thread
_ROTARY_UNIT = 2 * _CHANNELS
_MOST_HEADS = 65535 // 3  # those of Q, K and V are a dimension of one grid
_MOST_GROUPS = 2**31 - 1025  # of eight channels
_MOST_TOKENS_WITHIN = 8  # a sequence, on average: each block of its rows of q makes them again


def refusal(appended: Appended) -> str | None:
    """Why no kernel appends these rows, or None."""
    cache, x = appended.cache, appended.x
    if cache.dtype not in (x.dtype, E4M3):
        return f"the cache is {cache.dtype} and its new rows are {x.dtype}"
    if cache.numel() == 0:
        return "the cache has room for nothing"
    if appended.page_table is not None and appended.page_table.numel() == 0:
        return "the page table lists nothing"
    steps = [step for n, step in zip(cache.shape, cache.stride(), strict=True) if n != 1]
    if cache.stride(-1) != 1 or any(step % _CHANNELS != 0 for step in steps[:-1]):
        return f"the cache's strides are not multiples of {_CHANNELS} elements"
    return _refusal_of(x, appended.rope, appended.norm)


def refusal_of_address(cache: Tensor) -> str | None:
    """The same where the cache has memory: a trace's has none."""
    return "the cache's address is not a multiple of 16" if cache.data_ptr() % 16 != 0 else None


def refusal_of_queries(queries: Queries) -> str | None:
    """Why no kernel rotates these queries, or None."""
    return _refusal_of(queries.x, queries.rope, queries.norm)


def _refusal_of(x: Tensor, rope: Rope | None, norm: Norm | None) -> str | None:
    if x.dtype not in _DTYPES:
        return f"there is no appending kernel for {x.dtype}"
    if x.shape[-2] > _MOST_HEADS:
        return f"there are {x.shape[-2]} heads; the appending kernel takes up to {_MOST_HEADS}"
    if x.shape[-1] % _CHANNELS != 0:
        return f"head_dim is {x.shape[-1]}; the appending kernel takes multiples of {_CHANNELS}"
    if x.shape[:-2].numel() * (x.shape[-1] // _CHANNELS) > _MOST_GROUPS:
        return f"there are {x.shape[:-2].numel()} new rows; the appending kernel takes fewer"
    if norm is not None and x.dtype == E4M3:
        return f"the appending kernel normalises no rows of {x.dtype}"
    if rope is not None:
        if x.dtype == E4M3:
            return f"the appending kernel rotates no rows of {x.dtype}"
        rotary_dim = 2 * rope.cos.shape[1]
        if rotary_dim % _ROTARY_UNIT != 0:
            return f"rotary_dim is {rotary_dim}, which is not a multiple of {_ROTARY_UNIT}"
    return None


def refusal_within(k: Appended, v: Appended, queries: Queries) -> str | None:
    """Why the decode kernel does not append these rows itself, or None. None of them is refused."""
    x, batch = queries.x, k.starts.shape[0]
    if x.dtype not in (torch.float16, torch.bfloat16) or x.numel() == 0:
        return "there is no q, or not of 16 bits"
    if not x.dtype == k.x.dtype == v.x.dtype or k.cache.dtype != v.cache.dtype:
        return "q, the new rows and the caches are of more than two types"
    if not 0 < k.x.shape[:-2].numel() <= _MOST_TOKENS_WITHIN * batch:
        return f"there are no new rows, or more than {_MOST_TOKENS_WITHIN} for a sequence"
    for appended in (k, v):
        if appended.descale is not None and appended.descale.dim() > 2:
            return "descales are by page or block"
        if appended.mean is not None and appended.mean.data_ptr() % 16 != 0:
            return "the address of a mean is not a multiple of 16"
    return None


def describe_within(
    call: _native.AppendParams, k: Appended, v: Appended, queries: Queries
) -> list[Tensor]:
    """The new rows of a launch of the decode kernel, as far as its call does not tell them; returns
    what they point to."""
    dtype = _DTYPES[queries.x.dtype]
    held = _Held()
    for name, appended in (("k", k), ("v", v)):
        rows = getattr(call, name)
        held.describe_rows(rows, appended.x, appended.cu_seqlens)
        rows.rotates, rows.advances = int(_rotates(appended.rope)), 1
        held.describe_norm(rows, appended.norm, dtype)
    call.q.rotates, call.q.advances = int(_rotates(queries.rope)), int(queries.advances)
    held.describe_norm(call.q, queries.norm, dtype)
    if queries.rope is not None and _rotates(queries.rope):
        held.describe_rotary(call.rotary, queries.rope, dtype)
    return held.tensors


def variants(*appended: Appended, queries: Queries | None = None) -> list[AppendVariant]:
    """The kernels of rows which are not refused, in the order of their launches."""
    found = [_variant_of(rows) for rows in appended]
    if queries is not None:
        found.append(_variant_of_queries(queries, found))
    return list(dict.fromkeys(found))


def _variant_of(appended: Appended) -> AppendVariant:
    return _variant(_DTYPES[appended.x.dtype], "e4m3" if appended.quantizes else "same")


def _variant_of_queries(queries: Queries, others: list[AppendVariant]) -> AppendVariant:
    """That of keys or values of their type, whose launch they share, or one of their own."""
    dtype = _DTYPES[queries.x.dtype]
    own = _variant(dtype, "same")
    return next((variant for variant in others if variant.dtype == dtype), own)


@functools.cache
def _variant(dtype: Input, cache: Cache) -> AppendVariant:
    return AppendVariant(dtype, cache)


def append(*appended: Appended, queries: Queries | None = None) -> tuple[Tensor | None, Tensor]:
    """Writes the rows of K, or of K and V, on their stream; those without a place are dropped.
    Returns the rotated queries, and int32 (batch,): the lengths of the sequences from now on."""
    launched = launch(*appended, queries=queries)
    return launched.rotated, launched.lengths


class Launched(NamedTuple):
    """What an append has filled, and its launches, one unless types differ."""

    rotated: Tensor | None
    lengths: Tensor
    launches: list[tuple[_native.Kernel, _native.AppendParams]]


def launch(*appended: Appended, queries: Queries | None = None) -> Launched:
    """As `append`."""
    call = _Call(appended, queries)
    first = appended[0].x
    device, stream = first.device.index or 0, streams.current_stream(first)
    launches = [(kernels.kernel(variant), params) for variant, params in call.launches.items()]
    for kernel, params in launches:
        _native.launch_append(kernel, device, stream, params)
    return Launched(call.rotated, call.lengths, launches)


class _Held:
    """Tensors that a launch points to: alive until it is enqueued; the stream does the rest."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def describe_rows(
        self, rows: _native.AppendedRows, x: Tensor, cu_seqlens: Tensor | None
    ) -> None:
        aligned, rows.x = quantizer.aligned(x)
        self.keep(aligned)
        rows.heads, rows.head_dim = x.shape[-2:]
        rows.tokens = x.shape[:-2].numel()
        if cu_seqlens is None:
            rows.seqlen = x.shape[1]
        else:
            rows.cu_seqlens = self.index(cu_seqlens)

    def describe_norm(self, rows: _native.AppendedRows, norm: Norm | None, dtype: Input) -> None:
        if norm is None:
            return
        weight = norm.weight
        if not _is_readable_table(weight[None], dtype):
            weight = quantizer.floats(weight)
        rows.norm_weight, rows.norm_eps = self.keep(weight).data_ptr(), norm.eps
        rows.norm_is_fp32 = int(weight.dtype == torch.float32)

    def describe_rotary(self, rotary: _native.RotaryParams, rope: Rope, dtype: Input) -> None:
        tables = [rope.cos, rope.sin]
        if not all(_is_readable_table(table, dtype) for table in tables):
            tables = [quantizer.floats(table) for table in tables]
        cos, sin = (self.keep(table) for table in tables)
        rotary.cos, rotary.cos_stride = cos.data_ptr(), _row_stride(cos)
        rotary.sin, rotary.sin_stride = sin.data_ptr(), _row_stride(sin)
        rotary.is_fp32 = int(cos.dtype == torch.float32)
        rotary.positions, rotary.rotary_dim = cos.shape[0], 2 * cos.shape[1]
        rotary.interleaved = int(rope.interleaved)
        if rope.offsets is not None:
            rotary.offsets = self.index(rope.offsets)

    def index(self, x: Tensor) -> int:
        return self.keep(to_int32(x).contiguous()).data_ptr()

    def keep(self, x: Tensor) -> Tensor:
        self.tensors.append(x)
        return x


class _Call:
    """The launches of an append, and what they fill."""

    def __init__(self, appended: tuple[Appended, ...], queries: Queries | None) -> None:
        first = appended[0]
        self._first, self._held = first, _Held()
        self.launches: dict[AppendVariant, _native.AppendParams] = {}
        self.lengths = quantizer.allocate((first.starts.shape[0],), torch.int32, first.x)
        self.rotated: Tensor | None = None
        for name, rows in zip("kv", appended, strict=False):
            variant = _variant_of(rows)
            described = getattr(self._params(variant, rows.rope), name)
            self._describe_appended(described, rows)
            self._held.describe_norm(described, rows.norm, variant.dtype)
        next(iter(self.launches.values())).lengths = self.lengths.data_ptr()
        if queries is not None:
            self.rotated = quantizer.allocate(queries.x.shape, queries.x.dtype, queries.x)
            variant = _variant_of_queries(queries, list(self.launches))
            described = self._params(variant, queries.rope).q
            self._describe_queries(described, queries, self.rotated)
            self._held.describe_norm(described, queries.norm, variant.dtype)

    def _params(self, variant: AppendVariant, rope: Rope | None) -> _native.AppendParams:
        """Those of the launch of this kernel."""
        if variant not in self.launches:
            self.launches[variant] = params = _native.AppendParams()
            params.batch = self._first.starts.shape[0]
            self._describe_place(params.place)
        params = self.launches[variant]
        if rope is not None and _rotates(rope) and params.rotary.cos == 0:
            self._held.describe_rotary(params.rotary, rope, variant.dtype)
        return params

    def _describe_place(self, place: _native.PlaceParams) -> None:
        first = self._first
        place.cache_seqlens = self._held.index(first.starts)
        place.num_slots, place.slot_tokens = first.cache.shape[:2]
        if first.page_table is not None:
            place.page_table = self._held.index(first.page_table)
            place.page_table_stride = self._held.tensors[-1].stride(0)
            place.table_rows, place.max_pages = first.page_table.shape
        if first.kv_batch_idx is not None:
            place.kv_batch_idx = self._held.index(first.kv_batch_idx)

    def _describe_appended(self, rows: _native.AppendedRows, appended: Appended) -> None:
        self._held.describe_rows(rows, appended.x, appended.cu_seqlens)
        rows.out = quantizer.tensor_ref(appended.cache)
        rows.rotates, rows.advances = int(_rotates(appended.rope)), 1
        if appended.mean is not None:
            mean = self._held.keep(quantizer.floats(appended.mean))
            by_sequence = mean.stride(0) if mean.dim() == 3 else 0
            rows.mean = (mean.data_ptr(), by_sequence, mean.stride(-2))
        if appended.descale is not None:
            descale = self._held.keep(appended.descale)
            by_batch, by_head, by_block = (*descale.stride(), 0, 0, 0)[:3]
            rows.descale = (descale.data_ptr(), by_batch, by_head, by_block)
            rows.descale_by_slot = int(descale.dim() == 3)

    def _describe_queries(
        self, rows: _native.AppendedRows, queries: Queries, rotated: Tensor
    ) -> None:
        self._held.describe_rows(rows, queries.x, queries.cu_seqlens)
        rows.out = quantizer.tensor_ref(rotated)
        rows.rotates, rows.advances = int(_rotates(queries.rope)), int(queries.advances)


def _rotates(rope: Rope | None) -> bool:
    return rope is not None and rope.cos.numel() > 0


def _row_stride(table: Tensor) -> int:
    return 0 if table.shape[0] == 1 else table.stride(0)


def _is_readable_table(table: Tensor, dtype: Input) -> bool:
    """Whether the kernel reads it as it lies."""
    return (
        (table.dtype == torch.float32 or _DTYPES.get(table.dtype) == dtype)
        and table.stride(-1) == 1
        and _row_stride(table) % _CHANNELS == 0
        and table.data_ptr() % 16 == 0
    )
