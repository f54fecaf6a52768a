"""Units of equal lengths, worked on as one batch: what costs time per call is paid once.

Where the rows of the units follow each other in memory, the batch is a view; else it is gathered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from flash8.backends.cpu.sequences import KeyRows, QueryRows, Unit

_Rows: TypeAlias = Sequence[QueryRows] | Sequence[KeyRows]


@dataclass(frozen=True)
class Group:
    """Units with the same seqlen_q, seqlen_k and mask."""

    units: tuple[Unit, ...]
    common: int  # keys, the first ones, that all queries see; the others are a causal square

    @property
    def hides(self) -> bool:
        """Whether a key is hidden from a query."""
        return self.common < self.units[0].keys.seqlen

    def queries(self, x: Tensor) -> Tensor:
        """(B, seqlen_q, heads, ...) of a tensor in q's layout."""
        return _gathered(x, [unit.queries for unit in self.units])

    def keys(self, x: Tensor) -> Tensor:
        """(B, seqlen_k, heads_kv, ...) of k or v."""
        return _gathered(x, [unit.keys for unit in self.units])

    def rows(self, x: Tensor) -> Tensor:
        """(B, heads, seqlen_q) of a tensor in LSE's layout."""
        view = self._rows_view(x)
        return torch.cat([unit.queries.rows(x) for unit in self.units]) if view is None else view

    def store_queries(self, x: Tensor, values: Tensor) -> None:
        """The inverse of `queries`."""
        view = _view(x, [unit.queries for unit in self.units])
        if view is not None:
            view.copy_(values)
            return
        for unit, part in zip(self.units, self._parts(values), strict=True):
            unit.queries.tokens(x).copy_(part)

    def store_rows(self, x: Tensor, values: Tensor) -> None:
        """The inverse of `rows`."""
        view = self._rows_view(x)
        if view is not None:
            view.copy_(values)
            return
        for unit, part in zip(self.units, self._parts(values), strict=True):
            unit.queries.rows(x).copy_(part)

    def store_keys(self, x: Tensor, values: Tensor) -> None:
        """The inverse of `keys`, where no unit shares its keys with another."""
        view = _view(x, [unit.keys for unit in self.units])
        if view is not None:
            view.copy_(values)
            return
        for unit, part in zip(self.units, self._parts(values), strict=True):
            unit.keys.tokens(x).copy_(part)

    def accumulate_keys(self, x: Tensor, gradient: Tensor) -> None:
        """x += gradient, where x is a contiguous dk or dv. Units may share keys."""
        for unit, part in zip(self.units, self._parts(gradient), strict=True):
            unit.keys.accumulate(x, part)

    def _parts(self, values: Tensor) -> Sequence[Tensor]:
        sizes = [unit.batch.stop - unit.batch.start for unit in self.units]
        return list(values.split(sizes))

    def _rows_view(self, x: Tensor) -> Tensor | None:
        rows = [unit.queries for unit in self.units]
        first = rows[0]
        if len(rows) == 1:
            return first.rows(x)
        if not _follow_each_other(rows):
            return None
        if not first.packed:
            return x[first.batch.start : rows[-1].batch.stop, :, : first.seqlen]
        taken = x[:, first.start : first.start + len(rows) * first.seqlen]
        view: Tensor = taken.unflatten(1, (len(rows), first.seqlen)).transpose(0, 1)
        return view


def _gathered(x: Tensor, rows: _Rows) -> Tensor:
    view = _view(x, rows)
    return torch.cat([part.tokens(x) for part in rows]) if view is None else view


def _view(x: Tensor, rows: _Rows) -> Tensor | None:
    first = rows[0]
    if len(rows) == 1:
        return first.tokens(x)
    if not _follow_each_other(rows):
        return None
    if not first.packed:
        return x[first.batch.start : rows[-1].batch.stop, : first.seqlen]
    taken = x[first.start : first.start + len(rows) * first.seqlen]
    view: Tensor = taken.unflatten(0, (len(rows), first.seqlen))
    return view


def _follow_each_other(rows: _Rows) -> bool:
    """Whether they are one batch in memory."""
    first = rows[0]
    if isinstance(first, KeyRows) and first.pages is not None:
        return False
    if first.packed:
        starts = [row.start for row in rows]
        return all(start == first.start + i * first.seqlen for i, start in enumerate(starts))
    batches = [row.batch for row in rows]
    adjacent = zip(batches, batches[1:], strict=False)
    return all(row.start == 0 for row in rows) and all(a.stop == b.start for a, b in adjacent)
