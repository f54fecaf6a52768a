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
    # Of each entry, int64: the span that has its queries and the run that has its keys, and where
    # it begins in them.
    q_spans: Tensor
    q_offsets: Tensor
    k_runs: Tensor
    k_offsets: Tensor


class _Entry(NamedTuple):
    part: int
    q_span: int
    q_offset: int
    k_run: int
    k_offset: int
    q_begin: int  # among the rank's rows
    q_end: int
    k_rows: Tensor


class How(NamedTuple):
    """How spans are paired. `align`: entries begin at multiples of it in their spans and runs.
    `joins`: runs that are seen whole may be one entry."""

    window: Window
    align: int = 1
    joins: bool = True


@kept(maxsize=4)
def gathered(
    batch: Batch, ranks: int, rank: int, how: How, device: torch.device
) -> tuple[Call, ...]:
    """A rank's queries against all keys, gathered as `places_of` says; each query in one call. A
    run of keys is a sequence."""
    places, offsets = places_of(batch, ranks, torch.device("cpu")), batch.offsets()
    keys = [
        Keys(Span(i, 0, 0, length), places[offsets[i] : offsets[i] + length])
        for i, length in enumerate(batch.lengths)
    ]
    return _calls(batch.spans(ranks, rank), keys, how, device)


@kept(maxsize=4)
def around(
    batch: Batch, ranks: int, rank: int, how: How, device: torch.device
) -> tuple[tuple[Call, ...], ...]:
    """A rank's queries against the keys of one rank at a time: in step s of a ring those of rank
    number rank - s. A run of keys is a span of that rank."""
    own = batch.spans(ranks, rank)
    steps = []
    for step in range(ring_steps(batch, ranks, how.window)):
        keys, row = [], 0
        for span in batch.spans(ranks, (rank - step) % ranks):
            length = span.end - span.begin
            keys.append(Keys(span, torch.arange(row, row + length)))
            row += length
        steps.append(_calls(own, keys, how, device))
    return tuple(steps)


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
    it; None if there are none. Those before them that `align` asks for it hides."""
    left, right = (float("inf") if side < 0 else side for side in window)
    k_begin, k_end = max(keys.begin, queries.begin - left), min(keys.end, queries.end + right)
    if k_begin >= k_end:
        return None
    q_begin, q_end = max(queries.begin, k_begin - right), min(queries.end, k_end + left)
    if q_begin >= q_end:
        return None
    q_begin, q_end, k_begin, k_end = (int(x) for x in (q_begin, q_end, k_begin, k_end))
    k_begin -= (k_begin - keys.begin) % align
    q_begin -= (q_begin - queries.begin) % align
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
    queries: Sequence[Span], keys: Sequence[Keys], how: How, device: torch.device
) -> tuple[Call, ...]:
    by_sequence = defaultdict(list)
    for number, run in enumerate(keys):
        by_sequence[run.span.sequence].append((number, run))
    entries: dict[tuple[Window, int], list[_Entry]] = defaultdict(list)
    row = 0
    for index, span in enumerate(queries):
        found = _entries(span, index, row, by_sequence[span.sequence], how)
        for window, number, entry in found:
            entries[window, number].append(entry)
        row += span.end - span.begin
    return tuple(_call(those, window, row, device) for (window, _), those in entries.items())


def _entries(
    span: Span, index: int, row: int, keys: Sequence[tuple[int, Keys]], how: How
) -> list[tuple[Window, int, _Entry]]:
    """Those of a span of queries, the `index`-th, whose first row is `row`. Each has a window and a
    number; no two have both in common."""
    found: list[tuple[Window, _Entry]] = []
    for number, run in keys:
        seen = cut(span, run.span, how.window, how.align)
        if seen is None:
            continue
        part, own, window = seen
        q_offset, k_offset = part.begin - span.begin, own.begin - run.span.begin
        begin, end = row + q_offset, row + part.end - span.begin
        rows = run.rows[k_offset : own.end - run.span.begin]
        last = found[-1][1] if found else None
        if (
            how.joins
            and last is not None
            and (found[-1][0], window) == (_EVERYTHING, _EVERYTHING)
            and (last.q_begin, last.q_end) == (begin, end)
        ):
            joined = last._replace(k_rows=torch.cat((last.k_rows, rows)))
            found[-1] = window, joined
            continue
        entry = _Entry(span.part, index, q_offset, number, k_offset, begin, end, rows)
        found.append((window, entry))
    numbers: dict[Window, int] = defaultdict(int)
    numbered = []
    for window, entry in found:
        numbered.append((window, numbers[window], entry))
        numbers[window] += 1
    return numbered


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
        *(
            torch.tensor(values).to(device)
            for values in zip(
                *((x.q_span, x.q_offset, x.k_run, x.k_offset) for x in entries), strict=True
            )
        ),
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
