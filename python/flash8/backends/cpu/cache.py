"""Writing new keys and values into a KV cache, dense or paged."""

from torch import Tensor

from flash8.backends.cpu.sequences import cache_slots, checked_cu_seqlens
from flash8.call.options import Options
from flash8.tensors.float8 import E4M3, saturating_cast


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_k_new: Tensor | None,
    page_table: Tensor | None,
    kv_batch_idx: Tensor | None,
) -> None:
    """Writes sequence b's new rows at positions cache_seqlens[b] and up.

    k, v: (batch, seqlen_new, heads_kv, d) or with cu_seqlens_k_new (total_new, heads_kv, d).
    Everything is checked before the first row is written.
    """
    both = [(k_cache, k), (v_cache, v)]
    append_rows(both, cache_seqlens, cu_seqlens_k_new, page_table, kv_batch_idx)


def append_rows(
    pairs: list[tuple[Tensor, Tensor]],
    starts: Tensor,
    cu_seqlens: Tensor | None,
    page_table: Tensor | None,
    kv_batch_idx: Tensor | None,
) -> None:
    """`append_kv` for (cache, new rows): caches of one layout, new rows of one length."""
    options = Options(page_table=page_table, kv_batch_idx=kv_batch_idx)
    batch = starts.shape[0]
    first_cache, first = pairs[0]
    if cu_seqlens is None:
        offsets = [b * first.shape[1] for b in range(batch + 1)]
        pairs = [(cache, new.flatten(0, 1)) for cache, new in pairs]
    else:
        offsets = checked_cu_seqlens("cu_seqlens_k_new", cu_seqlens, first.shape[0])
    lengths = [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
    slots = cache_slots(first_cache, lengths, starts.tolist(), options)
    for cache, new in pairs:
        page_size = cache.shape[1]
        for start, length, rows in zip(offsets, lengths, slots, strict=False):
            values = _cast(new[start : start + length], cache)[: rows.numel()]
            cache[rows // page_size, rows % page_size] = values


def check_slots(
    cache: Tensor,
    new: Tensor,
    starts: Tensor,
    cu_seqlens: Tensor | None,
    page_table: Tensor | None,
    kv_batch_idx: Tensor | None,
) -> None:
    """Raises what `append_rows` would raise, without anything else happening."""
    options = Options(page_table=page_table, kv_batch_idx=kv_batch_idx)
    lengths = [new.shape[-3]] * starts.shape[0]
    if cu_seqlens is not None:
        offsets = checked_cu_seqlens("cu_seqlens_k_new", cu_seqlens, new.shape[0])
        lengths = [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
    list(cache_slots(cache, lengths, starts.tolist(), options))


def _cast(new: Tensor, cache: Tensor) -> Tensor:
    if cache.dtype == E4M3 and new.dtype != E4M3:
        return saturating_cast(new.float())
    return new.to(cache.dtype)
