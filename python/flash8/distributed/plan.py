"""From spans of queries and of keys to calls of attention.

A call is one `flash8::forward` over packed sequences: each entry pairs queries of one span with
keys that they see. The last key of an entry need not be at the position of its last query, as
flash8's windows have it; the window is moved by the difference:

    shift = end of the keys - end of the queries        left + shift, right - shift

Keys and queries that the window leaves nothing of are cut off first, so neither becomes negative.
Entries of one window share a call.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flash8.call.options import Options
from flash8.distributed.layout import Batch, Span, kept, places_of

Window = tuple[int, int]
_EVERYTHING: Window = (-1, -1)


class Keys(NamedTuple):
    """Keys of one sequence, and the row of each in the buffer that holds them."""

    span: Span
    rows: Tensor


class Call(NamedTuple):
    """One call. No row of queries is in it twice."""

    q_rows: Tensor | None  # int64; None: all rows, in order
    k_rows: Tensor  # int64, into the buffer of keys
    k_parts: tuple[int, ...]  # sizes of parts of k_rows in which no row is twice
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    window: Window
    sequences: Tensor  # int64 (entries,): the sequence of each
    q_spans: Tensor  # int64 (entries,): which of the rank's spans has its queries
    k_begins: Tensor  # int64 (entries,): the first key of each, in its sequence


class _Entry(NamedTuple):
    sequence: int
    q_span: int
    part: int
    q_begin: int  # among the rank's rows
    q_end: int
    k_begin: int
    k_rows: Tensor


@kept(maxsize=16)
def gathered(
    batch: Batch, ranks: int, rank: int, window: Window, align: int, device: torch.device
) -> tuple[Call, ...]:
    """A rank's queries against all keys, gathered as `places_of` says; each query in one call. The
    first key of an entry is a multiple of `align`."""
    places, offsets = places_of(batch, ranks, torch.device("cpu")), batch.offsets()
    keys = [
        Keys(Span(i, 0, 0, length), places[offsets[i] : offsets[i] + length])
        for i, length in enumerate(batch.lengths)
    ]
    return _calls(batch.spans(ranks, rank), keys, window, align, device)


@kept(maxsize=64)
def pairwise(
    batch: Batch, ranks: int, rank: int, source: int, window: Window, device: torch.device
) -> tuple[Call, ...]:
    """A rank's queries against the keys of one rank."""
    keys, row = [], 0
    for span in batch.spans(ranks, source):
        length = span.end - span.begin
        keys.append(Keys(span, torch.arange(row, row + length)))
        row += length
    return _calls(batch.spans(ranks, rank), keys, window, 1, device)


@kept(maxsize=64)
def ring_steps(batch: Batch, ranks: int, window: Window) -> int:
    """How many ranks' keys a rank of the ring meets before it has met all that it sees.

    Fewer than all of them only where a window looks back to its neighbours: under "zigzag" the
    piece before a late piece comes last.
    """
    left, right = window
    if batch.layout != "contiguous" or left < 0 or right != 0:
        return ranks
    needed = 1
    for length in {*batch.lengths}:
        cuts = [rank * length // ranks for rank in range(ranks + 1)]
        for rank in range(ranks):
            if cuts[rank] == cuts[rank + 1]:
                continue
            first = max(0, cuts[rank] - left)
            reached = next(r for r in range(rank + 1) if cuts[r + 1] > first)
            needed = max(needed, rank - reached + 1)
    return needed


def cut(
    queries: Span, keys: Span, window: Window, align: int = 1
) -> tuple[Span, Span, Window] | None:
    """The queries and keys of two spans that see each other at all, and the window as these have
    it; None if there are none. The keys before them that `align` asks for are hidden by it."""
    left, right = (float("inf") if side < 0 else side for side in window)
    k_begin, k_end = max(keys.begin, queries.begin - left), min(keys.end, queries.end + right)
    if k_begin >= k_end:
        return None
    q_begin, q_end = max(queries.begin, k_begin - right), min(queries.end, k_end + left)
    if q_begin >= q_end:
        return None
    q_begin, q_end, k_begin, k_end = (int(x) for x in (q_begin, q_end, k_begin, k_end))
    k_begin -= (k_begin - keys.begin) % align
    shift = k_end - q_end
    # What hides nothing is no bound, so that entries of other lengths can share its call.
    moved = (
        -1 if left + shift >= k_end - k_begin - 1 else int(left) + shift,
        -1 if right - shift >= q_end - q_begin - 1 else int(right) - shift,
    )
    return (
        queries._replace(begin=q_begin, end=q_end),
        keys._replace(begin=k_begin, end=k_end),
        moved,
    )


def _calls(
    queries: Sequence[Span],
    keys: Sequence[Keys],
    window: Window,
    align: int,
    device: torch.device,
) -> tuple[Call, ...]:
    by_sequence = defaultdict(list)
    for run in keys:
        by_sequence[run.span.sequence].append(run)
    entries: dict[tuple[Window, int], list[_Entry]] = defaultdict(list)
    row = 0
    for index, span in enumerate(queries):
        found = _entries(span, index, row, by_sequence[span.sequence], window, align)
        for moved, number, entry in found:
            entries[moved, number].append(entry)
        row += span.end - span.begin
    return tuple(_call(those, moved, row, device) for (moved, _), those in entries.items())


def _entries(
    span: Span, index: int, row: int, keys: Sequence[Keys], window: Window, align: int
) -> list[tuple[Window, int, _Entry]]:
    """Those of a span of queries, the `index`-th, whose first row is `row`. Each has a window and a
    number; no two have both in common."""
    found: dict[tuple[int, int], list[Tensor]] = {}  # keys that are all seen, by queries
    numbers: dict[Window, int] = defaultdict(int)
    entries = []
    for run in keys:
        seen = cut(span, run.span, window, align)
        if seen is None:
            continue
        part, own, moved = seen
        rows = run.rows[own.begin - run.span.begin : own.end - run.span.begin]
        at = (row + part.begin - span.begin, row + part.end - span.begin)
        if moved == _EVERYTHING and at in found:  # in any order, as one entry
            found[at].append(rows)
            continue
        if moved == _EVERYTHING:
            found[at] = [rows]
        entry = _Entry(span.sequence, index, span.part, *at, own.begin, rows)
        entries.append((moved, numbers[moved], entry))
        numbers[moved] += 1
    return [
        (moved, number, entry._replace(k_rows=torch.cat(found[entry.q_begin, entry.q_end])))
        if moved == _EVERYTHING
        else (moved, number, entry)
        for moved, number, entry in entries
    ]


def _call(entries: list[_Entry], window: Window, q_count: int, device: torch.device) -> Call:
    """Entries of one part of the queries have different sequences, hence different keys."""
    entries = sorted(entries, key=lambda entry: entry.part)
    q_rows = torch.cat([torch.arange(entry.q_begin, entry.q_end) for entry in entries])
    whole = len(q_rows) == q_count and bool((q_rows == torch.arange(q_count)).all())
    q_lengths = [entry.q_end - entry.q_begin for entry in entries]
    k_lengths = [len(entry.k_rows) for entry in entries]
    parts: dict[int, int] = defaultdict(int)
    for entry in entries:
        parts[entry.part] += len(entry.k_rows)
    return Call(
        None if whole else q_rows.to(device),
        torch.cat([entry.k_rows for entry in entries]).to(device),
        tuple(parts.values()),
        cumulative(q_lengths, device),
        cumulative(k_lengths, device),
        max(q_lengths),
        max(k_lengths),
        window,
        torch.tensor([entry.sequence for entry in entries]).to(device),
        torch.tensor([entry.q_span for entry in entries]).to(device),
        torch.tensor([entry.k_begin for entry in entries]).to(device),
    )


def of_whole_sequences(batch: Batch, options: Options, device: torch.device) -> Options:
    """For one call of all tokens."""
    cu_seqlens, longest = _whole(batch, device), max(batch.lengths, default=0)
    return options._replace(
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
    )


@kept(maxsize=32)
def _whole(batch: Batch, device: torch.device) -> Tensor:
    return cumulative(batch.lengths, device)


def cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    """int32 (batch + 1,) from lengths."""
    ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return ends.to(device=device, dtype=torch.int32)
