"""From cumulative lengths, used lengths, left padding and page tables to units of dense attention.

This is where the data of index tensors is read, and so where it is checked. Of a page table only
what the mask lets a query see: other entries may be pages that were freed, or no pages at all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash8.backends.cpu.mask import Mask
from flash8.call import check_descales
from flash8.call.options import Options
from flash8.tensors.arguments import wrong_index
from flash8.tensors.descales import check_value, is_per_token

#: The row of a cache that a sequence without work has.
NO_ROW = -1
#: Heads of a dense batch that are worked on together: enough to fill two cores, few enough that
#: the score tiles of all of them stay in cache.
_HEADS_TOGETHER = 32

#: Options that give the entries of a batch lengths or places of their own, in a packed batch, too.
_PLACES = (
    "seqused_q",
    "seqused_k",
    "leftpad_k",
    "page_table",
    "kv_batch_idx",
    "tree_mask",
)
_PER_SEQUENCE = ("cu_seqlens_q", "cu_seqlens_k", *_PLACES)


@dataclass(frozen=True)
class QueryRows:
    """Where a unit's queries are: rows [start, start + seqlen) of these batch entries."""

    batch: slice
    start: int
    seqlen: int
    packed: bool

    def tokens(self, x: Tensor) -> Tensor:
        """The (B, seqlen_q, heads, ...) view of a tensor in q's layout."""
        rows = slice(self.start, self.start + self.seqlen)
        return x[rows].unsqueeze(0) if self.packed else x[self.batch, rows]

    def rows(self, x: Tensor) -> Tensor:
        """The (B, heads, seqlen_q, ...) view of a tensor in LSE's layout."""
        rows = slice(self.start, self.start + self.seqlen)
        return x[:, rows].unsqueeze(0) if self.packed else x[self.batch, :, rows]


@dataclass(frozen=True)
class KeyRows:
    """Where a unit's keys are: rows [start, start + seqlen) of a batch slice or of pages."""

    batch: slice
    start: int
    seqlen: int
    packed: bool
    pages: Tensor | None = None
    seen: Tensor | None = None  # those of the pages that some query sees

    def tokens(self, x: Tensor) -> Tensor:
        """(B, seqlen_k, heads_kv, ...): a view of k or v, or a copy gathered from pages."""
        rows = slice(self.start, self.start + self.seqlen)
        if self.pages is not None:
            return x[self.pages].flatten(0, 1)[rows].unsqueeze(0)
        return x[rows].unsqueeze(0) if self.packed else x[self.batch, rows]

    def accumulate(self, x: Tensor, gradient: Tensor) -> None:
        """x += gradient, (B, seqlen_k, heads_kv, ...), where x is a contiguous dk or dv."""
        if self.pages is None:
            self.tokens(x).add_(gradient)
            return
        slots = page_slots(self.pages, x.shape[1])[self.start : self.start + self.seqlen]
        x.flatten(0, 1).index_add_(0, slots, gradient[0].to(x.dtype))


@dataclass(frozen=True)
class Unit:
    """Dense attention of `queries` over `keys` for the batch entries `batch`."""

    batch: slice
    queries: QueryRows
    keys: KeyRows

    def seen(self, x: Tensor, options: Options) -> Tensor:
        """(B, keys, ...): the part of a tensor in k's layout that some query sees."""
        begin, end = 0, 0
        if self.queries.seqlen > 0:
            mask = Mask(self.queries.seqlen, self.keys.seqlen, options)
            begin, end = mask.visible_range(0, self.queries.seqlen)
        return self.keys.tokens(x)[:, begin:end]


def page_slots(pages: Tensor, page_size: int) -> Tensor:
    """The flat row in a (pages * page_size, ...) cache of every position of one sequence."""
    offsets = pages.new_tensor(range(page_size))
    return (pages[:, None] * page_size + offsets).flatten()


def units(q: Tensor, k: Tensor, options: Options) -> Iterator[Unit]:
    """Splits a call into units. Raises ValueError on index data that does not fit q and k."""
    if is_plain_batch(options):
        yield from _batch_units(q, k)
        return
    batch = q.shape[0] if options.cu_seqlens_q is None else options.cu_seqlens_q.shape[0] - 1
    queries = _query_rows(q, batch, options)
    keys = _key_rows(k, batch, options)
    for b in range(batch):
        rows = queries(b)
        row_keys = keys(b, rows.seqlen)
        if row_keys is not None:
            yield Unit(slice(b, b + 1), rows, row_keys)


def check_indices(q: Tensor, k: Tensor, options: Options) -> None:
    """Raises what `units` would raise, without anything else happening."""
    for _ in units(q, k, options):
        pass


def check_values(q: Tensor, k: Tensor, options: Options) -> None:
    """Raises ValueError on descales that are none, and where pages tell which count on those."""
    for name in ("k_descale", "v_descale"):
        descale = getattr(options, name)
        if is_per_token(descale, k):
            for unit in units(q, k, options):
                check_value(name, unit.seen(descale, options))
            without: dict[str, Any] = {name: None}
            options = options._replace(**without)
    if options.page_table is None or not options.is_scaled:
        check_descales.check_values(options)
        return
    found = [unit.keys.seen for unit in units(q, k, options)]
    seen = [x for x in found if x is not None]
    pages = torch.cat(seen) if seen else options.page_table.new_empty((0,)).long()
    check_descales.check_values(options, pages)


def check_tokens(x: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None) -> None:
    """Raises ValueError on the cu_seqlens and seqused of a single tensor."""
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if cu_seqlens is None:
        capacities = [x.shape[1]] * batch
    else:
        offsets = checked_cu_seqlens("cu_seqlens", cu_seqlens, x.shape[0])
        capacities = [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
    _used("seqused", seqused, capacities)


def is_plain_batch(options: Options) -> bool:
    """Whether all entries of the batch have all rows of theirs, and may be worked on together."""
    alone = options.split_keys > 0  # bits must not depend on what is worked on together
    return not alone and all(getattr(options, name) is None for name in _PER_SEQUENCE)


def is_plain_pack(options: Options) -> bool:
    """Whether sequences have the rows that cu_seqlens gives them, and all of these."""
    return all(getattr(options, name) is None for name in _PLACES)


def _batch_units(q: Tensor, k: Tensor) -> Iterator[Unit]:
    batch, seqlen_q, heads = q.shape[:3]
    together = max(1, _HEADS_TOGETHER // heads)
    for begin in range(0, batch, together):
        rows = slice(begin, min(begin + together, batch))
        yield Unit(
            rows,
            QueryRows(rows, 0, seqlen_q, packed=False),
            KeyRows(rows, 0, k.shape[1], packed=False),
        )


def _query_rows(q: Tensor, batch: int, options: Options) -> Callable[[int], QueryRows]:
    packed = options.cu_seqlens_q is not None
    starts, capacities = _extents("q", options.cu_seqlens_q, q, batch)
    lengths = _used("seqused_q", options.seqused_q, capacities)
    _check_max_seqlen("max_seqlen_q", options.max_seqlen_q, lengths)

    def rows(b: int) -> QueryRows:
        return QueryRows(slice(b, b + 1), starts[b], lengths[b], packed)

    return rows


def _key_rows(k: Tensor, batch: int, options: Options) -> Callable[[int, int], KeyRows | None]:
    packed = options.cu_seqlens_k is not None
    cache_rows = _cache_rows(k, batch, options)
    idle = [row == NO_ROW for row in cache_rows]
    starts, capacities = _key_extents(k, batch, options)
    ends = _used("seqused_k", options.seqused_k, capacities, idle=idle)
    _check_max_seqlen("max_seqlen_k", options.max_seqlen_k, ends)
    padding = _used("leftpad_k", options.leftpad_k, ends, default=0, idle=idle)
    pages = None if options.page_table is None else _Pages(k, options.page_table)

    def rows(b: int, seqlen_q: int) -> KeyRows | None:
        """The keys of a sequence with so many queries; None for one without work."""
        if idle[b]:
            return None
        row, start, seqlen = cache_rows[b], starts[b] + padding[b], ends[b] - padding[b]
        used_pages = seen_pages = None
        if pages is not None:
            seen = range(0)
            if seqlen_q > 0:
                begin, end = Mask(seqlen_q, seqlen, options).visible_range(0, seqlen_q)
                seen = range(start + begin, start + end)
            used_pages, seen_pages = pages.of(row, ends[b], seen)
        return KeyRows(slice(row, row + 1), start, seqlen, packed, used_pages, seen_pages)

    return rows


def _key_extents(k: Tensor, batch: int, options: Options) -> tuple[list[int], list[int]]:
    if options.page_table is not None:
        capacity = options.page_table.shape[1] * k.shape[1]
        return [0] * batch, [capacity] * batch
    return _extents("k", options.cu_seqlens_k, k, batch)


def _extents(
    side: str, cu_seqlens: Tensor | None, x: Tensor, batch: int
) -> tuple[list[int], list[int]]:
    """First row and number of rows of every sequence of a packed or dense tensor."""
    if cu_seqlens is None:
        return [0] * batch, [x.shape[1]] * batch
    offsets = checked_cu_seqlens(f"cu_seqlens_{side}", cu_seqlens, x.shape[0])
    lengths = [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
    return offsets[:-1], lengths


def checked_cu_seqlens(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    """cu_seqlens as a list that starts with 0, never decreases and ends within `total` rows."""
    offsets: list[int] = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise wrong_index(name, f"must start with 0, got {offsets[0]}")
    for b, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if end < start:
            raise wrong_index(
                name, f"must never decrease, got {start} at index {b} and {end} at index {b + 1}"
            )
    if offsets[-1] > total:
        raise wrong_index(
            name, f"must end within the {total} rows of its packed tensor, got {offsets[-1]}"
        )
    return offsets


def _used(
    name: str,
    used: Tensor | None,
    capacities: list[int],
    default: int | None = None,
    idle: list[bool] | None = None,
) -> list[int]:
    """The checked values of a (batch,) tensor of lengths; without it `default` or the capacity.
    Those of idle sequences are not looked at, and 0."""
    if used is None:
        return capacities if default is None else [default] * len(capacities)
    values: list[int] = used.tolist()
    for b, (value, capacity) in enumerate(zip(values, capacities, strict=True)):
        if idle is not None and idle[b]:
            values[b] = 0
        elif not 0 <= value <= capacity:
            raise wrong_index(name, f"must be from 0 to {capacity} at index {b}, got {value}")
    return values


def _check_max_seqlen(name: str, max_seqlen: int | None, lengths: list[int]) -> None:
    longest = max(lengths, default=0)
    if max_seqlen is not None and longest > max_seqlen:
        raise wrong_index(
            name, f"must be at least the longest sequence {longest}, got {max_seqlen}"
        )


def _cache_rows(k: Tensor, batch: int, options: Options) -> list[int]:
    """The row of the cache (or of its page table) of every batch entry, or `NO_ROW`."""
    if options.kv_batch_idx is None:
        return list(range(batch))
    available = k.shape[0] if options.page_table is None else options.page_table.shape[0]
    rows: list[int] = options.kv_batch_idx.tolist()
    for b, row in enumerate(rows):
        if row != NO_ROW and not 0 <= row < available:
            raise wrong_index(
                "kv_batch_idx",
                f"must be from 0 to {available - 1}, or {NO_ROW} for a row without work, "
                f"at index {b}, got {row}",
            )
    return rows


class _Pages:
    """The page table, read and checked as far as a sequence uses it."""

    def __init__(self, cache: Tensor, page_table: Tensor) -> None:
        self._num_pages, self._page_size = cache.shape[:2]
        self._table = page_table

    def of(self, row: int, seqlen: int, needed: range) -> tuple[Tensor, Tensor]:
        """int64 indices of the pages that hold the first `seqlen` positions, and those that count.

        Only those of the `needed` positions count; others, which need not exist, are page 0.
        """
        size = self._page_size
        used = self._table[row, : -(-seqlen // size)].long()
        first, last = (needed.start // size, -(-needed.stop // size)) if needed else (0, 0)
        counts = used[first:last]
        for position, page in enumerate(counts.tolist(), first):
            if not 0 <= page < self._num_pages:
                raise wrong_index(
                    "page_table",
                    f"must hold page indices from 0 to {self._num_pages - 1}, "
                    f"got {page} at [{row}, {position}]",
                )
        if counts.shape == used.shape:
            return used, counts
        pages = torch.zeros_like(used)
        pages[first:last] = counts
        return pages, counts


def cache_slots(
    cache: Tensor, lengths: list[int], starts: list[int], options: Options
) -> list[Tensor]:
    """For every batch entry the flat cache rows of positions [start, start + length); none for one
    without work. Raises ValueError where two would be one."""
    batch = len(lengths)
    rows = _cache_rows(cache, batch, options)
    pages = None if options.page_table is None else _Pages(cache, options.page_table)
    capacity = _key_extents(cache, batch, options)[1]
    slots = []
    for b, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True)):
        end = start + length
        if row == NO_ROW:
            slots.append(cache.new_empty((0,), dtype=torch.int64))
            continue
        if start < 0 or end > capacity[b]:
            raise wrong_index(
                "cache_seqlens",
                f"must leave room for {length} new rows in a cache of "
                f"{capacity[b]} at index {b}, got {start}",
            )
        positions = cache.new_tensor(range(start, end), dtype=torch.int64)
        if pages is None:
            slots.append(positions + row * cache.shape[1])
        else:
            used, _ = pages.of(row, end, range(start, end))
            slots.append(page_slots(used, cache.shape[1])[start:end])
    _refuse_shared(slots, options)
    return slots


def _refuse_shared(slots: list[Tensor], options: Options) -> None:
    """Which of two new rows is kept would be chance."""
    every = torch.cat(slots) if slots else torch.empty(0)
    if every.unique().numel() == every.numel():
        return
    seen: dict[int, int] = {}
    for b, rows in enumerate(slots):
        for slot in rows.tolist():
            first = seen.setdefault(slot, b)
            if first != b:
                name = "page_table" if options.kv_batch_idx is None else "kv_batch_idx"
                raise wrong_index(
                    name,
                    f"must give every sequence rows of its own to append to, got the same for "
                    f"sequences {first} and {b}",
                )
    raise wrong_index(
        "page_table", "must not hold a page twice where a sequence appends across both"
    )
